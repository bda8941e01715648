"""The audit log, as the servicers write it: who calls is known, they say what they have changed.

    before = …
    …the change…
    await audit.record(connection, "neuron", neuron_id, before, after)

`MUTATIONS` names the RPCs that have entries: a servicer's `record` for each success, in the
transaction of its effect, and `Witness` for each that is refused, in the background. A call that
has changed nothing, because it was repeated or all was so already, has none.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import access_service_pb2 as pb
from federation.v1.session_service_pb2 import RegisterRequest
from federation_server.domain.access import Admin, NeuronIdentity
from federation_server.domain.audit import STRANGER, Entry, address, differences, fit_id
from federation_server.live.refusals import Refusals
from federation_server.rpc import auth
from federation_server.rpc.convert import to_struct, to_timestamp
from federation_server.rpc.errors import Refused
from federation_server.rpc.methods import DEREGISTER, METHODS, REGISTER
from federation_server.store import audit as store


@dataclass(frozen=True, slots=True)
class Subject:
    """What an RPC changes, and where its request names that."""

    object_type: str
    id_path: str = ""
    """The request's field; empty: the object is yet to be made."""
    neuron_path: str = ""
    """The field that names the neuron which the object belongs to."""


MUTATIONS: Mapping[str, Subject] = {
    REGISTER: Subject("neuron", "description.neuron_id"),
    DEREGISTER: Subject("neuron"),
    "/federation.v1.FleetService/UpdateNeuron": Subject("neuron", "neuron_id"),
    "/federation.v1.FleetService/DeactivateNeuron": Subject("neuron", "neuron_id"),
    "/federation.v1.FleetService/ActivateNeuron": Subject("neuron", "neuron_id"),
    "/federation.v1.FleetService/DeleteNeuron": Subject("neuron", "neuron_id"),
    "/federation.v1.CommandService/IssueCommand": Subject("command", "", "command.neuron_id"),
    "/federation.v1.CommandService/ExecuteCommand": Subject("command", "", "command.neuron_id"),
    "/federation.v1.CommandService/CancelCommand": Subject("command", "command_id"),
    "/federation.v1.CommandService/RetryCommand": Subject("command", "command_id"),
    "/federation.v1.CommandService/IssueCommandBatch": Subject("command_batch"),
    "/federation.v1.CommandService/CancelCommandBatch": Subject("command_batch", "batch_id"),
    "/federation.v1.AccessService/CreateEnrollmentToken": Subject("enrollment_token"),
    "/federation.v1.AccessService/RevokeEnrollmentToken": Subject(
        "enrollment_token", "enrollment_token_id"
    ),
    "/federation.v1.AccessService/ApproveNeuron": Subject("neuron", "neuron_id"),
    "/federation.v1.AccessService/RejectNeuron": Subject("neuron", "neuron_id"),
    "/federation.v1.AccessService/RevokeNeuronTokens": Subject("neuron", "neuron_id"),
    "/federation.v1.AccessService/CreateApiKey": Subject("api_key", "name"),
    "/federation.v1.AccessService/RotateApiKey": Subject("api_key", "name"),
    "/federation.v1.AccessService/ExpireApiKey": Subject("api_key", "name"),
    "/federation.v1.AccessService/RevokeApiKey": Subject("api_key", "name"),
    "/federation.v1.AccessService/RotateSigningKey": Subject("signing_key"),
}
"""The RPCs that have entries in the audit log."""

READ_ONLY = frozenset(
    {
        "/federation.v1.AccessService/ListEnrollmentTokens",
        "/federation.v1.AccessService/ListApiKeys",
        "/federation.v1.AccessService/ListSigningKeys",
        "/federation.v1.AccessService/ListAuditEntries",
        *(rpc for rpc in METHODS if rpc.startswith("/grpc.channelz.")),
    }
)
"""The RPCs for OPERATOR and ADMIN that change nothing. A test finds those that are in neither."""

_BAD_CREDENTIAL = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})


@dataclass(frozen=True, slots=True)
class _Call:
    """The call that is being served."""

    method: str = ""
    peer: str = ""
    server_id: str = ""
    call_id: str = field(default_factory=lambda: str(uuid.uuid4()))


_SAME = tuple(each.name for each in fields(Entry) if each.name not in {"before", "after"})

