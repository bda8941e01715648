"""The gRPC channel to the federation, and what its errors mean."""

from __future__ import annotations

import random
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

# A dead path is noticed after at most PING + PING_TIMEOUT; the server permits a ping each 10 s.
PING_MS = 18_000
PING_TIMEOUT_MS = 10_000
MAX_MESSAGE_BYTES = 4 * 2**20
RECONNECT_MS = (1_500, 3_000)
"""How long gRPC waits at the most between two tries to connect, for as long as somebody waits for a
channel. Each channel has its own, so that those that lost one server do not try in step."""

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


def open_channel(target: str, *, max_receive_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel of its own for one neuron; it connects when first used."""
    most_ms = random.randint(*RECONNECT_MS)  # noqa: S311 - jitter
    return grpc.aio.insecure_channel(
        target,
        options=[
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
        ],
    )


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
