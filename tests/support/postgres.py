"""A PostgreSQL for the tests, and a fresh database of it for each test that asks.

The server is the one that DATABASE_URL names (14 or later, a role that may create databases), else
an embedded one. A migrated database is made once for a session and cloned for each test.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL, make_url

from federation_server.store.embedded import SUPERUSER, EmbeddedPostgres

FAST_AND_LOOSE = {"fsync": "off"}
"""For data that need not survive the machine's crash. PostgreSQL's own loses nothing by it: what is
committed is with the kernel. Without synchronous_commit or full_page_writes it might."""


@dataclass(frozen=True)
class Server:
    """A running PostgreSQL, named by a URL to a database of it that is there already."""

    admin: URL

    def create_database(self, *, template: str | None = None) -> str:
        """Make a database, empty or a copy of `template` (nobody may be connected to that one)."""
        name = f"federation_test_{uuid.uuid4().hex}"
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        self._execute(statement)
        return name

    def drop_database(self, name: str) -> None:
        """Drop it, and with it the connections that a test left open."""
        self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def url(self, database: str) -> str:
        """SQLAlchemy's URL of a database of this server, for psycopg 3."""
        return self.admin.set(database=database).render_as_string(hide_password=False)

    @contextmanager
    def database(self, *, template: str | None = None) -> Iterator[str]:
        """The URL of a database that lives as long as the block."""
        name = self.create_database(template=template)
        try:
            yield self.url(name)
        finally:
            self.drop_database(name)

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(libpq(self.admin), autocommit=True) as connection:
            connection.execute(statement)


def libpq(url: URL | str) -> str:
    """The same as libpq, and so psycopg itself, reads it."""
    url = make_url(url)
    parts = url.translate_connect_args(username="user", database="dbname")
    options = {name: ",".join(values) for name, values in url.normalized_query.items()}
    return make_conninfo(**parts | options)


@contextmanager
def running_server() -> Iterator[Server]:
    """The server that DATABASE_URL names, else an embedded one that ends with the block."""
    given = os.environ.get("DATABASE_URL")
    if given:
        yield Server(make_url(given).set(drivername="postgresql+psycopg"))
        return
    with (
        passable_folder() as folder,
        EmbeddedPostgres(folder / "data", settings=FAST_AND_LOOSE) as postgres,
    ):
        yield Server(make_url(postgres.url("postgres", user=SUPERUSER)))


@contextmanager
def passable_folder() -> Iterator[Path]:
    """A temporary folder with a short path that PostgreSQL's account may pass through.

    pytest's own `tmp_path` is neither: run by root it lies under a folder that only root may enter.
    """
    folder = Path(tempfile.mkdtemp(prefix="fed-", dir="/tmp"))
    folder.chmod(0o711)
    try:
        yield folder.resolve()
    finally:
        shutil.rmtree(folder)
