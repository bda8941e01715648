"""One PostgreSQL and one server for all tests of faults.

The tests stop, freeze and kill that PostgreSQL, and leave it running. Each has neurons of its own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from tests.support.faults import Peer, Postgres, calling, doomed_postgres, serving
from tests.support.federation import BareNeuron, Served
from tests.support.postgres import passable_folder
from tests.support.processes import FederationProcess
from tests.support.proxy import proxy


@pytest.fixture(scope="package")
def doomed() -> Iterator[Postgres]:
    with doomed_postgres() as doomed:
        yield doomed


@pytest.fixture(scope="package")
def server(doomed: Postgres) -> Iterator[FederationProcess]:
    with passable_folder() as folder, serving(doomed, folder) as server:
        yield server


@pytest_asyncio.fixture(scope="package", autouse=True)
async def dead_peer(server: FederationProcess) -> AsyncIterator[Peer]:
    """Made first and looked at last: a dead peer takes half a minute to be found."""
    async with calling(server) as served, proxy(server.address) as through:
        token = await served.register("dead-peer")
        async with grpc.aio.insecure_channel(through.address) as channel:
            neuron = BareNeuron(Served(through.address, channel), token)
            await neuron.hello()
            through.stall()
            yield Peer(served, time.monotonic())
            neuron.call.cancel()
