"""How a server's connections to PostgreSQL are made."""

from __future__ import annotations

import pytest

from federation_server.store.database import Database, DatabaseRefuses, driver
from tests.support.processes import free_port

OF_TCP = ("keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")


async def test_a_dead_peer_is_noticed_on_pooled_connections_as_soon_as_on_all_others(
    database_url: str,
) -> None:
    database = Database(database_url)
    async with (
        await database.connect("test") as own,
        database.begin() as pooled,
        database.begin_for_neurons() as neurons,
    ):
        wanted = {name: own.info.get_parameters()[name] for name in OF_TCP}
        for connection in (pooled, neurons):
            found = (await driver(connection)).info.get_parameters()
            assert {name: found.get(name) for name in OF_TCP} == wanted
    await database.close()


async def test_a_postgresql_that_is_away_is_given_up_when_the_time_is_over() -> None:
    database = Database(f"postgresql://nobody@127.0.0.1:{free_port()}/federation")
    with pytest.raises(DatabaseRefuses, match=r"^DATABASE_URL: no answer: .*refused"):
        await database.wait_until_ready(within_s=0.0)
    await database.close()
