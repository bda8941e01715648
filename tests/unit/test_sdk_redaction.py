"""Secrets do not leave the process, and what is no secret stays readable."""

from __future__ import annotations

import math
import time
from pathlib import PurePosixPath

import pytest

from neuron_sdk.redaction import REDACTED, redact, redact_text

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJuMSJ9.c2lnbmF0dXJlLW9mLWl0"  # made up


@pytest.mark.parametrize(
    "key",
    ["token", "access_token", "enrollment_token", "ENROLLMENT_TOKEN", "secret", "client_secret",
     "password", "db_password_old", "Authorization", "api_key", "API-Key", "apiKey", "x-admin-key",
     "jwt", "set-cookie", "private_key"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["abc", b"abc", 1234, ["abc"], {"a": "abc"}])
def test_a_value_under_a_secrets_name_is_replaced_whole(key: str, value: object) -> None:
    assert redact({"outer": [{key: value}]}) == {"outer": [{key: REDACTED}]}


@pytest.mark.parametrize("key", ["token_count", "tokens", "key", "author", "path", "passed"])
def test_a_name_that_only_resembles_a_secrets_keeps_its_value(key: str) -> None:
    assert redact({key: 17}) == {key: 17}


def test_whether_a_secret_is_set_may_be_told() -> None:
    assert redact({"token": None, "password": True}) == {"token": None, "password": True}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"sent {JWT}, refused", f"sent {REDACTED}, refused"),
        ("fet_A1b2-C3d4_E5f6 is spent", f"{REDACTED} is spent"),
        ("key=fak_A1b2C3d4E5f6", f"key={REDACTED}"),
        ("Authorization: Bearer abc.def", f"Authorization: {REDACTED}"),
        ("used Bearer 0123456789abcdef0123", f"used Bearer {REDACTED}"),
        ("postgresql://app:s3c@ret@db/x", f"postgresql://app:{REDACTED}@db/x"),
        ("redis://:s3cret@cache", f"redis://:{REDACTED}@cache"),
        ("host=db password='a b' user=app", f"host=db password={REDACTED} user=app"),
        ('{"client_secret": "x y"}', f'{{"client_secret": {REDACTED}}}'),
        ("https://h/p?api_key=abc&page=2", f"https://h/p?api_key={REDACTED}&page=2"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out_of_a_text(text: str, left: str) -> None:
    assert redact_text(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8080/health",
        "send `authorization: Bearer <token>` in its metadata, or an admin's `x-admin-key: <key>`",
        "basic authentication is off",
        "buffet_reservation_made",
        "user@example.org wrote at 12:30",
        "the token has expired",
    ],
)
def test_an_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact_text(text) == text


def test_anything_becomes_plain_data() -> None:
    given = {
        1: PurePosixPath("/a"),
        "set": {2},
        "tuple": (1, 2.5, None, True),
        "odd": math.nan,
        "huge": 2**80,
        "broken": "\ud800",
    }
    assert redact(given) == {
        "1": "/a",
        "set": [2],
        "tuple": [1, 2.5, None, True],
        "odd": "nan",
        "huge": str(2**80),
        "broken": "?",
    }


def test_data_that_holds_itself_is_cut_off() -> None:
    endless: dict[str, object] = {}
    endless["again"] = endless
    assert "…" in str(redact(endless))


@pytest.mark.parametrize(
    "text", ["://:" * 20_000, "eyJ" * 30_000, "eyJ-" * 30_000, "a-" * 50_000, "token=" * 20_000]
)
def test_a_hostile_text_costs_no_more_than_a_moment(text: str) -> None:
    start = time.thread_time()
    redact_text(text)
    assert (
        time.thread_time() - start < 2
    )  # of this thread's own time: a busy machine changes nothing
