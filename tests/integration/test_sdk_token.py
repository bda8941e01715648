"""The neuron's token in STATE_DIR outlasts a crash, a lost answer and a full disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from federation.v1 import session_service_pb2 as pb
from federation_server.rpc import tokens
from neuron_sdk import registration
from neuron_sdk.channel import RpcFailure
from neuron_sdk.description import NeuronDescription
from neuron_sdk.registration import Registration, SecretFile
from tests.support.federation import Federation, running
from tests.support.waiting import eventually

DESCRIPTION = NeuronDescription("n", "worker")


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url) as federation:
        yield federation


class Process:
    """What one process of the neuron does for its token."""

    def __init__(self, federation: Federation, folder: Path, enrollment_token: str = "") -> None:
        self.session = federation.session
        self.registration = Registration(
            DESCRIPTION,
            enrollment_token,
            token=SecretFile(folder / "token"),
            request_id=SecretFile(folder / "request"),
        )

    async def start(self) -> None:
        await self.registration.ensure(self.session)

    async def call(self) -> None:
        """Uses its token, in a way that gives it no other one."""
        await self.session.PullCommands(
            pb.PullCommandsRequest(instance_id="i"), metadata=self.registration.metadata
        )


class Lost:
    """A federation whose answers to Register are lost on the way."""

    def __init__(self, federation: Federation) -> None:
        self._session = federation.session

    async def Register(self, request: Any, **options: Any) -> Any:  # noqa: N802 - gRPC's name
        await self._session.Register(request, **options)
        raise RpcFailure("UNAVAILABLE", "", "the connection broke")


class Disk:
    """The disk of a STATE_DIR, on which no other token can be kept while it is full."""

    def __init__(self, folder: Path) -> None:
        self._fresh = folder / "token.new"

    def fill(self) -> None:
        self._fresh.mkdir()

    def free(self) -> None:
        self._fresh.rmdir()


async def test_a_neuron_that_dies_before_it_hears_that_it_is_enrolled_is_let_in_the_next_time(
    federation: Federation, tmp_path: Path
) -> None:
    secret = await federation.enrollment_token(max_uses=1)
    first = Process(federation, tmp_path, secret)
    with pytest.raises(RpcFailure):
        await first.registration.ensure(Lost(federation))  # type: ignore[arg-type]
    second = Process(federation, tmp_path, secret)
    await second.start()
    await second.call()
    assert not (tmp_path / "request").exists()


async def test_a_neuron_that_dies_before_it_hears_that_it_is_re_enrolled_is_let_in_the_next_time(
    federation: Federation, tmp_path: Path
) -> None:
    await federation.register("n")
    (tmp_path / "token").write_text("eyJ.of-another.federation\n")
    secret = await federation.enrollment_token(max_uses=1, allow_reenrollment=True)
    with pytest.raises(RpcFailure):
        await Process(federation, tmp_path, secret).registration.ensure(
            Lost(federation)  # type: ignore[arg-type]
        )
    second = Process(federation, tmp_path, secret)
    await second.start()
    await second.call()


async def test_a_process_on_a_full_disk_leaves_the_token_there_good_for_the_next_one(
    federation: Federation, tmp_path: Path
) -> None:
    await Process(federation, tmp_path, await federation.enrollment_token()).start()
    Disk(tmp_path).fill()
    for _ in range(3):
        process = Process(federation, tmp_path)
        await process.start()
        await process.call()


async def test_a_new_token_that_cannot_be_kept_is_asked_for_again_until_it_can(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "KEEP_AGAIN_S", 0.05)
    await Process(federation, tmp_path, await federation.enrollment_token()).start()
    before = (tmp_path / "token").read_text()
    disk = Disk(tmp_path)
    disk.fill()
    process = Process(federation, tmp_path)
    await process.start()
    fresh = asyncio.create_task(process.registration.keep_fresh(process.session))
    disk.free()
    await eventually(lambda: (tmp_path / "token").read_text() != before, describe="it is kept")
    await eventually(
        lambda: process.registration.metadata[0][1].endswith(
            (tmp_path / "token").read_text().strip()
        ),
        describe="it is shown",
    )
    await process.call()
    fresh.cancel()
    with suppress(asyncio.CancelledError):
        await fresh


async def test_when_the_token_that_is_kept_has_expired_the_newest_one_is_used(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "LEEWAY", tokens.LEEWAY * 0)
    async with running(database_url, token_ttl="PT2S") as federation:
        await Process(federation, tmp_path, await federation.enrollment_token()).start()
        Disk(tmp_path).fill()
        process = Process(federation, tmp_path)
        await process.start()

        async def expired() -> bool:
            try:
                await process.call()
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        await eventually(expired, describe="the token has expired")

        async def called() -> bool:
            process.registration.forget()
            await process.start()
            return not await expired()

        await eventually(called, describe="a newer token is shown")


def test_a_token_is_on_disk_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        sync(handle)
        synced.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    file = SecretFile(tmp_path / "token")
    file.write("a-token")
    assert file.read() == "a-token"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert synced == [(tmp_path / "token").stat().st_ino, tmp_path.stat().st_ino]
