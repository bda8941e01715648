"""A started neuron: its control thread, everything on it, and the order in which all of it ends.

The control loop (a thread of its own) holds the session, the executor and the reports. The work
loop is the service's. Neither waits for the other without a limit: a hanging service is reported
as STALLED and can still be stopped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from neuron_sdk.builtin import Builtins
from neuron_sdk.commands import CommandRegistry
from neuron_sdk.config import Settings
from neuron_sdk.convert import finish_update, shortened_finish
from neuron_sdk.description import NeuronDescription
from neuron_sdk.errors import CommandFailed
from neuron_sdk.executor import Executor
from neuron_sdk.health import HealthReport
from neuron_sdk.intervals import Intervals
from neuron_sdk.journal import Journal, interrupted_update, not_started_update
from neuron_sdk.link import Connection, LinkParts
from neuron_sdk.logs import get_logger
from neuron_sdk.mode import Mode
from neuron_sdk.offload import offload
from neuron_sdk.pull_session import PullSession
from neuron_sdk.registration import Registration, SecretFile
from neuron_sdk.reporter import Reporter
from neuron_sdk.reports import Reports
from neuron_sdk.restart import SUCCEEDED, failed_restart
from neuron_sdk.session import Session
from neuron_sdk.spool import Attempt, Spool
from neuron_sdk.stall import StallWatch
from neuron_sdk.state_dir import StateDir
from neuron_sdk.tls import is_loopback
from neuron_sdk.version import __version__
from neuron_sdk.vitals import Activity, Vitals, VitalSigns
from neuron_sdk.workers import Workers

if TYPE_CHECKING:
    from neuron_sdk.http import StatusServer

FLUSH_S = 5.0
HOOKS_S = 10.0
_REFRESH_S = 3.0

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a neuron was built of before it started."""

    settings: Settings
    description: NeuronDescription
    registry: CommandRegistry
    builtins: Builtins
    vitals: VitalSigns
    reports: Reports
    workers: Workers


