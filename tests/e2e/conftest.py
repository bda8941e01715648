"""A PostgreSQL and a server of its own for each module whose tests stop, freeze or kill them.

What a module names SETTINGS are its server's, over those of `tests/support/faults.py`. Each test
leaves both running, and has neurons of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.support.faults import Postgres, calling, doomed_postgres, serving
from tests.support.federation import Served
from tests.support.postgres import passable_folder
from tests.support.processes import FederationProcess


@pytest.fixture(scope="module")
def doomed() -> Iterator[Postgres]:
    with doomed_postgres() as doomed:
        yield doomed


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, doomed: Postgres) -> Iterator[FederationProcess]:
    settings: dict[str, str] = getattr(request.module, "SETTINGS", {})
    with passable_folder() as folder, serving(doomed, folder, **settings) as server:
        yield server


@pytest_asyncio.fixture
async def served(server: FederationProcess) -> AsyncIterator[Served]:
    async with calling(server) as served:
        yield served
