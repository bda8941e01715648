"""What a call's error says to people: one line with the reason, and the details below it."""

from __future__ import annotations

from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from federation_server.console.failure import EXIT_FAILED, EXIT_UNAVAILABLE, Failure
from federation_server.console.wording import span

_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""How a call ends when its server ends."""

_NO_ANSWER = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


class CallFailure(Failure):
    """A call came to nothing."""

    def __init__(self, *lines: str, code: grpc.StatusCode, details: Details, sent: bool) -> None:
        no_answer = code in _NO_ANSWER
        super().__init__(*lines, exit_code=EXIT_UNAVAILABLE if no_answer else EXIT_FAILED)
        self.code = code
        self.retry_after = details.retry_after
        """Seconds that the federation asked to wait; 0 if it did not."""
        self.passing = code in _LOST or code is grpc.StatusCode.DEADLINE_EXCEEDED
        """The same call may succeed as soon as a server answers."""
        self.maybe_done = sent and no_answer and not details.reason
        """The call may have taken effect all the same."""


class Details:
    """The parts of an error that the contract promises (errors.proto); all may be missing."""

    def __init__(self, status: Any) -> None:
        self.reason = ""
        self.incident_id = ""
        self.neuron_id = ""
        self.violations: list[tuple[str, str]] = []
        self.retry_after = 0.0
        self.retry_text = ""
        for detail in status.details if status is not None else ():
            self._add_info(detail)
            self._add_violations(detail)
            self._add_retry(detail)

    def _add_info(self, detail: Any) -> None:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            self.reason = info.reason
            self.incident_id = info.metadata.get("incident_id", "")
            self.neuron_id = info.metadata.get("neuron_id", "")

    def _add_violations(self, detail: Any) -> None:
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            self.violations += [(each.field, each.description) for each in request.field_violations]
        precondition = error_details_pb2.PreconditionFailure()
        if detail.Unpack(precondition):
            self.violations += [
                (each.subject or each.type, each.description) for each in precondition.violations
            ]

    def _add_retry(self, detail: Any) -> None:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            delay = retry.retry_delay
            self.retry_after = delay.seconds + delay.nanos / 1e9
            self.retry_text = span(delay)


def failure(
    error: grpc.RpcError, *, server: str, timeout: float, key_source: str, tls: bool = False
) -> CallFailure:
    """The failure that an error of gRPC means.

    Args:
        error: what the call raised.
        server: the address that was called.
        timeout: how many seconds the answer had.
        key_source: where the key came from, for people.
        tls: whether the way there is TLS.
    """
    call = cast("grpc.Call", error)  # every error that a call raises is the call as well
    code = call.code()
    text = call.details() or ""
    details = Details(_status(call))
    sent = not _never_sent(text)
    if not details.reason:
        line = _without_reason(code, text, server=server, timeout=timeout)
        if code is grpc.StatusCode.UNAVAILABLE:
            line = handshake_problem(text, server=server, tls=tls) or line
        return CallFailure(line, code=code, details=details, sent=sent)
    lines = [f"{text or 'refused'} ({details.reason})"]
    lines += _untold(details.violations, text)
    if details.reason in _HINTS:
        lines.append(_HINTS[details.reason].format(neuron=details.neuron_id))
    if details.incident_id and details.incident_id not in text:
        lines.append(f"incident {details.incident_id}: the server's log says more under it")
    if details.retry_text:
        lines.append(f"try again in {details.retry_text}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        lines.append(f"the key came from {key_source}")
    return CallFailure(*lines, code=code, details=details, sent=sent)


_HINTS = {
    "COMMAND_TYPE_NOT_ADVERTISED": "`federation neurons show {neuron}` lists its types;"
    " --allow-unadvertised orders it all the same",
}
"""What a refusal means at this command line, beyond what the federation says to everybody."""


def no_answer(*, server: str, timeout: float) -> CallFailure:
    """The failure of a call that was given up, as its time was over."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    line = _without_reason(code, "", server=server, timeout=timeout)
    return CallFailure(line, code=code, details=Details(None), sent=True)


def _untold(violations: list[tuple[str, str]], text: str) -> list[str]:
    """A line for each violation; none for a single one that the reason has told in full."""
    if len(violations) == 1 and all(part in text for part in violations[0]):
        return []
    return [f"{field}: {meaning}" for field, meaning in violations]


def _without_reason(code: grpc.StatusCode, text: str, *, server: str, timeout: float) -> str:
    """The line for an error that no federation sent, or that lost its details on the way."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{server} did not answer within {timeout:g} s (--timeout allows more)"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"what answers at {server} is no federation, or one of another version"
    if code not in _LOST:
        return f"{text or 'refused'} ({code.name})"
    if _unknown_host(text):
        return f"{server}: there is no host of that name"
    if _never_sent(text):
        return (
            f"no federation answers at {server}: start one with `federation up`,"
            " or name it with --server"
        )
    return f"the federation at {server} went away before it answered"


_HANDSHAKE = {
    "WRONG_VERSION_NUMBER": "{server} speaks plaintext and not TLS: write federation://{server}"
    " if your key may travel readable to anybody on the way",
    "certificate has expired": "the certificate of {server} has expired:"
    " whoever runs the server must renew it",
    "certificate is not yet valid": "the certificate of {server} is not valid yet:"
    " is this machine's clock right?",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of {server} is from a CA that is not trusted"
    " here: name its CA's file with FEDERATION_CA_FILE",
    "Hostname Verification": "the certificate of {server} is for other names: use one of them,"
    " or give it this one too (`federation tls init` with a --host for every name)",
    "create security handshaker": "FEDERATION_CA_FILE, or the client's certificate with its key,"
    " is damaged or does not fit together",
    "handshake failed": "{server} and this command found no TLS in common",
}
"""What gRPC says of a handshake that failed, in its words and in ours; the first that fits."""


def handshake_problem(text: str, *, server: str, tls: bool) -> str:
    """What TLS has to do with a call that never reached the server; "" for nothing."""
    for sign, meaning in _HANDSHAKE.items() if tls else ():
        if sign.lower() in text.lower():
            return meaning.format(server=server)
    if not (_never_sent(text) and "socket closed" in text.lower()):
        return ""
    if tls:
        return (
            f"{server} closed the connection after the handshake: it may ask for a client's"
            " certificate (FEDERATION_CLIENT_CERT_FILE and FEDERATION_CLIENT_KEY_FILE)"
            " or not take this one"
        )
    return f"{server} closed the connection at once: if it speaks TLS, write federations://{server}"


def _unknown_host(text: str) -> bool:
    return any(sign in text.lower() for sign in ("dns resolution", "name resolution", "resolving"))


def _never_sent(text: str) -> bool:
    """Whether gRPC says that it never had a connection."""
    signs = ("failed to connect", "connections to all")
    return _unknown_host(text) or any(sign in text.lower() for sign in signs)


def _status(error: grpc.Call) -> Any:
    try:
        return rpc_status.from_call(error)
    except (ValueError, DecodeError):
        return None  # the trailer contradicts the call's code: somebody in between wrote it
