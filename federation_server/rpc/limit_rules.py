"""What the contract says of several fields together. Each function is one such rule."""

from __future__ import annotations

from typing import Any

from federation.v1.command_pb2 import CommandState, Execution
from federation_server.rpc.findings import Check, Findings, Path
from federation_server.rpc.limit_kinds import note_repeated
from federation_server.rpc.limit_values import MAX_INTEGER, REQUIRED

_DURABLE = frozenset({"analytics_report", "command_update"})
_WITH_ERROR = frozenset(
    {
        CommandState.COMMAND_STATE_FAILED,
        CommandState.COMMAND_STATE_REJECTED,
        CommandState.COMMAND_STATE_TIMED_OUT,
    }
)


def in_order(earlier: str, later: str, *, equal: bool) -> Check:
    """The rule that one time is not after (or, without `equal`, is before) another, where both
    are set.
    """
    words = f"must {'not be before' if equal else 'be after'} {earlier}"

    def rule(message: Any, path: Path, found: Findings) -> None:
        if not (message.HasField(earlier) and message.HasField(later)):
            return
        first, second = getattr(message, earlier), getattr(message, later)
        low, high = (first.seconds, first.nanos), (second.seconds, second.nanos)
        if high < low or (high == low and not equal):
            found.add(path, later, words)

    return rule


def names_a_neuron(message: Any, path: Path, found: Findings) -> None:
    """IssueCommandRequest, ExecuteCommandRequest: the command is for one neuron."""
    if message.HasField("command") and not message.command.neuron_id:
        found.add((path, "command", None), "neuron_id", REQUIRED)


def names_no_neuron(message: Any, path: Path, found: Findings) -> None:
    """IssueCommandBatchRequest: the filter says which neurons the command is for."""
    if message.command.neuron_id:
        found.add(
            (path, "command", None), "neuron_id", "must be empty: the filter says which neurons"
        )


def one_attempt_at_most_once(message: Any, path: Path, found: Findings) -> None:
    """CommandSpec: what must not run twice has one attempt."""
    if message.execution == Execution.EXECUTION_AT_MOST_ONCE and message.max_attempts > 1:
        found.add(path, "max_attempts", "must be 1 with EXECUTION_AT_MOST_ONCE")


def failed_within_requests(message: Any, path: Path, found: Findings) -> None:
    """ApplicationMetrics: not more requests failed than there were."""
    if message.failed_requests > message.requests:
        found.add(path, "failed_requests", f"must not be above requests ({message.requests})")


def buckets_fit_bounds(message: Any, path: Path, found: Findings) -> None:
    """HistogramValue: bounds strictly increase, and there is one bucket more than bounds."""
    bounds, counts = message.bounds, message.bucket_counts
    if not bounds:
        found.add(path, "bounds", "must hold 1 to 100 bounds")
        return
    for index in range(1, len(bounds)):
        if not bounds[index - 1] < bounds[index]:
            found.add((path, "bounds", index), "", "must be above the bound before it")
            break
    if len(counts) != len(bounds) + 1:
        words = f"must hold one more than bounds, {len(bounds) + 1}; it has {len(counts)}"
        found.add(path, "bucket_counts", words)
    elif sum(counts) > MAX_INTEGER:
        found.add(path, "bucket_counts", f"must add up to at most {MAX_INTEGER}")


def metrics_differ(message: Any, path: Path, found: Findings) -> None:
    """AnalyticsReport: points are unique by name and labels; no name is in both fields."""
    points, custom = message.points, message.custom_metrics
    if len(points) > 2000 or len(custom) > 500:
        return  # that itself has been noted
    keys = [(p.name, frozenset(p.labels.items()) if p.labels else None) for p in points]
    note_repeated(keys, (path, "points"), "must be unique by name and labels", found)
    for index, (name, _) in enumerate(keys):
        if name and name in custom:
            words = "must not be in custom_metrics too"
            found.add((path, "points", index), "name", words)


def spool_in_order(message: Any, path: Path, found: Findings) -> None:
    """Hello: the spool's first sequence is from 1 to its next one."""
    if not 1 <= message.first_sequence <= max(1, message.next_sequence):
        words = "must be from 1 to next_sequence, which it is while the spool is empty"
        found.add(path, "first_sequence", words)


def envelope_fits(message: Any, path: Path, found: Findings) -> None:
    """NeuronMessage: durable messages carry a sequence, a report its send_time, others none."""
    kind = message.WhichOneof("message")
    if kind in _DURABLE and not message.sequence:
        found.add(path, "sequence", f"must be 1 or above with {kind}")
    elif kind not in _DURABLE and kind is not None and message.sequence:
        found.add(path, "sequence", f"must be 0 with {kind}")
    if kind == "analytics_report" and not message.HasField("send_time"):
        found.add(path, "send_time", REQUIRED)


def error_said(message: Any, path: Path, found: Findings) -> None:
    """CommandFinished: whoever did not succeed says why."""
    if message.state in _WITH_ERROR and not message.HasField("error"):
        found.add(path, "error", "is required unless the state is SUCCEEDED or CANCELLED")


def masks_differ(message: Any, path: Path, found: Findings) -> None:
    """UpdateNeuronRequest: one mask names a field, and no field is in both."""
    update, release = set(message.update_mask.paths), message.release_mask.paths
    if not update and not release:
        found.add(path, "update_mask", "must name a field, or release_mask must")
    for index, name in enumerate(release):
        if name in update:
            where = ((path, "release_mask", None), "paths", index)
            found.add(where, "", "must not be in update_mask too")
