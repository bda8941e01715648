"""Texts of others: what looks like a secret in them is found, however they were made to hide it."""

from __future__ import annotations

import time

import pytest

from federation_server.domain.text import without_secrets

LENGTH = 200_000
"""Where the work grows with the square of the length, that much takes a minute and more."""

ENOUGH_S = 5.0
"""Of processor time. One pass takes some milliseconds."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("it leaked fet_0123456789 to all", "it leaked [redacted] to all"),
        ("eyJhbGciOiJI.eyJzdWIiOi.c2ln", "[redacted]"),
        ("https://me:pass@host/path", "https://[redacted]@host/path"),
        ("postgresql://me@corp:p@ss:word@host/path", "postgresql://[redacted]@host/path"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("host=db password=hunter2 user=me", "host=db password=[redacted] user=me"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
    ],
)
def test_a_secret_is_known_by_its_looks(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "part", [":", "@", "://", "://a:", "eyJ-", "eyJa.", "fak_", "password='", "password='\\", "\\"]
)
@pytest.mark.parametrize("before", ["", "://", "eyJ", "password='"])
def test_no_text_takes_longer_than_its_length_is_worth(before: str, part: str) -> None:
    text = before + part * (LENGTH // len(part))
    began = time.process_time()
    without_secrets(text)
    assert time.process_time() - began < ENOUGH_S
