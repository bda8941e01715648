"""What the federation tells a neuron, carried out: the same by a stream and in answers to calls."""

from __future__ import annotations

from federation.v1 import errors_pb2
from federation.v1 import session_service_pb2 as pb
from neuron_sdk.channel import RpcFailure
from neuron_sdk.convert import from_delivery, from_duration
from neuron_sdk.executor import Executor
from neuron_sdk.intervals import Intervals, SessionIntervals
from neuron_sdk.journal import refused_update
from neuron_sdk.logs import get_logger
from neuron_sdk.payload import clean_text
from neuron_sdk.spool import Attempt, Spool
from neuron_sdk.spool_store import MAX_SEQUENCE

_log = get_logger("neuron_sdk.session")


class Inbox:
    """Where messages of the federation go. Belongs to the control loop."""

    def __init__(self, executor: Executor, spool: Spool, intervals: Intervals) -> None:
        self._executor = executor
        self._spool = spool
        self._intervals = intervals

    def take(self, delivery: pb.CommandDelivery) -> None:
        """A command to carry out."""
        self._executor.deliver(from_delivery(delivery))

    def cancel(self, given_up: pb.CancelCommand) -> None:
        """A command to give up."""
        of = Attempt(given_up.command_id, max(1, given_up.attempt))
        self._executor.cancel(of, clean_text(given_up.reason, 1024))

    def obey(self, settings: pb.SessionSettings) -> None:
        """New intervals."""
        said = {field.name: from_duration(span) for field, span in settings.ListFields()}
        self._intervals.obey(
            SessionIntervals(
                heartbeat=said.get("heartbeat_interval"),
                analytics=said.get("analytics_interval"),
                min_heartbeat=said.get("min_heartbeat_interval"),
            )
        )

    def note_refusal(self, sequence: int, kind: str, reason: str, detail: str) -> None:
        """A message of the neuron's was not taken, and never will be.

        Args:
            sequence: its sequence; 0 if it was not durable.
            kind: which member of NeuronMessage it was.
            reason: an ErrorReason's name without its prefix.
            detail: for people.
        """
        _log.error(
            "the federation refused a message",
            action="session.refused",
            message_kind=kind,
            sequence=sequence,
            reason=reason,
            detail=detail,
        )
        if sequence:
            text = clean_text(f"{reason}: {detail}", 1024)
            self._spool.refuse(sequence, lambda of: refused_update(text, of))


def own_sequence(value: int) -> int:
    """A sequence that the federation names.

    Raises:
        RpcFailure: it is beyond what any spool gives. The wire has room for more; to take it for an
            acknowledgement would be to forget what nobody has stored.
    """
    if value > MAX_SEQUENCE:
        raise RpcFailure("OUT_OF_RANGE", "", f"it names sequence {value}, which no spool gives")
    return value


def reason_name(value: int) -> str:
    """An ErrorReason's name without its prefix."""
    try:
        name: str = errors_pb2.ErrorReason.Name(value)  # type: ignore[arg-type]
    except ValueError:
        return f"reason {value}"
    return name.removeprefix("ERROR_REASON_")
