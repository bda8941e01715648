"""Where run_task reads from: a stand-in for your database, bucket or queue.

The records are made up, the same ones for the same name, so that the example runs anywhere.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

from .processing import Record

PAGE_SIZE = 20

_CITIES = ("Berlin", "Lima", "Nairobi", "Osaka")


async def read_pages(source: str, limit: int) -> AsyncIterator[list[Record]]:
    """Give the first `limit` records of a source, `PAGE_SIZE` at a time."""
    dice = random.Random(source)  # noqa: S311 - made-up data, not a secret
    for first in range(0, limit, PAGE_SIZE):
        await asyncio.sleep(0)  # here a real source would wait for its network
        last = min(first + PAGE_SIZE, limit)
        yield [_record(number, dice) for number in range(first, last)]


def _record(number: int, dice: random.Random) -> Record:
    return {
        "id": number,
        "city": dice.choice(_CITIES),
        "price": round(dice.lognormvariate(3, 1), 2),
        "sold": dice.random() < 0.5,
    }