class Runtime:
    """Everything that runs of one neuron, from its start to its end."""

    def __init__(self, parts: Parts, work_loop: asyncio.AbstractEventLoop, *, mode: Mode) -> None:
        """Opens STATE_DIR and starts the control thread.

        Args:
            parts: what the neuron was built of.
            work_loop: the service's loop; the caller runs in it.
            mode: what the neuron is to its process.

        Raises:
            ConfigError: STATE_DIR cannot be used, or is in use.
        """
        self._parts = parts
        self._work_loop = work_loop
        self._stall_watch = StallWatch(self._on_work)
        self._mode = mode
        self.stop_reason = ""
        self.failure = ""
        """Why it has ended without being told to, for people; "" if all went well."""
        self.restart_wanted = False
        self.commands_stopped = asyncio.Event()
        """On the work loop: no command runs any more, and the service itself is to end."""
        self.closed: Future[None] = Future()
        """Done when nothing runs any more."""
        self._work_done = asyncio.Event()
        self._hurried = False
        if parts.settings.overruled:
            _log.warning(
                "the code says otherwise than these variables, and counts",
                action="settings.overruled",
                variables=list(parts.settings.overruled),
            )
        self._state = StateDir(parts.settings.state_dir)
        try:
            self._instance_id = uuid.uuid4().hex
            self._spool = self._open_spool(self._state)
        except BaseException:
            self._state.release()
            raise
        parts.vitals.spool_in_memory = lambda: self._spool.state.in_memory
        self._http: StatusServer | None = None
        self._http_port: int | None = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._control, args=(started,), name="neuron-control", daemon=True
        )
        self._thread.start()
        started.result()
        self._serve_pages()

    def _open_spool(self, state: StateDir) -> Spool:
        return Spool(
            state.spool,
            max_bytes=self._parts.settings.spool_max_bytes,
            interrupted=interrupted_update,
            not_started=not_started_update,
            shortened=shortened_finish,
        )

    # ---- what others ask, in any thread

    def ready(self) -> None:
        """The service has started: commands may run."""
        self._on_control(self._open)

    def request_stop(self, reason: str) -> None:
        """Begin to stop; a second call changes nothing."""
        if not self.stop_reason:
            self.stop_reason = reason
            _log.info("stopping", action="neuron.stopping", reason=reason)
        self._on_control(self._stop.set)

    def hurry(self) -> None:
        """Stop at once: no grace for commands, no waiting for acknowledgements."""
        self._hurried = True
        self._on_control(lambda: self._executor.interrupt("the neuron was told twice to stop"))

    def work_done(self) -> None:
        """The service has ended: its workers and hooks."""
        self._on_control(self._work_done.set)

    def status(self) -> dict[str, Any]:
        """What `/status` answers."""
        settings, description = self._parts.settings, self._parts.description
        return {
            "neuron_id": description.neuron_id,
            "type": description.type,
            "name": description.name,
            "version": description.version,
            "sdk_version": __version__,
            "instance_id": self._instance_id,
            "activity": self.activity.value,
            "uptime": round(self._parts.vitals.uptime_s, 3),
            "federation": {"target": settings.target, **asdict(self._session.link)},
            "spool": asdict(self._spool.state),
            "running_commands": self._executor.running,
            "commands": sorted(command.type for command in self._parts.registry),
            "heartbeat_interval": self._intervals.heartbeat,
            "analytics_interval": self._intervals.analytics,
        }

    @property
    def activity(self) -> Activity:
        """What the neuron is doing."""
        if self.stop_reason:
            return Activity.STOPPING
        if self._stall_watch.stalled:
            return Activity.STALLED
        return Activity.PAUSED if self._executor.paused else Activity.ACTIVE

    @property
    def http_port(self) -> int | None:
        """The TCP port of the local HTTP endpoints; None if they are off."""
        return self._http_port

    # ---- what the built-in commands do (Controls), on the control loop

    async def restart(self, of: Attempt, reason: str) -> None:
        """Begin to stop, to be started again by `lifecycle`; the next process finishes `of`."""
        if not self._mode.owns_process:
            raise CommandFailed(
                "NOT_SUPPORTED",
                "this neuron is a part of a larger program, which must restart it itself; only "
                "neuron.run() and `neuron run` can be restarted",
            )
        if self.stop_reason and not self.restart_wanted:
            raise CommandFailed("STOPPING", f"the neuron is stopping: {self.stop_reason}")
        if self._spool.state.in_memory:
            raise CommandFailed(
                "STATE_NOT_KEPT",
                "the disk does not take the neuron's state: a restart would lose what it holds; "
                "make room in STATE_DIR",
            )
        await self._executor.carry_over(of)
        self.restart_wanted = True
        self.request_stop(reason)

    def note_failed_restart(self, problem: str) -> None:
        """Finish the restart's command, because no new process will; once all is closed."""
        state = StateDir(self._parts.settings.state_dir)
        try:
            spool = self._open_spool(state)
            for of in spool.carried_over:
                spool.finish(of, finish_update(of, failed_restart(problem)))
            spool.close()
        finally:
            state.release()

    @property
    def worker_names(self) -> tuple[str, ...]:
        """The service's workers."""
        return self._parts.workers.names

    async def health(self) -> HealthReport:
        """How the neuron is now."""
        return await offload(self._parts.vitals.report)

    def set_intervals(
        self, *, heartbeat: float | None, analytics: float | None
    ) -> Mapping[str, float]:
        """Change the neuron's own intervals; answers those in effect."""
        self._intervals.set_own(heartbeat=heartbeat, analytics=analytics)
        return {
            "heartbeat_interval": self._intervals.heartbeat,
            "analytics_interval": self._intervals.analytics,
        }

    def set_log_level(self, level: str) -> None:
        """The whole process's if it is ours, else the SDK's own."""
        logging.getLogger(None if self._mode.owns_process else "neuron_sdk").setLevel(level)

    def pause(self) -> None:
        """Start no more commands."""
        self._executor.pause()

    def resume(self) -> None:
        """Start commands again."""
        self._executor.resume()

    async def restart_workers(self, name: str | None) -> list[str]:
        """Restart the service's workers, if its loop answers."""
        future = asyncio.run_coroutine_threadsafe(
            self._parts.workers.restart(name), self._work_loop
        )
        try:
            async with asyncio.timeout(HOOKS_S):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise CommandFailed(
                "STALLED", f"the service's event loop did not answer within {HOOKS_S:g} s"
            ) from None

    # ---- the control thread

    def _control(self, started: Future[None]) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._live(started))
        except BaseException as error:  # noqa: BLE001 - logged, and told to whoever waits
            _log.exception("the control channel broke", action="control.broken")
            if not started.done():
                started.set_exception(error)
        finally:
            self._parts.builtins.attach(None)
            self._on_work(self.commands_stopped.set)
            self._spool.close()
            if self._http is not None:
                self._http.stop()
            self._state.release()
            self.closed.set_result(None)

    async def _live(self, started: Future[None]) -> None:
        settings = self._parts.settings
        self._intervals = Intervals(settings.heartbeat_interval, settings.analytics_interval)
        self._executor = Executor(
            self._parts.registry,
            Journal(self._spool),
            max_concurrent=self._parts.description.max_concurrent_commands,
            carried_over=self._spool.carried_over,
        )
        self._reporter = Reporter(
            self._parts.reports, self._parts.vitals, self._spool, self._intervals
        )
        self._parts.reports.listen(lambda: self._on_control(self._reporter.hurry))
        self._session = self._connection()
        self._parts.builtins.attach(self)
        started.set_result(None)
        tasks = [
            asyncio.create_task(self._hold_session(), name="session"),
            asyncio.create_task(self._reporter.run(), name="reports"),
            asyncio.create_task(self._stall_watch.run(), name="stall-watch"),
        ]
        back = asyncio.create_task(self._say_that_it_is_back(), name="back")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            ended, _ = await asyncio.wait([stop, *tasks], return_when="FIRST_COMPLETED")
            for vital in tasks:
                if vital in ended:
                    self._note_end(vital)
            await self._wind_down()
        finally:
            for task in [stop, back, *tasks]:
                task.cancel()
            await asyncio.gather(stop, back, *tasks, return_exceptions=True)

    def _connection(self) -> Connection:
        settings = self._parts.settings
        if settings.tls is None and not is_loopback(settings.target):
            _log.warning(
                "tokens travel to the federation in plaintext: anybody on the way can read them; "
                "use federations:// in FEDERATION_URL",
                action="session.plaintext",
                target=settings.target,
            )
        parts = LinkParts(
            target=settings.target,
            tls=settings.tls,
            instance_id=self._instance_id,
            registration=Registration(
                self._parts.description,
                settings.enrollment_token,
                token=SecretFile(self._state.token),
                request_id=SecretFile(self._state.request),
            ),
            enrollable=bool(settings.enrollment_token),
            spool=self._spool,
            executor=self._executor,
            intervals=self._intervals,
            vitals=self._take_vitals,
        )
        if self._mode is Mode.ONCE:
            return PullSession(parts)
        return Session(parts, refusal_retry=settings.refusal_retry)

    async def _hold_session(self) -> None:
        if self._mode is Mode.ONCE:
            await self._ready.wait()  # a lease is for what can run at once
        await self._session.run()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """One of the tasks that a neuron lives by has ended by itself: it stops, in order."""
        fault = task.exception()
        if fault is None and self._session.failure:
            self.request_stop(self._session.failure)
        elif fault is None and self._mode is Mode.ONCE:
            self.request_stop("nothing is left to do")
        else:
            self.failure = f"internal fault in {task.get_name()}: {fault!r}"
            self.request_stop(self.failure)

    def _open(self) -> None:
        self._executor.open(self._work_loop)
        self._ready.set()

    async def _say_that_it_is_back(self) -> None:
        await self._ready.wait()
        await self._session.opened.wait()
        await self._executor.finish_carried_over(SUCCEEDED)

    async def _wind_down(self) -> None:
        if not self._ready.is_set():
            problem = f"the new process did not start: {self.stop_reason}"
            await self._executor.finish_carried_over(failed_restart(problem))
        await self._executor.stop(0.0 if self._hurried else self._parts.settings.stop_grace)
        self._on_work(self.commands_stopped.set)
        try:
            async with asyncio.timeout(HOOKS_S):
                await self._work_done.wait()
        except TimeoutError:
            _log.warning("the service does not end", action="neuron.stuck")
        await self._reporter.report()
        if not self._hurried:
            await self._session.flush(FLUSH_S)
        await self._session.say_goodbye(self.stop_reason)
        self.failure = self.failure or self._session.failure

    async def _take_vitals(self) -> Vitals:
        # The host may hang (a dead network disk), and so may the service's health function: then
        # the heartbeat says what was known before.
        refresh = asyncio.create_task(offload(self._parts.vitals.refresh), name="vitals")
        await asyncio.wait({refresh}, timeout=_REFRESH_S)
        refresh.cancel()
        return self._parts.vitals.take(self.activity, self._spool.state, self._executor.running)

    def _on_control(self, call: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            return  # it has ended

    def _on_work(self, call: Callable[[], object]) -> None:
        try:
            self._work_loop.call_soon_threadsafe(call)
        except RuntimeError:
            return  # it has ended

    def _serve_pages(self) -> None:
        if not self._parts.settings.metrics_enabled:
            return
        from neuron_sdk.pages import serve_pages  # noqa: PLC0415 - only who serves pays for it

        serving = serve_pages(self._parts.settings, self._parts.vitals, self.status)
        if serving is not None:
            self._http, self._http_port = serving
