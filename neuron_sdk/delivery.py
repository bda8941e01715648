"""A command as it arrives: the SDK's own word for a CommandDelivery of the contract."""

from __future__ import annotations

from dataclasses import dataclass, field

from neuron_sdk.payload import JsonObject
from neuron_sdk.spool_store import Attempt, Execution


@dataclass(frozen=True, slots=True)
class Delivery:
    """A command to carry out."""

    of: Attempt
    type: str
    data: JsonObject = field(default_factory=dict)
    priority: int = 5
    """0 to 9; higher first."""
    run_timeout: float | None = None
    """Seconds that it may run; None without limit."""
    expire_after: float | None = None
    """Seconds within which it must have started; None without limit."""
    checkpoint: JsonObject | None = None
    """What the handler noted last, in an earlier attempt; None for nothing."""
    max_attempts: int = 1
    """How many attempts there may be."""
    execution: Execution = Execution.AT_LEAST_ONCE
    """Whether it comes again if its fate is unknown."""
