"""What of a change goes into the audit log, and which attempts are alike."""

from __future__ import annotations

from typing import Any

import pytest

from federation_server.domain.access import new_secret
from federation_server.domain.audit import (
    MOST_BYTES,
    Entry,
    address,
    differences,
    fit_id,
    neighbourhood,
)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ({"b": 2}, {"b": 3})),
        ({"a": 1}, {"a": 1}, ({}, {})),
        ({"a": 1}, {"a": 1, "how": "renewed"}, ({}, {"how": "renewed"})),
        ({"a": 1}, {}, ({"a": 1}, {})),
        ({"a": None}, {"a": 0}, ({"a": None}, {"a": 0})),
        (None, {"a": 1, "b": "", "c": []}, (None, {"a": 1})),
        ({"a": 1, "b": {}}, None, ({"a": 1}, None)),
    ],
)
def test_a_change_is_told_by_what_differs_and_a_whole_object_by_what_it_has(
    before: Any, after: Any, told: Any
) -> None:
    assert differences(before, after) == told


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "k", "[redacted]"),
        ("db_password_old", "k", "[redacted]"),
        ("enrollment_token", "k", "[redacted]"),
        ("enrollment_token_id", "k", "k"),
        ("password", "", ""),
        ("max_tokens", 7, 7),
        ("metadata", {"secrets": ["a", {"b": "c"}]}, {"secrets": "[redacted]"}),
        ("metadata", {"credentials": {"db": "k"}}, {"credentials": "[redacted]"}),
        (
            "metadata",
            {"password": 1234, "passwords": True},
            {"password": "[redacted]", "passwords": True},
        ),
        ("reason", "it leaked fet_0123456789 to all", "it leaked [redacted] to all"),
        ("note", "eyJhbGciOiJI.eyJzdWIiOi.c2ln", "[redacted]"),
        ("base_url", "https://me:pass@host/path", "https://[redacted]@host/path"),
        ("base_url", "https://host:80/a@b", "https://host:80/a@b"),
    ],
)
def test_a_secret_is_known_by_its_key_or_its_looks(name: str, value: Any, shown: Any) -> None:
    assert differences({}, {name: value}) == ({}, {name: shown})


@pytest.mark.parametrize(("name", "value"), [("password", "k"), ("note", "x" * 3000)])
def test_a_change_that_the_log_does_not_show_is_one_all_the_same(name: str, value: str) -> None:
    before, after = differences({name: value}, {name: value[:-1] + "y"})
    assert before == after != {}


def test_a_value_is_shown_up_to_its_bound_and_beyond_it_only_its_size() -> None:
    inside, outside = "x" * (MOST_BYTES - 2), "x" * (MOST_BYTES - 1)
    assert differences({}, {"a": inside}) == ({}, {"a": inside})
    assert differences({}, {"a": outside}) == ({}, {"a": {"omitted_bytes": MOST_BYTES + 1}})


def test_an_id_that_was_refused_is_cut_and_holds_no_nul() -> None:
    assert fit_id("a\0b" + "c" * 1000) == "ab" + "c" * 126


def test_an_id_that_was_refused_is_no_secret_that_was_put_in_its_place() -> None:
    secret = new_secret("fak_")
    assert fit_id(secret) == "[redacted]"
    assert fit_id("x" * 120 + " " + secret) == "x" * 120 + " [redact"


@pytest.mark.parametrize(
    ("peer", "shown"),
    [
        ("ipv4:10.0.0.7:5123", "10.0.0.7"),
        ("ipv6:%5B2001:db8::7%5D:5123", "2001:db8::7"),
        ("ipv6:[::1]:5123", "::1"),
        ("unix:/run/x.sock", "unix"),
    ],
)
def test_a_peer_is_shown_by_its_address_alone(peer: str, shown: str) -> None:
    assert address(peer) == shown


def test_addresses_of_one_ipv6_network_are_alike_and_others_are_not() -> None:
    assert neighbourhood("2001:db8::1") == neighbourhood("2001:db8::ffff:2") == "2001:db8::/64"
    assert neighbourhood("2001:db8:0:1::1") == "2001:db8:0:1::/64"
    assert (neighbourhood("10.0.0.7"), neighbourhood("unix")) == ("10.0.0.7", "unix")


def test_two_attempts_together_say_what_they_have_in_common() -> None:
    first = Entry(actor="admin:a", peer="p", method="m", object_id="1", reason="R")
    second = Entry(actor="admin:b", peer="p", method="m", object_id="2", reason="R")
    assert first.together(first) == first
    assert first.together(second) == Entry(peer="p", method="m", reason="R")
