"""API keys, as admins see and change them. How a caller's key is found is in `access.py`.

A key has one present secret; those that it had before a rotation work on until their time is over.
Changes that could leave nobody to administer the federation are made one after the other.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.access import (
    API_KEY_PREFIX,
    ApiKey,
    Role,
    is_last_resort,
    new_secret,
    secret_hash,
)
from federation_server.store.access import CONFIGURED_KEY_NAME, lock_api_keys
from federation_server.store.database import current_time
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import api_key_old_secrets as old_secrets
from federation_server.store.schema import api_keys

DEFAULT_OVERLAP = timedelta(hours=24)

USE_INTERVAL = timedelta(minutes=1)
"""How exactly a key's last use is noted."""

_old_secret_end = func.least(old_secrets.c.expire_time, api_keys.c.expire_time)
"""No secret outlives its key."""

_COLUMNS: list[ColumnElement[Any]] = [
    *(
        api_keys.c[name]
        for name in (
            "name",
            "role",
            "description",
            "creator",
            "create_time",
            "expire_time",
            "revoke_time",
            "last_use_time",
        )
    ),
    select(func.max(_old_secret_end))
    .where(
        old_secrets.c.api_key_id == api_keys.c.api_key_id,
        _old_secret_end > func.now(),
        api_keys.c.revoke_time.is_(None),
    )
    .scalar_subquery()
    .label("old_secret_expire_time"),
]


class NameTaken(Exception):
    """An API key has that name, or had it."""


class KeyNotFound(Exception):
    """There is no API key of that name that may be changed so."""

    def __init__(self, *, revoked: bool) -> None:
        """`revoked`: there is one, and it was revoked."""
        super().__init__()
        self.revoked = revoked


class LastAdminKey(Exception):
    """Without that key nobody could administer the federation any more."""


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """What is wanted of a new key; fields as in the contract."""

    name: str
    role: Role
    creator: str
    """The name of the API key that makes it."""
    description: str = ""
    ttl: timedelta | None = None
    """None: it never expires."""
    request_id: str | None = None
    """None: every call makes another key."""
    request_hash: bytes | None = None


@dataclass(frozen=True, slots=True, repr=False)
class CreatedKey:
    """What `create` has made, or what an earlier call with the same request_id made."""

    key: ApiKey
    secret: str
    """Empty if the key was there already."""
    request_hash: bytes | None
    """Of the call that made it."""


async def create(connection: AsyncConnection, new: NewApiKey) -> CreatedKey:
    """Makes a key, unless the creator has made one with this request_id before.

    Raises:
        NameTaken: another call's key has the name, or it is the one of ADMIN_API_KEY.
    """
    if new.name == CONFIGURED_KEY_NAME:
        raise NameTaken
    secret = new_secret(API_KEY_PREFIX)
    made = await connection.execute(
        insert(api_keys)
        .values(
            api_key_id=str(uuid.uuid4()),
            name=new.name,
            role=new.role,
            secret_hash=secret_hash(secret),
            description=new.description,
            creator=new.creator,
            request_id=new.request_id,
            request_hash=new.request_hash,
            create_time=func.now(),
            expire_time=None if new.ttl is None else func.now() + new.ttl,
        )
        .on_conflict_do_nothing()
        .returning(*_COLUMNS)
    )
    row = made.mappings().one_or_none()
    if row is not None:
        return CreatedKey(_key(row), secret, new.request_hash)
    if new.request_id is None:
        raise NameTaken
    before = await connection.execute(
        select(*_COLUMNS, api_keys.c.request_hash).where(
            api_keys.c.creator == new.creator, api_keys.c.request_id == new.request_id
        )
    )
    row = before.mappings().one_or_none()
    if row is None:
        raise NameTaken
    return CreatedKey(_key(row), "", row["request_hash"])


