"""The commands that every neuron has. They run on the control channel's own loop, so that they
work while the service itself is busy or hangs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import msgspec

from neuron_sdk.commands import Command, make_command
from neuron_sdk.context import CommandContext
from neuron_sdk.errors import CommandFailed
from neuron_sdk.health import HealthReport
from neuron_sdk.spool_store import Attempt

RESTART = "restart"
Interval = Annotated[float, msgspec.Meta(ge=1, le=86_400)]


class Controls(Protocol):
    """What a running neuron lets its built-in commands do."""

    async def health(self) -> HealthReport: ...
    def set_intervals(
        self, *, heartbeat: float | None, analytics: float | None
    ) -> Mapping[str, float]: ...
    def set_log_level(self, level: str) -> None: ...
    def request_stop(self, reason: str) -> None: ...
    async def restart(self, of: Attempt, reason: str) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    async def restart_workers(self, name: str | None) -> list[str]: ...
    @property
    def worker_names(self) -> tuple[str, ...]: ...


class Builtins:
    """The built-in commands of one neuron."""

    def __init__(self) -> None:
        self._running: Controls | None = None

    def attach(self, controls: Controls | None) -> None:
        """The neuron runs now, or has stopped (None)."""
        self._running = controls

    def commands(self) -> list[Command]:
        """All of them, to be registered before the service's own."""
        handlers = (
            self.health_check,
            self.config_update,
            self.restart,
            self.restart_worker,
            self.stop,
            self.pause,
            self.resume,
        )
        return [make_command(handler, control=True, builtin=True) for handler in handlers]

    async def health_check(self) -> dict[str, Any]:
        """Tell how the neuron is now: status, score and dependencies."""
        report = await self._controls.health()
        return {
            "status": report.status,
            "health_score": report.score,
            "uptime": round(report.uptime, 3),
            "dependencies": [
                {
                    "name": found.name,
                    "state": found.state.value,
                    "latency_ms": found.latency_ms,
                    "message": found.message,
                }
                for found in report.dependencies
            ],
            "spool_in_memory": report.spool_in_memory,
        }

    async def config_update(
        self,
        heartbeat_interval: Interval | None = None,
        analytics_interval: Interval | None = None,
        log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = None,
    ) -> dict[str, Any]:
        """Change settings of the running neuron until its next start; intervals in seconds."""
        said = {
            "heartbeat_interval": heartbeat_interval,
            "analytics_interval": analytics_interval,
            "log_level": log_level,
        }
        changed = {name: value for name, value in said.items() if value is not None}
        if not changed:
            raise CommandFailed("NOTHING_TO_CHANGE", f"name at least one of {', '.join(said)}")
        in_effect = self._controls.set_intervals(
            heartbeat=heartbeat_interval, analytics=analytics_interval
        )
        if log_level is not None:
            self._controls.set_log_level(log_level)
        return {"changed": changed, "in_effect": dict(in_effect)}

    async def restart(self, ctx: CommandContext) -> None:
        """Stop in order, and start the program again in the same process, which then answers."""
        await self._controls.restart(Attempt(ctx.command_id, ctx.attempt), "restarted by a command")

    async def restart_worker(self, name: str | None = None) -> dict[str, Any]:
        """Cancel the service's background workers, or the one of that name, and start them anew."""
        known = self._controls.worker_names
        if name is not None and name not in known:
            raise CommandFailed(
                "UNKNOWN_WORKER", f"there is no worker {name!r}", {"workers": list(known)}
            )
        return {"restarted": await self._controls.restart_workers(name)}

    async def stop(self, reason: str = "") -> dict[str, Any]:
        """Stop the neuron in order: running commands get their grace period."""
        self._controls.request_stop(
            f"stopped by a command: {reason}" if reason else "stopped by a command"
        )
        return {"stopping": True}

    async def pause(self) -> dict[str, Any]:
        """Start no more commands; those that run go on, those that come wait."""
        self._controls.pause()
        return {"paused": True}

    async def resume(self) -> dict[str, Any]:
        """Start commands again."""
        self._controls.resume()
        return {"paused": False}

    @property
    def _controls(self) -> Controls:
        if self._running is None:
            raise CommandFailed("NOT_RUNNING", "the neuron is not running")
        return self._running
