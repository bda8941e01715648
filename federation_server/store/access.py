"""API keys and signing keys, as a server needs them to know who calls.

Of an API key only the SHA-256 of its secret is kept, and a key is found by that. Signing keys are
kept as they are: who can read them can read all that they protect. What admins do with both is in
`api_keys.py` and `signing_keys.py`.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Select,
    and_,
    any_,
    func,
    literal,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.access import (
    API_KEY_PREFIX,
    Admin,
    Role,
    is_jwt,
    new_secret,
    secret_hash,
)
from federation_server.store.schema import api_key_old_secrets as old_secrets
from federation_server.store.schema import api_keys, signing_keys

GENERATED_KEY_NAME = "admin"
"""The name of the key that the first server of a federation makes."""

CONFIGURED_KEY_NAME = "admin-env"
"""The name of the key that ADMIN_API_KEY holds."""

MIN_CONFIGURED_KEY_LENGTH = 16
"""A shorter ADMIN_API_KEY could be guessed: its hash is a fast one."""


class AdminKeyUnusable(ValueError):
    """ADMIN_API_KEY cannot be the admin's key; the message says why and what to do."""


class AdminKeySeed(StrEnum):
    """What `seed_admin_key` has done."""

    GENERATED = "GENERATED"
    """There was no key at all: one was made, and its secret is known now and never again."""
    ADDED = "ADDED"
    """ADMIN_API_KEY was new."""
    REPLACED = "REPLACED"
    """ADMIN_API_KEY was another one before; that one no longer works."""
    KEPT = "KEPT"
    """Nothing was missing."""


@dataclass(frozen=True, slots=True)
class SeededKey:
    """What `seed_admin_key` has done, and the secret if it made one."""

    seed: AdminKeySeed
    secret: str | None = None


@dataclass(frozen=True, slots=True)
class FoundKey:
    """An API key that was shown."""

    admin: Admin
    expire_time: datetime | None
    """Of the secret that was shown: one before the key's present one may end sooner."""
    expired: bool
    """By PostgreSQL's clock."""


@dataclass(frozen=True, slots=True, repr=False)
class SigningKey:
    """A key that signs neuron tokens."""

    kid: str
    secret: bytes
    retire_time: datetime | None = None
    """None for the one that signs."""


async def find_api_keys(
    connection: AsyncConnection, secret_hashes: Sequence[bytes]
) -> dict[bytes, FoundKey]:
    """The API keys whose secrets have those hashes, also secrets from before a rotation; but for
    keys that were revoked.
    """
    wanted = any_(literal(secret_hashes, ARRAY(LargeBinary)))
    key = (api_keys.c.api_key_id, api_keys.c.name, api_keys.c.role)
    expire_time = func.least(api_keys.c.expire_time, old_secrets.c.expire_time)
    both = union_all(
        select(*key, api_keys.c.secret_hash, api_keys.c.expire_time).where(
            api_keys.c.secret_hash == wanted, api_keys.c.revoke_time.is_(None)
        ),
        select(*key, old_secrets.c.secret_hash, expire_time)
        .join_from(old_secrets, api_keys, old_secrets.c.api_key_id == api_keys.c.api_key_id)
        .where(old_secrets.c.secret_hash == wanted, api_keys.c.revoke_time.is_(None)),
    ).subquery()
    expired = func.coalesce(both.c.expire_time <= func.now(), False).label("expired")
    rows = await connection.execute(select(both, expired))
    return {
        bytes(row.secret_hash): FoundKey(
            Admin(row.name, row.role, row.api_key_id), row.expire_time, row.expired
        )
        for row in rows
    }


def _having(wanted: bytes, *columns: ColumnElement[Any]) -> Select[Any]:
    """Keys, each beside the old secret of it that is wanted, if it had that one."""
    old = and_(
        old_secrets.c.secret_hash == wanted, old_secrets.c.api_key_id == api_keys.c.api_key_id
    )
    return select(*columns).select_from(api_keys.outerjoin(old_secrets, old))


def _has(wanted: bytes) -> ColumnElement[bool]:
    """The key has that secret, or had it. Both ways are found by an index."""
    owner = select(old_secrets.c.api_key_id).where(old_secrets.c.secret_hash == wanted)
    return or_(api_keys.c.secret_hash == wanted, api_keys.c.api_key_id == owner.scalar_subquery())


