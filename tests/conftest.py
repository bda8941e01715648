"""Fixtures that tests of every kind use: databases, and a folder for an embedded PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.support.postgres import Server, passable_folder, running_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A running PostgreSQL: DATABASE_URL's, else one embedded for this session."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def template_database(postgres: Server) -> Iterator[str]:
    """The name of a migrated database to clone. Never connect to it."""
    # Here and not above: a test that needs no schema runs without the code that makes one.
    from federation_server.store import migrate

    with postgres.database() as url:
        migrate.upgrade(url)
        # As a server's start does: nothing can be changed without it.
        with ThreadPoolExecutor(1) as pool:  # whatever loop this thread has
            pool.submit(asyncio.run, _make_audit_room(url)).result()
        name = make_url(url).database
        assert name is not None
        yield name


@pytest.fixture
def database_url(postgres: Server, template_database: str) -> Iterator[str]:
    """SQLAlchemy's URL of a migrated database of the test's own."""
    with postgres.database(template=template_database) as url:
        yield url


@pytest.fixture
def empty_database_url(postgres: Server) -> Iterator[str]:
    """SQLAlchemy's URL of an empty database of the test's own."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder with a short path that PostgreSQL's account may pass through."""
    with passable_folder() as path:
        yield path


async def _make_audit_room(url: str) -> None:
    from federation_server.store import partitions
    from federation_server.store.database import Database

    async with await Database(url).connect("test") as connection:
        today = await partitions.today(connection)
        days = [today, today + timedelta(days=partitions.DAYS_AHEAD)]
        await partitions.ensure(connection, ["audit_entries"], days)
