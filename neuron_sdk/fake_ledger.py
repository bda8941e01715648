"""What a fake federation knows of its commands: the newest attempt of each, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from federation.v1 import session_service_pb2 as pb
from neuron_sdk.fake_server import to_outcome
from neuron_sdk.outcome import CommandOutcome, FinalState

_RETRIED = (FinalState.FAILED, FinalState.TIMED_OUT)


@dataclass(slots=True)
class FakeCommand:
    """One command."""

    neuron_id: str
    delivery: pb.CommandDelivery
    """The newest attempt, with the newest checkpoint."""
    given_up: pb.CancelCommand | None = None
    """What tells the neuron to give it up."""
    outcome: CommandOutcome | None = None
    """Its end, once no attempt is left."""

    def take(self, update: pb.CommandUpdate) -> bool:
        """Advance by what the neuron said; True if another attempt is to be delivered."""
        delivery = self.delivery
        if update.attempt != delivery.attempt or self.outcome is not None:
            return False
        if update.progressed.HasField("checkpoint"):
            delivery.checkpoint.CopyFrom(update.progressed.checkpoint)
        if not update.HasField("finished"):
            return False
        outcome = to_outcome(update.finished)
        left = delivery.attempt < delivery.max_attempts and self.given_up is None
        if outcome.state in _RETRIED and left:
            delivery.attempt += 1
            return True
        self.outcome = outcome
        return False


@dataclass(slots=True)
class FakeLedger:
    """All commands, by command_id."""

    commands: dict[str, FakeCommand] = field(default_factory=dict)

    def waiting_for(self, neuron_id: str, hello: pb.Hello) -> list[pb.FederationMessage]:
        """What a new session gets: cancels, and what the neuron does not name as running."""
        running = {(run.command_id, run.attempt) for run in hello.running_commands}
        messages = []
        for command in self.commands.values():
            if command.neuron_id != neuron_id or command.outcome is not None:
                continue
            if command.given_up is not None:
                messages.append(pb.FederationMessage(cancel_command=command.given_up))
            elif (command.delivery.command_id, command.delivery.attempt) not in running:
                messages.append(pb.FederationMessage(command=command.delivery))
        return messages

    def take(self, update: pb.CommandUpdate) -> pb.FederationMessage | None:
        """Take an update; answers the next attempt if there is one."""
        command = self.commands.get(update.command_id)
        if command is None or not command.take(update):
            return None
        return pb.FederationMessage(command=command.delivery)
