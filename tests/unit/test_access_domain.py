"""Which API key must stay, so that somebody can administer the federation; what a pin matches."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest

from federation.v1 import access_service_pb2 as pb
from federation_server.domain.access import ApiKey, Role, is_last_resort, matches

NOW = datetime(2026, 11, 21, tzinfo=UTC)
DAY = timedelta(days=1)
LASTING = ApiKey(
    name="lasting",
    role=Role.ADMIN,
    description="",
    creator="",
    create_time=NOW - DAY,
    expire_time=None,
    revoke_time=None,
    last_use_time=None,
    old_secret_expire_time=None,
)
OTHER = replace(LASTING, name="other")
ENDING = replace(LASTING, name="ending", expire_time=NOW + DAY)
ENDING_TOO = replace(ENDING, name="ending-too")


@pytest.mark.parametrize(
    "rest",
    [
        [],
        [ENDING],
        [replace(OTHER, role=Role.OPERATOR)],
        [replace(OTHER, revoke_time=NOW)],
        [replace(OTHER, expire_time=NOW)],
    ],
    ids=["alone", "beside one that expires", "an operator's", "a revoked one", "an expired one"],
)
def test_the_only_admin_key_that_never_expires_is_the_last_resort(rest: list[ApiKey]) -> None:
    assert is_last_resort("lasting", [LASTING, *rest], NOW)


def test_neither_of_two_that_never_expire_is_the_last_resort() -> None:
    assert not is_last_resort("lasting", [LASTING, OTHER], NOW)


def test_one_that_expires_is_the_last_resort_only_where_there_is_no_other() -> None:
    assert is_last_resort("ending", [ENDING], NOW)
    assert not is_last_resort("ending", [ENDING, ENDING_TOO], NOW)
    assert not is_last_resort("ending", [ENDING, LASTING], NOW)


def test_a_key_that_does_not_work_is_never_the_last_resort() -> None:
    assert not is_last_resort("lasting", [replace(LASTING, revoke_time=NOW)], NOW)
    assert not is_last_resort("ending", [replace(ENDING, expire_time=NOW)], NOW)
    assert not is_last_resort("lasting", [replace(LASTING, role=Role.OPERATOR)], NOW)


def test_the_contracts_roles_are_the_servers() -> None:
    named = {name.removeprefix("ROLE_"): number for name, number in pb.Role.items() if number}
    assert named == {role.name: role.value for role in Role}


def test_a_star_stands_for_any_text_and_nothing_else_does() -> None:
    texts = ["".join(letters) for length in range(6) for letters in product("a.", repeat=length)]
    patterns = ["".join(each) for length in range(1, 6) for each in product("a.*", repeat=length)]
    for pattern in patterns:
        expected = re.compile(".*".join(map(re.escape, pattern.split("*"))))
        for text in texts:
            assert matches(pattern, text) == bool(expected.fullmatch(text)), (pattern, text)


@pytest.mark.timeout(10)
def test_no_id_makes_a_pattern_take_long() -> None:
    assert not matches("w" + "-*" * 30 + "-eu", "w" + "-" * 126 + "x")
    assert not matches("*a" * 64, "a" * 127 + "b")
