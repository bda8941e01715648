"""What to do after a failure: whether to wait long, and what to tell whoever can help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recovery:
    """What follows a failure."""

    slow: bool = False
    """Whether only a person, or another process, can change it: then the next try waits for
    REFUSAL_RETRY."""
    remedy: str = ""
    """What to do, for people; "" if it will pass by itself."""
    register_again: bool = False
    turn: bool = False
    """Whether the federation has said when it is this neuron's turn."""

    def tell(self, failure: object) -> str:
        """The failure with its remedy, for people."""
        return f"{failure}; {self.remedy}" if self.remedy else str(failure)


def _slow(remedy: str, *, register_again: bool = False) -> Recovery:
    return Recovery(True, remedy, register_again)


_BY_REASON = {
    "NEURON_EXISTS": _slow(
        "choose another (in the code, or NEURON_ID where that says none), or bring back this "
        "neuron's STATE_DIR with its token, or set an ENROLLMENT_TOKEN that allows re-enrollment",
        register_again=True,
    ),
    "ENROLLMENT_REFUSED": _slow(
        "this ENROLLMENT_TOKEN is unknown, expired, used up, or for another type, id or label",
        register_again=True,
    ),
    "INVALID_FIELD": _slow(
        "correct the fields named here where the Neuron is built", register_again=True
    ),
    "TOO_LARGE": _slow("make what is named here smaller", register_again=True),
    "CREDENTIAL_MISSING": _slow(
        "set ENROLLMENT_TOKEN to a token that an admin has made", register_again=True
    ),
    "NEURON_PENDING": _slow("an admin must approve this neuron: `federation neurons approve`"),
    "NEURON_DEACTIVATED": _slow("`federation neurons activate` does that"),
    "SESSION_SUPERSEDED": _slow(
        "another process runs with the same neuron_id: give each one its own",
    ),
    "PROTOCOL_VIOLATION": _slow("update the SDK: the server does not understand it"),
    "SERVER_BUSY": Recovery(turn=True),
    "RATE_LIMITED": Recovery(turn=True),
}
# Enrolling anew at once would revoke the other one's token in turn, for ever.
_REVOKED = _slow(
    "an admin has revoked this neuron's token or ended the key that signed it: set an "
    "ENROLLMENT_TOKEN that allows re-enrollment; or another process has enrolled with the same "
    "neuron_id: give each one its own",
    register_again=True,
)
_CREDENTIAL = frozenset({"CREDENTIAL_INVALID", "CREDENTIAL_EXPIRED", "NEURON_NOT_FOUND"})


def gives_turn(reason: str) -> bool:
    """Whether a federation that refuses for this reason has said when it is this neuron's turn: it
    is there, and to connect anew would only make it busier.
    """
    return _BY_REASON.get(reason, Recovery()).turn


def recover(reason: str, code: str, *, enrollable: bool, registering: bool) -> Recovery:
    """What follows a failed call or a stream's end.

    Args:
        reason: an ErrorReason's name, or "".
        code: the gRPC status code's name.
        enrollable: whether an enrollment token is set.
        registering: whether it was Register that failed.
    """
    if reason == "CREDENTIAL_INVALID" and not registering:
        return _REVOKED
    if reason in _CREDENTIAL or (code == "UNAUTHENTICATED" and reason not in _BY_REASON):
        if not registering:
            return Recovery(register_again=True)  # the stored token is tried, then enrollment
        remedy = "the token in STATE_DIR is not taken any more: set ENROLLMENT_TOKEN to a new one"
        if enrollable:
            remedy = "neither the token in STATE_DIR nor ENROLLMENT_TOKEN is taken: set a new one"
        return _slow(remedy, register_again=True)
    if code in ("UNIMPLEMENTED", "OUT_OF_RANGE"):
        return _slow("FEDERATION_URL leads to a gRPC server that is no federation")
    return _BY_REASON.get(reason, Recovery())
