"""A gRPC server whose answers a test writes beforehand: the other side of a client under test.

Every RPC of the admins' services answers what `answers` holds under its name: a message, a
sequence of messages (a stream), a Refusal, or a function of the request that gives one of these
or calls `context` itself. Requests are kept, with their metadata.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.status_pb2 import Status

from federation.v1 import (
    access_service_pb2,
    analytics_service_pb2,
    command_service_pb2,
    fleet_service_pb2,
)

SERVICES = [
    fleet_service_pb2.DESCRIPTOR.services_by_name["FleetService"],
    command_service_pb2.DESCRIPTOR.services_by_name["CommandService"],
    analytics_service_pb2.DESCRIPTOR.services_by_name["AnalyticsService"],
    access_service_pb2.DESCRIPTOR.services_by_name["AccessService"],
]


@dataclass
class Refusal:
    """An error with the details of google.rpc that the contract promises."""

    code: grpc.StatusCode
    message: str
    details: Sequence[Message] = ()


Answer: TypeAlias = Any
"""A message, a list of messages and refusals, a Refusal, or a function of request and context."""


class ScriptedFederation:
    """What it answers, what it was asked, and where."""

    def __init__(self, server: grpc.Server, port: int) -> None:
        self._server = server
        self.port = port
        self.answers: dict[str, Answer] = {}
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.metadata: dict[str, str] = {}

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Ends it and every call that is under way."""
        self._server.stop(grace=0).wait(5)

    def answer(self, name: str, request: Message, context: grpc.ServicerContext) -> Iterator[Any]:
        """The messages of an answer; ends the call if a Refusal is among them."""
        self.requests[name].append(request)
        self.metadata = {key: str(value) for key, value in context.invocation_metadata()}
        answer = self.answers.get(name)
        if callable(answer):
            answer = answer(request, context)
        for each in answer if isinstance(answer, list) else [answer]:
            if isinstance(each, Refusal):
                _refuse(each, context)
            if callable(each):
                each()
            else:
                yield each


def _refuse(refusal: Refusal, context: grpc.ServicerContext) -> None:
    if refusal.details:
        status = Status(code=refusal.code.value[0], message=refusal.message)
        for detail in refusal.details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(refusal.code, refusal.message)


def _unary(scripted: ScriptedFederation, name: str) -> Callable[..., Any]:
    return lambda request, context: next(scripted.answer(name, request, context))


def _stream(scripted: ScriptedFederation, name: str) -> Callable[..., Any]:
    return lambda request, context: scripted.answer(name, request, context)


@contextmanager
def scripted_federation(port: int = 0) -> Iterator[ScriptedFederation]:
    """Serves one on loopback for the block.

    port: 0 for any free one.
    """
    server = grpc.server(ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
    scripted = ScriptedFederation(server, server.add_insecure_port(f"127.0.0.1:{port}"))
    for service in SERVICES:
        handlers = {}
        for method in service.methods:
            codec: dict[str, Any] = {
                "request_deserializer": GetMessageClass(method.input_type).FromString,
                "response_serializer": GetMessageClass(method.output_type).SerializeToString,
            }
            handlers[method.name] = (
                grpc.unary_stream_rpc_method_handler(_stream(scripted, method.name), **codec)
                if method.server_streaming
                else grpc.unary_unary_rpc_method_handler(_unary(scripted, method.name), **codec)
            )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.full_name, handlers),)
        )
    server.start()
    try:
        yield scripted
    finally:
        scripted.stop()
