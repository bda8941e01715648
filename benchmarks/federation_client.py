"""The federation's client in `commands.py`: ExecuteCommand, until it shows the final state.

    python -m benchmarks.federation_client ADDRESS NEURON_ID… --jobs 500

The admin's key comes in ADMIN_API_KEY. Each job goes to the next of the neurons.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import grpc.aio

from benchmarks import client
from federation.v1 import command_pb2, command_service_pb2
from federation.v1.command_service_pb2_grpc import CommandServiceStub

if TYPE_CHECKING:  # a name of the stubs' types only
    from federation.v1.command_service_pb2_grpc import CommandServiceAsyncStub


async def execute(
    stub: CommandServiceAsyncStub, key: tuple[tuple[str, str]], neuron_id: str, number: int
) -> None:
    """One command, from its issue to its result."""
    spec = command_service_pb2.CommandSpec(neuron_id=neuron_id, type="bench")
    spec.data["n"] = number
    request = command_service_pb2.ExecuteCommandRequest(command=spec)
    seen = command_pb2.Command()
    async for answer in stub.ExecuteCommand(request, metadata=key, timeout=60):
        seen = answer.command
        if seen.HasField("end_time"):
            break
    if seen.state != command_pb2.COMMAND_STATE_SUCCEEDED or seen.response["n"] != number:
        raise RuntimeError(f"command {number} to {neuron_id} ended as {seen}")


async def main() -> None:
    """Runs one client."""
    parser = client.parser(__doc__)
    parser.add_argument("address")
    parser.add_argument("neurons", type=int, help="so many; 0: the one of the real SDK")
    arguments = parser.parse_args()
    names = [f"bench-{number:05d}" for number in range(arguments.neurons)] or ["bench"]
    key = (("x-admin-key", os.environ["ADMIN_API_KEY"]),)
    async with grpc.aio.insecure_channel(arguments.address) as channel:
        stub: CommandServiceAsyncStub = CommandServiceStub(channel)

        async def job(number: int) -> None:
            await execute(stub, key, names[number % len(names)], number)

        await client.closed_loop(job, arguments)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
