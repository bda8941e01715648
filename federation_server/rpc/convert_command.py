"""From the ledger's records to the contract's Command."""

from __future__ import annotations

from collections.abc import Sequence

from federation.v1 import command_pb2 as pb
from federation.v1 import command_service_pb2
from federation_server.domain.command import CommandState, Execution
from federation_server.domain.explain import Fact
from federation_server.rpc.convert import to_duration, to_struct, to_timestamp
from federation_server.store.ledger.batches import BatchProgress, BatchRecord
from federation_server.store.ledger.commands import CommandRecord, CommandTransition

_STATE = {state: pb.CommandState.Value(f"COMMAND_STATE_{state.value}") for state in CommandState}

_EXECUTION = {each: pb.Execution.Value(f"EXECUTION_{each.value}") for each in Execution}


def command(record: CommandRecord, transitions: Sequence[CommandTransition] = ()) -> pb.Command:
    """A command with those of its transitions."""
    return pb.Command(
        command_id=record.command_id,
        neuron_id=record.neuron_id,
        type=record.type,
        data=to_struct(record.data),
        priority=record.priority,
        issuer=record.issuer,
        state=_STATE[record.state],
        state_reason=record.state_reason,
        attempt=record.attempt,
        progress=_progress(record),
        response=to_struct(record.response),
        error=_error(record),
        log_tail=record.log_tail,
        create_time=to_timestamp(record.create_time),
        not_before_time=to_timestamp(record.not_before_time),
        expire_time=to_timestamp(record.expire_time),
        run_timeout=to_duration(record.run_timeout),
        send_time=to_timestamp(record.send_time),
        start_time=to_timestamp(record.start_time),
        end_time=to_timestamp(record.end_time),
        run_duration=to_duration(record.run_duration),
        transitions=[_transition(transition) for transition in transitions],
        revision=record.revision,
        execution=_EXECUTION[record.execution],
        max_attempts=record.max_attempts,
        retry_backoff=to_duration(record.retry_backoff),
        next_attempt_time=to_timestamp(record.next_attempt_time),
        accept_timeout=to_duration(record.accept_timeout),
        progress_timeout=to_duration(record.progress_timeout),
        checkpoint=to_struct(record.checkpoint),
        retry_of_command_id=record.retry_of_command_id or "",
        batch_id=record.batch_id or "",
    )


def _progress(record: CommandRecord) -> pb.CommandProgress | None:
    if record.progress_fraction is None:
        return None
    return pb.CommandProgress(
        fraction=record.progress_fraction,
        message=record.progress_message or "",
        update_time=to_timestamp(record.progress_time),
    )


def _error(record: CommandRecord) -> pb.CommandError | None:
    if record.error_code is None:
        return None
    return pb.CommandError(
        code=record.error_code,
        message=record.error_message or "",
        details=to_struct(record.error_details),
    )


def _transition(transition: CommandTransition) -> pb.CommandTransition:
    return pb.CommandTransition(
        state=_STATE[transition.state],
        transition_time=to_timestamp(transition.transition_time),
        attempt=transition.attempt,
        actor=transition.actor,
        reason=transition.reason,
    )


def fact(fact: Fact) -> command_service_pb2.CommandFact:
    """One reason of why a command is where it is."""
    return command_service_pb2.CommandFact(
        code=fact.code, message=fact.message, time=to_timestamp(fact.time)
    )


def batch(record: BatchRecord, progress: BatchProgress | None = None) -> pb.CommandBatch:
    """A batch, and how far it is."""
    return pb.CommandBatch(
        batch_id=record.batch_id,
        filter=record.filter,
        type=record.type,
        data=to_struct(record.data),
        issuer=record.issuer,
        max_in_flight=record.max_in_flight,
        create_time=to_timestamp(record.create_time),
        cancel_time=to_timestamp(record.cancel_time),
        cancel_reason=record.cancel_reason,
        end_time=to_timestamp(progress.end_time if progress else None),
        matched_count=record.matched_count,
        skipped_count=record.skipped_count,
        counts=[
            pb.CommandStateCount(state=_STATE[state], count=count)
            for state, count in (progress.counts if progress else ())
        ],
    )
