"""Reading neurons: each with its state, as one `NeuronRecord`.

What neurons do to themselves is in `registration` and `ingest`; what admins do to them is in
`fleet`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sqlalchemy import RowMapping, Select, select
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
    row = (await connection.execute(query)).mappings().one_or_none()
    return None if row is None else record(row)


def record(row: RowMapping) -> NeuronRecord:
    """A row of `select_records`."""
    return NeuronRecord(
        description=NeuronDescription(**{name: row[name] for name in DESCRIBED}),
        **{name: row[name] for name in (*_PLAIN, *_STATE)},
        session=_session(row),
        totals=Totals(*(row[name] for name in _TOTALS)),
    )


def _session(row: RowMapping) -> SessionRecord | None:
    if (lease_expire_time := row["lease_expire_time"]) is not None:
        # The other columns are those of the stream that there was before.
        process, epoch = row["instance_id"], row["session_epoch"]
        return SessionRecord(
            "", epoch, False, None, None, process, "", "", "", "", lease_expire_time
        )
    if row["session_id"] is None:
        return None
    epoch, session_id, opened, *rest = (row[name] for name in _SESSION)
    return SessionRecord(session_id, epoch, opened, *rest)
