"""Logs: JSON lines without secrets, and a host program's own logging left alone."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from neuron_sdk import logs
from neuron_sdk.logs import configure_logging, get_logger


@pytest.fixture(autouse=True)
def logging_left_as_found() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_an_event_is_one_json_line_with_time_level_logger_and_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(level="INFO", file=None, json=True)
    get_logger("neuron_sdk.test").info("registered", action="session.open", attempt=2)
    (line,) = lines(capsys.readouterr().err)
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {
        "level": "info",
        "logger": "neuron_sdk.test",
        "event": "registered",
        "action": "session.open",
        "attempt": 2,
    }


def test_plain_logging_and_structlog_of_the_service_come_out_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(level="INFO", file=None, json=True)
    logging.getLogger("service").info("%d rows", 3, extra={"action": "rows"})
    structlog.get_logger("service").info("3 rows", action="rows")
    plain, structured = lines(capsys.readouterr().err)
    assert (plain["event"], plain["action"]) == (structured["event"], structured["action"])


def test_no_secret_reaches_the_log_by_any_way(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "neuron.log"
    configure_logging(level="INFO", file=file, json=True)
    log = get_logger("neuron_sdk.test")
    log.info("with password=hunter2", token="hunter2", url="db://u:hunter2@h")
    log.info("nested", settings={"deep": [{"api_key": "hunter2"}]})
    logging.getLogger("service").warning("password=%s", "hunter2", extra={"secret": "hunter2"})
    try:
        raise RuntimeError("refused: password=hunter2")
    except RuntimeError:
        log.exception("failed")
        logging.getLogger("service").exception("failed")
    written = capsys.readouterr().err
    assert written == file.read_text()
    assert "RuntimeError" in written
    assert "hunter2" not in written


def test_an_unconfigured_program_gets_our_events_as_ordinary_records_without_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    get_logger("neuron_sdk.test").warning("retrying", action="connect.retry", token="hunter2")
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("neuron_sdk.test", "retrying")
    assert vars(record)["action"] == "connect.retry"
    assert vars(record)["token"] == "[redacted]"


def test_the_sdk_alone_never_touches_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, structlog.is_configured())
    get_logger("neuron_sdk.test").info("hello")
    assert (list(root.handlers), root.level, structlog.is_configured()) == before


def test_a_field_named_like_a_records_own_is_kept_under_another_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(level="INFO", file=None, json=True)
    get_logger("neuron_sdk.test").info("hello", name="n1", args=[1], message="m", module="x")
    (line,) = lines(capsys.readouterr().err)
    assert (line["name_"], line["args_"], line["message_"], line["module_"]) == (
        "n1",
        [1],
        "m",
        "x",
    )


def test_configuring_twice_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="INFO", file=None, json=True)
    configure_logging(level="INFO", file=None, json=True)
    get_logger("neuron_sdk.test").info("once")
    assert len(lines(capsys.readouterr().err)) == 1


def test_handlers_of_the_host_program_stay() -> None:
    theirs = logging.NullHandler()
    logging.getLogger().addHandler(theirs)
    configure_logging(level="INFO", file=None)
    assert theirs in logging.getLogger().handlers


def test_what_is_below_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="warning", file=None, json=True)
    get_logger("neuron_sdk.test").info("quiet")
    logging.getLogger("service").info("quiet")
    assert capsys.readouterr().err == ""


def test_an_unknown_level_is_refused_by_the_settings_name() -> None:
    with pytest.raises(ValueError, match=r"LOG_LEVEL 'loud' is unknown: use one of DEBUG"):
        configure_logging(level="loud", file=None)


def test_lines_are_for_people_on_a_terminal_and_json_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(level="INFO", file=None)
    get_logger("neuron_sdk.test").info("to a pipe")
    assert lines(capsys.readouterr().err)[0]["event"] == "to a pipe"

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging(level="INFO", file=None)
    get_logger("neuron_sdk.test").info("to a person", token="hunter2")
    written = capsys.readouterr().err
    assert "to a person" in written
    assert "{" not in written
    assert "hunter2" not in written


def test_the_file_is_rotated_before_it_grows_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 2_000)
    file = tmp_path / "logs" / "neuron.log"
    configure_logging(level="INFO", file=file, json=True)
    for number in range(100):
        get_logger("neuron_sdk.test").info("line", number=number)
    files = sorted(path.name for path in file.parent.iterdir())
    assert files == ["neuron.log", *(f"neuron.log.{n}" for n in range(1, logs.KEPT_FILES + 1))]
    assert all(path.stat().st_size <= 2_000 for path in file.parent.iterdir())
    assert capsys.readouterr().err.count("\n") == 100


def test_a_file_that_cannot_be_written_is_refused_by_the_settings_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"LOG_FILE cannot be written .*file/neuron.log"):
        configure_logging(level="INFO", file=tmp_path / "file" / "neuron.log")