_call: ContextVar[_Call | None] = ContextVar("call", default=None)


async def record(
    connection: AsyncConnection,
    object_type: str,
    object_id: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    *,
    neuron_id: str = "",
    request_id: str = "",
    actor: str = "",
) -> None:
    """Puts a change of this call into the log, in the transaction of the change; nothing if there
    is no difference.

    `before` and `after` are the object's fields; None: there was no object, or there is none any
    more. `neuron_id`: the neuron that an object which is no neuron belongs to. `actor`: who did it,
    where no credential says so.
    """
    was, is_now = differences(before, after)
    if was == {} == is_now:
        return  # not where they only look the same: a secret, or a large value, that was changed
    made = entry(
        object_type,
        object_id,
        was,
        is_now,
        neuron_id=neuron_id,
        request_id=request_id,
        actor=actor,
    )
    await store.record(connection, made)


def entry(
    object_type: str,
    object_id: str,
    before: Any,
    after: Any,
    *,
    neuron_id: str = "",
    request_id: str = "",
    actor: str = "",
    outcome: str = "OK",
    reason: str = "",
) -> Entry:
    """An entry of this call. `before` and `after` must be fit for the log."""
    call, principal = _call.get() or _Call(), auth.current_principal()
    admin = principal if isinstance(principal, Admin) else None
    return Entry(
        actor=actor or (STRANGER if principal is None else principal.actor),
        role="" if admin is None else admin.role.name,
        api_key_id="" if admin is None else admin.api_key_id,
        peer=call.peer,
        method=call.method,
        object_type=object_type,
        object_id=object_id,
        neuron_id=object_id if object_type == "neuron" else neuron_id,
        before=before,
        after=after,
        outcome=outcome,
        reason=reason,
        request_id=request_id,
        call_id=call.call_id,
        server_id=call.server_id,
    )


class Witness:
    """Sees every call begin, and every one that is refused."""

    def __init__(self, refusals: Refusals, server_id: str) -> None:
        """`server_id` is this server's."""
        self._refusals = refusals
        self._server_id = server_id

    def begins(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """From here on the task serves that call."""
        if method in MUTATIONS:
            _call.set(_Call(method, address(context.peer()), self._server_id))

    def refused(
        self,
        method: str,
        context: grpc.aio.ServicerContext[Any, Any],
        refused: Refused,
        request: object = None,
    ) -> None:
        """The call ends with that error."""
        subject = MUTATIONS.get(method)
        if subject is None:
            if refused.code not in _BAD_CREDENTIAL:
                return
            subject = Subject("")
        if refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED and refused.retry_after is not None:
            return  # it was told to come again, and nobody has looked at what it asks
        if _call.get() is None:
            _call.set(_Call(method, address(context.peer()), self._server_id))
        object_id = _named(request, subject.id_path)
        principal = auth.current_principal()
        if method == DEREGISTER and isinstance(principal, NeuronIdentity):
            object_id = principal.neuron_id
        self._refusals.note(
            entry(
                subject.object_type,
                object_id,
                None,
                None,
                neuron_id=_named(request, subject.neuron_path),
                request_id=logged_request_id(request),
                outcome=refused.code.name,
                reason=refused.reason_name,
            )
        )


def logged_request_id(request: object) -> str:
    """What the log says of a request's request_id. In a Register without an enrollment token that
    is as good as a credential: who repeats the call gets the neuron's token.
    """
    if isinstance(request, RegisterRequest) and not request.enrollment_token:
        return ""
    return _named(request, "request_id")


def _named(request: object, path: str) -> str:
    """The id in that field of a request, which nobody may have checked; empty if there is none."""
    found: Any = request
    for name in path.split("."):
        if not (isinstance(found, Message) and name in found.DESCRIPTOR.fields_by_name):
            return ""
        found = getattr(found, name)
    return fit_id(found) if isinstance(found, str) else ""


def to_message(stored: store.StoredEntry) -> pb.AuditEntry:
    """An entry as the contract shows it."""
    entry = stored.entry
    same = {name: getattr(entry, name) for name in _SAME}
    return pb.AuditEntry(
        entry_id=stored.entry_id,
        entry_time=to_timestamp(stored.entry_time),
        before=to_struct(entry.before),
        after=to_struct(entry.after),
        **same,
    )
