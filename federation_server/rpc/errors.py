"""Every error that an RPC answers with: built here, and nowhere else.

Code raises what a function here gives: `raise errors.neuron_not_found(neuron_id)`. The
`ErrorMapping` interceptor turns it, and whatever else a handler raises, into a status with the
details that `errors.proto` promises. A cause never reaches the client: what is not in the table is
INTERNAL with an incident id, under which the log has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from federation.v1.errors_pb2 import ErrorReason
from federation_server.domain.violation import Violation
from federation_server.live.session import SessionEnd

DOMAIN = "federation"

DETAILS_KEY = "grpc-status-details-bin"

MAX_DETAILS_BYTES = 5 * 1024
"""HTTP/2 stacks take 8 KiB of trailers by default, and base64 makes four bytes of three. The
violations that do not fit are counted in ErrorInfo.metadata["omitted_violations"]."""

MAX_MESSAGE_LENGTH = 512

SUPERSEDED_BACK_OFF_S = 60.0
DATABASE_RETRY_S = 1.0
DATABASE_FULL_RETRY_S = 10.0
PENDING_RETRY_S = 30.0

_CODES: Mapping[ErrorReason.ValueType, grpc.StatusCode] = {
    ErrorReason.ERROR_REASON_INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_CREDENTIAL_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    ErrorReason.ERROR_REASON_CREDENTIAL_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    ErrorReason.ERROR_REASON_CREDENTIAL_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorReason.ERROR_REASON_ROLE_TOO_LOW: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.ERROR_REASON_NOT_THIS_NEURON: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.ERROR_REASON_ENROLLMENT_REFUSED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.ERROR_REASON_NEURON_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_NEURON_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_NEURON_DEACTIVATED: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_NEURON_NOT_OFFLINE: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_SESSION_SUPERSEDED: grpc.StatusCode.ABORTED,
    ErrorReason.ERROR_REASON_PROTOCOL_VIOLATION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_COMMAND_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_COMMAND_TYPE_NOT_ADVERTISED: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_REQUEST_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_ENROLLMENT_TOKEN_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_PAGE_TOKEN_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_DATABASE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ERROR_REASON_SERVER_DRAINING: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ERROR_REASON_INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorReason.ERROR_REASON_CONFLICT: grpc.StatusCode.ABORTED,
    ErrorReason.ERROR_REASON_COMMAND_ENDED: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_COMMAND_NOT_ENDED: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_COMMAND_BATCH_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_NO_NEURON_MATCHES: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_SERVER_BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_NEURON_PENDING: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_NEURON_NOT_PENDING: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_API_KEY_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_LAST_ADMIN_KEY: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_API_KEY_NAME_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
}


class Refused(Exception):
    """An RPC ends with an error. Its text is for the client."""

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
        precondition: str | None = None,
    ) -> None:
        """`metadata`: the ids that it is about. `retry_after`: seconds after which the same call
        may succeed. `precondition`: the id of what is not as it must be.
        """
        message = message.replace("\0", "")
        if len(message) > MAX_MESSAGE_LENGTH:
            message = message[: MAX_MESSAGE_LENGTH - 1] + "…"
        super().__init__(message)
        self.reason: Final = reason
        self.message: Final = message
        self.metadata: Final = dict(metadata or {})
        self.violations: Final = tuple(violations)
        self.retry_after: Final = retry_after
        self.precondition: Final = precondition

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code."""
        return _CODES[self.reason]

    @property
    def reason_name(self) -> str:
        """The reason as ErrorInfo has it: "NEURON_NOT_FOUND"."""
        return ErrorReason.Name(self.reason).removeprefix("ERROR_REASON_")


def to_status(refused: Refused) -> status_pb2.Status:
    """The rich status, small enough for every client's limit of trailers."""
    number: int = refused.code.value[0]
    status = status_pb2.Status(code=number, message=refused.message)
    info = error_details_pb2.ErrorInfo(
        reason=refused.reason_name,
        domain=DOMAIN,
        metadata={key: _cut(value) for key, value in refused.metadata.items()},
    )
    others: list[Message] = []
    if refused.retry_after is not None:
        delay = Duration()
        delay.FromMilliseconds(round(refused.retry_after * 1000))
        others.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if refused.precondition is not None:
        failed = error_details_pb2.PreconditionFailure.Violation(
            type=refused.reason_name,
            subject=_cut(refused.precondition),
            description=refused.message,
        )
        others.append(error_details_pb2.PreconditionFailure(violations=[failed]))
    if refused.violations:
        shown = _as_many_as_fit(refused.violations)
        others.append(error_details_pb2.BadRequest(field_violations=shown))
        if len(shown) < len(refused.violations):
            info.metadata["omitted_violations"] = str(len(refused.violations) - len(shown))
    for detail in (info, *others):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _cut(text: str) -> str:
    return text if len(text) <= 128 else text[:127] + "…"


