"""API keys, signing keys and enrollment tokens, in the store."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import func, select, text, update

from federation_server.domain.access import EnrollmentToken, Role, secret_hash
from federation_server.store import access, enrollment
from federation_server.store.access import AdminKeySeed, AdminKeyUnusable, FoundKey, SeededKey
from federation_server.store.database import Database
from federation_server.store.schema import api_keys, enrollment_tokens, signing_keys

SECRET = "correct horse battery staple"
OTHER = "another secret of some length"


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


async def seed(database: Database, configured: str | None = None) -> SeededKey:
    async with database.begin() as connection:
        return await access.seed_admin_key(connection, configured)


async def find(database: Database, secret: str) -> FoundKey | None:
    async with database.begin() as connection:
        digest = secret_hash(secret)
        return (await access.find_api_keys(connection, [digest])).get(digest)


async def change(database: Database, name: str, **values: Any) -> None:
    async with database.begin() as connection:
        await connection.execute(update(api_keys).where(api_keys.c.name == name).values(**values))


async def names(database: Database) -> set[str]:
    async with database.begin() as connection:
        return set((await connection.execute(select(api_keys.c.name))).scalars())


async def create(database: Database, **wanted: Any) -> enrollment.CreatedToken:
    async with database.begin() as connection:
        return await enrollment.create(
            connection, enrollment.NewEnrollmentToken(**{"creator": "admin", **wanted})
        )


# API keys


async def test_the_first_start_makes_an_admin_key_and_later_ones_make_none(
    database: Database,
) -> None:
    first = await seed(database)
    assert first.seed is AdminKeySeed.GENERATED
    assert first.secret is not None
    assert re.fullmatch(r"fak_[A-Za-z0-9_-]{43}", first.secret)
    found = await find(database, first.secret)
    assert found is not None
    assert (found.admin.name, found.admin.role, found.expired) == ("admin", Role.ADMIN, False)
    assert await seed(database) == SeededKey(AdminKeySeed.KEPT)


async def test_servers_that_start_at_once_make_one_key(database: Database) -> None:
    seeds = await asyncio.gather(*(seed(database) for _ in range(4)))
    assert sorted(seeded.seed for seeded in seeds) == ["GENERATED", "KEPT", "KEPT", "KEPT"]
    assert await names(database) == {"admin"}


async def test_a_secret_is_stored_as_its_hash_alone(database: Database) -> None:
    first = await seed(database)
    assert first.secret is not None
    async with database.begin() as connection:
        row = (await connection.execute(text("SELECT k::text FROM api_keys k"))).scalar_one()
    assert secret_hash(first.secret).hex() in row
    assert first.secret.removeprefix("fak_") not in row


async def test_admin_api_key_is_the_first_key_if_it_is_set(database: Database) -> None:
    assert await seed(database, SECRET) == SeededKey(AdminKeySeed.ADDED)
    assert await find(database, SECRET) is not None
    assert await names(database) == {"admin-env"}
    assert await seed(database, SECRET) == SeededKey(AdminKeySeed.KEPT)


async def test_another_admin_api_key_takes_the_place_of_the_one_before(database: Database) -> None:
    await seed(database, SECRET)
    assert await seed(database, OTHER) == SeededKey(AdminKeySeed.REPLACED)
    assert await find(database, SECRET) is None
    assert await find(database, OTHER) is not None


async def test_admin_api_key_leaves_the_generated_key_alone(database: Database) -> None:
    generated = (await seed(database)).secret
    assert generated is not None
    assert await seed(database, SECRET) == SeededKey(AdminKeySeed.ADDED)
    assert await find(database, generated) is not None
    assert await seed(database, generated) == SeededKey(AdminKeySeed.KEPT)
    assert await find(database, SECRET) is not None


@pytest.mark.parametrize(
    "spoiled",
    [
        {"revoke_time": func.now()},
        {"expire_time": func.now()},
        {"role": Role.VIEWER},
    ],
    ids=["revoked", "expired", "lower role"],
)
async def test_a_restart_does_not_bring_a_spoiled_key_back(
    database: Database, spoiled: dict[str, Any]
) -> None:
    await seed(database, SECRET)
    await change(database, "admin-env", **spoiled)
    with pytest.raises(AdminKeyUnusable, match="set another one"):
        await seed(database, SECRET)


@pytest.mark.parametrize("around", [" {}", "{} ", "{}\n", "\t{} \r\n"])
async def test_an_admin_api_key_is_what_its_holder_can_show(
    database: Database, around: str
) -> None:
    """A call's credential comes without the blanks around it."""
    assert await seed(database, around.format(SECRET)) == SeededKey(AdminKeySeed.ADDED)
    assert await find(database, SECRET) is not None
    assert await seed(database, SECRET) == SeededKey(AdminKeySeed.KEPT)


async def test_an_admin_api_key_that_would_be_taken_for_a_neurons_token_is_refused(
    database: Database,
) -> None:
    with pytest.raises(AdminKeyUnusable, match="form of a neuron's token"):
        await seed(database, "eyJhbGciOiJI.eyJzdWIiOi.c2ln")


@pytest.mark.parametrize("weak", ["short", "sixteen letters\n", "sechzehn Zeichen ü"])
async def test_an_admin_api_key_that_is_weak_or_cannot_travel_is_refused(
    database: Database, weak: str
) -> None:
    with pytest.raises(AdminKeyUnusable, match="16 or more printable ASCII") as caught:
        await seed(database, weak)
    assert weak not in str(caught.value)


