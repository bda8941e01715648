"""What grpc itself serves here: as quiet and exact as the federation's own services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from tests.support.federation import Federation, running


@pytest_asyncio.fixture
async def federation(database_url: str) -> AsyncIterator[Federation]:
    async with running(database_url) as federation:
        yield federation


async def test_channelz_says_not_found_of_what_is_not_there(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    channel: Any = federation.channel  # its types know no asyncio
    channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
    request = channelz_pb2.GetServerRequest(server_id=10**9)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channelz.GetServer(request, metadata=federation.admin)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
