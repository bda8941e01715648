"""Signing keys that change while a server runs: it learns of them in time, and asks seldom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from federation_server.domain.access import TokenLifetime
from federation_server.rpc import errors
from federation_server.rpc import tokens as module
from federation_server.rpc.tokens import Tokens
from federation_server.store.access import SigningKey
from tests.support.waiting import eventually

OLD = SigningKey("old", b"o" * 32)
NEW = SigningKey("new", b"n" * 32)
NEVER_S = 3600.0


class Store:
    """The keys that there are, and when they were read."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys: Sequence[SigningKey] = keys
        self.read_at: list[float] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.fault: Exception | None = None

    async def read(self) -> Sequence[SigningKey]:
        self.read_at.append(asyncio.get_running_loop().time())
        keys = self.keys
        await self.hold.wait()
        if self.fault is not None:
            raise self.fault
        return keys


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELOAD_INTERVAL_S", NEVER_S)
    monkeypatch.setattr(module, "RELOAD_PAUSE_S", 0.05)


@asynccontextmanager
async def running(store: Store) -> AsyncIterator[Tokens]:
    """Tokens that began with the store's keys, and follow them."""
    tokens = Tokens(store.keys, TokenLifetime(), read=store.read)
    task = asyncio.create_task(tokens.run())
    yield tokens
    assert not task.done(), task
    task.cancel()


def token_by(*keys: SigningKey) -> str:
    return Tokens(keys, TokenLifetime()).issue("n1", 1, datetime.now(UTC)).token


async def answer(tokens: Tokens, token: str) -> str:
    try:
        async with asyncio.timeout(10):
            return (await tokens.identify(token)).neuron_id
    except errors.Refused as refused:
        return refused.reason_name


async def test_a_token_by_a_key_that_was_just_made_is_good() -> None:
    store = Store(OLD)
    async with running(store) as tokens:
        store.keys = [NEW, OLD]
        assert await answer(tokens, token_by(NEW)) == "n1"
        assert await answer(tokens, token_by(OLD)) == "n1"
        assert len(store.read_at) == 1
        assert await answer(tokens, tokens.issue("n2", 1, datetime.now(UTC)).token) == "n2"


async def test_an_expired_token_by_a_key_that_was_just_made_can_still_be_renewed() -> None:
    store = Store(OLD)
    a_day_ago = datetime.now(UTC) - timedelta(hours=25)
    token = Tokens([NEW], TokenLifetime()).issue("n1", 1, a_day_ago).token
    async with running(store) as tokens:
        store.keys = [NEW, OLD]
        assert (await tokens.identify(token, to_renew=True)).neuron_id == "n1"
        assert await answer(tokens, token) == "CREDENTIAL_EXPIRED"


async def test_who_comes_while_keys_are_read_waits_for_the_next_time() -> None:
    store = Store(OLD)
    async with running(store) as tokens:
        store.hold.clear()
        stranger = asyncio.create_task(answer(tokens, token_by(SigningKey("x", b"x" * 32))))
        await eventually(lambda: store.read_at)  # and has not seen what comes now
        store.keys = [NEW, OLD]
        known = asyncio.create_task(answer(tokens, token_by(NEW)))
        await asyncio.sleep(0)
        store.hold.set()
        assert await stranger == "CREDENTIAL_INVALID"
        assert await known == "n1"


async def test_strangers_do_not_make_the_server_read_more_than_so_often() -> None:
    store = Store(OLD)
    async with running(store) as tokens:
        for _ in range(4):
            strangers = (token_by(SigningKey(f"x{n}", b"x" * 32)) for n in range(50))
            answers = await asyncio.gather(*(answer(tokens, token) for token in strangers))
            assert set(answers) == {"CREDENTIAL_INVALID"}
    gaps = [after - before for before, after in zip(store.read_at, store.read_at[1:], strict=False)]
    assert len(store.read_at) == 4
    assert min(gaps) >= 0.05


async def test_a_token_by_a_known_key_reads_nothing() -> None:
    store = Store(OLD)
    async with running(store) as tokens:
        assert await answer(tokens, token_by(OLD)) == "n1"
        assert await answer(tokens, "eyJ.garbage.x") == "CREDENTIAL_INVALID"
        assert store.read_at == []


async def test_a_key_that_has_retired_verifies_nothing_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RELOAD_INTERVAL_S", 0.01)
    store = Store(NEW, OLD)
    async with running(store) as tokens:
        store.keys = [NEW]

        async def retired() -> bool:
            return await answer(tokens, token_by(OLD)) == "CREDENTIAL_INVALID"

        await eventually(retired)


async def test_while_the_keys_cannot_be_read_a_token_is_put_off_and_not_refused() -> None:
    store = Store(OLD)
    async with running(store) as tokens:
        store.keys, store.fault = [NEW, OLD], psycopg.OperationalError("away")
        assert await answer(tokens, token_by(NEW)) == "DATABASE_UNAVAILABLE"
        assert await answer(tokens, token_by(OLD)) == "n1"
        store.fault = None
        assert await answer(tokens, token_by(NEW)) == "n1"


async def test_nobody_waits_for_a_reading_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_TIMEOUT_S", 0.05)
    store = Store(OLD)
    store.hold.clear()
    async with running(store) as tokens:
        assert await answer(tokens, token_by(NEW)) == "DATABASE_UNAVAILABLE"