async def test_a_key_is_not_found_by_another_secret_nor_once_it_is_revoked(
    database: Database,
) -> None:
    await seed(database, SECRET)
    assert await find(database, SECRET + " ") is None
    await change(database, "admin-env", revoke_time=func.now())
    assert await find(database, SECRET) is None


async def test_a_key_expires_by_postgresqls_clock(database: Database) -> None:
    await seed(database, SECRET)
    await change(database, "admin-env", expire_time=func.now() + timedelta(minutes=1))
    found = await find(database, SECRET)
    assert found is not None
    assert not found.expired
    await change(database, "admin-env", expire_time=func.now())
    found = await find(database, SECRET)
    assert found is not None
    assert found.expired


# signing keys


async def test_servers_that_start_at_once_sign_with_one_key(database: Database) -> None:
    async def load() -> list[access.SigningKey]:
        async with database.begin() as connection:
            return list(await access.load_signing_keys(connection))

    loaded = await asyncio.gather(*(load() for _ in range(4)))
    assert len(loaded[0]) == 1
    assert len(loaded[0][0].secret) == 32
    assert all(keys == loaded[0] for keys in loaded)


async def test_the_newest_signing_key_comes_first_and_retired_ones_not_at_all(
    database: Database,
) -> None:
    async with database.begin() as connection:
        for kid, age_h, retired in (("old", 2, None), ("new", 1, None), ("gone", 0, func.now())):
            await connection.execute(
                signing_keys.insert().values(
                    kid=kid,
                    secret=kid.encode(),
                    create_time=func.now() - timedelta(hours=age_h),
                    retire_time=retired,
                )
            )
        keys = await access.load_signing_keys(connection)
    assert [key.kid for key in keys] == ["new", "old"]


def test_a_signing_key_does_not_show_its_secret() -> None:
    assert "hush" not in repr(access.SigningKey("kid", b"hush"))


# enrollment tokens


async def test_a_new_enrollment_token_is_found_by_its_secret_as_it_was_made(
    database: Database,
) -> None:
    made = await create(
        database,
        description="for tests",
        ttl=timedelta(hours=2),
        max_uses=3,
        neuron_type="worker",
        neuron_id_pattern="worker-*",
        labels={"zone": "eu"},
        allow_reenrollment=True,
    )
    assert re.fullmatch(r"fet_[A-Za-z0-9_-]{43}", made.secret)
    async with database.begin() as connection:
        found = await enrollment.lock_by_secret(connection, made.secret)
        assert await enrollment.lock_by_secret(connection, "fet_other") is None
    assert found == made.token
    assert found.expire_time - found.create_time == timedelta(hours=2)
    assert found == EnrollmentToken(
        enrollment_token_id=found.enrollment_token_id,
        description="for tests",
        creator="admin",
        create_time=found.create_time,
        expire_time=found.expire_time,
        revoke_time=None,
        max_uses=3,
        uses=0,
        neuron_type="worker",
        neuron_id_pattern="worker-*",
        labels={"zone": "eu"},
        allow_reenrollment=True,
    )
    assert made.secret not in repr(made)


async def test_the_same_request_id_makes_one_enrollment_token_even_at_once(
    database: Database,
) -> None:
    made = await asyncio.gather(
        *(create(database, request_id="r", request_hash=b"h") for _ in range(4))
    )
    assert len({created.token.enrollment_token_id for created in made}) == 1
    assert sorted(bool(created.secret) for created in made) == [False, False, False, True]
    assert {created.request_hash for created in made} == {b"h"}


async def test_request_ids_of_two_admins_have_nothing_to_do_with_each_other(
    database: Database,
) -> None:
    one = await create(database, creator="one", request_id="r")
    two = await create(database, creator="two", request_id="r")
    assert one.token.enrollment_token_id != two.token.enrollment_token_id


async def test_without_a_request_id_every_call_makes_another_token(database: Database) -> None:
    first, second = await create(database), await create(database)
    assert first.token.enrollment_token_id != second.token.enrollment_token_id


async def test_tokens_are_listed_newest_first_page_by_page_also_those_made_at_once(
    database: Database,
) -> None:
    made = [(await create(database)).token.enrollment_token_id for _ in range(5)]
    async with database.begin() as connection:  # three of one moment: their ids decide
        await connection.execute(
            update(enrollment_tokens)
            .where(enrollment_tokens.c.enrollment_token_id.in_(made[:3]))
            .values(create_time=func.now() - timedelta(hours=1))
        )
    pages: list[list[str]] = []
    page_token = ""
    while not pages or page_token:
        async with database.begin() as connection:
            tokens, page_token = await enrollment.list_tokens(
                connection, page_size=2, page_token=page_token
            )
        pages.append([token.enrollment_token_id for token in tokens])
    assert pages == [[made[4], made[3]], sorted(made[:3], reverse=True)[:2], [min(made[:3])]]


async def test_a_revoked_token_stays_revoked_since_the_first_time(database: Database) -> None:
    made = await create(database)
    async with database.begin() as connection:
        first = await enrollment.revoke(connection, made.token.enrollment_token_id)
    async with database.begin() as connection:
        second = await enrollment.revoke(connection, made.token.enrollment_token_id)
    assert first is not None
    assert first.revoke_time is not None
    assert second == first