def _as_many_as_fit(
    violations: Sequence[Violation],
) -> list[error_details_pb2.BadRequest.FieldViolation]:
    shown = []
    room = MAX_DETAILS_BYTES - MAX_MESSAGE_LENGTH
    for violation in violations:
        one = error_details_pb2.BadRequest.FieldViolation(
            field=violation.field, description=violation.description
        )
        room -= one.ByteSize() + 4  # its tag and length
        if room < 0:
            break
        shown.append(one)
    return shown


def trailers(refused: Refused) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries the rich status."""
    return ((DETAILS_KEY, to_status(refused).SerializeToString()),)


# -- one function for each reason ------------------------------------------------------------


def invalid_fields(violations: Sequence[Violation]) -> Refused:
    """Fields that break limits; TOO_LARGE if all of it is about size."""
    reason = ErrorReason.ERROR_REASON_INVALID_FIELD
    if all(violation.too_large for violation in violations):
        reason = ErrorReason.ERROR_REASON_TOO_LARGE
    first = violations[0]
    name = first.field or "the message"
    message = f"{name} {first.description}"
    if len(violations) > 1:
        message = f"{len(violations)} fields break limits, the first: {message}"
    return Refused(reason, message, violations=violations)


def invalid_field(field: str, description: str) -> Refused:
    """One field is not as it must be."""
    return invalid_fields([Violation(field, description)])


def too_large(field: str, description: str) -> Refused:
    """A field, or with an empty name the whole message, is larger than its limit."""
    return invalid_fields([Violation(field, description, too_large=True)])


def credential_missing() -> Refused:
    """The call carries no credential."""
    return Refused(
        ErrorReason.ERROR_REASON_CREDENTIAL_MISSING,
        "this call needs a credential: send `authorization: Bearer <token>` in its metadata, or an "
        "admin's `x-admin-key: <key>`",
    )


def credential_invalid() -> Refused:
    """The credential is no good; why not stays in the log."""
    return Refused(
        ErrorReason.ERROR_REASON_CREDENTIAL_INVALID,
        "the credential is not valid: ask for a new one",
    )


def credential_expired() -> Refused:
    """The credential was good and its time is over."""
    return Refused(
        ErrorReason.ERROR_REASON_CREDENTIAL_EXPIRED, "the credential has expired: ask for a new one"
    )


def role_too_low(required: str) -> Refused:
    """The caller's role is below `required`."""
    return Refused(
        ErrorReason.ERROR_REASON_ROLE_TOO_LOW,
        f"this call needs the role {required}: use a credential that has it",
        metadata={"required_role": required},
    )


def not_this_neuron(neuron_id: str) -> Refused:
    """The token is another neuron's."""
    return Refused(
        ErrorReason.ERROR_REASON_NOT_THIS_NEURON,
        f"the token is not that of {_cut(neuron_id)}: use the neuron's own",
        metadata={"neuron_id": neuron_id},
    )


def enrollment_refused() -> Refused:
    """The enrollment token is no good for this neuron; why not stays in the log."""
    return Refused(
        ErrorReason.ERROR_REASON_ENROLLMENT_REFUSED,
        "the enrollment token does not enroll this neuron: ask an admin for a new one",
    )


def neuron_exists(neuron_id: str) -> Refused:
    """The id is taken."""
    return Refused(
        ErrorReason.ERROR_REASON_NEURON_EXISTS,
        f"the neuron_id {_cut(neuron_id)} is taken: show that neuron's token, or an enrollment"
        " token that allows re-enrollment",
        metadata={"neuron_id": neuron_id},
    )


def neuron_not_found(neuron_id: str) -> Refused:
    """No neuron has that id."""
    return Refused(
        ErrorReason.ERROR_REASON_NEURON_NOT_FOUND,
        f"there is no neuron {_cut(neuron_id)}: list the neurons to see which there are",
        metadata={"neuron_id": neuron_id},
    )


def neuron_deactivated(neuron_id: str) -> Refused:
    """The neuron is shut out."""
    return Refused(
        ErrorReason.ERROR_REASON_NEURON_DEACTIVATED,
        f"the neuron {_cut(neuron_id)} is deactivated: an admin must activate it",
        metadata={"neuron_id": neuron_id},
        precondition=neuron_id,
    )


