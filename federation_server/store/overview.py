"""The whole fleet in a few numbers, counted by PostgreSQL when somebody asks."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.fleet import FleetOverview, NeuronSummary
from federation_server.domain.neuron import Lifecycle, Presence
from federation_server.store import servers
from federation_server.store.database import current_time
from federation_server.store.neurons import JOINED
from federation_server.store.schema import neuron_states, neurons

MOST_TYPES = 100

_STATE = neuron_states.c


async def overview(
    connection: AsyncConnection, matching: ColumnElement[bool], *, top: int
) -> FleetOverview:
    """The numbers of the neurons that match; names at most `top` of the slowest and the worst."""
    now: datetime = await current_time(connection)
    presences = dict.fromkeys(Presence, 0)
    lifecycles = dict.fromkeys(Lifecycle, 0)
    types: Counter[str] = Counter()
    scores, score_sum = 0, 0.0
    for row in await connection.execute(_counts(matching)):
        presences[row.presence] += row.number
        lifecycles[row.lifecycle] += row.number
        types[row.type] += row.number
        if row.presence is Presence.ONLINE:
            scores += row.scores
            score_sum += row.score_sum or 0.0
    slowest = _top(matching, _STATE.mean_response_ms, _STATE.mean_response_ms.desc(), top)
    worst = _top(matching, _STATE.health_score, _STATE.health_score.asc(), top)
    return FleetOverview(
        presences=presences,
        lifecycles=lifecycles,
        types=sorted(types.items(), key=lambda item: (-item[1], item[0]))[:MOST_TYPES],
        mean_health_score=score_sum / scores if scores else None,
        slowest=[NeuronSummary(*row) for row in await connection.execute(slowest)],
        worst=[NeuronSummary(*row) for row in await connection.execute(worst)],
        doubts=await servers.in_doubt(connection),
        time=now,
    )


def _counts(matching: ColumnElement[bool]) -> Select[Any]:
    kinds = (neurons.c.type, neurons.c.lifecycle, _STATE.presence)
    return (
        select(
            *kinds,
            func.count().label("number"),
            func.count(_STATE.health_score).label("scores"),
            func.sum(_STATE.health_score).label("score_sum"),
        )
        .select_from(JOINED)
        .where(matching)
        .group_by(*kinds)
    )


def _top(
    matching: ColumnElement[bool], said: ColumnElement[Any], order: ColumnElement[Any], top: int
) -> Select[Any]:
    return (
        select(neurons.c.neuron_id, neurons.c.type, _STATE.health_score, _STATE.mean_response_ms)
        .select_from(JOINED)
        .where(matching, _STATE.presence == Presence.ONLINE, said.is_not(None))
        .order_by(order, neurons.c.neuron_id)
        .limit(top)
    )
