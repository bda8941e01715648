"""Reading neurons: each with its state, as one `NeuronRecord`.

What neurons do to themselves is in `registration` and `ingest`; what admins do to them is in
`fleet`.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.neuron import (
    NeuronDescription,
    NeuronRecord,
    SessionRecord,
    Totals,
)
from federation_server.store.schema import neuron_states, neurons

DESCRIBED = tuple(field.name for field in fields(NeuronDescription))
"""The columns of a description; the table's have the dataclass's names."""

_STATE = (
    "presence",
    "presence_time",
    "presence_reason",
    "last_heartbeat_time",
    "health_score",
    "cpu_percent",
    "memory_percent",
    "error_rate_percent",
    "mean_response_ms",
    "uptime_s",
    "host",
)
_PLAIN = (
    "overridden_fields",
    "lifecycle",
    "lifecycle_reason",
    "create_time",
    "update_time",
)
_SESSION = (
    "session_epoch",
    "session_id",
    "session_open",
    "session_open_time",
    "session_close_time",
    "instance_id",
    "sdk_name",
    "sdk_version",
    "server_id",
    "peer",
    "lease_expire_time",
)
_TOTALS = ("requests_total", "failed_requests_total", "response_ms_total", "uptime_s_total")

JOINED = neurons.join(neuron_states, neuron_states.c.neuron_id == neurons.c.neuron_id)
"""Every neuron with its state; what filters and orders are made over."""


def _slices(*groups: tuple[str, ...]) -> list[slice]:
    """Where each group of columns is in a row of all of them."""
    ends = [sum(len(group) for group in groups[: n + 1]) for n in range(len(groups))]
    return [slice(end - len(group), end) for group, end in zip(groups, ends, strict=True)]


_OWN = _PLAIN + _STATE
_DESCRIBED_AT, _OWN_AT, _SESSION_AT, _TOTALS_AT = _slices(DESCRIBED, _OWN, _SESSION, _TOTALS)


@cache
def select_records() -> Select[Any]:
    """The query whose rows `record` reads."""
    columns = (
        *(neurons.c[name] for name in (*DESCRIBED, *_PLAIN)),
        *(neuron_states.c[name] for name in (*_STATE, *_SESSION, *_TOTALS)),
    )
    return select(*columns).select_from(JOINED)


async def get(connection: AsyncConnection, neuron_id: str) -> NeuronRecord | None:
    """One neuron; None if there is none."""
    query = select_records().where(neurons.c.neuron_id == neuron_id)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else record(row)


def record(row: Row[Any]) -> NeuronRecord:
    """A row of `select_records`. By place and not by name, because lists have many."""
    return NeuronRecord(
        NeuronDescription(*row[_DESCRIBED_AT]),
        **dict(zip(_OWN, row[_OWN_AT], strict=True)),
        session=_session(*row[_SESSION_AT]),
        totals=Totals(*row[_TOTALS_AT]),
    )


def _session(  # noqa: PLR0917 - the columns of _SESSION, in their order
    epoch: int,
    session_id: str | None,
    is_open: bool,
    open_time: datetime | None,
    close_time: datetime | None,
    instance_id: str,
    sdk_name: str,
    sdk_version: str,
    server_id: str,
    peer: str,
    lease_expire_time: datetime | None,
) -> SessionRecord | None:
    if lease_expire_time is not None:
        # The other columns are those of the stream that there was before.
        return SessionRecord(
            "", epoch, False, None, None, instance_id, "", "", "", "", lease_expire_time
        )
    if session_id is None:
        return None
    return SessionRecord(
        session_id,
        epoch,
        is_open,
        open_time,
        close_time,
        instance_id,
        sdk_name,
        sdk_version,
        server_id,
        peer,
        None,
    )
