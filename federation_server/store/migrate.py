"""Brings the schema up to date. The steps are Alembic's, in `migrations/versions`.

`federation migrate` and `federation up` run it, where `schema_version.py` says that it has to be.
Alembic is imported when it is used: 11 MB that a server with an up-to-date schema does not hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from psycopg.errors import InsufficientPrivilege, InvalidParameterValue, InvalidSchemaName
from sqlalchemy import Connection, NullPool, create_engine, func, select
from sqlalchemy.exc import DBAPIError

from federation_server.store import migrations
from federation_server.store.database import CONNECT_TIMEOUT_S, first_line, parse_url
from federation_server.store.schema_version import refuse_newer

if TYPE_CHECKING:
    from alembic.config import Config

LOCK = 0x6665_6465_7261_7465
"""The advisory lock that one upgrade holds at a time: "federate" in ASCII."""


_REFUSALS = (InsufficientPrivilege, InvalidParameterValue, InvalidSchemaName)
"""What PostgreSQL says to a role that may not act as another one, or make tables."""


class MayNotMigrate(RuntimeError):
    """The role may not change the schema; the message says what it needs."""


def upgrade(url: str, *, role: str | None = None) -> None:
    """Applies the steps that are missing; does nothing if there are none. With `role` it is that
    role which applies them, and which owns what they make.

    All of it is one transaction, so a step that fails leaves nothing behind. Whoever comes while
    another upgrade is under way waits for it and then finds nothing to do.

    Raises:
        DatabaseUrlError: `url` is no URL of PostgreSQL.
        SchemaMismatch: the schema is newer than this server.
        MayNotMigrate: the URL's role may not act as `role`, or that one may not do this.
        sqlalchemy.exc.OperationalError: PostgreSQL does not answer.
    """
    from alembic import command  # noqa: PLC0415 - see the module's docstring

    config = _config()
    engine = create_engine(
        parse_url(url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "federation-migrate",
        },
    )
    try:
        with engine.begin() as connection:
            if role is not None:
                connection.execute(select(func.set_config("role", role, True)))
            connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
            refuse_newer(current_revision(connection))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        if isinstance(error.orig, _REFUSALS):
            raise MayNotMigrate(
                f"the schema cannot be upgraded ({first_line(error.orig)}): the role of"
                " DATABASE_URL must own it, and that of FEDERATION_MIGRATION_URL be a member of it;"
                " see docs/security.md"
            ) from None
        raise


def current_revision(connection: Connection) -> str | None:
    """The schema's revision; None for a database without one."""
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415 - as above

    return MigrationContext.configure(connection).get_current_revision()


def _config() -> Config:
    """Alembic's settings, without a file of its own."""
    from alembic.config import Config  # noqa: PLC0415 - as above

    folder = Path(migrations.__file__).parent
    config = Config()
    # The value is a template, in which a % of the path must be doubled.
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return config
