"""The console's API keys and signing keys against a scripted federation."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import ErrorInfo

from federation.v1 import access_service_pb2 as pb
from tests.support.console import federation, run
from tests.support.scripted_federation import Refusal, ScriptedFederation

__all__ = ["federation"]  # a fixture


def at(**ahead: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(datetime.now(UTC) + timedelta(**ahead))
    return stamp


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_a_keys_secret_is_all_that_goes_to_stdout(
    federation: ScriptedFederation, quiet: list[str]
) -> None:
    key = pb.ApiKey(name="ci", role=pb.ROLE_OPERATOR)
    federation.answers["CreateApiKey"] = pb.CreateApiKeyResponse(api_key=key, secret="fak_new")
    options = ["--role", "operator", "--ttl", "90d", "--description", "the pipeline"]
    result = run("api-key", "create", "ci", *options, *quiet)
    assert result.stdout == "fak_new\n"
    assert ("ci, OPERATOR, never expires" in result.stderr) is not bool(quiet)
    [request] = federation.requests["CreateApiKey"]
    assert (request.name, request.role) == ("ci", pb.ROLE_OPERATOR)
    assert (request.ttl.seconds, request.description) == (90 * 24 * 3600, "the pipeline")


def test_a_key_without_a_ttl_is_asked_for_without_one(federation: ScriptedFederation) -> None:
    federation.answers["CreateApiKey"] = pb.CreateApiKeyResponse(secret="fak_new")
    run("api-key", "create", "ci", "--role", "viewer")
    [request] = federation.requests["CreateApiKey"]
    assert not request.HasField("ttl")


def test_a_role_has_to_be_said_and_known(federation: ScriptedFederation) -> None:
    assert run("api-key", "create", "ci").exit_code == 2
    result = run("api-key", "create", "ci", "--role", "root")
    assert result.exit_code == 2
    assert "viewer" in result.stderr


def test_keys_are_listed_with_what_has_become_of_them(federation: ScriptedFederation) -> None:
    keys = [
        pb.ApiKey(name="good", role=pb.ROLE_ADMIN, last_use_time=at(minutes=-5)),
        pb.ApiKey(name="rotated", role=pb.ROLE_VIEWER, old_secret_expire_time=at(hours=1)),
        pb.ApiKey(name="expired", role=pb.ROLE_VIEWER, expire_time=at(hours=-1)),
        pb.ApiKey(
            name="revoked", role=pb.ROLE_VIEWER, expire_time=at(hours=1), revoke_time=at(hours=-1)
        ),
    ]
    federation.answers["ListApiKeys"] = pb.ListApiKeysResponse(api_keys=keys)
    rows = [line.split() for line in run("api-key", "list").stdout.splitlines()[1:]]
    assert [(row[0], row[2]) for row in rows] == [
        ("good", "good"),
        ("rotated", "two"),
        ("expired", "expired"),
        ("revoked", "revoked"),
    ]
    assert rows[0][3:7] == ["never", "5", "min", "ago"]
    answer = json.loads(run("api-key", "list", "--json").stdout)
    assert [key["name"] for key in answer["api_keys"]] == [key.name for key in keys]


def test_a_keys_description_cannot_steer_the_terminal(federation: ScriptedFederation) -> None:
    key = pb.ApiKey(name="ci", role=pb.ROLE_VIEWER, description="a\x1b[2J[red]b")
    federation.answers["ListApiKeys"] = pb.ListApiKeysResponse(api_keys=[key])
    assert run("api-key", "list").stdout.splitlines()[1].endswith("a[red]b")


@pytest.mark.parametrize(
    ("options", "overlap_s"), [([], None), (["--overlap", "1h"], 3600), (["--overlap", "0"], 0)]
)
def test_a_rotation_says_when_the_secret_before_ends(
    federation: ScriptedFederation, options: list[str], overlap_s: int | None
) -> None:
    end = at(hours=1) if overlap_s is None or overlap_s else None
    key = pb.ApiKey(name="admin-env", old_secret_expire_time=end)
    federation.answers["RotateApiKey"] = pb.RotateApiKeyResponse(api_key=key, secret="fak_new")
    result = run("api-key", "rotate", "admin-env", *options)
    assert result.stdout == "fak_new\n"
    assert "the secret before ends " + ("20" if end else "now") in result.stderr
    assert "ADMIN_API_KEY" in result.stderr
    [request] = federation.requests["RotateApiKey"]
    assert (request.overlap.seconds if request.HasField("overlap") else None) == overlap_s


def test_a_key_expires_at_a_time_or_after_a_span(federation: ScriptedFederation) -> None:
    federation.answers["ExpireApiKey"] = pb.ExpireApiKeyResponse(
        api_key=pb.ApiKey(name="ci", expire_time=at(days=7, minutes=1))
    )
    assert "ci expires 20" in run("api-key", "expire", "ci", "7d").stdout
    run("api-key", "expire", "ci", "2030-01-01T00:00:00Z")
    after, fixed = federation.requests["ExpireApiKey"]
    assert abs(after.expire_time.seconds - at(days=7).seconds) < 60
    assert fixed.expire_time.ToDatetime() == datetime(2030, 1, 1)  # noqa: DTZ001 - protobuf's UTC


@pytest.mark.parametrize(
    ("expires", "said", "state"),
    [("1970-01-01T00:00:00Z", "expired", "expired"), ("9999-12-31T23:59:59Z", "expires", "good")],
)
def test_a_key_that_expires_at_the_first_or_the_last_time_that_there_is_is_shown_so(
    federation: ScriptedFederation,
    expires: str,
    said: str,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        stamp = Timestamp()
        stamp.FromJsonString(expires)
        key = pb.ApiKey(name="ci", role=pb.ROLE_ADMIN, expire_time=stamp)
        federation.answers["ExpireApiKey"] = pb.ExpireApiKeyResponse(api_key=key)
        federation.answers["ListApiKeys"] = pb.ListApiKeysResponse(api_keys=[key])
        assert run("api-key", "expire", "ci", expires).stdout.startswith(f"ci {said} ")
        assert run("api-key", "list").stdout.splitlines()[1].split()[2] == state
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_last_admin_key_is_kept_with_a_word_on_what_to_do(
    federation: ScriptedFederation,
) -> None:
    federation.answers["RevokeApiKey"] = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "the API key admin is the last ADMIN key that stays: create another one first",
        [ErrorInfo(reason="LAST_ADMIN_KEY", domain="federation")],
    )
    result = run("api-key", "revoke", "admin")
    assert result.exit_code != 0
    assert "create another one first" in result.stderr


@pytest.mark.parametrize(
    ("call", "end"), [("RevokeApiKey", ["revoke"]), ("ExpireApiKey", ["expire", "7d"])]
)
def test_whoever_ends_the_key_of_admin_api_key_is_told_of_the_next_start(
    federation: ScriptedFederation, call: str, end: list[str]
) -> None:
    answer = getattr(pb, f"{call}Response")
    verb, *when = end
    for name, told in (("admin-env", True), ("ci", False)):
        federation.answers[call] = answer(api_key=pb.ApiKey(name=name))
        result = run("api-key", verb, name, *when)
        assert ("no server starts whose ADMIN_API_KEY" in result.stderr) is told


def test_a_revocation_says_when_the_key_was_last_used(federation: ScriptedFederation) -> None:
    for used, said in ((at(minutes=-5), "last used 5 min ago"), (None, "never used")):
        key = pb.ApiKey(name="ci", last_use_time=used)
        federation.answers["RevokeApiKey"] = pb.RevokeApiKeyResponse(api_key=key)
        assert run("api-key", "revoke", "ci").stdout == f"ci is revoked; it was {said}\n"


def test_signing_keys_are_listed_with_what_they_do(federation: ScriptedFederation) -> None:
    keys = [
        pb.SigningKey(kid="c", create_time=at(hours=-1)),
        pb.SigningKey(kid="b", create_time=at(hours=-2), retire_time=at(hours=2)),
        pb.SigningKey(kid="a", create_time=at(hours=-3), retire_time=at(hours=-2)),
    ]
    federation.answers["ListSigningKeys"] = pb.ListSigningKeysResponse(signing_keys=keys)
    rows = [line.split()[:2] for line in run("keys", "list").stdout.splitlines()[1:]]
    assert rows == [["c", "signs"], ["b", "verifies"], ["a", "retired"]]


@pytest.mark.parametrize(("options", "overlap_s"), [([], None), (["--overlap", "0s", "-y"], 0)])
def test_signing_keys_rotate_with_the_overlap_that_is_asked_for(
    federation: ScriptedFederation, options: list[str], overlap_s: int | None
) -> None:
    answer = pb.RotateSigningKeyResponse(signing_key=pb.SigningKey(kid="d"))
    federation.answers["RotateSigningKey"] = answer
    assert run("keys", "rotate", *options).stdout == "d signs from now on\n"
    [request] = federation.requests["RotateSigningKey"]
    assert (request.overlap.seconds if request.HasField("overlap") else None) == overlap_s


def test_a_signing_key_ends_neurons_tokens_early_only_after_a_question(
    federation: ScriptedFederation,
) -> None:
    refused = run("keys", "rotate", "--overlap", "2h", typed="n\n")
    assert refused.exit_code == 1
    assert "End in 2 h every neuron's token that is not renewed by then?" in refused.stderr
    assert refused.stderr.endswith("no key is made\n")
    assert "RotateSigningKey" not in federation.requests
