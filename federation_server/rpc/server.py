"""The gRPC server: its services, what stands before them, health and reflection."""

from __future__ import annotations

import grpc.aio
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

from federation.v1 import (
    access_service_pb2_grpc,
    analytics_service_pb2_grpc,
    command_service_pb2_grpc,
    fleet_service_pb2_grpc,
    session_service_pb2_grpc,
)
from federation_server.rpc.access import AccessServicer
from federation_server.rpc.analytics import AnalyticsServicer
from federation_server.rpc.command import CommandServicer
from federation_server.rpc.fleet import FleetServicer
from federation_server.rpc.session import SessionServicer

SERVICES = (
    "federation.v1.SessionService",
    "federation.v1.FleetService",
    "federation.v1.CommandService",
    "federation.v1.AnalyticsService",
    "federation.v1.AccessService",
)

MAX_MESSAGE_BYTES = 4 * 1024 * 1024

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 16 * MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    # Another process on the port would take half of the streams without being asked.
    ("grpc.so_reuseport", 0),
    # A peer that is gone is found within half a minute.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # It bounds keepalive pings too, and is a minute unless it is set.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Neurons and consoles may ping each 10 s, also without a call.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who connects and does not speak HTTP/2 (nor finishes a TLS handshake) is not waited for, nor
    # is a connection kept on which nobody calls anything.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # What one connection may have this process do at a time. Beyond it gRPC answers UNAVAILABLE.
    ("grpc.max_concurrent_streams", 5_000),
    # Calls that wait for this process to take them. Beyond the first number gRPC drops some at
    # random (from 1,000 on unless it is set), with nothing but CANCELLED: a herd is for
    # `live/admission.py`, which says when to come again.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 30_000),
)

PRESENCE = "presence"
"""Beside the services: NOT_SERVING while this server doubts itself and marks no neuron down. It is
apart from them, so that no load balancer takes a server out for that."""

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


class Health:
    """`grpc.health.v1`: SERVING while the database answers and the server is not draining."""

    def __init__(self) -> None:
        """Nothing serves yet."""
        self.servicer = health_aio.HealthServicer()

    async def start(self) -> None:
        """Names the services, NOT_SERVING until the database has answered."""
        await self.database_changed(up=False)
        await self.presence_changed(frozen=True)

    async def database_changed(self, *, up: bool) -> None:
        """The database answers, or does not any more."""
        status = health_pb2.HealthCheckResponse
        for service in ("", *SERVICES):
            await self.servicer.set(service, status.SERVING if up else status.NOT_SERVING)

    async def presence_changed(self, *, frozen: bool) -> None:
        """The server is in doubt of itself, or not any more."""
        status = health_pb2.HealthCheckResponse
        await self.servicer.set(PRESENCE, status.NOT_SERVING if frozen else status.SERVING)

    async def draining(self) -> None:
        """From now on nothing serves."""
        await self.servicer.enter_graceful_shutdown()


def build_server(
    interceptors: list[grpc.aio.ServerInterceptor],
    health: Health,
    *,
    session: SessionServicer,
    fleet: FleetServicer,
    command: CommandServicer,
    analytics: AnalyticsServicer,
    access: AccessServicer,
) -> grpc.aio.Server:
    """A server with every service, bound to no port yet."""
    server = grpc.aio.server(interceptors=interceptors, options=OPTIONS)
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(session, server)
    fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
    command_service_pb2_grpc.add_CommandServiceServicer_to_server(command, server)
    analytics_service_pb2_grpc.add_AnalyticsServiceServicer_to_server(analytics, server)
    access_service_pb2_grpc.add_AccessServiceServicer_to_server(access, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    channelz.add_channelz_servicer(server)
    _add_reflection(server)
    return server


def _add_reflection(server: grpc.aio.Server) -> None:
    """Serves reflection v1alpha, and the same messages as v1: they are alike on the wire."""
    names = (*SERVICES, "grpc.health.v1.Health", _REFLECTION_V1, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection_aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )
