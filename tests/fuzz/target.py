"""The federation that is fuzzed: who calls it, what a request begins as, and what no answer may be.

Every call is real gRPC, of bytes, to a server process on a real PostgreSQL, with the credential
that the RPC asks for. INTERNAL and UNKNOWN are faults of the server; so is UNAVAILABLE, because
its database is there, and a call that lasts until its deadline.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from federation.v1.command_pb2 import COMMAND_STATE_SUCCEEDED
from federation_server.domain.access import Caller
from federation_server.rpc.methods import METHODS
from tests.support.federation import ADMIN_KEY

STUCK_S = 20.0
"""A call that has not ended by then never would: no handler may take as long."""

NEURON = "fuzz"
"""Whose token is used."""

FINE = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
    }
)

_TIMES = {"start_time": "2026-11-21T00:00:00Z", "end_time": "2026-11-21T01:00:00Z"}
_DESCRIPTION = {
    "neuron_id": NEURON,
    "type": "worker",
    "labels": {"zone": "eu"},
    "command_types": [
        {
            "type": "run",
            "data_schema": {"type": "object", "properties": {"n": {"type": "integer"}}},
        }
    ],
    "metadata": {"a": [1, {"b": None}]},
}
_COMMAND = {"neuron_id": NEURON, "type": "run", "data": {"n": 1}}
_HEARTBEAT = {"health_score": 90, "system": {"cpu_percent": 5}, "activity": "ACTIVITY_ACTIVE"}
_REPORT = {
    **_TIMES,
    "points": [
        {"name": "rows", "counter": 1, "labels": {"a": "b"}},
        {"name": "ms", "histogram": {"bounds": [1], "bucket_counts": [1, 2], "sum": 3}},
    ],
    "events": [{"event_time": _TIMES["start_time"], "severity": "SEVERITY_INFO", "type": "t"}],
}
_UPDATE = {"command_id": "?", "attempt": 1, "finished": {"state": "COMMAND_STATE_SUCCEEDED"}}
_SPOOLED = {"spool_id": "spool", "sequence": 1}

BASES: Mapping[str, Mapping[str, Any]] = {
    "Register": {"description": _DESCRIPTION, "enrollment_token": "?"},
    "SendHeartbeat": {"heartbeat": _HEARTBEAT, "instance_id": "i"},
    "ReportAnalytics": {**_SPOOLED, "send_time": _TIMES["end_time"], "report": _REPORT},
    "ReportCommand": {**_SPOOLED, "epoch": "?", "update": _UPDATE},
    "PullCommands": {"instance_id": "i", "max_commands": 5, "lease_duration": "30s"},
    "UpdateNeuron": {
        "neuron_id": NEURON,
        "description": _DESCRIPTION,
        "update_mask": "metadata,labels",
    },
    "IssueCommand": {"command": _COMMAND},
    "ExecuteCommand": {"command": _COMMAND},
    "IssueCommandBatch": {"filter": "type = worker", "command": {"type": "run", "data": {}}},
    "QueryMetrics": {"name": "rows", **_TIMES},
    "ListHeartbeats": {"neuron_id": NEURON, **_TIMES},
    "CreateEnrollmentToken": {"ttl": "3600s", "max_uses": 3},
    "CreateApiKey": {"name": "?", "role": "ROLE_VIEWER"},
    "RotateApiKey": {"name": "?"},
    "ExpireApiKey": {"name": "?", "expire_time": "2100-01-01T00:00:00Z"},
    "RevokeApiKey": {"name": "?"},
}
"""What the requests of some RPCs begin as; "?" stands for something known, and those of others
have nothing but ids that exist.
"""

STREAM_BASES: Sequence[Mapping[str, Any]] = (
    {"hello": {"instance_id": "i", "spool_id": "s", "first_sequence": 1, "next_sequence": 1}},
    {"heartbeat": _HEARTBEAT},
    {"analytics_report": _REPORT, "send_time": _TIMES["end_time"], "sequence": 1},
    {"command_update": _UPDATE, "sequence": 2},
    {"goodbye": {"reason": "enough"}},
)
"""What a neuron may say on its stream, Hello first."""

FILTERS = ('type = "worker"', "presence = ONLINE AND NOT labels.zone = eu", "state = FAILED", "a*")
PATHS = ("metadata", "labels", "alert_thresholds", "alert_thresholds.cpu_percent", "*", "x.y")


def methods() -> list[MethodDescriptor]:
    """Every RPC that the server serves, but what stands for others or is not there: reflection v1,
    which is v1alpha on the wire, and Health.List.
    """
    pool = descriptor_pool.Default()
    found = []
    for path in METHODS:
        service, name = path.lstrip("/").split("/")
        if service != "grpc.reflection.v1.ServerReflection" and name != "List":
            found.append(pool.FindServiceByName(service).methods_by_name[name])
    return found


def is_ours(method: MethodDescriptor) -> bool:
    """The RPC is the federation's, not grpc's own."""
    return method.containing_service.file.package == "federation.v1"


class Target:
    """A server process to send bytes to."""

    def __init__(self, address: str) -> None:
        """Registers the neuron that calls, and makes one object of each kind to name."""
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        # Its types know no calls of bytes.
        self.channel: Any = grpc.insecure_channel(address, options)
        self.answers: Counter[str] = Counter()
        self.known: dict[str, list[str]] = {
            "neuron_id": [NEURON, "nobody"],
            "filter": list(FILTERS),
            "paths": list(PATHS),
            "order_by": ["neuron_id", "create_time desc"],
            "group_by": ["neuron_id", "labels.a"],
            "type": ["run", "worker"],
            "name": ["rows", "ms"],
            "spool_id": ["s", "spool"],
        }
        self.token = ""
        self.register()
        lists = ("FleetService/ListNeurons", "CommandService/ListCommands")
        pages = [self._made(name, page_size=1).next_page_token for name in lists]
        self.known["page_token"] = [*filter(None, pages), "AAAA", "e30="]

    def close(self) -> None:
        """Ends every call."""
        self.channel.close()

    def register(self) -> None:
        """Gives the neuron a token that works, whatever was done to it."""
        with suppress(grpc.RpcError):  # it was deleted, or never there
            self._made("FleetService/ActivateNeuron", neuron_id=NEURON)
        token = self._made("AccessService/CreateEnrollmentToken", allow_reenrollment=True)
        self.known["enrollment_token"] = [token.secret]
        self.known["enrollment_token_id"] = [token.enrollment_token.enrollment_token_id]
        answer = self._made(
            "SessionService/Register", description=_DESCRIPTION, enrollment_token=token.secret
        )
        self.token = answer.token.token

    def base(self, method: MethodDescriptor) -> Message:
        """A request that the server takes; what it names is made anew."""
        self.register()
        self.known["command_id"] = [self.issue(NEURON)]
        batch = self._made(
            "CommandService/IssueCommandBatch", filter="type = worker", command={"type": "run"}
        )
        self.known["batch_id"] = [batch.batch.batch_id]
        if method.name == "RetryCommand":  # whose command must have ended
            self._made("CommandService/CancelCommand", command_id=self.known["command_id"][0])
        if method.name == "ReportCommand":
            pulled = self._made("SessionService/PullCommands", instance_id="i", max_commands=100)
            self.known["epoch"] = [str(pulled.epoch)]
        if method.name == "RejectNeuron":  # who does not take part
            self._made("FleetService/DeactivateNeuron", neuron_id=NEURON)
        if method.name.endswith("ApiKey"):
            name = f"key-{uuid.uuid4().hex}"
            self.known["name"] = [name, "rows", "ms"]
            if method.name != "CreateApiKey":
                self._made("AccessService/CreateApiKey", name=name, role="ROLE_VIEWER")
        request = GetMessageClass(method.input_type)()
        ParseDict(self._filled(BASES.get(method.name, {})), request)
        for field in request.DESCRIPTOR.fields:
            if method.name not in BASES and field.name in self.known and field.name.endswith("_id"):
                setattr(request, field.name, self.known[field.name][0])
        return request

    def stream_bases(self, connect: MethodDescriptor) -> list[Message]:
        """Messages of a neuron's stream that the server takes."""
        make = type(self.base(connect))
        return [ParseDict(self._filled(each), make()) for each in STREAM_BASES]

    def unary(self, method: MethodDescriptor, data: bytes) -> None:
        """Sends a request; of a stream of answers the first is read.

        Raises:
            AssertionError: the answer is a fault of the server.
        """
        path = f"/{method.containing_service.full_name}/{method.name}"
        code = grpc.StatusCode.OK
        try:
            if method.server_streaming:
                streamed = method.client_streaming
                kind = self.channel.stream_stream if streamed else self.channel.unary_stream
                answers = kind(path)(
                    iter([data]) if streamed else data,
                    metadata=self._credential(path),
                    timeout=STUCK_S,
                )
                next(answers, None)
                answers.cancel()
            else:
                self.channel.unary_unary(path)(
                    data, metadata=self._credential(path), timeout=STUCK_S
                )
        except grpc.RpcError as error:
            code = self._judge(path, error)
        self._note(method.name, code)

    def stream(self, messages: Sequence[bytes], *, cancels: bool) -> None:
        """Opens a neuron's stream and says all that; then cancels it, or closes its own side.

        Raises:
            AssertionError: it ended by a fault of the server, or not at all.
        """
        path = "/federation.v1.SessionService/Connect"

        def said() -> Iterator[bytes]:
            yield from messages
            if cancels:
                opened.wait()
                call.cancel()

        opened = threading.Event()
        call = self.channel.stream_stream(path)(
            said(), metadata=self._credential(path), timeout=STUCK_S
        )
        opened.set()
        code = grpc.StatusCode.OK
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            if not cancels or error.code() is not grpc.StatusCode.CANCELLED:
                code = self._judge(path, error)
        self._note("Connect", code)

    def issue(self, neuron_id: str) -> str:
        """The id of a new command."""
        command = {"neuron_id": neuron_id, "type": "run"}
        issued = self._made("CommandService/IssueCommand", command=command)
        command_id: str = issued.command.command_id
        return command_id

    def has_succeeded(self, command_id: str) -> bool:
        """The command has ended well."""
        found = self._made("CommandService/GetCommand", command_id=command_id)
        return bool(found.command.state == COMMAND_STATE_SUCCEEDED)

    def _judge(self, path: str, error: Any) -> grpc.StatusCode:
        code: grpc.StatusCode = error.code()
        assert code in FINE, f"{path} answered {code.name}: {error.details()}"
        return code

    def _note(self, name: str, code: grpc.StatusCode) -> None:
        self.answers[f"{name} {code.name}"] += 1
        shut_out = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION}
        if code in shut_out or name in {"Deregister", "DeleteNeuron", "DeactivateNeuron"}:
            self.register()

    def _credential(self, path: str) -> list[tuple[str, str]]:
        match METHODS[path]:
            case Caller.ANYONE:
                return []
            case Caller.NEURON:
                return [("authorization", f"Bearer {self.token}")]
            case _:
                return [("x-admin-key", ADMIN_KEY)]

    def _made(self, name: str, /, **request: Any) -> Any:
        """The answer to a request that must succeed."""
        path = f"/federation.v1.{name}"
        method = next(each for each in methods() if path.endswith(f".{_name(each)}"))
        message = ParseDict(request, GetMessageClass(method.input_type)())
        call = self.channel.unary_unary(
            path,
            request_serializer=lambda each: each.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return call(message, metadata=self._credential(path), timeout=STUCK_S)

    def _filled(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The base with something known for each "?"."""
        return {
            name: self.known[name][0]
            if value == "?"
            else self._filled(value)
            if isinstance(value, dict)
            else value
            for name, value in base.items()
        }


def _name(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}/{method.name}"
