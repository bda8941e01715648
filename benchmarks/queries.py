"""How long operators wait: metrics over a month of a fleet, and pages of a very large one.

    python -m benchmarks.queries

Both are asked of a running server over gRPC. The data is made by SQL: a month of rollups is more
than can be reported in an afternoon.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import psycopg
from psycopg import sql

from benchmarks.machine import Others, machine
from benchmarks.processes import Served, federation
from federation.v1 import analytics_service_pb2 as analytics
from federation.v1 import fleet_service_pb2 as fleet
from federation.v1.analytics_service_pb2_grpc import AnalyticsServiceStub
from federation.v1.fleet_service_pb2_grpc import FleetServiceStub

DAYS = 30
METRICS = ("COUNTER", "GAUGE", "HISTOGRAM")
"""One metric of each kind, each neuron's of its own; named in lower case."""

LISTED = 100_000
PAGES = 5

_ZONE = 'labels.zone = "zone-7"'

_EMPTY = {
    "text": "''",
    "jsonb": "'{}'",
    "_text": "'{}'",
    "timestamptz": "now()",
    "bool": "false",
    "int4": "4",
    "int8": "0",
    "float8": "0",
}
"""What a column holds that nobody looks at."""

_NEURON = {
    "neuron_id": "'made-' || lpad(n::text, 6, '0')",
    "type": "'type-' || n % 20",
    "lifecycle": "'ACTIVE'",
    "capabilities": "CASE WHEN n % 50 = 0 THEN '{gpu,io}' ELSE '{io}' END::text[]",
    "labels": "jsonb_build_object('zone', 'zone-' || n % 100, 'host', 'host-' || n % 1000)",
}
_STATE = {
    "neuron_id": "neuron_id",
    "presence": "CASE WHEN random() < 0.01 THEN 'OFFLINE' ELSE 'ONLINE' END::presence",
    "heartbeat_timeout": "'120 s'",
    "health_score": "floor(random() * 101)",
    "cpu_percent": "random() * 100",
}

_ROLLUPS = """
INSERT INTO {table} (series_id, bucket_time, count, sum, min, max, bucket_counts)
SELECT series_id, bucket_time, 12, random() * 100, 1, 90,
    CASE WHEN kind = 'HISTOGRAM' THEN '{{1,2,1,1,1,1,1,1,1,1,1}}'::int8[] END
FROM metric_series, generate_series(%(start)s, %(end)s, %(width)s) AS bucket_time
"""


def connect(served: Served) -> psycopg.Connection[Any]:
    """A connection to the embedded PostgreSQL of a server."""
    socket = next((served.data_dir / "postgres" / "socket").glob(".s.PGSQL.*[0-9]"))
    port = socket.name.rpartition(".")[2]
    conninfo = f"host={socket.parent} port={port} dbname=federation user=postgres"
    return psycopg.connect(conninfo, autocommit=True)


def make_neurons(connection: psycopg.Connection[Any], number: int) -> None:
    """So many neurons that nobody has ever seen."""
    numbers = sql.SQL("generate_series(1, {}) AS n").format(number)
    for table, given, source in (
        ("neurons", _NEURON, numbers),
        ("neuron_states", _STATE, sql.Identifier("neurons")),
    ):
        columns = connection.execute(
            "SELECT column_name, udt_name, is_nullable = 'YES' FROM information_schema.columns"
            " WHERE table_name = %s",
            (table,),
        ).fetchall()
        values = {
            name: given.get(name, _EMPTY.get(kind, "''"))
            for name, kind, nullable in columns
            if not nullable or name in given
        }
        connection.execute(
            sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {}").format(
                sql.Identifier(table),
                sql.SQL(", ").join(map(sql.Identifier, values)),
                sql.SQL(", ").join(map(sql.SQL, values.values())),
                source,
            )
        )


def make_rollups(connection: psycopg.Connection[Any], end: datetime) -> None:
    """A month of hours and days of every neuron's metrics, up to that whole hour."""
    connection.execute(
        "INSERT INTO metric_series (neuron_id, name, kind, labels, unit, last_report_time, bounds)"
        " SELECT neuron_id, lower(kind), kind::metric_kind, '{}', '', now(),"
        " CASE WHEN kind = 'HISTOGRAM' THEN %s ELSE '{}' END::float8[]"
        " FROM neurons, unnest(%s::text[]) AS kind",
        ([1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0], list(METRICS)),
    )
    for table, width in (("metric_hours", timedelta(hours=1)), ("metric_days", timedelta(days=1))):
        start = end.replace(hour=0) - timedelta(days=DAYS + 1)
        for first in sorted({(start + timedelta(days=n)).replace(day=1) for n in range(DAYS + 2)}):
            after = (first + timedelta(days=31)).replace(day=1)
            make = "CREATE TABLE IF NOT EXISTS {} PARTITION OF {} FOR VALUES FROM ({}) TO ({})"
            name = sql.Identifier(f"{table}_{first:%Y%m%d}")
            bounds = [f"{time:%Y-%m-%d}T00:00:00Z" for time in (first, after)]
            connection.execute(sql.SQL(make).format(name, sql.Identifier(table), *bounds))
        connection.execute(
            _ROLLUPS.format(table=table), {"start": start, "end": end - width, "width": width}
        )
    connection.execute("UPDATE rollup_levels SET until_time = %s", (end.replace(hour=0),))
    connection.execute("UPDATE rollup_levels SET until_time = %s WHERE level <> 'DAY'", (end,))


