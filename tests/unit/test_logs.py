"""What the server logs: no secret that a text quotes, and nothing that acts on who reads it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import structlog

from federation_server.domain.text import escape_line
from federation_server.logs import Alike

SECRETS = {
    "enrollment token": "fet_tj9huq8NS8ovrU5QQ5c-rd5JKeo6jDb3",
    "API key": "fak_uFQeGxuLz3z7Pn2eOHtVCbq_XgYp1k0W",
    "neuron's token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl-_A",
    "password in a URL": "postgresql://fed:sw0rd-f1sh@db:5432/federation",
    "password in a URL's query": "postgresql://fed@db/federation?password=sw0rd-f1sh",
    "password for libpq": "host=db user=fed password=sw0rd-f1sh dbname=federation",
    "quoted password for libpq": r"host=db password='it\'s sw0rd-f1sh' dbname=federation",
    "HTTP header": "authorization: Bearer sw0rd-f1sh",
}
HOSTILE = "a\r\n2026-11-21T00:00:00Z [info] forged\x1b[2J\x1b]52;c;Zm9v\x07\x9b1m\u202e\u2028\x85"
HALF = "\ud800"
"""Half a character, which no encoding has."""

LOGS = """
import json, logging, sys
import structlog
from federation_server import logs

logs.configure("DEBUG", json=sys.argv[1] == "json")
log = structlog.get_logger("test")
for text in json.loads(sys.stdin.read()):
    log.info("said", action="said", field=text, nested={"deeper": [text]}, enrollment_token=text)
    local_variable = text
    try:
        try:
            raise ValueError(text)
        except ValueError as error:
            raise RuntimeError("and so " + text) from error
    except RuntimeError as error:
        log.error("failed", action="failed", exc_info=error)
        logging.getLogger("library").error("%s", text, exc_info=True)
    log.info("ended", action="ended")
"""


def logged(form: str, *texts: str) -> str:
    """What a process logs about these texts: as fields, in errors, by a library."""
    done = subprocess.run(
        [sys.executable, "-c", LOGS, form],
        input=json.dumps(texts).encode(),
        capture_output=True,
        check=True,
    )
    assert not done.stdout
    return done.stderr.decode("utf-8")


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_secret_that_a_field_an_error_or_a_library_quotes_is_logged(form: str) -> None:
    said = logged(form, *SECRETS.values())
    assert "ValueError" in said
    assert said.count("[redacted]") > len(SECRETS) * 5
    for secret in SECRETS.values():
        assert secret not in said
    for part in ("sw0rd-f1sh", "tj9huq8NS8", "uFQeGxuLz3", "c2lnbmF0dXJl"):
        assert part not in said


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE + HALF], ids=["whole", "with half a character"])
@pytest.mark.parametrize("form", ["json", "console"])
def test_no_text_begins_a_line_of_its_own_or_acts_on_a_terminal(form: str, text: str) -> None:
    said = logged(form, text)
    assert "forged" in said
    assert all(line.isprintable() for line in said.split("\n"))
    if form == "json":
        events = [json.loads(line)["event"] for line in said.splitlines()]
        quoted = text if text is HOSTILE else escape_line(text)
        assert events == ["said", "failed", quoted, "ended"]
    else:
        events = [line for line in said.splitlines() if line[:1].strip()]
        assert [each.split("]")[1].split()[0] for each in events][:2] == ["said", "failed"]
        assert len(events) == 4


def test_refusals_that_are_alike_fill_no_disk_and_the_others_are_all_said() -> None:
    now = 0.0
    alike = Alike(clock=lambda: now)

    def says(action: str, **fields: str) -> int | None:
        try:
            event = alike(None, "info", {"action": action, **fields})
        except structlog.DropEvent:
            return None
        left_out: int = event.get("left_out", 0)
        return left_out

    said = [says("rpc_refused", method="/m", reason="CREDENTIAL_INVALID") for _ in range(1000)]
    assert [each for each in said if each is not None] == [0] * 100
    assert says("rpc_refused", method="/m", reason="ROLE_TOO_LOW") == 0
    assert [says("neuron_registered") for _ in range(1000)] == [0] * 1000
    now = 10.0
    assert says("rpc_refused", method="/m", reason="CREDENTIAL_INVALID") == 900
    assert says("rpc_refused", method="/m", reason="CREDENTIAL_INVALID") == 0


def test_a_traceback_in_json_holds_no_variables() -> None:
    said = logged("json", "the-value-of-a-variable")
    failed = json.loads(said.splitlines()[1])
    (raised, cause) = failed["exception"]
    assert (raised["exc_type"], cause["exc_type"]) == ("RuntimeError", "ValueError")
    assert not any(frame.get("locals") for each in failed["exception"] for frame in each["frames"])