async def list_keys(
    connection: AsyncConnection, *, page_size: int, page_token: str
) -> tuple[list[ApiKey], str]:
    """A page of all keys, newest first, and the token of the next page.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    asked = page(page_size, page_token, "api_keys")
    newest_first = [
        SortKey(api_keys.c.create_time, descending=True),
        SortKey(api_keys.c.name, descending=True),
    ]
    rows, next_page_token = await asked.read(connection, select(*_COLUMNS), newest_first)
    # `_mapping` is public, and has that name because a column may have any other.
    return [_key(row._mapping) for row in rows], next_page_token  # noqa: SLF001


async def lock(connection: AsyncConnection, name: str) -> ApiKey:
    """A key, as it is until the transaction ends or changes it.

    Raises:
        KeyNotFound: there is none.
    """
    await lock_api_keys(connection)
    return await _get(connection, name)


async def rotate(connection: AsyncConnection, name: str, overlap: timedelta) -> tuple[ApiKey, str]:
    """Gives a key a new secret, and returns both; every secret before it ends after `overlap`, if
    not sooner.

    Raises:
        KeyNotFound: there is none, or it was revoked.
    """
    await lock_api_keys(connection)
    await _get_unrevoked(connection, name)
    this = api_keys.c.name == name
    end = func.now() + overlap
    present = select(api_keys.c.secret_hash, api_keys.c.api_key_id, end).where(this)
    key_id = select(api_keys.c.api_key_id).where(this).scalar_subquery()
    await connection.execute(
        update(old_secrets)
        .where(old_secrets.c.api_key_id == key_id, old_secrets.c.expire_time > end)
        .values(expire_time=end)
    )
    await connection.execute(
        insert(old_secrets).from_select(["secret_hash", "api_key_id", "expire_time"], present)
    )
    secret = new_secret(API_KEY_PREFIX)
    await connection.execute(update(api_keys).where(this).values(secret_hash=secret_hash(secret)))
    return await _get_unrevoked(connection, name), secret


async def expire(connection: AsyncConnection, name: str, expire_time: datetime) -> ApiKey:
    """Sets when a key stops to work, and returns it.

    Raises:
        KeyNotFound: there is none, or it was revoked.
        LastAdminKey: it would stop sooner, and must not.
    """
    await lock_api_keys(connection)
    key = await _get_unrevoked(connection, name)
    if key.expire_time is None or expire_time < key.expire_time:
        await _refuse_last(connection, key)
    return await _change(connection, name, expire_time=expire_time)


async def revoke(connection: AsyncConnection, name: str) -> ApiKey:
    """Ends a key, and returns it; a second time changes nothing.

    Raises:
        KeyNotFound: there is none.
        LastAdminKey: it must not end.
    """
    await lock_api_keys(connection)
    key = await _get(connection, name)
    if key.revoke_time is not None:
        return key
    await _refuse_last(connection, key)
    return await _change(connection, name, revoke_time=func.now())


async def note_use(connection: AsyncConnection, names: Iterable[str]) -> None:
    """Those keys were used within the last moments. Writes nothing for one whose last use was
    noted a moment ago, by whichever server.
    """
    noted = api_keys.c.last_use_time
    await connection.execute(
        update(api_keys)
        .where(
            api_keys.c.name.in_(sorted(names)),
            or_(noted.is_(None), noted <= func.now() - USE_INTERVAL),
        )
        .values(last_use_time=func.now())
    )


async def _refuse_last(connection: AsyncConnection, key: ApiKey) -> None:
    admins = await connection.execute(
        select(*_COLUMNS).where(api_keys.c.role == Role.ADMIN, api_keys.c.revoke_time.is_(None))
    )
    now = await current_time(connection)
    if is_last_resort(key.name, map(_key, admins.mappings()), now):
        raise LastAdminKey


async def _get(connection: AsyncConnection, name: str) -> ApiKey:
    found = await connection.execute(select(*_COLUMNS).where(api_keys.c.name == name))
    row = found.mappings().one_or_none()
    if row is None:
        raise KeyNotFound(revoked=False)
    return _key(row)


async def _get_unrevoked(connection: AsyncConnection, name: str) -> ApiKey:
    key = await _get(connection, name)
    if key.revoke_time is not None:
        raise KeyNotFound(revoked=True)
    return key


async def _change(connection: AsyncConnection, name: str, **values: Any) -> ApiKey:
    await connection.execute(update(api_keys).where(api_keys.c.name == name).values(**values))
    return await _get(connection, name)


def _key(row: RowMapping) -> ApiKey:
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(ApiKey)}
    return ApiKey(**values)
