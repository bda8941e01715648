"""The keys that sign neurons' tokens, as admins see and change them. What a server signs and
verifies with is in `access.py`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.store.access import lock_signing_keys
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import signing_keys


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A signing key without its secret; see the contract's SigningKey."""

    kid: str
    create_time: datetime
    retire_time: datetime | None


_COLUMNS = (signing_keys.c.kid, signing_keys.c.create_time, signing_keys.c.retire_time)


async def list_keys(
    connection: AsyncConnection, *, page_size: int, page_token: str
) -> tuple[list[ListedKey], str]:
    """A page of all keys, newest first, and the token of the next page.

    Raises:
        PageTokenInvalid: the token is not of this list.
    """
    asked = page(page_size, page_token, "signing_keys")
    newest_first = [
        SortKey(signing_keys.c.create_time, descending=True),
        SortKey(signing_keys.c.kid, descending=True),
    ]
    rows, next_page_token = await asked.read(connection, select(*_COLUMNS), newest_first)
    return [ListedKey(*row) for row in rows], next_page_token


async def rotate(connection: AsyncConnection, overlap: timedelta) -> ListedKey:
    """Makes a new key, and returns it; every key before it retires after `overlap`, if not
    sooner.
    """
    await lock_signing_keys(connection)
    # Not the transaction's time: one that waited for the lock would make a key that looks older
    # than the one it waited for.
    now = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    await connection.execute(
        update(signing_keys)
        .where(
            or_(signing_keys.c.retire_time.is_(None), signing_keys.c.retire_time > now + overlap)
        )
        .values(retire_time=now + overlap)
    )
    made = await connection.execute(
        insert(signing_keys)
        .values(kid=secrets.token_hex(8), secret=secrets.token_bytes(32), create_time=now)
        .returning(*_COLUMNS)
    )
    return ListedKey(*made.one())
