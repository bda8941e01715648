"""The gRPC channel to the federation, and what its errors mean."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from neuron_sdk.offload import offload
from neuron_sdk.tls import TlsFiles, explain, handshake_problem

# A dead path is noticed after at most PING + PING_TIMEOUT; the server permits a ping each 10 s.
PING_MS = 18_000
PING_TIMEOUT_MS = 10_000
MAX_MESSAGE_BYTES = 4 * 2**20
RECONNECT_MS = (1_500, 3_000)
"""How long gRPC waits at the most between two tries to connect, for as long as somebody waits for a
channel. Each channel has its own, so that those that lost one server do not try in step."""

_ASK_S = 1.0
_DOMAIN = "federation"
_DETAILS = "grpc-status-details-bin"
_BAD_CREDENTIALS = "FAILED_CREDENTIAL_RATE"
"""The limit that only those meet who have shown a bad credential, and are to show another one."""


@dataclass(eq=False)
class RpcFailure(Exception):
    """The federation refused a call, or could not be reached."""

    code: str
    """The gRPC status code's name, for example "UNAVAILABLE"."""
    reason: str
    """The name of an ErrorReason without its prefix; "" if the federation gave none."""
    message: str
    """For people."""
    retry_after: float = 0.0
    """Seconds to wait at the least before the same call again; 0 if nothing was said."""
    violations: tuple[str, ...] = ()
    """Every bad field, as "field: what is wrong"."""

    def __str__(self) -> str:
        said = "; ".join(self.violations) or self.message
        return f"{self.reason or self.code}: {said}"


async def read_credentials(tls: TlsFiles | None) -> grpc.ChannelCredentials | None:
    """What its files hold now; None for plaintext."""
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(*await offload(tls.read))


def open_channel(
    target: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    max_receive_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel of its own for one neuron; it connects when first used.

    credentials: what it speaks TLS with; None for plaintext.
    """
    most_ms = random.randint(*RECONNECT_MS)  # noqa: S311 - jitter
    options = [
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        # A ping has a patience of its own, a minute by default, whatever keepalive says.
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", max_receive_bytes),
        # Backoff is ours: a shared subchannel would remember gRPC's own.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", most_ms // 3),
        ("grpc.max_reconnect_backoff_ms", most_ms),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, credentials, options)


async def wait_connected(channel: grpc.aio.Channel, target: str, *, tls: bool) -> None:
    """Wait until the channel is connected; to be bounded by a timeout.

    Raises:
        RpcFailure: the handshake failed, which waiting does not mend.
    """
    while True:
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        if tls and state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            problem = handshake_problem(await _last_error(channel))
            if problem:
                raise RpcFailure("UNAVAILABLE", "", f"no connection to {target}: {problem}")
        await channel.wait_for_state_change(state)


async def why_unconnected(channel: grpc.aio.Channel, target: str, *, tls: bool) -> RpcFailure:
    """The failure of a channel that did not connect in time."""
    error = await _last_error(channel)
    problem = explain(error, tls=tls)
    said = f": {problem}" if problem != error else ""
    return RpcFailure("UNAVAILABLE", "", f"no answer from {target}{said}")


async def _last_error(channel: grpc.aio.Channel) -> str:
    """Why the channel is not connected; "" if that is not known, or if it is.

    A channel tells it only to a call, which fails at once.
    """
    check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    try:
        await check(b"", timeout=_ASK_S)
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    return ""


def in_words(failure: RpcFailure, *, tls: bool) -> RpcFailure:
    """The failure, with what TLS has to do with it in place of gRPC's words for that."""
    if failure.reason or failure.code != "UNAVAILABLE":
        return failure
    return replace(failure, message=explain(failure.message, tls=tls))


def read_failure(error: grpc.aio.AioRpcError) -> RpcFailure:
    """What a failed call says."""
    code = error.code().name
    message = error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            return _read_details(value, code, message)
    return RpcFailure(code, "", message)


def _read_details(raw: bytes, code: str, message: str) -> RpcFailure:
    reason, retry_after, violations = "", 0.0, []
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            bad = error_details_pb2.BadRequest()
            if detail.Unpack(info) and info.domain == _DOMAIN:
                reason = info.reason
                if info.metadata.get("limit") == _BAD_CREDENTIALS:
                    code, reason = "UNAUTHENTICATED", "CREDENTIAL_INVALID"
            elif detail.Unpack(retry):
                retry_after = max(0.0, retry.retry_delay.ToMicroseconds() / 1e6)
            elif detail.Unpack(bad):
                violations = [f"{v.field}: {v.description}" for v in bad.field_violations]
    except DecodeError:
        pass  # A proxy's own trailer: the status says enough.
    return RpcFailure(code, reason, message, retry_after, tuple(violations))
