"""Neuron tokens: what is issued is taken back, and nothing else is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from structlog.testing import capture_logs

from federation_server.domain.access import TokenLifetime
from federation_server.rpc import errors
from federation_server.rpc.error_mapping import refusal
from federation_server.rpc.tokens import LEEWAY, Tokens
from federation_server.store.access import SigningKey

KEY = SigningKey("new", b"n" * 32)
OLD_KEY = SigningKey("old", b"o" * 32)
GENERATION = 1_700_000_000_000_000
TTL = timedelta(hours=24)


@pytest.fixture
def tokens() -> Tokens:
    return Tokens([KEY, OLD_KEY], TokenLifetime(TTL))


def now() -> datetime:
    return datetime.now(UTC)


def reason(tokens: Tokens, token: str) -> str:
    with pytest.raises(errors.Refused) as caught:
        tokens.verify(token)
    assert caught.value.code.name == "UNAUTHENTICATED"
    return caught.value.reason_name


def forged(claims: dict[str, Any] | None = None, **overrides: Any) -> str:
    """A token as `Tokens` would issue it, but for what is said."""
    header = {"alg": "HS256", "kid": KEY.kid, **overrides.pop("header", {})}
    key = overrides.pop("key", KEY.secret)
    issued = {
        "iss": "federation",
        "aud": "federation/neuron",
        "sub": "n1",
        "gen": GENERATION,
        "iat": int(now().timestamp()),
        "exp": int((now() + TTL).timestamp()),
        "jti": "j",
        **(claims or {}),
    }
    issued = {name: value for name, value in issued.items() if value is not None}
    return jwt.encode(issued, key, algorithm=header["alg"], headers=header)


def test_a_token_names_its_neuron_generation_and_end(tokens: Tokens) -> None:
    start = now()
    issued = tokens.issue("n1", GENERATION, start)
    identity = tokens.verify(issued.token)
    assert (identity.neuron_id, identity.generation) == ("n1", GENERATION)
    assert identity.expire_time == (start + TTL).replace(microsecond=0)


def test_a_token_is_to_be_refreshed_in_the_middle_of_its_life(tokens: Tokens) -> None:
    start = now()
    issued = tokens.issue("n1", GENERATION, start)
    assert issued.neuron.expire_time - start == TTL
    assert issued.neuron.refresh_time - start == TTL / 2
    read = tokens.verify(issued.token)
    assert abs(read.refresh_time - issued.neuron.refresh_time) < timedelta(seconds=1)


def test_two_tokens_of_one_moment_are_different(tokens: Tokens) -> None:
    start = now()
    first = tokens.issue("n1", GENERATION, start)
    assert first.token != tokens.issue("n1", GENERATION, start).token


def test_the_first_key_signs_and_every_key_verifies(tokens: Tokens) -> None:
    before = Tokens([OLD_KEY], TokenLifetime(TTL))
    assert tokens.verify(before.issue("n1", GENERATION, now()).token).neuron_id == "n1"
    new = tokens.issue("n1", GENERATION, now()).token
    assert jwt.get_unverified_header(new)["kid"] == KEY.kid
    assert reason(before, new) == "CREDENTIAL_INVALID"


def test_a_token_is_expired_after_its_time_and_the_leeway(tokens: Tokens) -> None:
    margin = timedelta(seconds=5)
    within = tokens.issue("n1", GENERATION, now() - TTL - LEEWAY + margin)
    assert tokens.verify(within.token).neuron_id == "n1"
    beyond = tokens.issue("n1", GENERATION, now() - TTL - LEEWAY - margin)
    assert reason(tokens, beyond.token) == "CREDENTIAL_EXPIRED"


def test_a_token_of_a_database_whose_clock_is_ahead_is_good(tokens: Tokens) -> None:
    ahead = tokens.issue("n1", GENERATION, now() + timedelta(minutes=5))
    assert tokens.verify(ahead.token).neuron_id == "n1"


@pytest.mark.parametrize(
    ("claim", "ahead", "good"),
    [
        ("iat", timedelta(hours=1), False),
        ("iat", timedelta(minutes=5), True),
        ("nbf", timedelta(minutes=1), False),
        ("nbf", timedelta(seconds=5), True),
    ],
)
def test_a_token_whose_time_is_yet_to_come_is_invalid_beyond_what_clocks_differ(
    tokens: Tokens, claim: str, ahead: timedelta, good: bool
) -> None:
    token = forged({claim: int((now() + ahead).timestamp())})
    if good:
        assert tokens.verify(token).neuron_id == "n1"
    else:
        assert reason(tokens, token) == "CREDENTIAL_INVALID"


def test_the_forger_of_these_tests_makes_good_tokens(tokens: Tokens) -> None:
    assert tokens.verify(forged()).neuron_id == "n1"


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "another"},
        {"aud": None},
        {"iss": "another"},
        {"iss": None},
        {"sub": None},
        {"sub": 7},
        {"exp": None},
        {"exp": "soon"},
        {"iat": None},
        {"iat": "now"},
        {"iat": True},
        {"jti": None},
        {"gen": None},
        {"gen": "1"},
        {"gen": True},
        {"gen": 1.0},
    ],
    ids=str,
)
def test_a_token_with_another_or_no_claim_is_invalid(
    tokens: Tokens, claims: dict[str, Any]
) -> None:
    assert reason(tokens, forged(claims)) == "CREDENTIAL_INVALID"


@pytest.mark.parametrize(
    "overrides",
    [
        {"key": b"x" * 32},
        {"key": OLD_KEY.secret},
        {"header": {"kid": "unknown"}},
        {"header": {"alg": "none"}, "key": None},
        {"header": {"alg": "HS512"}, "key": b"n" * 64},
    ],
    ids=["another key", "the key of another kid", "unknown kid", "unsigned", "another algorithm"],
)
def test_a_token_that_is_signed_in_another_way_is_invalid(
    tokens: Tokens, overrides: dict[str, Any]
) -> None:
    assert reason(tokens, forged(**overrides)) == "CREDENTIAL_INVALID"


def test_another_algorithm_is_refused_even_with_the_right_key() -> None:
    key = SigningKey("k", b"n" * 64)
    token = forged(key=key.secret, header={"alg": "HS512", "kid": "k"})
    assert reason(Tokens([key], TokenLifetime(TTL)), token) == "CREDENTIAL_INVALID"


def encoded(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


@pytest.mark.parametrize("algorithm", ["RS256", "none", "None", "hs256", ""])
def test_a_good_signature_under_the_name_of_another_algorithm_is_refused(
    tokens: Tokens, algorithm: str
) -> None:
    signed = f"{encoded({'alg': algorithm, 'kid': KEY.kid})}.{forged().split('.')[1]}"
    digest = hmac.digest(KEY.secret, signed.encode(), hashlib.sha256)
    signature = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert reason(tokens, f"{signed}.{signature}") == "CREDENTIAL_INVALID"


def test_a_changed_payload_is_invalid(tokens: Tokens) -> None:
    header, payload, signature = forged().split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    changed = encoded({**claims, "sub": "n2"})
    assert reason(tokens, f"{header}.{changed}.{signature}") == "CREDENTIAL_INVALID"


def test_a_changed_signature_is_invalid(tokens: Tokens) -> None:
    header, payload, signature = forged().split(".")
    first = "A" if signature[0] != "A" else "B"
    assert reason(tokens, f"{header}.{payload}.{first}{signature[1:]}") == "CREDENTIAL_INVALID"


def test_a_token_of_another_federation_is_invalid_even_with_a_kid_of_ours(tokens: Tokens) -> None:
    for kid in (KEY.kid, "theirs"):
        other = Tokens([SigningKey(kid, b"t" * 32)], TokenLifetime(TTL))
        assert reason(tokens, other.issue("n1", GENERATION, now()).token) == "CREDENTIAL_INVALID"


def with_header(header: object) -> str:
    return ".".join([encoded(header), *forged().split(".")[1:]])


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "eyJ..",
        "not a token",
        "eyJ\udc80.a.b",
        forged()[:-4],
        forged() + "." + forged(),
        with_header({"alg": "HS256", "kid": 7}),
        with_header({"alg": "HS256", "kid": ["new"]}),
        with_header({"alg": "HS256"}),
        with_header(["alg"]),
        with_header({"alg": "HS256", "kid": "new", "crit": ["b64"], "b64": False}),
        forged({"x": "y" * 8000}),
    ],
)
def test_garbage_is_invalid(tokens: Tokens, token: str) -> None:
    assert reason(tokens, token) == "CREDENTIAL_INVALID"


def test_a_refused_token_is_logged_without_the_token_and_with_what_is_wrong_with_it(
    tokens: Tokens,
) -> None:
    bad = forged(key=b"x" * 32)
    with pytest.raises(errors.Refused) as caught:
        tokens.verify(bad)
    with capture_logs() as logs:
        refusal(caught.value)
    assert [line["cause"] for line in logs] == ["InvalidSignatureError"]
    assert not any(part in str(logs) for part in bad.split("."))
