"""Enrollment tokens: made, found, counted, listed, revoked."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import RowMapping, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.access import (
    ENROLLMENT_TOKEN_PREFIX,
    EnrollmentToken,
    new_secret,
    secret_hash,
)
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import enrollment_tokens, enrollment_uses

DEFAULT_TTL = timedelta(hours=24)

_COLUMNS = [
    enrollment_tokens.c[name]
    for name in (
        "enrollment_token_id",
        "description",
        "creator",
        "create_time",
        "expire_time",
        "revoke_time",
        "max_uses",
        "uses",
        "neuron_type",
        "neuron_id_pattern",
        "labels",
        "allow_reenrollment",
    )
]


@dataclass(frozen=True, slots=True)
class NewEnrollmentToken:
    """What is wanted of a new token; fields as in the contract."""

    creator: str
    """The name of the API key that makes it."""
    description: str = ""
    ttl: timedelta = DEFAULT_TTL
    max_uses: int = 0
    neuron_type: str = ""
    neuron_id_pattern: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    allow_reenrollment: bool = False
    request_id: str | None = None
    """None: every call makes another token."""
    request_hash: bytes | None = None


@dataclass(frozen=True, slots=True, repr=False)
class CreatedToken:
    """What `create` has made, or what an earlier call with the same request_id made."""

    token: EnrollmentToken
    secret: str
    """Empty if the token was there already."""
    request_hash: bytes | None
    """Of the call that made it."""


async def create(connection: AsyncConnection, new: NewEnrollmentToken) -> CreatedToken:
    """Makes a token, unless the creator has made one with this request_id before."""
    secret = new_secret(ENROLLMENT_TOKEN_PREFIX)
    made = await connection.execute(
        insert(enrollment_tokens)
        .values(
            enrollment_token_id=str(uuid.uuid4()),
            secret_hash=secret_hash(secret),
            description=new.description,
            creator=new.creator,
            request_id=new.request_id,
            request_hash=new.request_hash,
            create_time=func.now(),
            expire_time=func.now() + new.ttl,
            max_uses=new.max_uses,
            uses=0,
            neuron_type=new.neuron_type,
            neuron_id_pattern=new.neuron_id_pattern,
            labels=dict(new.labels),
            allow_reenrollment=new.allow_reenrollment,
        )
        .on_conflict_do_nothing(index_elements=["creator", "request_id"])
        .returning(*_COLUMNS)
    )
    row = made.mappings().one_or_none()
    if row is not None:
        return CreatedToken(_token(row), secret, new.request_hash)
    before = await connection.execute(
        select(*_COLUMNS, enrollment_tokens.c.request_hash).where(
            enrollment_tokens.c.creator == new.creator,
            enrollment_tokens.c.request_id == new.request_id,
        )
    )
    row = before.mappings().one()
    return CreatedToken(_token(row), "", row["request_hash"])


async def lock_by_secret(connection: AsyncConnection, secret: str) -> EnrollmentToken | None:
    """The token with that secret, good or not; its count stands still until the transaction
    ends.
    """
    found = await connection.execute(
        select(*_COLUMNS)
        .where(enrollment_tokens.c.secret_hash == secret_hash(secret))
        .with_for_update(key_share=True)
    )
    row = found.mappings().one_or_none()
    return None if row is None else _token(row)


async def count_use(
    connection: AsyncConnection,
    enrollment_token_id: str,
    neuron_id: str,
    request_id: str,
    time: datetime,
) -> None:
    """Counts one use of a locked token.

    If the request has an id, remembers that it was counted, at the `time` when the neuron's token
    generation began: in later generations it is a new request.
    """
    await connection.execute(
        update(enrollment_tokens)
        .where(enrollment_tokens.c.enrollment_token_id == enrollment_token_id)
        .values(uses=enrollment_tokens.c.uses + 1)
    )
    if request_id:
        await connection.execute(
            insert(enrollment_uses)
            .values(
                enrollment_token_id=enrollment_token_id,
                neuron_id=neuron_id,
                request_id=request_id,
                use_time=time,
            )
            .on_conflict_do_update(
                index_elements=["enrollment_token_id", "neuron_id", "request_id"],
                set_={"use_time": time},
            )
        )


async def use_time(
    connection: AsyncConnection, enrollment_token_id: str, neuron_id: str, request_id: str
) -> datetime | None:
    """The time with which that request was counted; None if it was not, or has no id."""
    found = await connection.execute(
        select(enrollment_uses.c.use_time).where(
            enrollment_uses.c.enrollment_token_id == enrollment_token_id,
            enrollment_uses.c.neuron_id == neuron_id,
            enrollment_uses.c.request_id == request_id,
        )
    )
    return found.scalar_one_or_none()


async def list_tokens(
    connection: AsyncConnection, *, page_size: int, page_token: str
) -> tuple[list[EnrollmentToken], str]:
    """A page of all tokens, newest first, and the token of the next page.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    asked = page(page_size, page_token, "enrollment_tokens")
    newest_first = [
        SortKey(enrollment_tokens.c.create_time, descending=True),
        SortKey(enrollment_tokens.c.enrollment_token_id, descending=True),
    ]
    rows, next_page_token = await asked.read(connection, select(*_COLUMNS), newest_first)
    # `_mapping` is public, and has that name because a column may have any other.
    return [_token(row._mapping) for row in rows], next_page_token  # noqa: SLF001


async def revoke(connection: AsyncConnection, enrollment_token_id: str) -> EnrollmentToken | None:
    """Ends a token, and returns it; a second time changes nothing. None: there is none."""
    changed = await connection.execute(
        update(enrollment_tokens)
        .where(enrollment_tokens.c.enrollment_token_id == enrollment_token_id)
        .values(revoke_time=func.coalesce(enrollment_tokens.c.revoke_time, func.now()))
        .returning(*_COLUMNS)
    )
    row = changed.mappings().one_or_none()
    return None if row is None else _token(row)


def _token(row: RowMapping) -> EnrollmentToken:
    values: dict[str, Any] = {column.name: row[column.name] for column in _COLUMNS}
    return EnrollmentToken(**values)
