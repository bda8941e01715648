"""Connections that keep a server busy with nothing: each is ended in time, by real sockets."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import grpc
import grpc.aio
import psutil
import pytest

from federation.v1 import fleet_service_pb2
from federation_server.rpc import server as rpc_server
from tests.support.calls import shown
from tests.support.faults import is_online
from tests.support.federation import BareNeuron, Served, running
from tests.support.waiting import eventually

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
HALF_HEADERS = b"\0\0\x64\1\4\0\0\0\1" + b"\x82\x86"  # announces 100 bytes

HANDSHAKE_S = 10.0
KEEPALIVE_S = 30.0
SLACK_S = 15.0
"""For a machine that has other things to do."""


async def kept_for(address: str, said: bytes) -> float:
    """How long a connection lives on which that is said, and nothing more."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    loop = asyncio.get_running_loop()
    began = loop.time()
    writer.write(said)
    with suppress(ConnectionError):
        while await reader.read(4096):  # what it is told goes unanswered
            pass
    writer.close()
    return loop.time() - began


async def test_a_connection_on_which_nobody_speaks_http2_to_the_end_is_closed(
    served: Served,
) -> None:
    handshakes = (b"", PREFACE[:16], PREFACE, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    silent = (PREFACE + SETTINGS, PREFACE + SETTINGS + HALF_HEADERS)
    async with asyncio.timeout(KEEPALIVE_S + SLACK_S):
        lives = await asyncio.gather(
            *(kept_for(served.address, said) for said in (*handshakes, *silent))
        )
    assert max(lives[: len(handshakes)]) < HANDSHAKE_S + SLACK_S
    assert max(lives) < KEEPALIVE_S + SLACK_S


def _hold(address: str, token: str) -> None:
    async def hold() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            neuron = BareNeuron(Served(address, channel), token)
            await neuron.hello()
            await asyncio.Event().wait()

    asyncio.run(hold())


@contextmanager
def holding(address: str, token: str) -> Iterator[BaseProcess]:
    """A process that holds a stream."""
    process = get_context("spawn").Process(target=_hold, args=(address, token))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


async def test_a_neuron_whose_process_stands_still_loses_its_stream(served: Served) -> None:
    token = await served.register("stands-still")
    with holding(served.address, token) as process:
        await eventually(lambda: is_online(served, "stands-still"), describe="it has a stream")
        psutil.Process(process.pid).send_signal(signal.SIGSTOP)

        async def closed() -> bool:
            return not (await shown(served, "stands-still")).session.open

        await eventually(closed, within=KEEPALIVE_S + SLACK_S, describe="its session is closed")


async def test_a_connection_on_which_nobody_calls_anything_is_not_kept(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(rpc_server.OPTIONS) | {"grpc.max_connection_idle_ms": 1000}
    monkeypatch.setattr(rpc_server, "OPTIONS", tuple(options.items()))
    async with running(database_url) as federation:
        # gRPC's client answers the pings, and connects again only when somebody calls.
        await shown_overview(federation)
        state = federation.channel.get_state
        await eventually(lambda: state() is grpc.ChannelConnectivity.IDLE, describe="it was let go")
        await shown_overview(federation)


async def shown_overview(served: Served) -> None:
    await served.fleet.GetFleetOverview(
        fleet_service_pb2.GetFleetOverviewRequest(), metadata=served.admin
    )


async def test_metadata_beyond_16_kib_is_refused(served: Served) -> None:
    metadata = (*served.admin, ("x-large", "x" * 40_000))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.fleet.GetFleetOverview(
            fleet_service_pb2.GetFleetOverviewRequest(), metadata=metadata
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await shown_overview(served)