def neuron_pending(neuron_id: str) -> Refused:
    """The neuron waits for an admin's approval."""
    return Refused(
        ErrorReason.ERROR_REASON_NEURON_PENDING,
        f"the neuron {_cut(neuron_id)} waits for approval: an admin must approve or reject it",
        metadata={"neuron_id": neuron_id},
        retry_after=PENDING_RETRY_S,
        precondition=neuron_id,
    )


def neuron_not_pending(neuron_id: str, what: str) -> Refused:
    """The neuron does not wait for an approval; `what` says what it does, or how to go on."""
    return Refused(
        ErrorReason.ERROR_REASON_NEURON_NOT_PENDING,
        f"the neuron {_cut(neuron_id)} {what}",
        metadata={"neuron_id": neuron_id},
        precondition=neuron_id,
    )


def neuron_not_offline(neuron_id: str) -> Refused:
    """The neuron is there, and the request does not force."""
    return Refused(
        ErrorReason.ERROR_REASON_NEURON_NOT_OFFLINE,
        f"the neuron {_cut(neuron_id)} is not OFFLINE: stop it first, or set force",
        metadata={"neuron_id": neuron_id},
        precondition=neuron_id,
    )


def session_superseded(neuron_id: str = "") -> Refused:
    """A newer session took over; the neuron is to stay away for a while."""
    return Refused(
        ErrorReason.ERROR_REASON_SESSION_SUPERSEDED,
        "a newer session of this neuron took over: see that its id is used by one process only",
        metadata={"neuron_id": neuron_id} if neuron_id else None,
        retry_after=SUPERSEDED_BACK_OFF_S,
    )


def protocol_violation(what: str) -> Refused:
    """The peer broke the protocol; `what` says how."""
    return Refused(
        ErrorReason.ERROR_REASON_PROTOCOL_VIOLATION,
        f"{what}: connect again and follow session_service.proto",
        precondition="session",
    )


def command_not_found(command_id: str) -> Refused:
    """No command has that id."""
    return Refused(
        ErrorReason.ERROR_REASON_COMMAND_NOT_FOUND,
        f"there is no command {_cut(command_id)}: list the commands to see which there are",
        metadata={"command_id": command_id},
    )


def command_ended(command_id: str, state: str) -> Refused:
    """The command has ended, so that it cannot be cancelled."""
    return Refused(
        ErrorReason.ERROR_REASON_COMMAND_ENDED,
        f"the command {_cut(command_id)} has ended as {state}: there is nothing to cancel",
        metadata={"command_id": command_id, "state": state},
        precondition=command_id,
    )


def command_not_ended(command_id: str, state: str) -> Refused:
    """The command has not ended, so that it cannot be issued anew."""
    remedy = "wait for its end" + ("" if state == "CANCELLING" else ", or cancel it first")
    return Refused(
        ErrorReason.ERROR_REASON_COMMAND_NOT_ENDED,
        f"the command {_cut(command_id)} is {state}: {remedy}",
        metadata={"command_id": command_id, "state": state},
        precondition=command_id,
    )


def command_batch_not_found(batch_id: str) -> Refused:
    """No batch has that id."""
    return Refused(
        ErrorReason.ERROR_REASON_COMMAND_BATCH_NOT_FOUND,
        f"there is no batch {_cut(batch_id)}: list the batches to see which there are",
        metadata={"batch_id": batch_id},
    )


def no_neuron_matches(matched: int, example: str = "") -> Refused:
    """Nobody would get a batch's command; `example` says why one of those that match would not."""
    if matched:
        words = f"of the {matched} neurons that match, none would get the command, e.g. {example}"
    else:
        words = "no neuron matches the filter: list the neurons with it"
    return Refused(
        ErrorReason.ERROR_REASON_NO_NEURON_MATCHES,
        words,
        metadata={"matched_count": str(matched)},
        precondition="neurons",
    )


def command_type_not_advertised(neuron_id: str, command_type: str) -> Refused:
    """The neuron does not say that it takes that type."""
    return Refused(
        ErrorReason.ERROR_REASON_COMMAND_TYPE_NOT_ADVERTISED,
        f"the neuron {_cut(neuron_id)} does not advertise the command type {_cut(command_type)}:"
        " use one of its command_types, or set allow_unadvertised",
        metadata={"neuron_id": neuron_id, "command_type": command_type},
        precondition=neuron_id,
    )


def request_id_reused(request_id: str) -> Refused:
    """The request_id stands for another request."""
    return Refused(
        ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
        f"the request_id {_cut(request_id)} was used for a different request: use a new one",
        metadata={"request_id": request_id},
    )