async def measure(rounds: int, ask: Callable[[], Awaitable[Any]]) -> tuple[str, Any]:
    """Median and 95th percentile in ms, after one that is not counted; and the last answer."""
    answer = await ask()
    taken_ms = []
    for _ in range(rounds):
        began = time.perf_counter()
        answer = await ask()
        taken_ms.append((time.perf_counter() - began) * 1000)
    p95 = sorted(taken_ms)[int(0.95 * (rounds - 1))]
    return f"{statistics.median(taken_ms):.0f} | {p95:.0f}", answer


def metric_questions(end: datetime) -> Iterator[tuple[str, analytics.QueryMetricsRequest]]:
    """What is asked of a month."""
    for kind in METRICS:
        for what, options in (
            ("the fleet", {}),
            ("by type", {"group_by": ["type"]}),
            ("one type", {"filter": 'type = "type-3"'}),
            (
                "one zone, by neuron",
                {"filter": 'labels.zone = "zone-7"', "group_by": ["neuron_id"]},
            ),
            ("one neuron, by hour", {"filter": 'neuron_id = "made-000007"'}),
        ):
            request = analytics.QueryMetricsRequest(name=kind.lower(), **options)
            request.start_time.FromDatetime(end - timedelta(days=DAYS))
            request.end_time.FromDatetime(end)
            if "hour" in what:
                request.bucket_width.FromTimedelta(timedelta(hours=1))
            yield f"{kind.lower()}, {what}", request


LISTS = (
    "",
    'type = "type-3"',
    _ZONE,
    "capabilities:gpu AND presence = ONLINE",
    "presence = OFFLINE",
    "health_score < 10",
    'type = "type-3" AND NOT labels.zone = "zone-3" AND cpu_percent > 50',
)


async def query_metrics(served: Served, end: datetime, rounds: int) -> None:
    """Prints the table of QueryMetrics."""
    print("| QueryMetrics, 30 days, 1,000 neurons | buckets | p50 ms | p95 ms |\n|---|---|---|---|")
    key = (("x-admin-key", served.admin_key),)
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = AnalyticsServiceStub(channel)
        for what, request in metric_questions(end):
            taken, answer = await measure(
                rounds,
                lambda r=request: stub.QueryMetrics(r, metadata=key),  # type: ignore[misc]
            )
            buckets = sum(len(series.buckets) for series in answer.series)
            print(f"| {what} | {buckets} | {taken} |", flush=True)


async def list_neurons(served: Served, rounds: int) -> None:
    """Prints the table of ListNeurons: the first pages, each asked for several times."""
    print(f"| ListNeurons, pages of 100, {LISTED:,} neurons | p50 ms | p95 ms |\n|---|---|---|")
    key = (("x-admin-key", served.admin_key),)
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = FleetServiceStub(channel)
        for filter_text in LISTS:
            token = ""

            async def page(filter_text: str = filter_text) -> None:
                nonlocal token
                request = fleet.ListNeuronsRequest(
                    filter=filter_text, page_size=100, page_token=token
                )
                answer: Any = await stub.ListNeurons(request, metadata=key)
                token = answer.next_page_token

            taken, _ = await measure(rounds * PAGES, page)
            print(f"| `{filter_text or 'all'}` | {taken} |", flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Makes the data and asks."""
    others = Others()
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with federation() as served:
        with connect(served) as connection:
            make_neurons(connection, 1000)
            make_rollups(connection, end)
            connection.execute("VACUUM ANALYZE")
        asyncio.run(query_metrics(served, end, arguments.asked))
    print()
    with federation() as served:
        with connect(served) as connection:
            make_neurons(connection, LISTED)
            connection.execute("VACUUM ANALYZE")
        asyncio.run(list_neurons(served, arguments.asked))
    print(
        f"\nTargets: QueryMetrics p95 100 ms, ListNeurons p95 20 ms a page;"
        f" others' CPU meanwhile {others.percent():.0f} %"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of the fleet."""
    parser.add_argument("--asked", type=int, default=20, help="how often each question is asked")


def main() -> None:
    """Runs this alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    print(f"machine: {machine()}\n")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
