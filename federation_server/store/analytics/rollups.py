"""Points added up by minute, those by hour, and those by day.

Whoever writes points leaves a mark for each minute that they fall into (`mark`), in the same
transaction. `roll_up` takes the marks of buckets that have ended, makes those buckets anew from the
level below, and leaves marks for the level above. So a report that comes days late ends up in every
level, and a crash at any point repeats nothing and loses nothing: what is made anew twice is the
same. One server does this at a time (live/rollup.py).

A mark is for all neurons, or for one: a neuron that was away for days and sends its spool has its
own rows made anew, and not those of the whole fleet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from federation_server.domain.rollup import WIDTHS, Level, floor
from federation_server.store import partitions
from federation_server.store.database import Connection, bounded
from federation_server.store.pipeline import Pipeline, pipeline

SETTLES_AFTER = timedelta(seconds=10)
"""How long after its end a minute is added up: most of its reports are there by then."""

AT_A_TIME = {Level.MINUTE: 30, Level.HOUR: 6, Level.DAY: 1}
"""How many buckets one transaction makes."""

LATE = timedelta(minutes=5)
"""Points older than this when they come are marked by their neuron; for others, which come from all
neurons at once, one mark for all is less work.
"""

MOST_NEURONS = 100
"""A bucket with the marks of more, and of more than a tenth of the fleet, is made anew for all,
which is less work then.
"""

STEP_TIMEOUT_S = 300.0
"""How long one of these transactions may take before its connection is given up."""

LARGEST = 1e290
"""Values beyond this are added up as this: PostgreSQL refuses a sum that overflows, and one absurd
value must not make the whole fleet's metric unreadable.
"""


@dataclass(frozen=True, slots=True)
class _Rollup:
    """A level's table, and where it comes from."""

    level: Level
    table: str
    source: str


_POINTS = f"""(
    SELECT series_id, point_time AS bucket_time, coalesce(count, 1) AS count,
        least(greatest(coalesce(value, sum), -{LARGEST}), {LARGEST}) AS sum,
        coalesce(value, min) AS min, coalesce(value, max) AS max, bucket_counts
    FROM metric_points
)"""
"""Points in the shape of rollups: a number is one observation."""

ROLLUPS = (
    _Rollup(Level.MINUTE, "metric_minutes", _POINTS),
    _Rollup(Level.HOUR, "metric_hours", "metric_minutes"),
    _Rollup(Level.DAY, "metric_days", "metric_hours"),
)
TABLES = {rollup.level: rollup.table for rollup in ROLLUPS}

_MARK = b"""
INSERT INTO stale_rollups (level, bucket_time, neuron_id)
SELECT $1::rollup_level, unnest($2::timestamptz[]), unnest($3::text[])
"""

_STALE = b"""
SELECT DISTINCT bucket_time FROM stale_rollups
WHERE level = $1::rollup_level AND bucket_time < $2::timestamptz
ORDER BY bucket_time LIMIT $3::int8
"""

_TAKE = b"""
WITH taken AS (
    DELETE FROM stale_rollups
    WHERE level = $1::rollup_level AND bucket_time = ANY ($2::timestamptz[])
    RETURNING bucket_time, neuron_id
)
SELECT bucket_time,
    CASE WHEN count(neuron_id) = count(*)
          AND count(DISTINCT neuron_id) <= greatest($3::int8, (SELECT count(*) / 10 FROM neurons))
         THEN array_agg(DISTINCT neuron_id) END
FROM taken GROUP BY bucket_time
"""

_UNTIL = b"UPDATE rollup_levels SET until_time = $2::timestamptz WHERE level = $1::rollup_level"

_READ_UNTIL = b"SELECT level::text, until_time FROM rollup_levels"


def _whole(count: str) -> str:
    """A count that may be more than a bigint holds, as the most that this does."""
    return f"least({count}, {2**63 - 1})::int8"


@dataclass(frozen=True, slots=True)
class _Scope:
    """Which rows of a level are made anew."""

    stale: str
    """The buckets, as `b`, that the statements' parameters name."""
    same_series: str
    """What a row `r` of such a bucket must be besides."""

    def forget(self, rollup: _Rollup) -> bytes:
        """The statement that deletes them."""
        return f"""
        DELETE FROM {rollup.table} r USING {self.stale}
        WHERE r.bucket_time = b.bucket_time {self.same_series}
        """.encode()

    def read(self, rollup: _Rollup, *, histograms: bool) -> str:
        """The query for what they are made from."""
        width = f"interval '{WIDTHS[rollup.level].total_seconds():.0f} s'"
        return f"""
            SELECT r.series_id, b.bucket_time, r.count, r.sum, r.min, r.max, r.bucket_counts
            FROM {self.stale} JOIN {rollup.source} r
                ON r.bucket_time >= b.bucket_time AND r.bucket_time < b.bucket_time + {width}
                {self.same_series}
            WHERE r.bucket_counts IS {"NOT NULL" if histograms else "NULL"}
        """


