"""Lists of neurons: filter, order, pages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.neuron import Lifecycle, NeuronRecord, Presence
from federation_server.store import filter as filters
from federation_server.store.neurons import record, select_records
from federation_server.store.paging import SortKey, page
from federation_server.store.schema import neuron_states, neurons

FIELDS: filters.Fields = {
    "neuron_id": filters.Text(neurons.c.neuron_id),
    "name": filters.Text(neurons.c.name),
    "type": filters.Text(neurons.c.type),
    "language": filters.Text(neurons.c.language),
    "version": filters.Text(neurons.c.version),
    "lifecycle": filters.Choice(neurons.c.lifecycle, Lifecycle),
    "presence": filters.Choice(neuron_states.c.presence, Presence),
    "health_score": filters.Number(neuron_states.c.health_score),
    "cpu_percent": filters.Number(neuron_states.c.cpu_percent),
    "memory_percent": filters.Number(neuron_states.c.memory_percent),
    "error_rate_percent": filters.Number(neuron_states.c.error_rate_percent),
    "mean_response_ms": filters.Number(neuron_states.c.mean_response_ms),
    "last_heartbeat_time": filters.Time(neuron_states.c.last_heartbeat_time),
    "create_time": filters.Time(neurons.c.create_time),
    "update_time": filters.Time(neurons.c.update_time),
    "labels": filters.TextMap(neurons.c.labels),
    "capabilities": filters.TextArray(neurons.c.capabilities),
    "dependencies": filters.TextArray(neurons.c.dependencies),
}

_SORTED: dict[str, ColumnElement[Any]] = {
    "neuron_id": neurons.c.neuron_id,
    "name": neurons.c.name,
    "type": neurons.c.type,
    "presence": neuron_states.c.presence,
    "health_score": neuron_states.c.health_score,
    "last_heartbeat_time": neuron_states.c.last_heartbeat_time,
    "create_time": neurons.c.create_time,
}

DEFAULT_ORDER = "neuron_id"

ORDERS: Sequence[str] = tuple(f"{name}{end}" for name in _SORTED for end in ("", " desc"))
"""What `order_by` may say; empty means DEFAULT_ORDER."""


@lru_cache(maxsize=256)
def matching(filter_text: str) -> ColumnElement[bool]:
    """The condition that a filter puts on neurons and their states; true for an empty one.

    Raises:
        FilterError: the filter cannot be understood.
    """
    return filters.condition(filter_text, FIELDS)


async def list_neurons(
    connection: AsyncConnection,
    *,
    filter_text: str,
    order_by: str,
    page_size: int,
    page_token: str,
) -> tuple[list[NeuronRecord], str]:
    """A page of the neurons that match, and the token of the next page.

    Raises:
        FilterError: the filter cannot be understood.
        KeyError: `order_by` is not one of ORDERS.
        PageTokenInvalid: the token is not of this list.
    """
    order = order_by or DEFAULT_ORDER
    name = order.removesuffix(" desc")
    same = neuron_states.c.neuron_id if name == "neuron_id" else None
    keys = [SortKey(_SORTED[name], descending=order.endswith(" desc"), also=same)]
    if name != "neuron_id":
        keys.append(SortKey(neurons.c.neuron_id))
    asked = page(page_size, page_token, "neurons", filter_text, order)
    query = select_records().where(matching(filter_text))
    rows, next_page_token = await asked.read(connection, query, keys)
    return [record(row) for row in rows], next_page_token
