"""The whole fleet in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from federation_server.domain.doubt import Cause
from federation_server.domain.neuron import Lifecycle, Presence


@dataclass(frozen=True, slots=True)
class NeuronSummary:
    """A neuron in a few words; None is what its last heartbeat did not say."""

    neuron_id: str
    type: str
    health_score: float | None
    mean_response_ms: float | None


@dataclass(frozen=True, slots=True)
class DoubtfulServer:
    """A server that is in doubt of itself."""

    server_id: str
    causes: Sequence[Cause]
    since: datetime
    sweeping: bool
    """It marks neurons down, all the fleet's; else only its own are left alone."""


@dataclass(frozen=True, slots=True)
class FleetOverview:
    """How many neurons there are of each presence and lifecycle (each one named) and type (the
    most frequent first), and those of the ONLINE ones that are the slowest and the worst.
    """

    presences: Mapping[Presence, int]
    lifecycles: Mapping[Lifecycle, int]
    types: Sequence[tuple[str, int]]
    mean_health_score: float | None
    """Of the ONLINE neurons that say one."""
    slowest: Sequence[NeuronSummary]
    worst: Sequence[NeuronSummary]
    doubts: Sequence[DoubtfulServer]
    time: datetime

    @property
    def total(self) -> int:
        """How many neurons there are."""
        return sum(self.presences.values())
