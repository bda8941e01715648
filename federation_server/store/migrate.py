"""Brings the schema up to date, and says whether it is.

`upgrade` is what `federation migrate` and `federation up` run, `check` is what a server asks
before it serves. The steps themselves are Alembic's, in `migrations/versions`.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, func, select

from federation_server.store import migrations
from federation_server.store.database import CONNECT_TIMEOUT_S, Database, parse_url

LOCK = 0x6665_6465_7261_7465
"""The advisory lock that one upgrade holds at a time: "federate" in ASCII."""


class SchemaMismatch(RuntimeError):
    """The schema is not the one that this server was written for; the message says what to do."""


def upgrade(url: str) -> None:
    """Applies the steps that are missing; does nothing if there are none.

    All of it is one transaction, so a step that fails leaves nothing behind. Whoever comes while
    another upgrade is under way waits for it and then finds nothing to do.

    Raises:
        DatabaseUrlError: `url` is no URL of PostgreSQL.
        SchemaMismatch: the schema is newer than this server.
        sqlalchemy.exc.OperationalError: PostgreSQL does not answer.
    """
    config = _config()
    engine = create_engine(
        parse_url(url),
        poolclass=NullPool,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "federation-migrate",
        },
    )
    with engine.begin() as connection:
        connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
        _refuse_newer(ScriptDirectory.from_config(config), current_revision(connection))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def current_revision(connection: Connection) -> str | None:
    """The schema's revision; None for a database without one."""
    return MigrationContext.configure(connection).get_current_revision()


async def check(database: Database) -> None:
    """Returns if the schema is the one that this server was written for.

    Raises:
        SchemaMismatch: it is not.
        sqlalchemy.exc.OperationalError: PostgreSQL does not answer.
    """
    scripts = ScriptDirectory.from_config(_config())
    async with database.begin() as connection:
        revision = await connection.run_sync(current_revision)
    needed = scripts.get_current_head()
    if revision == needed:
        return
    _refuse_newer(scripts, revision)
    found = "there is no schema yet" if revision is None else f"the schema is at {revision}"
    raise SchemaMismatch(f"{found}, this server needs {needed}: run `federation migrate`")


def _refuse_newer(scripts: ScriptDirectory, revision: str | None) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        raise SchemaMismatch(
            f"the schema is at {revision}, newer than this server: upgrade the server"
        )


def _config() -> Config:
    """Alembic's settings, without a file of its own."""
    folder = Path(migrations.__file__).parent
    config = Config()
    # The value is a template, in which a % of the path must be doubled.
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config
