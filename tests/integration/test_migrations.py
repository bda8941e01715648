"""The migrations make what `store/schema.py` describes, once, whoever runs them and how often."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import alembic.command
import pytest
from google.protobuf.descriptor import EnumDescriptor
from sqlalchemy import Connection, Engine, NullPool, create_engine, inspect, text
from sqlalchemy.dialects import postgresql

from federation.v1 import (
    analytics_service_pb2,
    command_pb2,
    fleet_service_pb2,
    heartbeat_pb2,
    neuron_pb2,
    report_pb2,
)
from federation_server.domain.access import Role
from federation_server.domain.analytics import MetricKind, Severity
from federation_server.domain.command import CommandState
from federation_server.domain.doubt import Cause
from federation_server.domain.neuron import Activity, DependencyState, Lifecycle, Presence
from federation_server.store import migrate, schema, schema_version
from federation_server.store.database import Database, DatabaseUrlError

TABLES = sorted(schema.metadata.tables)
DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


@pytest.fixture
def migrated(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url, poolclass=NullPool)
    yield engine
    engine.dispose()


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_database_url, poolclass=NullPool)
    yield engine
    engine.dispose()


def snapshot(connection: Connection) -> list[tuple[str, str, int]]:
    """Every column and index, with the oid that a second making would change."""
    rows = connection.execute(
        text(
            "SELECT c.relname, coalesce(a.attname, ''), c.oid::int FROM pg_class c"
            " LEFT JOIN pg_attribute a ON a.attrelid = c.oid"
            " WHERE c.relnamespace = 'public'::regnamespace ORDER BY 1, 2"
        )
    )
    return [(table, column, oid) for table, column, oid in rows]


def set_revision(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


def upgrade_to(monkeypatch: pytest.MonkeyPatch, url: str, revision: str) -> None:
    """Applies the steps up to that one."""
    whole = alembic.command.upgrade
    monkeypatch.setattr(alembic.command, "upgrade", lambda config, _: whole(config, revision))
    migrate.upgrade(url)


async def complaint(url: str) -> str:
    database = Database(url)
    try:
        with pytest.raises(schema_version.SchemaMismatch) as caught:
            await schema_version.check(database)
    finally:
        await database.close()
    return str(caught.value)


def test_every_table_is_described_and_every_description_is_a_table(migrated: Engine) -> None:
    with migrated.connect() as connection:
        partitions = set(
            connection.execute(text("SELECT relname FROM pg_class WHERE relispartition")).scalars()
        )
        tables = set(inspect(connection).get_table_names())
    assert tables - partitions - {"alembic_version"} == set(TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_columns_have_the_types_and_nullability_that_are_described(
    migrated: Engine, table: str
) -> None:
    with migrated.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT attname, format_type(atttypid, atttypmod), NOT attnotnull"
                " FROM pg_attribute"
                " WHERE attrelid = cast(:name AS regclass) AND attnum > 0 AND NOT attisdropped"
            ),
            {"name": table},
        )
        made = {name: (kind, nullable) for name, kind, nullable in rows}
    assert made == {
        column.name: (column.type.compile(DIALECT).lower(), column.nullable)
        for column in schema.metadata.tables[table].columns
    }


@pytest.mark.parametrize("table", TABLES)
def test_keys_are_those_that_are_described(migrated: Engine, table: str) -> None:
    described = schema.metadata.tables[table]
    with migrated.connect() as connection:
        primary = inspect(connection).get_pk_constraint(table)["constrained_columns"]
        foreign = {
            (
                tuple(key["constrained_columns"]),
                key["referred_table"],
                key["options"].get("ondelete"),
            )
            for key in inspect(connection).get_foreign_keys(table)
        }
    assert primary == [column.name for column in described.primary_key]
    assert foreign == {
        (tuple(key.column_keys), key.referred_table.name, key.ondelete)
        for key in described.foreign_key_constraints
    }


@pytest.mark.parametrize("kind", schema.ENUMS, ids=lambda kind: kind.name)
def test_postgresql_has_the_enums_members_in_the_same_order(
    migrated: Engine, kind: postgresql.ENUM
) -> None:
    with migrated.connect() as connection:
        labels = connection.execute(
            text(
                "SELECT enumlabel FROM pg_enum WHERE enumtypid = cast(:name AS regtype)"
                " ORDER BY enumsortorder"
            ),
            {"name": kind.name},
        ).scalars()
        assert list(labels) == kind.enums
    assert kind.enum_class is not None
    assert kind.enums == [member.name for member in kind.enum_class]


def test_postgresql_has_no_enum_that_is_not_described(migrated: Engine) -> None:
    with migrated.connect() as connection:
        names = connection.execute(text("SELECT typname FROM pg_type WHERE typtype = 'e'"))
        assert set(names.scalars()) == {kind.name for kind in schema.ENUMS}


@pytest.mark.parametrize(
    ("ours", "contract"),
    [
        (Lifecycle, neuron_pb2.Lifecycle.DESCRIPTOR),
        (Presence, neuron_pb2.Presence.DESCRIPTOR),
        (Activity, heartbeat_pb2.Activity.DESCRIPTOR),
        (DependencyState, heartbeat_pb2.DependencyState.DESCRIPTOR),
        (CommandState, command_pb2.CommandState.DESCRIPTOR),
        (MetricKind, analytics_service_pb2.MetricKind.DESCRIPTOR),
        (Severity, report_pb2.Severity.DESCRIPTOR),
        (Cause, fleet_service_pb2.DoubtCause.DESCRIPTOR),
    ],
    ids=lambda value: value.name if isinstance(value, EnumDescriptor) else "",
)
def test_the_contract_has_the_same_enum_members(
    ours: type[enum.Enum], contract: EnumDescriptor
) -> None:
    prefix = contract.values[0].name.removesuffix("UNSPECIFIED")
    names = {value.name.removeprefix(prefix) for value in contract.values}
    assert {member.name for member in ours} | {"UNSPECIFIED"} == names


def test_roles_of_api_keys_are_stored_by_name() -> None:
    assert schema.ROLE.enums == [role.name for role in Role]


def test_an_upgrade_twice_is_harmless(migrated: Engine, database_url: str) -> None:
    with migrated.connect() as connection:
        before = snapshot(connection)
    migrate.upgrade(database_url)
    with migrated.connect() as connection:
        assert snapshot(connection) == before


async def test_servers_that_upgrade_at_once_all_succeed(
    empty: Engine, empty_database_url: str
) -> None:
    program = f"from {migrate.__name__} import upgrade; upgrade({empty_database_url!r})"
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program) for _ in range(3)
    ]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    with empty.connect() as connection:
        assert migrate.current_revision(connection) == schema_version.HEAD


async def test_a_schema_that_fits_is_not_complained_about(database_url: str) -> None:
    database = Database(database_url)
    await schema_version.check(database)
    await database.close()


def test_an_upgrade_waits_for_one_that_is_under_way(empty: Engine, empty_database_url: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with empty.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": migrate.LOCK})
            upgrade = pool.submit(migrate.upgrade, empty_database_url)
            with pytest.raises(TimeoutError):
                upgrade.result(timeout=0.5)
            assert snapshot(connection) == []
        upgrade.result(timeout=30)


def test_a_step_that_fails_leaves_nothing_behind(empty: Engine, empty_database_url: str) -> None:
    with empty.begin() as connection:
        connection.execute(text("CREATE TABLE signing_keys ()"))  # in the way of the last part
    with pytest.raises(Exception, match="signing_keys"):
        migrate.upgrade(empty_database_url)
    with empty.connect() as connection:
        assert inspect(connection).get_table_names() == ["signing_keys"]


def test_a_series_of_several_bounds_becomes_one_for_each(
    empty: Engine, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade_to(monkeypatch, empty_database_url, "0011")
    made = """
        INSERT INTO neurons SELECT (jsonb_populate_record(NULL::neurons, (
            SELECT jsonb_object_agg(column_name, CASE
                WHEN column_name = 'neuron_id' THEN to_jsonb('n'::text)
                WHEN udt_name = '_text' THEN '[]'
                WHEN udt_name = 'lifecycle' THEN to_jsonb('ACTIVE'::text)
                WHEN udt_name = 'timestamptz' THEN to_jsonb(now())
                ELSE '0' END)
            FROM information_schema.columns
            WHERE table_name = 'neurons' AND is_nullable = 'NO'))).*;
        INSERT INTO metric_series (neuron_id, name, kind, labels, unit, last_report_time, places)
        VALUES ('n', 'rows', 'COUNTER', '{}', '', now(), 0),
            ('n', 'ms', 'HISTOGRAM', '{}', '', now(), 3);
        CREATE TABLE metric_hours_all PARTITION OF metric_hours DEFAULT;
        INSERT INTO metric_hours (series_id, bucket_time, count, sum, bounds, bucket_counts)
        SELECT series_id, now(), made.count, 0, bounds::float8[], counts::int8[]
        FROM (VALUES ('rows', 1, NULL, NULL), ('ms', 2, '{5}', '{1,1}'), ('ms', 3, '{5}', '{2,1}'),
            ('ms', 4, '{1,2}', '{4,0,0}')) AS made (name, count, bounds, counts)
            JOIN metric_series USING (name)
    """
    with empty.begin() as connection:
        connection.execute(text(made))
    monkeypatch.undo()
    migrate.upgrade(empty_database_url)
    kept = """
        SELECT name, s.bounds, array_agg(count ORDER BY count)
        FROM metric_hours JOIN metric_series s USING (series_id)
        GROUP BY series_id, name, s.bounds ORDER BY name, s.bounds
    """
    with empty.connect() as connection:
        assert [tuple(row) for row in connection.execute(text(kept))] == [
            ("ms", [1.0, 2.0], [4]),
            ("ms", [5.0], [2, 3]),
            ("rows", [], [1]),
        ]


async def test_an_empty_database_is_told_to_migrate(empty_database_url: str) -> None:
    assert await complaint(empty_database_url) == (
        f"there is no schema yet, this server needs {schema_version.HEAD}: run `federation migrate`"
    )


async def test_an_older_schema_is_told_to_migrate(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated = schema_version.HEAD
    monkeypatch.setattr(schema_version, "HEAD", "9999")
    assert await complaint(database_url) == (
        f"the schema is at {migrated}, this server needs 9999: run `federation migrate`"
    )


async def test_a_newer_schema_is_not_touched_and_asks_for_a_newer_server(
    migrated: Engine, database_url: str
) -> None:
    set_revision(migrated, "9999")
    message = "the schema is at 9999, newer than this server: upgrade the server"
    assert await complaint(database_url) == message
    with pytest.raises(schema_version.SchemaMismatch) as caught:
        migrate.upgrade(database_url)
    assert str(caught.value) == message


def test_a_url_of_another_database_is_refused_with_a_remedy() -> None:
    with pytest.raises(DatabaseUrlError, match="use postgresql://"):
        migrate.upgrade("mysql://localhost/federation")


def test_the_schema_that_a_server_needs_is_alembics_head() -> None:
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(migrate._config()).get_current_head()
    assert head == schema_version.HEAD