def enrollment_token_not_found(enrollment_token_id: str) -> Refused:
    """No enrollment token has that id."""
    return Refused(
        ErrorReason.ERROR_REASON_ENROLLMENT_TOKEN_NOT_FOUND,
        f"there is no enrollment token {_cut(enrollment_token_id)}: list them to see which there"
        " are",
        metadata={"enrollment_token_id": enrollment_token_id},
    )


def api_key_not_found(name: str, *, revoked: bool = False) -> Refused:
    """No API key has that name, or only one that was revoked."""
    words = f"the API key {_cut(name)} was revoked" if revoked else f"no API key is {_cut(name)}"
    return Refused(
        ErrorReason.ERROR_REASON_API_KEY_NOT_FOUND,
        f"{words}: list them to see which there are",
        metadata={"name": name},
    )


def last_admin_key(name: str) -> Refused:
    """Without that API key nobody could administer the federation any more."""
    return Refused(
        ErrorReason.ERROR_REASON_LAST_ADMIN_KEY,
        f"the API key {_cut(name)} is the last ADMIN key that stays: create another one first,"
        " of role ADMIN and without a ttl",
        metadata={"name": name},
        precondition=name,
    )


def api_key_name_taken(name: str) -> Refused:
    """An API key has that name, or had it."""
    return Refused(
        ErrorReason.ERROR_REASON_API_KEY_NAME_TAKEN,
        f"an API key is or was named {_cut(name)}: choose another name, or rotate that key",
        metadata={"name": name},
    )


def page_token_invalid() -> Refused:
    """The page_token is not one of this list's, or the list is another now."""
    words = "is not one of this list's: begin again at the first page"
    return Refused(
        ErrorReason.ERROR_REASON_PAGE_TOKEN_INVALID,
        f"page_token {words}",
        violations=[Violation("page_token", words)],
    )


def database_unavailable(retry_after: float = DATABASE_RETRY_S) -> Refused:
    """The database does not answer."""
    return Refused(
        ErrorReason.ERROR_REASON_DATABASE_UNAVAILABLE,
        "the database does not answer: try again",
        retry_after=retry_after,
    )


def database_full() -> Refused:
    """The database's disk is full."""
    return Refused(
        ErrorReason.ERROR_REASON_DATABASE_UNAVAILABLE,
        "the database has no room on its disk: whoever runs it must make some",
        retry_after=DATABASE_FULL_RETRY_S,
    )


def server_draining(retry_after: float = DATABASE_RETRY_S) -> Refused:
    """The server is shutting down."""
    return Refused(
        ErrorReason.ERROR_REASON_SERVER_DRAINING,
        "the server is shutting down: try again",
        retry_after=retry_after,
    )


def server_busy(retry_after: float) -> Refused:
    """More come at once than the server takes on; each is told a time of its own."""
    return Refused(
        ErrorReason.ERROR_REASON_SERVER_BUSY,
        "too many neurons come at once: come again after retry_delay",
        retry_after=retry_after,
    )


def rate_limited(limit: str, retry_after: float) -> Refused:
    """One caller calls more often than that limit, a setting, lets it."""
    return Refused(
        ErrorReason.ERROR_REASON_RATE_LIMITED,
        f"this is more than FEDERATION_{limit} allows: come again after retry_delay",
        metadata={"limit": limit},
        retry_after=retry_after,
    )


def internal(incident_id: str) -> Refused:
    """A fault of the server; the log has the cause under the id."""
    return Refused(
        ErrorReason.ERROR_REASON_INTERNAL,
        f"the server failed: report the incident {incident_id}",
        metadata={"incident_id": incident_id},
    )


def conflict(what: str) -> Refused:
    """Somebody else changed the object meanwhile; `what` says which."""
    return Refused(ErrorReason.ERROR_REASON_CONFLICT, f"{what}: read it again and repeat the call")


def session_ended(
    end: SessionEnd,
    detail: str = "",
    neuron_id: str = "",
    reconnect_after: timedelta | None = None,
) -> Refused:
    """Why a stream ended that the server ends; `reconnect_after` is what its Reconnect said."""
    match end:
        case SessionEnd.SUPERSEDED:
            return session_superseded(neuron_id)
        case SessionEnd.DEACTIVATED:
            return neuron_deactivated(neuron_id)
        case SessionEnd.REVOKED:
            return credential_invalid()
        case SessionEnd.DRAINING:
            if reconnect_after is None:
                return server_draining()
            return server_draining(reconnect_after.total_seconds())
        case SessionEnd.PROTOCOL_VIOLATION:
            return protocol_violation(detail or "the protocol was broken")
