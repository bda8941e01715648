"""The server on a role that has what docs/security.md grants it, and nothing else."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url
from structlog.testing import capture_logs

from federation.v1 import report_pb2
from federation_server.settings import Settings
from federation_server.store import migrate, partitions
from federation_server.up import migrate as federation_migrate
from tests.support.faults import issue, report
from tests.support.federation import connected, running
from tests.support.plain_neuron import now
from tests.support.postgres import Server, libpq

SECURITY = Path(__file__).resolve().parents[2] / "docs/security.md"


OWNERS = """
SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class
WHERE relnamespace = 'public'::regnamespace
"""


@dataclass(frozen=True)
class Granted:
    """A database made by the documentation's own SQL."""

    url: str
    migration_url: str
    role: str

    def ask(self, question: str) -> list[tuple[object, ...]]:
        with psycopg.connect(libpq(self.url)) as connection:
            return connection.execute(question.encode()).fetchall()


@pytest.fixture
def granted(postgres: Server) -> Iterator[Granted]:
    (documented,) = re.findall(
        r"```sql\n(CREATE ROLE federation .*?)```", SECURITY.read_text(), re.DOTALL
    )
    name = f"fed_{uuid.uuid4().hex[:12]}"
    in_cluster, in_database = documented.replace("federation", name).split(f"\\connect {name}\n")
    with psycopg.connect(libpq(postgres.admin), autocommit=True) as admin:
        if admin.execute("SHOW is_superuser").fetchone() != ("on",):
            pytest.skip("only a superuser can make roles")
        for statement in filter(str.strip, in_cluster.split(";")):
            admin.execute(statement.encode())
    try:
        with psycopg.connect(libpq(postgres.url(name)), autocommit=True) as admin:
            admin.execute(in_database.encode())
        url = make_url(postgres.url(name)).set(username=name, password="choose-one")
        other = url.set(username=f"{name}_migrate", password="choose-another")
        yield Granted(
            url.render_as_string(hide_password=False),
            other.render_as_string(hide_password=False),
            name,
        )
    finally:
        postgres.drop_database(name)
        with psycopg.connect(libpq(postgres.admin), autocommit=True) as admin:
            admin.execute(f"DROP ROLE {name}_migrate, {name}".encode())


def settings(granted: Granted) -> Settings:
    return Settings(
        database_url=SecretStr(granted.url), migration_url=SecretStr(granted.migration_url)
    )


async def test_a_server_does_everything_on_a_role_that_owns_its_schema_alone(
    granted: Granted,
) -> None:
    await federation_migrate(settings(granted))
    assert granted.ask(OWNERS) == [(granted.role,)]
    with capture_logs() as logged:
        async with running(granted.url) as federation, connected(federation, "n") as neuron:
            await neuron.send(sequence=1, send_time=now(), analytics_report=report("n"))
            await neuron.acked(1)
            neuron.sequence = 1
            command = await issue(federation, "n")
            delivery = await neuron.command()
            await neuron.acked(await neuron.finish(delivery, "SUCCEEDED"))
            assert delivery.command_id == command.command_id
            async with await federation.app.database.connect("test") as connection:
                today = await partitions.today(connection)
                later = today + timedelta(days=40)
                await partitions.ensure(connection, ["heartbeats"], [later])
                dropped, left = await partitions.drop_before(
                    connection, "heartbeats", later + timedelta(days=1)
                )
            assert len(dropped) > 1
            assert not left
    grave = [each for each in logged if each["log_level"] in {"warning", "error"}]
    assert grave == []


async def test_what_a_superuser_has_made_is_handed_over_by_the_documentations_own_sql(
    granted: Granted, postgres: Server
) -> None:
    of_superuser = postgres.url(granted.role)
    await asyncio.to_thread(migrate.upgrade, of_superuser)
    async with running(of_superuser) as federation:  # which makes partitions
        await federation.enrollment_token()
    (documented,) = re.findall(
        r"```sql\n(ALTER SCHEMA public .*?)```", SECURITY.read_text(), re.DOTALL
    )
    own, *selects = documented.replace("federation", granted.role).split(";\n", 1)
    with psycopg.connect(libpq(of_superuser), autocommit=True) as admin:
        admin.execute(own.encode())
        for select in "".join(selects).split("\\gexec")[:-1]:
            for (statement,) in admin.execute(select.encode()).fetchall():
                admin.execute(statement.encode())
    foreign = "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert granted.ask(f"{foreign} AND relowner <> current_user::regrole") == []
    async with running(granted.url) as federation, connected(federation, "n") as neuron:
        event = report_pb2.ReportedEvent(
            event_time=now(), severity=report_pb2.SEVERITY_INFO, type="said"
        )
        said = report("n")
        said.events.append(event)
        await neuron.send(sequence=1, send_time=now(), analytics_report=said)
        await neuron.acked(1)


@pytest.mark.parametrize("named_by", ["the query", "PGUSER"])
async def test_the_schema_is_the_servers_roles_wherever_that_one_is_named(
    granted: Granted, named_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(granted.url)
    if named_by == "PGUSER":
        monkeypatch.setenv("PGUSER", granted.role)
        bare = url.set(username="")
    else:
        bare = url.set(username="").update_query_dict({"user": granted.role})
    elsewhere = bare.render_as_string(hide_password=False)
    await federation_migrate(settings(replace(granted, url=elsewhere)))
    assert granted.ask(OWNERS) == [(granted.role,)]


async def test_a_migration_role_that_may_not_act_as_the_servers_is_told_what_it_lacks(
    granted: Granted, postgres: Server
) -> None:
    with psycopg.connect(libpq(postgres.admin), autocommit=True) as admin:
        admin.execute(f"REVOKE {granted.role} FROM {granted.role}_migrate".encode())
    with pytest.raises(migrate.MayNotMigrate, match="permission denied to set role"):
        await federation_migrate(settings(granted))
    assert granted.ask("SELECT FROM pg_tables WHERE schemaname = 'public'") == []


async def test_a_role_that_does_not_own_the_schema_is_told_so(
    granted: Granted, postgres: Server
) -> None:
    with psycopg.connect(libpq(postgres.url(granted.role)), autocommit=True) as admin:
        admin.execute("ALTER SCHEMA public OWNER TO CURRENT_USER")
    with pytest.raises(migrate.MayNotMigrate, match="must own it"):
        await asyncio.to_thread(migrate.upgrade, granted.url)


async def test_a_server_that_is_a_superuser_says_so_and_what_to_do(
    postgres: Server, database_url: str
) -> None:
    with psycopg.connect(libpq(postgres.admin)) as admin:
        if admin.execute("SHOW is_superuser").fetchone() != ("on",):
            pytest.skip("the tests' role is no superuser")
    with capture_logs() as logged:
        async with running(database_url):
            pass
    (warning,) = [each for each in logged if each.get("action") == "database_superuser"]
    assert warning["log_level"] == "warning"
    assert "docs/security.md" in warning["event"]
