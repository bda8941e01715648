"""The baseline: a bare `grpc.aio` server that answers each message of a stream, and no more.

It speaks the contract's Connect, so that the same neurons can load it: a Hello is answered with a
Welcome, every other message with an empty acknowledgement. No token, no check, no database.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import grpc.aio

from federation.v1 import session_service_pb2 as pb


async def connect(_requests: object, context: Any) -> None:
    """One stream: answers whatever comes."""
    while isinstance(message := await context.read(), pb.NeuronMessage):
        if message.HasField("hello"):
            await context.write(pb.FederationMessage(welcome=pb.Welcome(epoch=1)))
        else:
            await context.write(pb.FederationMessage(ack_sequence=1))


HANDLER = grpc.method_handlers_generic_handler(
    "federation.v1.SessionService",
    {
        "Connect": grpc.stream_stream_rpc_method_handler(
            connect,
            request_deserializer=pb.NeuronMessage.FromString,
            response_serializer=pb.FederationMessage.SerializeToString,
        )
    },
)


async def serve(port: int) -> None:
    """Serves until it is killed; prints the port once it does."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((HANDLER,))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(bound, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(serve(parser.parse_args().port))
