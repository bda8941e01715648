"""How a server's connections to PostgreSQL are made."""

from __future__ import annotations

from federation_server.store.database import Database, driver

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
