"""Which schema a server needs, and whether a database has it.

Without Alembic, which only an upgrade needs (`migrate.py`).
"""

from __future__ import annotations

from sqlalchemy import text

from federation_server.store.database import Database

HEAD = "0017"
"""The newest revision in `migrations/versions`; a test proves it. Revisions grow as texts do."""


class SchemaMismatch(RuntimeError):
    """The schema is not the one that this server was written for; the message says what to do."""


async def read(database: Database) -> str | None:
    """The schema's revision; None for a database without one.

    Raises:
        sqlalchemy.exc.OperationalError: PostgreSQL does not answer.
    """
    async with database.begin() as connection:
        table = await connection.execute(text("SELECT to_regclass('alembic_version')"))
        if table.scalar() is None:
            return None
        found = await connection.execute(text("SELECT max(version_num) FROM alembic_version"))
        revision: str | None = found.scalar()
    return revision


async def check(database: Database) -> None:
    """Returns if the schema is the one that this server was written for.

    Raises:
        SchemaMismatch: it is not.
        sqlalchemy.exc.OperationalError: PostgreSQL does not answer.
    """
    revision = await read(database)
    if revision == HEAD:
        return
    refuse_newer(revision)
    found = "there is no schema yet" if revision is None else f"the schema is at {revision}"
    raise SchemaMismatch(f"{found}, this server needs {HEAD}: run `federation migrate`")


def refuse_newer(revision: str | None) -> None:
    """Returns unless the schema is newer than this server.

    Raises:
        SchemaMismatch: it is.
    """
    if revision is not None and revision > HEAD:
        raise SchemaMismatch(
            f"the schema is at {revision}, newer than this server: upgrade the server"
        )
