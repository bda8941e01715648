"""A neuron's way to the federation without a stream: `neuron run --once`.

`PullSession.run` shows that the neuron is there, pulls commands until there are none, and reports
every step of theirs. It makes one call at a time: so sequences arrive in order, and a pull names
exactly what this process has. It bears that the federation is away for PATIENCE_S; what it could
not send waits in the spool for the next run.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc.aio

from federation.v1 import session_service_pb2 as pb
from federation.v1.session_service_pb2_grpc import SessionServiceStub
from neuron_sdk.backoff import Backoff
from neuron_sdk.channel import (
    MAX_MESSAGE_BYTES,
    RpcFailure,
    in_words,
    open_channel,
    read_credentials,
    read_failure,
)
from neuron_sdk.convert import durable_message, heartbeat_message, to_duration, to_timestamp
from neuron_sdk.executor import MAX_LISTED
from neuron_sdk.inbox import Inbox, own_sequence
from neuron_sdk.link import Link, LinkParts
from neuron_sdk.logs import get_logger
from neuron_sdk.recovery import recover
from neuron_sdk.registration import RPC_TIMEOUT_S
from neuron_sdk.spool import MessageKind, SpooledMessage

if TYPE_CHECKING:  # a name of the stubs' types only
    from federation.v1.session_service_pb2_grpc import SessionServiceAsyncStub

LEASE_S = 60.0
"""How long the federation waits for a sign of life; one is given each third of it."""
PATIENCE_S = 60.0
"""How long the federation may be away. When it is over, so is the lease."""
MOST_WAIT_S = 10.0
"""Between two tries."""
_SHORTEST_CALL_S = 0.5
_BATCH_MESSAGES = 32
# The commands of one answer may be many, each with its data and its checkpoint.
_MAX_ANSWER_BYTES = 16 * MAX_MESSAGE_BYTES
_GOODBYE_TIMEOUT_S = 5.0
_HEARTBEAT_JITTER = 0.1

_log = get_logger(__name__)


class PullSession:
    """One run of a neuron that comes and goes. Belongs to the control loop."""

    def __init__(self, parts: LinkParts) -> None:
        self._parts = parts
        self._spool = parts.spool
        self._executor = parts.executor
        self._inbox = Inbox(parts.executor, parts.spool, parts.intervals)
        self._loop = asyncio.get_running_loop()
        self._backoff = Backoff(most_s=MOST_WAIT_S)
        self._running: asyncio.Task[Any] | None = None
        self._wake = asyncio.Event()
        self._epoch = 0
        self._reported: pb.ReportCommandRequest | None = None
        self._failing: tuple[str, float] | None = None
        """The call that has failed and not succeeded since, and when it began to."""
        self._renew_at = 0.0
        self._beat_at = 0.0
        self._with_host = True
        self.link = Link()
        self.opened = asyncio.Event()
        """Set once the first pull was answered."""
        self.failure = ""
        """Why it has given up; "" if it has not."""
        self._spool.listen(self._wake_soon, lambda: None)
        self._executor.listen(self._wake.set)

    async def run(self) -> None:
        """Do what is to be done. Returns when nothing is left, or it has given up."""
        self._running = asyncio.current_task()
        await self._persist(self._work)
        if not self.failure:
            _log.info("nothing is left to do", action="session.finished")

    async def flush(self, timeout_s: float) -> None:
        """Send what the spool still holds, for as long as that; takes no more commands."""
        finished = await self._end_run()
        if self.failure or not self.opened.is_set():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._persist(self._report)
        left = self._spool.state.pending
        if left and finished and not self.failure:
            self._give_up(f"{left} messages could not be sent in time; the next run sends them")

    async def say_goodbye(self, reason: str) -> None:
        """Show with a last heartbeat that the neuron stops; why, nobody can be told."""
        await self._end_run()
        if self.failure or not self.opened.is_set():
            return
        with contextlib.suppress(RpcFailure, TimeoutError):
            async with asyncio.timeout(_GOODBYE_TIMEOUT_S), self._calling() as stub:
                await self._beat(stub)

    async def _end_run(self) -> bool:
        """Whether it had ended by itself."""
        running, self._running = self._running, None
        if running is None or running.done():
            return True
        running.cancel()
        await asyncio.wait({running})
        return False

    # ---- what lasts when calls fail

    async def _persist(self, work: Callable[[SessionServiceAsyncStub], Awaitable[object]]) -> None:
        """Carry `work` out, anew after each failure that may pass; or give up."""
        while True:
            registering = not self._parts.registration.has_token
            try:
                async with self._calling() as stub:
                    await work(stub)
                return
            except RpcFailure as failure:
                registering = registering and not self._parts.registration.has_token
                wait, problem = self._weigh(failure, registering=registering)
            if self.failure:
                return
            self.link = Link(problem=problem)
            _log.warning(
                "not connected to the federation; what runs goes on",
                action="session.ended",
                target=self._parts.target,
                problem=problem,
                retry_s=round(wait, 1),
            )
            await asyncio.sleep(wait)

    @contextlib.asynccontextmanager
    async def _calling(self) -> AsyncIterator[SessionServiceAsyncStub]:
        """A channel to call on, registered, whose token is kept fresh."""
        channel = open_channel(
            self._parts.target,
            await read_credentials(self._parts.tls),
            max_receive_bytes=_MAX_ANSWER_BYTES,
        )
        token: asyncio.Task[None] | None = None
        try:
            stub: SessionServiceAsyncStub = SessionServiceStub(channel)
            await self._register(stub)
            # If it fails, the next call fails for the same reason.
            token = asyncio.create_task(
                self._parts.registration.keep_fresh(stub), name="session:token"
            )
            yield stub
        finally:
            if token is not None:
                token.cancel()
                await asyncio.gather(token, return_exceptions=True)
            self.link = Link()
            await channel.close()

    async def _register(self, stub: SessionServiceAsyncStub) -> None:
        if self._parts.registration.has_token:
            return
        with self._counted("Register"):
            try:
                async with asyncio.timeout(self._patience_left):
                    await self._parts.registration.ensure(stub)
            except TimeoutError:
                what = f"no answer from {self._parts.target}"
                raise RpcFailure("DEADLINE_EXCEEDED", "", what) from None

    def _weigh(self, failure: RpcFailure, *, registering: bool) -> tuple[float, str]:
        """How long to wait, and what is wrong; gives up if waiting does not help."""
        failure = in_words(failure, tls=self._parts.tls is not None)
        plan = recover(
            failure.reason,
            failure.code,
            enrollable=self._parts.enrollable,
            registering=registering,
        )
        if plan.register_again:
            self._parts.registration.forget()
        problem = plan.tell(failure)
        if plan.turn:
            wait = self._backoff.turn_s(failure.retry_after)
        else:
            wait = self._backoff.next_s(self._loop.time(), at_least=failure.retry_after)
        if plan.slow:
            self._give_up(problem)
        elif wait >= self._patience_left:
            self._give_up(
                f"no success with {self._parts.target} within {PATIENCE_S:g} s ({problem}); what "
                "could not be sent is kept in STATE_DIR for the next run"
            )
        if failure.reason == "SESSION_SUPERSEDED":
            # Another process has the commands now: nothing of theirs is to go on here.
            self._executor.pause()
            self._executor.interrupt("another process of this neuron has begun")
        return wait, problem

    def _give_up(self, problem: str) -> None:
        self.failure = problem
        self.link = Link(problem=problem)

    @property
    def _patience_left(self) -> float:
        if self._failing is None:
            return PATIENCE_S
        return self._failing[1] + PATIENCE_S - self._loop.time()

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Note whether a call fails, and since when: until it succeeds, others prove nothing."""
        began = self._loop.time()
        try:
            yield
        except RpcFailure as failure:
            if not _refused(failure):  # a refusal is an answer
                self._failing = self._failing or (name, began)
            raise
        if self._failing is not None and self._failing[0] == name:
            self._failing = None
            self._backoff = Backoff(most_s=MOST_WAIT_S)

    async def _call(self, stub: SessionServiceAsyncStub, name: str, request: Any) -> Any:
        with self._counted(name):
            try:
                return await getattr(stub, name)(
                    request,
                    metadata=self._parts.registration.metadata,
                    timeout=min(RPC_TIMEOUT_S, max(self._patience_left, _SHORTEST_CALL_S)),
                )
            except grpc.aio.AioRpcError as error:
                raise read_failure(error) from None

    # ---- the work

    async def _work(self, stub: SessionServiceAsyncStub) -> None:
        await self._beat(stub)
        while not self._executor.stopping:
            idle = not self._executor.busy
            told = await self._pull(stub)
            if idle and not told and not self._spool.state.pending:
                return
            await self._attend(stub)
        if self.opened.is_set():
            await self._attend(stub)

    async def _attend(self, stub: SessionServiceAsyncStub) -> None:
        """Report what happens, until it is time to pull again; if the neuron stops, for ever."""
        while True:
            self._wake.clear()
            ended = await self._report(stub)
            now = self._loop.time()
            if now >= self._beat_at:
                await self._beat(stub)
            due = now >= self._renew_at
            if not self._executor.stopping and (ended or due or not self._executor.busy):
                return
            if due:
                await self._renew(stub)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(self._renew_at, self._beat_at)):
                    await self._wake.wait()

    async def _pull(self, stub: SessionServiceAsyncStub) -> bool:
        """Take what there is to do. Returns whether there was anything."""
        running = self._executor.unfinished()
        # Named too, so that what ended and was not confirmed is not sent again: it is reported
        # before the next pull.
        ended = await asyncio.wrap_future(self._spool.unreported(MAX_LISTED))
        named = list(dict.fromkeys([*running, *ended]))[:MAX_LISTED]
        request = pb.PullCommandsRequest(
            instance_id=self._parts.instance_id,
            running_commands=[
                pb.RunningCommand(command_id=of.command_id, attempt=of.attempt) for of in named
            ],
            lease_duration=to_duration(LEASE_S),
            epoch=self._epoch,
        )
        asked_at = self._loop.time()
        answer: pb.PullCommandsResponse = await self._call(stub, "PullCommands", request)
        self._renew_at = asked_at + LEASE_S / 3
        self._note_epoch(answer.epoch)
        for given_up in answer.cancel_commands:
            self._inbox.cancel(given_up)
        for delivery in answer.commands:
            self._inbox.take(delivery)
        return bool(answer.commands or answer.cancel_commands)

    def _note_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._reported = None
            _log.info(
                "connected to the federation",
                action="session.opened",
                target=self._parts.target,
                epoch=epoch,
                pending=self._spool.state.pending,
            )
        self.link = Link(connected=True, epoch=epoch)
        self.opened.set()

    async def _renew(self, stub: SessionServiceAsyncStub) -> None:
        """Renew the lease by a report that was made before, which has no other effect.

        A pull renews it too, but takes more commands.
        """
        self._renew_at = self._loop.time() + LEASE_S / 3
        if self._reported is not None:
            await self._report_command(stub, self._reported)

    async def _beat(self, stub: SessionServiceAsyncStub) -> None:
        vitals = await self._parts.vitals()
        request = pb.SendHeartbeatRequest(
            heartbeat=heartbeat_message(vitals, with_host=self._with_host),
            instance_id=self._parts.instance_id,
        )
        try:
            answer: pb.SendHeartbeatResponse = await self._call(stub, "SendHeartbeat", request)
        except RpcFailure as failure:
            if not _refused(failure):
                raise
            self._note_refusal(0, "heartbeat", failure)
        else:
            self._with_host = self._with_host and vitals.host is None
            self._inbox.obey(answer.settings)
        # Only ever later, because more often than the interval is forbidden.
        stretch = 1.0 + random.uniform(0.0, _HEARTBEAT_JITTER)  # noqa: S311 - not a secret
        self._beat_at = self._loop.time() + self._parts.intervals.heartbeat * stretch

    # ---- what the spool holds

    async def _report(self, stub: SessionServiceAsyncStub) -> bool:
        """Send all that the spool holds. Returns whether a command's end was in it."""
        ended = False
        sent = 0
        while True:
            spool_id = self._spool.state.spool_id
            batch = await asyncio.wrap_future(
                self._spool.read_after(sent, max_count=_BATCH_MESSAGES, max_bytes=MAX_MESSAGE_BYTES)
            )
            if self._spool.state.spool_id != spool_id:
                sent = 0  # it was made anew meanwhile
                continue
            if not batch:
                return ended
            for message in batch:
                if not await self._send(stub, spool_id, message):
                    sent = 0
                    break
                sent = message.sequence
                ended = ended or message.kind is MessageKind.FINISH

    async def _send(
        self, stub: SessionServiceAsyncStub, spool_id: str, message: SpooledMessage
    ) -> bool:
        """Send one message. Returns False if the spool has become another one."""
        is_report = message.kind.is_report
        sequence = message.sequence
        parsed = durable_message(sequence, is_report=is_report, payload=message.payload)
        try:
            if is_report:
                answer = await self._call(
                    stub,
                    "ReportAnalytics",
                    pb.ReportAnalyticsRequest(
                        spool_id=spool_id,
                        sequence=sequence,
                        send_time=to_timestamp(time.time()),
                        report=parsed.analytics_report,
                    ),
                )
                mark = answer.ack_sequence
            else:
                request = pb.ReportCommandRequest(
                    epoch=self._epoch,
                    spool_id=spool_id,
                    sequence=sequence,
                    update=parsed.command_update,
                )
                mark = await self._report_command(stub, request)
        except RpcFailure as failure:
            if not _refused(failure):
                raise
            kind = "analytics_report" if is_report else "command_update"
            self._note_refusal(sequence, kind, failure)
            return True
        if own_sequence(mark) > max(self._spool.state.known_sequence, sequence):
            # An old copy of STATE_DIR: the federation took it for a replay of what it has seen.
            _log.warning(
                "the spool was older than what the federation has seen; it is renewed",
                action="spool.renewed",
            )
            await asyncio.wrap_future(self._spool.renew_identity(mark))
            self._reported = None
            return False
        self._spool.ack(sequence)
        return True

    async def _report_command(
        self, stub: SessionServiceAsyncStub, request: pb.ReportCommandRequest
    ) -> int:
        """Report a command's step. Returns the spool's mark."""
        asked_at = self._loop.time()
        answer: pb.ReportCommandResponse = await self._call(stub, "ReportCommand", request)
        self._renew_at = asked_at + LEASE_S / 3
        update = request.update
        self._reported = pb.ReportCommandRequest(
            epoch=request.epoch,
            spool_id=request.spool_id,
            sequence=request.sequence,
            update=pb.CommandUpdate(
                command_id=update.command_id,
                attempt=update.attempt,
                accepted=pb.CommandAccepted(),
            ),
        )
        for given_up in answer.cancel_commands:
            self._inbox.cancel(given_up)
        return answer.ack_sequence

    def _note_refusal(self, sequence: int, kind: str, failure: RpcFailure) -> None:
        detail = "; ".join(failure.violations) or failure.message
        self._inbox.note_refusal(sequence, kind, failure.reason or failure.code, detail)

    def _wake_soon(self) -> None:
        # The spool's thread may outlive the loop by a moment.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wake.set)


def _refused(failure: RpcFailure) -> bool:
    """Whether the same message would be refused again."""
    return failure.code == "INVALID_ARGUMENT" or failure.reason == "TOO_LARGE"