async def seed_admin_key(connection: AsyncConnection, configured: str | None) -> SeededKey:
    """Sees to it that somebody can administer the federation.

    With ADMIN_API_KEY set (`configured`), the key named "admin-env" gets that secret, and loses
    the one that it had: the setting is the truth, and changing it rotates the key. A secret that
    is an ADMIN's key already, under any name, is left as it is, also while it works beside the one
    that took its place. Without it, the first start of all (no key exists) makes the key named
    "admin". Unsetting ADMIN_API_KEY takes nothing away.

    Raises:
        AdminKeyUnusable: `configured` is too weak, or is a key that was revoked, was rotated, has
            expired or has a lower role; a restart must not undo that.
    """
    await lock_api_keys(connection)
    if configured:
        return SeededKey(await _configure(connection, configured))
    if (await connection.execute(select(api_keys.c.api_key_id).limit(1))).first() is not None:
        return SeededKey(AdminKeySeed.KEPT)
    secret = new_secret(API_KEY_PREFIX)
    await _put(connection, GENERATED_KEY_NAME, secret)
    return SeededKey(AdminKeySeed.GENERATED, secret)


async def lock_api_keys(connection: AsyncConnection) -> None:
    """Nobody else changes API keys until the transaction ends: servers that start together must
    not each make a first key, nor two admins revoke each other's, the last two.
    """
    await connection.execute(text("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE"))


async def _configure(connection: AsyncConnection, given: str) -> AdminKeySeed:
    secret = given.strip()  # as whoever shows it, and whoever looks at what was shown
    if len(secret) < MIN_CONFIGURED_KEY_LENGTH or not (secret.isascii() and secret.isprintable()):
        raise AdminKeyUnusable(
            f"ADMIN_API_KEY must be {MIN_CONFIGURED_KEY_LENGTH} or more printable ASCII"
            " characters: try `openssl rand -hex 32`"
        )
    if is_jwt(secret):
        raise AdminKeyUnusable(
            "ADMIN_API_KEY has the form of a neuron's token, and would be taken for one: set"
            " another one, try `openssl rand -hex 32`"
        )
    wanted = secret_hash(secret)
    expire_time = func.least(api_keys.c.expire_time, old_secrets.c.expire_time)
    query = _having(
        wanted,
        api_keys.c.name,
        _has(wanted),
        (api_keys.c.role == Role.ADMIN)
        & api_keys.c.revoke_time.is_(None)
        & func.coalesce(expire_time > func.now(), True),
    )
    rows = await connection.execute(
        query.where(or_(_has(wanted), api_keys.c.name == CONFIGURED_KEY_NAME)),
    )
    seed = AdminKeySeed.ADDED
    for name, same, usable in rows:
        if same and usable:
            return AdminKeySeed.KEPT
        if same:
            raise AdminKeyUnusable(
                f"ADMIN_API_KEY is the key {name!r}, which was revoked or rotated, has expired or"
                " has a lower role: set another one"
            )
        seed = AdminKeySeed.REPLACED
    await _put(connection, CONFIGURED_KEY_NAME, secret)
    # Nor does what it had before a rotation work any longer.
    configured = select(api_keys.c.api_key_id).where(api_keys.c.name == CONFIGURED_KEY_NAME)
    await connection.execute(
        update(old_secrets)
        .where(old_secrets.c.api_key_id == configured.scalar_subquery())
        .values(expire_time=func.least(old_secrets.c.expire_time, func.now()))
    )
    return seed


async def _put(connection: AsyncConnection, name: str, secret: str) -> None:
    fresh = {
        "role": Role.ADMIN,
        "secret_hash": secret_hash(secret),
        "create_time": func.now(),
        "expire_time": None,
        "revoke_time": None,
    }
    await connection.execute(
        insert(api_keys)
        .values(api_key_id=str(uuid.uuid4()), name=name, **fresh)
        .on_conflict_do_update(index_elements=[api_keys.c.name], set_=fresh)
    )


async def load_signing_keys(connection: AsyncConnection) -> Sequence[SigningKey]:
    """The keys that verify neuron tokens, the one that signs first; makes the first one of all."""
    await lock_signing_keys(connection)
    keys = await current_signing_keys(connection)
    if not keys:
        await connection.execute(
            insert(signing_keys).values(
                kid=secrets.token_hex(8), secret=secrets.token_bytes(32), create_time=func.now()
            )
        )
        keys = await current_signing_keys(connection)
    return keys


async def lock_signing_keys(connection: AsyncConnection) -> None:
    """Nobody else makes or retires signing keys until the transaction ends."""
    await connection.execute(text("LOCK TABLE signing_keys IN SHARE ROW EXCLUSIVE MODE"))


async def current_signing_keys(connection: AsyncConnection) -> Sequence[SigningKey]:
    """The keys that verify neuron tokens, the one that signs first."""
    rows = await connection.execute(
        select(signing_keys.c.kid, signing_keys.c.secret, signing_keys.c.retire_time)
        .where(or_(signing_keys.c.retire_time.is_(None), signing_keys.c.retire_time > func.now()))
        # One that is to be retired signs only where there is no other.
        .order_by(
            signing_keys.c.retire_time.is_not(None),
            signing_keys.c.create_time.desc(),
            signing_keys.c.kid,
        )
    )
    return [SigningKey(kid, bytes(secret), retire_time) for kid, secret, retire_time in rows]
