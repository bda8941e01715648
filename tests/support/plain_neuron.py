"""A neuron from the contract alone, on a thread: it comes back after a broken stream.

It keeps the rules that a neuron must keep (durable messages are sent again until acknowledged,
an attempt runs once) in the least code, and its commands do what a test tells them to.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import session_service_pb2 as pb
from federation.v1.command_pb2 import CommandError, CommandState
from federation.v1.heartbeat_pb2 import Heartbeat
from federation.v1.neuron_pb2 import NeuronDescription
from federation.v1.session_service_pb2_grpc import SessionServiceStub

RECONNECT_S = 0.1

Handler = Callable[["PlainNeuron", pb.CommandDelivery], dict[str, Any]]
"""Carries out a command; what it raises makes the command FAILED."""


class PlainNeuron:
    """A neuron that has registered. `run` holds its stream."""

    def __init__(self, address: str, token: str, handlers: Mapping[str, Handler]) -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._handlers = handlers
        self._instance_id, self._spool_id = str(uuid.uuid4()), str(uuid.uuid4())
        self._spool: list[pb.NeuronMessage] = []
        self._next_sequence = 1
        self._running: dict[str, int] = {}
        self._lock = threading.Lock()
        self._outbox: SimpleQueue[pb.NeuronMessage | None] = SimpleQueue()
        self._stop = threading.Event()

    def report(self, **message: Any) -> None:
        """Sends a durable message: an analytics_report or a command_update."""
        with self._lock:
            durable = pb.NeuronMessage(sequence=self._next_sequence, **message)
            durable.send_time.GetCurrentTime()
            self._next_sequence += 1
            self._spool.append(durable)
            self._outbox.put(durable)

    def progress(self, delivery: pb.CommandDelivery, fraction: float, message: str) -> None:
        """Says how far a command is."""
        self._update(delivery, progressed=pb.CommandProgressed(fraction=fraction, message=message))

    def heartbeat(self) -> None:
        """Sends a heartbeat."""
        beat = Heartbeat(health_score=87.5)
        beat.heartbeat_time.GetCurrentTime()
        self._outbox.put(pb.NeuronMessage(heartbeat=beat))

    def run(self) -> None:
        """Holds a stream, and opens a new one when it breaks, until `stop`."""
        while not self._stop.is_set():
            with grpc.insecure_channel(self._address) as channel:
                try:
                    stub = SessionServiceStub(channel)
                    self._session(stub.Connect(self._messages(), metadata=self._metadata))
                except grpc.RpcError:
                    self._outbox.put(None)
            self._stop.wait(RECONNECT_S)

    def stop(self) -> None:
        """Ends the stream with a Goodbye."""
        self._stop.set()
        self._outbox.put(pb.NeuronMessage(goodbye=pb.Goodbye(reason="the test is over")))
        self._outbox.put(None)

    def _messages(self) -> Iterator[pb.NeuronMessage]:
        with self._lock:
            outbox: SimpleQueue[pb.NeuronMessage | None] = SimpleQueue()
            self._outbox = outbox
            for durable in self._spool:
                outbox.put(durable)
            hello = pb.Hello(
                instance_id=self._instance_id,
                spool_id=self._spool_id,
                first_sequence=self._spool[0].sequence if self._spool else self._next_sequence,
                next_sequence=self._next_sequence,
                running_commands=[
                    pb.RunningCommand(command_id=command_id, attempt=attempt)
                    for command_id, attempt in self._running.items()
                ],
            )
        yield pb.NeuronMessage(hello=hello)
        self.heartbeat()
        while (message := outbox.get()) is not None:
            yield message

    def _session(self, stream: Any) -> None:
        for message in stream:
            with self._lock:
                self._spool = [each for each in self._spool if each.sequence > message.ack_sequence]
            if message.HasField("command"):
                self._accept(message.command)

    def _accept(self, delivery: pb.CommandDelivery) -> None:
        if delivery.command_id in self._running:
            return
        self._running[delivery.command_id] = delivery.attempt
        self._update(delivery, accepted=pb.CommandAccepted())
        thread = threading.Thread(target=self._carry_out, args=[delivery], daemon=True)
        thread.start()

    def _carry_out(self, delivery: pb.CommandDelivery) -> None:
        self._update(delivery, progressed=pb.CommandProgressed())
        finished = pb.CommandFinished(state=CommandState.COMMAND_STATE_SUCCEEDED)
        finished.run_duration.FromMilliseconds(1500)
        try:
            response = Struct()
            response.update(self._handlers[delivery.type](self, delivery))
            finished.response.CopyFrom(response)
        except ValueError as error:
            finished.state = CommandState.COMMAND_STATE_FAILED
            finished.error.CopyFrom(CommandError(code="HANDLER_RAISED", message=str(error)))
            finished.log_tail = "the last words\n"
        self._update(delivery, finished=finished)
        self._running.pop(delivery.command_id)

    def _update(self, delivery: pb.CommandDelivery, **update: Any) -> None:
        self.report(
            command_update=pb.CommandUpdate(
                command_id=delivery.command_id, attempt=delivery.attempt, **update
            )
        )


@contextmanager
def plain_neuron(
    address: str,
    enrollment_token: str,
    description: NeuronDescription,
    handlers: Mapping[str, Handler],
) -> Iterator[PlainNeuron]:
    """A neuron that registers and then runs for the block."""
    with grpc.insecure_channel(address) as channel:
        answer = SessionServiceStub(channel).Register(
            pb.RegisterRequest(description=description, enrollment_token=enrollment_token),
            timeout=20,
        )
    neuron = PlainNeuron(address, answer.token.token, handlers)
    thread = threading.Thread(target=neuron.run, name=description.neuron_id, daemon=True)
    thread.start()
    try:
        yield neuron
    finally:
        neuron.stop()
        thread.join(20)


def now() -> Timestamp:
    """This machine's time."""
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp
