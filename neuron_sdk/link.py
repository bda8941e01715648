"""How a neuron stands with the federation, and what its runtime needs of whatever connects it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from neuron_sdk.executor import Executor
    from neuron_sdk.intervals import Intervals
    from neuron_sdk.registration import Registration
    from neuron_sdk.spool import Spool
    from neuron_sdk.tls import TlsFiles
    from neuron_sdk.vitals import Vitals


@dataclass(frozen=True, slots=True)
class Link:
    """How the neuron stands with the federation, for the status page."""

    connected: bool = False
    session_id: str = ""
    """"" without a stream."""
    epoch: int = 0
    server_version: str = ""
    """"" without a stream."""
    problem: str = ""
    """Why it is not connected, with the remedy if there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkParts:
    """What is connected with the federation, and as whom."""

    target: str
    tls: TlsFiles | None
    """None: plaintext."""
    instance_id: str
    registration: Registration
    enrollable: bool
    """Whether an enrollment token is set."""
    spool: Spool
    executor: Executor
    intervals: Intervals
    vitals: Callable[[], Awaitable[Vitals]]
    """Asked for each heartbeat."""


class Connection(Protocol):
    """What connects a neuron with the federation. Belongs to the control loop."""

    link: Link
    opened: asyncio.Event
    """Set once the first session is open."""
    failure: str
    """Why it has given up, for people; "" if it has not."""

    async def run(self) -> None:
        """Hold a session. Returns if nothing is left to do, or it has given up. To be cancelled."""

    async def flush(self, timeout_s: float) -> None:
        """Wait until the federation has all that the spool holds, or cannot get it now."""

    async def say_goodbye(self, reason: str) -> None:
        """End the session on purpose; waits a moment for the federation to take note."""