_OF_ALL = _Scope("unnest($1::timestamptz[]) AS b (bucket_time)", "")
_OF_SOME = _Scope(
    """(
        SELECT bucket_time, series_id
        FROM unnest($1::timestamptz[], $2::text[]) AS marked (bucket_time, neuron_id)
        JOIN metric_series USING (neuron_id)
    ) AS b""",
    "AND r.series_id = b.series_id",
)


_INTO = "(series_id, bucket_time, count, sum, min, max, bucket_counts)"
_SUM = f"sum(least(greatest(sum, -{LARGEST}), {LARGEST}))"


def _add_numbers(rollup: _Rollup, scope: _Scope) -> bytes:
    return f"""
    INSERT INTO {rollup.table} {_INTO}
    SELECT series_id, bucket_time, {_whole("sum(count)")}, {_SUM}, min(min), max(max), NULL
    FROM ({scope.read(rollup, histograms=False)}) AS numbers
    GROUP BY series_id, bucket_time
    """.encode()


def _count_places(rollup: _Rollup, scope: _Scope) -> bytes:
    return f"""
    SELECT max(cardinality(bucket_counts))
    FROM ({scope.read(rollup, histograms=True)}) AS histograms
    """.encode()


# The extremes are known if every histogram that holds anything knows its.
def _add_histograms(rollup: _Rollup, scope: _Scope, places: int) -> bytes:
    counts = ", ".join(_whole(f"sum(bucket_counts[{place}])") for place in range(1, places + 1))
    return f"""
    INSERT INTO {rollup.table} {_INTO}
    SELECT series_id, bucket_time, {_whole("sum(count)")}, {_SUM},
        CASE WHEN bool_and(min IS NOT NULL) FILTER (WHERE count > 0)
             THEN min(min) FILTER (WHERE count > 0) END,
        CASE WHEN bool_and(max IS NOT NULL) FILTER (WHERE count > 0)
             THEN max(max) FILTER (WHERE count > 0) END,
        (ARRAY[{counts}])[1 : max(cardinality(bucket_counts))]
    FROM ({scope.read(rollup, histograms=True)}) AS histograms
    GROUP BY series_id, bucket_time
    """.encode()


def round_places(places: int) -> int:
    """So many or some more, so that few statements serve all histograms."""
    return 1 << (places - 1).bit_length()


class Mark(NamedTuple):
    """What is to be made anew: the bucket that a time is in, and whose rows of it."""

    time: datetime
    neuron_id: str = ""
    """"" for those of all neurons."""


def mark(send: Pipeline, level: Level, marks: Iterable[Mark]) -> None:
    """Says what of that level has to be made anew."""
    stale = sorted({Mark(floor(each.time, WIDTHS[level]), each.neuron_id) for each in marks})
    if stale:
        neurons = [each.neuron_id or None for each in stale]
        send(_MARK, level, [each.time for each in stale], neurons)


async def roll_up(connection: Connection, now: datetime) -> int:
    """Makes anew what has changed, at all levels, and says how many buckets that were. `now` is
    PostgreSQL's time.
    """
    made = 0
    until = now - SETTLES_AFTER
    for place, rollup in enumerate(ROLLUPS):
        until = floor(until, WIDTHS[rollup.level])
        above = ROLLUPS[place + 1].level if place + 1 < len(ROLLUPS) else None
        while buckets := await _stale(connection, rollup.level, until):
            with bounded(connection, STEP_TIMEOUT_S):
                await _make(connection, rollup, buckets, above)
            made += len(buckets)
        async with pipeline(connection) as send:
            send(_UNTIL, rollup.level, until)
    return made


async def _stale(connection: Connection, level: Level, until: datetime) -> list[datetime]:
    async with pipeline(connection) as send:
        return [bucket for (bucket,) in await send(_STALE, level, until, AT_A_TIME[level])]


async def _make(
    connection: Connection, rollup: _Rollup, buckets: list[datetime], above: Level | None
) -> None:
    days = {bucket.date() for bucket in buckets}
    await partitions.ensure(connection, (rollup.table,), days)
    async with pipeline(connection, transaction=True) as send:
        # The marks go first: what is marked from here on is seen by the next round.
        taken = await send(_TAKE, rollup.level, buckets, MOST_NEURONS)
        of_all = [Mark(bucket) for bucket, neurons in taken if neurons is None]
        of_some = [Mark(bucket, each) for bucket, neurons in taken for each in neurons or ()]
        if of_all:
            await _make_anew(send, rollup, _OF_ALL, [each.time for each in of_all])
        if of_some:
            await _make_anew(send, rollup, _OF_SOME, *map(list, zip(*of_some, strict=True)))
        if above is not None:
            mark(send, above, of_all + of_some)


async def _make_anew(send: Pipeline, rollup: _Rollup, scope: _Scope, *stale: list[Any]) -> None:
    send(scope.forget(rollup), *stale)
    send(_add_numbers(rollup, scope), *stale)
    ((places,),) = await send(_count_places(rollup, scope), *stale)
    if places:
        send(_add_histograms(rollup, scope, round_places(places)), *stale)


async def rolled_up_until(connection: Connection) -> dict[Level, datetime | None]:
    """Up to when each level has been made; None for one that has not been begun."""
    async with pipeline(connection) as send:
        return {Level(level): until for level, until in await send(_READ_UNTIL)}
