"""A neuron that holds no stream: short-lived processes, one after the other, that pull commands.

They are tasks of the test's own process and keep no journal: one that dies leaves nothing, and the
federation finds out by its lease. What they run they note as `tests/support/witness.py` does.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from federation.v1 import command_pb2
from federation.v1 import session_service_pb2 as pb
from tests.support.evidence import Note
from tests.support.federation import Served

LEASE_S = 2
TRIED_AGAIN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,
}
"""What a call may fail with while servers die; the same call again is right."""


async def persevere(call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer of a call, as often as it takes.

    Raises:
        grpc.aio.AioRpcError: it fails for another reason than that a server is away.
    """
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in TRIED_AGAIN:
                raise
        await asyncio.sleep(0.1)


class Died(Exception):
    """The process is gone."""


class PullingNeuron:
    """The neuron; `run` is its cron."""

    def __init__(self, served: Served, name: str, token: str, chance: random.Random) -> None:
        self.name = name
        self.notes: list[Note] = []
        self._served = served
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._chance = chance

    async def run(self) -> None:
        """One process after the other, until it is cancelled."""
        while True:
            try:
                await self._process(str(uuid.uuid4()))
            except Died:
                pass
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:  # another session has begun
                    raise
            await asyncio.sleep(self._chance.uniform(0, 0.3))

    async def _process(self, instance: str) -> None:
        sequence = 0
        finished: set[tuple[str, int]] = set()

        async def report(of: pb.CommandDelivery | pb.CancelCommand, **update: Any) -> None:
            nonlocal sequence
            sequence += 1
            request = pb.ReportCommandRequest(
                epoch=answer.epoch,
                spool_id=instance,
                sequence=sequence,
                update=pb.CommandUpdate(command_id=of.command_id, attempt=of.attempt, **update),
            )
            call = self._served.session.ReportCommand
            await persevere(lambda: call(request, metadata=self._metadata, timeout=5))

        for _ in range(self._chance.randint(1, 5)):
            request = pb.PullCommandsRequest(
                instance_id=instance, max_commands=2, lease_duration=Duration(seconds=LEASE_S)
            )
            pull = self._served.session.PullCommands
            answer = await persevere(lambda: pull(request, metadata=self._metadata, timeout=5))  # noqa: B023 - awaited here
            for told in answer.cancel_commands:
                await report(told, finished=_ended("CANCELLED"))
                finished.add((told.command_id, told.attempt))
            for delivery in answer.commands:
                of = (delivery.command_id, delivery.attempt)
                if of not in finished:
                    finished.add(of)
                    await self._carry_out(instance, delivery, report)

    async def _carry_out(
        self, instance: str, delivery: pb.CommandDelivery, report: Callable[..., Awaitable[None]]
    ) -> None:
        journal = f"{self.name}/{instance}"
        await report(delivery, accepted=pb.CommandAccepted())
        self._may_die()
        self.notes.append(Note(journal, delivery.command_id, delivery.attempt, "began"))
        await report(delivery, progressed=pb.CommandProgressed(fraction=0.5))
        self._may_die()
        await asyncio.sleep(self._chance.uniform(0, 0.1))
        self.notes.append(Note(journal, delivery.command_id, delivery.attempt, "ended"))
        self._may_die()
        done = _ended("SUCCEEDED")
        done.response.update({"attempt": delivery.attempt})
        await report(delivery, finished=done)

    def _may_die(self) -> None:
        if self._chance.random() < 0.05:
            raise Died


def _ended(state: str) -> pb.CommandFinished:
    return pb.CommandFinished(state=command_pb2.CommandState.Value(f"COMMAND_STATE_{state}"))
