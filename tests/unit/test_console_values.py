"""What people type at the console, and how values read there."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1.heartbeat_pb2 import Heartbeat, HostInfo, SpoolStatus
from federation.v1.neuron_pb2 import Presence
from federation_server.console import heartbeat_view, values, wording
from federation_server.console.client import Address, find_key
from federation_server.console.failure import EXIT_USAGE, Failure
from federation_server.console.trust import Trust


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("250ms", 0.25)],
)
def test_a_span_is_read(text: str, seconds: float) -> None:
    assert values.span(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "30", "s", "0s", "-5s", "1 h", "5 min", "inf", "99999999d"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        values.span(text)


def test_a_moment_is_a_span_away_or_a_time_with_a_zone() -> None:
    now = datetime.now(UTC)
    assert now - timedelta(hours=1) <= values.past("1h") <= datetime.now(UTC) - timedelta(hours=1)
    assert values.future("2h") >= now + timedelta(hours=2)
    assert values.past("2026-01-31T13:00:00+01:00") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert values.future("2026-01-31T12:00:00Z") == datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize("text", ["2026-01-31T12:00:00", "yesterday", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        values.past(text)


@pytest.mark.parametrize(
    ("pairs", "data"),
    [
        (["n=10", "name=World", "on=true", "none=null"], {"n": 10, "name": "World", "on": True}),
        (['text="10"', "list=[1,2]", 'map={"a":1}'], {"text": "10", "list": [1, 2]}),
        (["retry.limit=3", "retry.pause.s=0.5"], {"retry": {"limit": 3, "pause": {"s": 0.5}}}),
        (["url=http://x/?a=b", "empty="], {"url": "http://x/?a=b", "empty": ""}),
        (['id="9007199254740993"'], {"id": "9007199254740993"}),
        (["broken={", "deep=" + "[" * 100_000], {"broken": "{"}),
    ],
)
def test_a_pair_is_json_where_it_can_be_and_text_elsewhere(
    pairs: list[str], data: dict[str, Any]
) -> None:
    found = values.parameters(pairs, None)
    assert {key: found[key] for key in data} == data


def test_a_number_that_is_none_stays_text() -> None:
    assert values.parameters(["nan=NaN", "inf=1e999"], None) == {"nan": "NaN", "inf": "1e999"}


def test_a_whole_number_that_would_lose_digits_is_refused_with_what_to_write() -> None:
    with pytest.raises(typer.BadParameter) as refused:
        values.parameters(["id=9007199254740993"], None)
    assert refused.value.message == (
        'id: 9007199254740993 is beyond 2^53: write it as a string, "9007199254740993";'
        " in a shell id='\"9007199254740993\"'"
    )
    with pytest.raises(typer.BadParameter, match="beyond 2"):
        values.parameters(["ids=[9007199254740993]"], None)


def test_a_time_without_a_zone_is_refused_with_one_that_has_it() -> None:
    with pytest.raises(typer.BadParameter, match="write 2026-11-22T00:00:00Z"):
        values.past("2026-11-22")
    assert values.past("2026-11-22T00:00:00Z") == datetime(2026, 11, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    "pairs", [["nothing"], ["=1"], ["a=1", "a=2"], ["a=1", "a.b=2"], ["a.b=1", "a=2"], ["a..b=1"]]
)
def test_pairs_that_contradict_are_refused(pairs: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        values.parameters(pairs, None)


def test_pairs_are_laid_over_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data.json"
    file.write_text('{"limit": 1, "retry": {"max": 2}}')
    expected = {"limit": 9, "retry": {"max": 2, "pause": 1}}
    for source in (file.read_text(), f"@{file}"):
        assert values.parameters(["limit=9", "retry.pause=1"], source) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    assert values.parameters(["limit=9", "retry.pause=1"], "-") == expected


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "not JSON"),
        ('{"id": 9007199254740993}', "beyond 2^53"),
        ('{"x": NaN}', "not a finite number"),
        ("@/nowhere/data.json", "No such file"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_data_that_cannot_be_sent_is_refused(source: str, why: str) -> None:
    with pytest.raises(typer.BadParameter, match=why.replace("^", r"\^")):
        values.parameters([], source)


@pytest.mark.parametrize(
    ("text", "host", "port", "tls"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051, None),
        ("federation.example", "federation.example", 50051, None),
        ("[::1]:7000", "::1", 7000, None),
        ("::1", "::1", 50051, None),
        ("http://localhost:1234/", "localhost", 1234, False),
        ("federation://localhost", "localhost", 50051, False),
        ("grpc://[::1]:7000", "::1", 7000, False),
        ("federations://fed.example:443", "fed.example", 443, True),
        ("grpcs://fed.example", "fed.example", 50051, True),
        ("https://fed.example:443/", "fed.example", 443, True),
    ],
)
def test_an_address_is_read(text: str, host: str, port: int, tls: bool | None) -> None:
    assert Address.parse(text) == Address(host, port, tls)
    assert Address.parse(str(Address(host, port))) == Address(host, port)


@pytest.mark.parametrize(
    ("text", "alone", "with_a_ca"),
    [
        ("localhost", False, True),
        ("127.0.0.1:1", False, True),
        ("[::1]:1", False, True),
        ("fed.example", True, True),
        ("10.0.0.1", True, True),
        ("federation://fed.example", False, False),
        ("federations://localhost", True, True),
    ],
)
def test_an_admins_key_travels_in_plaintext_on_loopback_or_where_the_scheme_says_so(
    text: str, alone: bool, with_a_ca: bool
) -> None:
    address = Address.parse(text)
    assert address.uses_tls(Trust()) is alone
    assert address.uses_tls(Trust(ca_file="/ca.crt")) is with_a_ca


@pytest.mark.parametrize(
    "text", ["", ":50051", "host:port", "host:0", "host:70000", "ftp://x:1", "federations://"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Failure) as failure:
        Address.parse(text)
    assert failure.value.exit_code == EXIT_USAGE


def test_the_key_comes_from_the_nearest_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "admin.key").write_text("from-file\n")
    monkeypatch.setenv("FEDERATION_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("FEDERATION_ADMIN_KEY", raising=False)
    monkeypatch.delenv("ADMIN_API_KEY", raising=False)
    assert find_key("").secret == "from-file"
    monkeypatch.setenv("ADMIN_API_KEY", "from-server-variable")
    assert find_key("").secret == "from-server-variable"
    monkeypatch.setenv("FEDERATION_ADMIN_KEY", "from-variable")
    assert find_key("").secret == "from-variable"
    assert find_key("from-option").secret == "from-option"
    assert "from-option" not in repr(find_key("from-option"))


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(Failure) as failure:
        find_key(key)
    assert key not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;a title\x07after", "after"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "31mred"),
        ("bell\x07 back\x08 nul\x00", "bell back nul"),
        ("two\nlines\r\nand\ttabs", "two lines and tabs"),
        ("\u202eevil\u2066", "evil"),
        ("[bold]kept[/bold]", "[bold]kept[/bold]"),
        ("\x1b", ""),
        ("grün 日本", "grün 日本"),
    ],
)
def test_what_a_terminal_would_act_on_is_taken_out(text: str, seen: str) -> None:
    cleaned = wording.clean(text)
    assert " ".join(cleaned.split()) == seen
    assert not any(ord(each) < 32 or 0x7F <= ord(each) < 0xA0 for each in cleaned)


def test_a_time_reads_as_a_distance_in_its_greatest_unit() -> None:
    now = datetime(2026, 11, 21, 12, tzinfo=UTC)

    def at(seconds: float) -> Timestamp:
        stamp = Timestamp()
        stamp.FromDatetime(now - timedelta(seconds=seconds))
        return stamp

    read = [wording.relative(at(ago), now) for ago in (0.5, 12, 200, 9000, 260_000, -7000)]
    assert read == ["now", "12 s ago", "3 min ago", "2 h ago", "3 d ago", "in 116 min"]
    assert wording.relative(Timestamp(), now) == "-"


@pytest.mark.parametrize(
    ("seconds", "read"),
    [
        (0.0123, "12.3 ms"),
        (1.2345, "1.23 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_a_span_reads_exactly(seconds: float, read: str) -> None:
    length = Duration()
    length.FromTimedelta(timedelta(seconds=seconds))
    assert wording.span(length) == read


def test_an_enum_value_of_a_newer_server_reads_as_its_number() -> None:
    assert wording.enum(Presence, Presence.PRESENCE_ONLINE) == "ONLINE"
    assert wording.enum(Presence, 0) == "-"
    assert wording.enum(Presence, 77) == "77"


@pytest.mark.parametrize(
    ("spool", "text"),
    [
        ({"pending": 3, "pending_bytes": 2048}, "3 waiting (2 KiB), 0 dropped"),
        ({"dropped": 5}, "0 waiting (0 B), 5 dropped"),
        (
            {"dropped": 6, "dropped_reports": 3, "dropped_updates": 2, "dropped_error_reports": 1},
            "0 waiting (0 B), 6 dropped (3 reports, 2 overtaken updates, 1 reports of errors)",
        ),
        (
            {"shortened_results": 2},
            "0 waiting (0 B), 0 dropped, 2 results kept without their response",
        ),
        (
            {"in_memory": True},
            "0 waiting (0 B), 0 dropped, in memory: the neuron's disk does not take it",
        ),
    ],
)
def test_a_spool_reads_as_what_waits_what_was_dropped_and_where_it_is(
    spool: dict[str, Any], text: str
) -> None:
    beat = Heartbeat(spool=SpoolStatus(**spool))
    assert ("spool", text) in heartbeat_view.facts(beat, "now", HostInfo())
