"""What nobody will ask for any more, and no partition takes along when it is dropped."""

from __future__ import annotations

from datetime import timedelta

from federation_server.store.database import Connection

SPOOL_RETENTION = timedelta(days=90)
"""How long the mark of a spool is kept that sends nothing. A neuron that comes back later, and had
not heard what was stored, would be counted twice."""

_SPOOLS = b"""
DELETE FROM spools WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM spools WHERE update_time < now() - %s LIMIT %s))
  AND update_time < now() - %s
"""

_SERIES = b"""
DELETE FROM metric_series WHERE series_id = ANY (ARRAY(
    SELECT series_id FROM metric_series WHERE last_report_time < now() - %s LIMIT %s))
  AND last_report_time < now() - %s
"""

_MOST = 10_000
"""How many one statement deletes, so that none locks for long."""


async def forget(connection: Connection, *, longest: timedelta) -> None:
    """Forgets the marks of spools that nobody has, and the series of which no point is left:
    `longest` is for how long the points of any are kept.
    """
    for statement, age in ((_SPOOLS, SPOOL_RETENTION), (_SERIES, longest)):
        while (await connection.execute(statement, (age, _MOST, age))).rowcount == _MOST:
            pass
