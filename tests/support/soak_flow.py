"""The soak's operators: commands of all kinds, cancels, retries, batches, and who follows them."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import command_service_pb2 as pb
from tests.support.calls import FINAL, State, spec
from tests.support.command_faults import ONCE, span
from tests.support.evidence import Account
from tests.support.federation import Served
from tests.support.pulling import TRIED_AGAIN, persevere

PER_SECOND = 8.0
MOST_AT_A_TIME = 200


class Flow:
    """Everything that operators do, and what they were told."""

    def __init__(
        self,
        served: Served,
        streaming: Sequence[str],
        pulling: Sequence[str],
        chance: random.Random,
    ) -> None:
        """`streaming` are witnesses, `pulling` neurons that hold no stream."""
        self.issued: list[str] = []
        self.batches: list[str] = []
        self.followed: dict[str, list[tuple[str, int]]] = {}
        self._served = served
        self._streaming = streaming
        self._pulling = pulling
        self._chance = chance

    async def run(self, seconds: float) -> None:
        """Orders for so long; returns once everybody has had an answer."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        room = asyncio.Semaphore(MOST_AT_A_TIME)

        async def one(work: Awaitable[None]) -> None:
            async with room:
                await work

        async with asyncio.TaskGroup() as group:
            while loop.time() < until:
                group.create_task(one(self._something()))
                await asyncio.sleep(self._chance.expovariate(PER_SECOND))

    def untrue(self, accounts: dict[str, Account]) -> list[str]:
        """What operators were told and the ledger does not say."""
        found = [f"{each} was issued and is lost" for each in self.issued if each not in accounts]
        own = {account.batch_id for account in accounts.values()}
        found += [
            f"batch {each} was issued and is lost" for each in self.batches if each not in own
        ]
        for command_id, seen in self.followed.items():
            account = accounts[command_id]
            steps = [(step.state.value, step.attempt) for step in account.steps]
            if seen != steps:
                found.append(f"its follower saw {seen}:\n{account.told([])}")
        return found

    async def _call(self, name: str, request: Any, *, may_refuse: bool = False) -> Any:
        method: Callable[..., Awaitable[Any]] = getattr(self._served.command, name)
        admin = self._served.admin
        try:
            return await persevere(lambda: method(request, metadata=admin, timeout=10))
        except grpc.aio.AioRpcError as error:
            if may_refuse and error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                return None
            raise

    async def _something(self) -> None:
        if self._chance.random() < 0.04:
            await self._batch()
            return
        wanted = self._order()
        order = pb.IssueCommandRequest(command=wanted, request_id=str(uuid.uuid4()))
        try:
            answer = await self._call("IssueCommand", order)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT and _is_over(wanted):
                return  # rightly refused: nobody has answered in its time
            raise
        command_id = answer.command.command_id
        self.issued.append(command_id)
        luck = self._chance.random()
        if luck < 0.15:
            await self._cancel(command_id)
        elif luck < 0.25:
            await self._follow(command_id)
        elif luck < 0.30:
            await asyncio.sleep(self._chance.uniform(0, 5))
            request = pb.RetryCommandRequest(command_id=command_id, request_id=str(uuid.uuid4()))
            again = await self._call("RetryCommand", request, may_refuse=True)
            if again is not None:
                self.issued.append(again.command.command_id)

    def _order(self) -> pb.CommandSpec:
        chance = self._chance
        if chance.random() < 0.15:
            wanted = spec(chance.choice(self._pulling), "work")
        else:
            wanted = spec(chance.choice(self._streaming), self._kind())
        wanted.MergeFrom(self._terms(wanted.type))
        return wanted

    def _kind(self) -> str:
        weights = {"work": 10, "flaky": 3, "steps": 3, "apart": 1, "ending": 0.2}
        return self._chance.choices(list(weights), list(weights.values()))[0]

    def _terms(self, kind: str) -> pb.CommandSpec:
        chance = self._chance
        terms = pb.CommandSpec(priority=chance.randint(0, 9), retry_backoff=span(0.1))
        match kind:
            case "work":
                terms.data.update({"seconds": chance.choice([0, 0.05, 0.2, 1.5])})
            case "flaky":
                terms.data.update({"failures": chance.randint(1, 3)})
            case "steps":
                terms.data.update({"count": chance.randint(1, 20)})
            case _:
                pass
        terms.max_attempts = chance.randint(1, 3)
        if chance.random() < 0.25:
            terms.execution, terms.max_attempts = ONCE, 1
        for name in ("accept_timeout", "run_timeout", "progress_timeout"):
            if chance.random() < 0.1:
                getattr(terms, name).CopyFrom(span(chance.choice([0.5, 2])))
        for name, share in (("not_before_time", 0.1), ("expire_time", 0.1)):
            if chance.random() < share:
                later = datetime.now(UTC) + timedelta(seconds=chance.uniform(0.5, 6))
                time = Timestamp()
                time.FromDatetime(later + timedelta(seconds=6 * (name == "expire_time")))
                getattr(terms, name).CopyFrom(time)
        return terms

    async def _cancel(self, command_id: str) -> None:
        await asyncio.sleep(self._chance.uniform(0, 1))
        request = pb.CancelCommandRequest(command_id=command_id, reason="enough")
        await self._call("CancelCommand", request, may_refuse=True)

    async def _batch(self) -> None:
        request = pb.IssueCommandBatchRequest(
            filter='type = "witness"',
            command=pb.CommandSpec(type="work"),
            max_in_flight=self._chance.randint(0, 2),
            request_id=str(uuid.uuid4()),
        )
        answer = await self._call("IssueCommandBatch", request)
        batch_id = answer.batch.batch_id
        self.batches.append(batch_id)
        if self._chance.random() < 0.3:
            await asyncio.sleep(self._chance.uniform(0, 1))
            await self._call("CancelCommandBatch", pb.CancelCommandBatchRequest(batch_id=batch_id))

    async def _follow(self, command_id: str) -> None:
        """To its end, over every break."""
        seen: list[tuple[str, int]] = []
        revision = 0
        while True:
            call = self._served.command.WatchCommand(
                pb.WatchCommandRequest(command_id=command_id, after_revision=revision),
                metadata=self._served.admin,
            )
            try:
                async for shown in call:
                    revision = shown.command.revision
                    seen += [
                        (State.Name(step.state).removeprefix("COMMAND_STATE_"), step.attempt)
                        for step in shown.command.transitions
                    ]
                    if shown.command.state in FINAL:
                        self.followed[command_id] = seen
                        return
            except grpc.aio.AioRpcError as error:
                if error.code() not in TRIED_AGAIN:
                    raise
            finally:
                call.cancel()
            await asyncio.sleep(0.1)


def _is_over(wanted: pb.CommandSpec) -> bool:
    now = datetime.now(UTC)
    return wanted.HasField("expire_time") and wanted.expire_time.ToDatetime(UTC) <= now
