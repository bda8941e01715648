"""The federation's other client in `commands.py`: IssueCommandBatch, until WatchCommandBatch ends.

    python -m benchmarks.federation_batch_client ADDRESS NEURONS --jobs 3000

One call orders the same of all neurons of the swarm; the next batch follows when it has ended.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import grpc.aio

from benchmarks import client
from federation.v1 import command_pb2, command_service_pb2
from federation.v1.command_service_pb2_grpc import CommandServiceStub

if TYPE_CHECKING:  # a name of the stubs' types only
    from federation.v1.command_service_pb2_grpc import CommandServiceAsyncStub

TIMEOUT_S = 120


async def batch(stub: CommandServiceAsyncStub, key: tuple[tuple[str, str]], neurons: int) -> None:
    """One batch, from its issue to its end."""
    spec = command_service_pb2.CommandSpec(type="bench")
    spec.data["n"] = 1
    request = command_service_pb2.IssueCommandBatchRequest(filter='type = "bench"', command=spec)
    issued = await stub.IssueCommandBatch(request, metadata=key, timeout=TIMEOUT_S)
    watch = command_service_pb2.WatchCommandBatchRequest(batch_id=issued.batch.batch_id)
    seen = issued.batch
    async for answer in stub.WatchCommandBatch(watch, metadata=key, timeout=TIMEOUT_S):
        seen = answer.batch
    ended = {each.state: each.count for each in seen.counts if each.count}
    if ended != {command_pb2.COMMAND_STATE_SUCCEEDED: neurons}:
        raise RuntimeError(f"a batch ended as {seen}")


async def main() -> None:
    """Runs one client."""
    parser = client.parser(__doc__)
    parser.add_argument("address")
    parser.add_argument("neurons", type=int)
    arguments = parser.parse_args()
    key = (("x-admin-key", os.environ["ADMIN_API_KEY"]),)
    batches = max(1, arguments.jobs // arguments.neurons)
    async with grpc.aio.insecure_channel(arguments.address) as channel:
        stub: CommandServiceAsyncStub = CommandServiceStub(channel)
        await batch(stub, key, arguments.neurons)
        print("go", flush=True)
        began = time.perf_counter()
        for _ in range(batches):
            await batch(stub, key, arguments.neurons)
        client.report(batches * arguments.neurons, time.perf_counter() - began)


if __name__ == "__main__":
    asyncio.run(main())
