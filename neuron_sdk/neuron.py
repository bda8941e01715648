"""`Neuron`: what a developer makes a service of. A facade: decorators while it is built, one of
four ways to start it, and the service's own numbers while it runs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from neuron_sdk import lifecycle
from neuron_sdk.builtin import Builtins
from neuron_sdk.commands import CommandRegistry, Isolation, make_command
from neuron_sdk.config import NeuronConfig, Settings, merge, resolve
from neuron_sdk.dependencies import DEFAULT_INTERVAL, DEFAULT_TIMEOUT, Check, DependencyChecks
from neuron_sdk.description import (
    DEFAULT_MAX_CONCURRENT_COMMANDS,
    AlertThresholds,
    ApiEndpoint,
    AutoRestart,
    Deployment,
    NeuronDescription,
    ResourceRequirements,
    check_base_url,
    check_endpoints,
    check_extras,
    check_labels,
    check_names,
    check_neuron_id,
    check_range,
    check_text,
    check_type,
)
from neuron_sdk.errors import ConfigError, LifecycleError
from neuron_sdk.health import DEFAULT_ALERT_SCORE, default_health_score
from neuron_sdk.lifecycle import Hook
from neuron_sdk.logs import configure_logging
from neuron_sdk.metrics import DEFAULT_BOUNDS, Counter, Gauge, Histogram, Measurement, Metrics
from neuron_sdk.mode import Mode
from neuron_sdk.payload import (
    MAX_DETAILS_BYTES,
    MAX_DETAILS_DEPTH,
    NotJson,
    TooLarge,
    plain_object,
)
from neuron_sdk.reports import Reports, Severity, make_event
from neuron_sdk.vitals import HealthFunction, VitalSigns
from neuron_sdk.workers import Workers

if TYPE_CHECKING:
    from neuron_sdk.runtime import Runtime

F = TypeVar("F", bound=Callable[..., Any])

STOP_TIMEOUT_S = 40.0
EXIT_FAILED = 1
EXIT_CONFIG = 2
_DEFAULT_HEARTBEAT_TIMEOUT_S = 120.0


class Neuron:
    """One service of the federation.

    Build it at module level, decorate its handlers, then `run()`. Everything wrong with it raises
    while it is built; a federation that is away never raises at all.
    """

    once: ClassVar[bool] = False
    """How `run` runs without being told: `neuron run --once` sets it, for modules that call `run`
    themselves."""

    def __init__(
        self,
        neuron_id: str | None = None,
        *,
        type: str | None = None,  # noqa: A002 - the contract's word
        name: str | None = None,
        version: str = "",
        base_url: str = "",
        healthcheck_endpoint: str = "",
        api_endpoints: Sequence[ApiEndpoint] = (),
        capabilities: Sequence[str] = (),
        dependencies: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        resource_requirements: ResourceRequirements | None = None,
        deployment: Deployment | None = None,
        alert_thresholds: AlertThresholds | None = None,
        auto_restart: AutoRestart | None = None,
        max_concurrent_commands: int = DEFAULT_MAX_CONCURRENT_COMMANDS,
        health: HealthFunction = default_health_score,
        federation_url: str | None = None,
        enrollment_token: str | None = None,
        config: NeuronConfig | None = None,
    ) -> None:
        """What is said here wins over the environment; see `NeuronConfig` for the variables.

        Args:
            neuron_id: its name in the fleet. Default: NEURON_ID.
            type: the kind of service. Default: NEURON_TYPE.
            name: a name for people. Default: NEURON_NAME, else the neuron_id.
            version: the service's own version, at most 128 characters.
            base_url: where the service itself answers, http or https.
            healthcheck_endpoint: path or URL of the service's health check.
            api_endpoints: the service's own HTTP API, at most 256.
            capabilities: what it can do, for filters, at most 128.
            dependencies: names of what it needs, beside those that have a check.
            labels: for filters, at most 64.
            metadata: anything else worth keeping, as JSON, at most 64 KiB.
            resource_requirements: what it wants of its host.
            deployment: how it is deployed.
            alert_thresholds: when it counts as unwell.
            auto_restart: whether a supervisor restarts it.
            max_concurrent_commands: how many commands run at a time, 1 to 1000.
            health: makes the health score, 0 to 100; called in a thread, for each heartbeat.
            federation_url: "host:port". Default: FEDERATION_URL.
            enrollment_token: to register the first time. Default: ENROLLMENT_TOKEN.
            config: every other setting.

        Raises:
            ConfigError: an argument cannot be used; the text names it and says what can.
        """
        if neuron_id is not None:
            check_neuron_id(neuron_id, "neuron_id")
        if type is not None:
            check_type(type, "type")
        check_extras(resource_requirements, deployment, alert_thresholds, auto_restart)
        check_range(max_concurrent_commands, "max_concurrent_commands", 1, 1000)
        self._config = merge(
            config,
            neuron_id=neuron_id,
            type=type,
            name=name,
            federation_url=federation_url,
            enrollment_token=enrollment_token,
        )
        self._dependencies = check_names(dependencies, "dependencies")
        # Its id and type are the settings' business; everything else is known now.
        self._description = NeuronDescription(
            neuron_id="",
            type="",
            version=check_text(version, "version", 128),
            base_url=check_base_url(base_url),
            healthcheck_endpoint=check_text(healthcheck_endpoint, "healthcheck_endpoint", 2048),
            api_endpoints=check_endpoints(api_endpoints),
            capabilities=check_names(capabilities, "capabilities"),
            labels=check_labels(labels or {}),
            metadata=_check_metadata(metadata or {}),
            resource_requirements=resource_requirements,
            deployment=deployment,
            alert_thresholds=alert_thresholds,
            auto_restart=auto_restart,
            max_concurrent_commands=max_concurrent_commands,
        )
        self.metrics = Metrics()
        """The service's own numbers."""
        self.checks = DependencyChecks()
        """The checks of what it needs."""
        self.workers = Workers()
        """Its background work."""
        self.commands = CommandRegistry()
        """The commands that it accepts."""
        self.on_start_hooks: list[Hook] = []
        self.on_stop_hooks: list[Hook] = []
        self._builtins = Builtins()
        for command in self._builtins.commands():
            self.commands.add(command)
        self._vitals = VitalSigns(
            metrics=self.metrics,
            checks=self.checks,
            health=health,
            alert_score=(alert_thresholds and alert_thresholds.health_score) or DEFAULT_ALERT_SCORE,
            service_version=version,
        )
        self._reports = Reports(self.metrics, self._vitals.gauges)
        self._runtime: Runtime | None = None
        self._background: lifecycle.Background | None = None

    # ---- building

    def command(
        self,
        type: str | None = None,  # noqa: A002 - the contract's word
        *,
        description: str | None = None,
        control: bool = False,
        isolation: Isolation | None = None,
        replace: bool = False,
    ) -> Callable[[F], F]:
        """Make a function the handler of a command; the function stays what it is.

        Its typed parameters become the JSON Schema that is advertised. A coroutine function runs
        in the service's event loop, any other in a thread.

        Args:
            type: what operators call it. Default: the function's name.
            description: for people. Default: the first paragraph of its docstring.
            control: let it run in a lane of its own, which long work never delays.
            isolation: "process" runs it in a process of its own, which can be killed.
            replace: put it in the place of the built-in command of that name.

        Raises:
            HandlerError: the type is taken, or the function's signature cannot be used.
        """
        if callable(type):
            raise LifecycleError("write @neuron.command() with parentheses")

        def register(handler: F) -> F:
            self._must_be_new("a command")
            made = make_command(
                handler, type, description=description, control=control, isolation=isolation
            )
            self.commands.add(made, replace=replace)
            return handler

        return register

    def worker(self, worker: F) -> F:
        """Let a coroutine function run as long as the neuron does; it is started again, with
        growing waits, when it raises. Raises HandlerError if it is none.
        """
        self._must_be_new("a worker")
        self.workers.add(worker)
        return worker

    def dependency(
        self,
        name: str,
        *,
        interval: float = DEFAULT_INTERVAL,
        timeout: float = DEFAULT_TIMEOUT,
        required: bool = True,
    ) -> Callable[[F], F]:
        """Make a function the check of something that the service needs.

        It returns True, None or DependencyState.UP if all is well, another state if not, or raises.

        Args:
            name: the dependency's name, for example "postgresql".
            interval: seconds between two checks.
            timeout: seconds after which a check counts as DOWN.
            required: whether the neuron is unhealthy without it.

        Raises:
            ConfigError: an argument cannot be used.
        """

        def register(check: F) -> F:
            self.add_dependency(name, check, interval=interval, timeout=timeout, required=required)
            return check

        return register

    def add_dependency(
        self,
        name: str,
        check: Check,
        *,
        interval: float = DEFAULT_INTERVAL,
        timeout: float = DEFAULT_TIMEOUT,
        required: bool = True,
    ) -> None:
        """As `dependency`, for a check that exists: `add_dependency("redis", checks.tcp(…))`."""
        self._must_be_new("a dependency")
        try:
            self.checks.register(name, check, interval=interval, timeout=timeout, required=required)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def on_start(self, hook: F) -> F:
        """Call a function, or a coroutine function, before the first command runs. If it raises,
        the neuron does not start.
        """
        self.on_start_hooks.append(hook)
        return hook

    def on_stop(self, hook: F) -> F:
        """Call a function, or a coroutine function, after the last command has ended."""
        self.on_stop_hooks.append(hook)
        return hook

    # ---- running

    def run(self, *, once: bool = False) -> None:
        """Run until SIGTERM, SIGINT (twice: at once) or a command stops it. In the main thread.

        The process is the neuron's: a setting that cannot be used ends it with exit code 2 and one
        line on stderr.

        Args:
            once: for cron jobs. Hold no stream: show that the neuron is there, carry out the
                commands that wait for it, report, and return when none is left. If the federation
                is away for a minute, refuses the neuron, or has heard from another process of it
                since, the process ends with exit code 1 and one line on stderr; what could not be
                sent is sent by the next run.

        Raises:
            LifecycleError: it runs already, or this is not the main thread.
        """
        lifecycle.refuse_isolated()
        try:
            self.settings()
            self._configure_logging()
            # gRPC writes lines of its own to stderr; what they mean, ours say.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            mode = Mode.ONCE if once or Neuron.once else Mode.PROCESS
            failure = lifecycle.run_in_main_thread(self, mode)
        except ConfigError as error:
            sys.stderr.write(f"neuron: {error}\n")
            raise SystemExit(EXIT_CONFIG) from None
        if failure:
            sys.stderr.write(f"neuron: {failure}\n")
            raise SystemExit(EXIT_FAILED)

    async def serve(self) -> None:
        """Run in this event loop until it is told to stop, or cancelled. No signal is touched.

        Raises:
            ConfigError: a setting cannot be used.
            LifecycleError: it runs already.
        """
        lifecycle.refuse_isolated()
        await lifecycle.serve(self)

    def start(self) -> None:
        """Run beside an existing program, in threads; returns when it has started.

        Raises:
            ConfigError: a setting cannot be used.
            LifecycleError: it runs already.
        """
        if self._background is not None and self._background.alive:
            raise LifecycleError("this neuron runs already")
        self._background = lifecycle.Background(self)

    def stop(self, *, timeout: float = STOP_TIMEOUT_S) -> None:
        """End what `start` began, in order, within `timeout` seconds. Harmless if nothing runs.

        A neuron in `serve` or `run` is told to stop, and this returns at once.

        Raises:
            TimeoutError: it took longer.
        """
        background, self._background = self._background, None
        if background is not None:
            background.stop(timeout)
        elif self._runtime is not None:
            self._runtime.request_stop("stopped by the program")

    @property
    def has_run(self) -> bool:
        """Whether it has been started, in whatever way; it may have stopped since."""
        return self._runtime is not None

    def settings(self) -> Settings:
        """Every setting as it would be used now. Raises ConfigError."""
        return resolve(self._config)

    @property
    def http_port(self) -> int | None:
        """The TCP port of /health, /status and /metrics; None if they are not served."""
        return self._runtime.http_port if self._runtime is not None else None

    def open_runtime(self, loop: asyncio.AbstractEventLoop, *, mode: Mode) -> Runtime:
        """Start everything that belongs to the SDK; for `lifecycle` alone."""
        # gRPC and protobuf come with the runtime: a neuron that is only built, or tested, or
        # imported for one isolated handler, does not pay for them.
        from neuron_sdk.runtime import Parts, Runtime  # noqa: PLC0415

        if self._runtime is not None and not self._runtime.closed.done():
            raise LifecycleError("this neuron runs already")
        settings = self.settings()
        self._vitals.disk_path = settings.state_dir
        parts = Parts(
            settings=settings,
            description=self.describe(settings),
            registry=self.commands,
            builtins=self._builtins,
            vitals=self._vitals,
            reports=self._reports,
            workers=self.workers,
        )
        self._runtime = Runtime(parts, loop, mode=mode)
        return self._runtime

    def describe(self, settings: Settings) -> NeuronDescription:
        """What the neuron says of itself when it registers with these settings."""
        timeout = 2 * settings.heartbeat_interval
        alerts = self._description.alert_thresholds
        if timeout > _DEFAULT_HEARTBEAT_TIMEOUT_S and not (alerts and alerts.heartbeat_timeout):
            # Else a neuron that speaks seldom would be SUSPECT between any two heartbeats.
            alerts = replace(alerts or AlertThresholds(), heartbeat_timeout=min(timeout, 86_400.0))
        checked = (name for name in self.checks.names() if name not in self._dependencies)
        return replace(
            self._description,
            neuron_id=settings.neuron_id,
            type=settings.type,
            name=settings.name,
            dependencies=(*self._dependencies, *checked),
            alert_thresholds=alerts,
            command_types=tuple(command.info() for command in self.commands),
        )

    # ---- the service's own numbers

    def track_request(self, ms: float, *, ok: bool = True) -> None:
        """Count one request that took `ms` milliseconds, and whether it succeeded."""
        self.metrics.track_request(ms, ok=ok)

    def measure(self) -> Measurement:
        """`with neuron.measure():` counts its body as one request, failed if the body raises."""
        return self.metrics.measure()

    def request_started(self) -> None:
        """One more connection or request is open."""
        self.metrics.request_started()

    def request_finished(self) -> None:
        """One fewer is open."""
        self.metrics.request_finished()

    def set_queue_size(self, size: int) -> None:
        """How much work waits now."""
        self.metrics.set_queue_size(size)

    def counter(
        self, name: str, *, unit: str = "", labels: Mapping[str, str] | None = None
    ) -> Counter:
        """A sum that only grows, by `.add(…)`. Raises ValueError, as `Metrics.counter`."""
        return self.metrics.counter(name, unit=unit, labels=labels)

    def gauge(self, name: str, *, unit: str = "", labels: Mapping[str, str] | None = None) -> Gauge:
        """A number that goes up and down, by `.set(…)`. Raises ValueError, as `Metrics.gauge`."""
        return self.metrics.gauge(name, unit=unit, labels=labels)

    def histogram(
        self,
        name: str,
        *,
        bounds: Sequence[float] = DEFAULT_BOUNDS,
        unit: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> Histogram:
        """A distribution, by `.observe(…)`. Raises ValueError, as `Metrics.histogram`."""
        return self.metrics.histogram(name, bounds=bounds, unit=unit, labels=labels)

    def event(
        self,
        type: str,  # noqa: A002 - the contract's word
        message: str = "",
        *,
        severity: Severity = "INFO",
        **attributes: Any,
    ) -> None:
        """Note that something happened. It travels with the next report; ERROR and CRITICAL at
        once.

        Args:
            type: what kind of event, for filters, for example "disk_full".
            message: what happened, for people; cut at 8192 characters.
            severity: DEBUG, INFO, WARNING, ERROR or CRITICAL.
            attributes: details, as JSON, at most 64 KiB.

        Raises:
            ValueError: the type or the severity cannot be used.
        """
        self._reports.note(make_event(type, message, severity, attributes, time.time()))

    # ---- inside

    def _must_be_new(self, what: str) -> None:
        if self._runtime is not None and not self._runtime.closed.done():
            raise LifecycleError(f"{what} comes too late: the neuron has told what it can do")

    def _configure_logging(self) -> None:
        settings = self.settings()
        try:
            configure_logging(level=settings.log_level, file=settings.log_file)
        except OSError as error:
            raise ConfigError(f"{error.strerror}; set LOG_FILE to another path") from None


def _check_metadata(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return plain_object(metadata, max_bytes=MAX_DETAILS_BYTES, max_depth=MAX_DETAILS_DEPTH)
    except (NotJson, TooLarge) as error:
        raise ConfigError(f"metadata: {error}; use JSON of at most 64 KiB") from None
