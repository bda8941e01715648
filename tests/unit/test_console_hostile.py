"""Every command of the console, on answers in which every text is hostile.

The commands and how they are called come from the console itself, by the example that each has to
give: a new one is held to this from the day it is there.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from federation_server.console.app import NOUNS
from tests.support.console import federation, run
from tests.support.hostile import NEVER_SHOWN, TEXT, fill
from tests.support.scripted_federation import SERVICES, Refusal, ScriptedFederation

__all__ = ["federation"]

OF_RICH = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and the cursor: what rich itself writes on a terminal."""


def examples() -> list[str]:
    """Each command that calls a server, as its help says that it is called."""
    found = []
    for module in {module for module, _ in NOUNS.values()} - {"tls"}:
        app = import_module(f"federation_server.console.{module}").app
        group: Any = typer.main.get_command(app)
        for command in getattr(group, "commands", {"": group}).values():
            match = re.search(r"Example:  federation (.*)", command.epilog or "")
            assert match is not None, command.name
            words = shlex.split(match[1])
            end = words.index(">") if ">" in words else len(words)  # the shell's
            found.append(shlex.join(words[:end]))
    return sorted(found)


@pytest.fixture
def hostile(federation: ScriptedFederation) -> ScriptedFederation:
    """Answers everything, with hostile texts."""
    for service in SERVICES:
        for method in service.methods:
            answer: Any = GetMessageClass(method.output_type)()
            fill(answer)
            federation.answers[method.name] = [answer] if method.server_streaming else answer
    listed = federation.answers["ListNeurons"]
    over = Refusal(grpc.StatusCode.INVALID_ARGUMENT, TEXT)
    federation.answers["ListNeurons"] = lambda *_: (
        over if len(federation.requests["ListNeurons"]) > 1 else listed
    )  # or `watch` would never end
    return federation


def shown(example: str, *options: str) -> str:
    result = run(*shlex.split(example), *options)
    return f"{result.stdout}{result.stderr}"


def harmless(text: str) -> None:
    left = OF_RICH.sub("", text)
    for each in NEVER_SHOWN:
        assert each not in text, (each, text)
    assert all(each.isprintable() or each in "\n\r" for each in left), repr(left)


@pytest.mark.parametrize("example", examples())
def test_no_text_of_an_answer_acts_on_a_pipe_or_begins_a_line(
    hostile: ScriptedFederation, example: str
) -> None:
    text = shown(example)
    harmless(text)
    assert "\x1b" not in text


@pytest.mark.parametrize("example", examples())
def test_no_text_of_an_answer_acts_on_a_terminal(
    hostile: ScriptedFederation, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    harmless(shown(example))


@pytest.mark.parametrize("example", examples())
def test_json_has_the_texts_whole_and_escaped(hostile: ScriptedFederation, example: str) -> None:
    result = run(*shlex.split(example), "--json")
    harmless(result.stdout)
    decoder, left, texts = json.JSONDecoder(), result.stdout.lstrip(), set[str]()
    while left:  # one document, or one a line
        document, end = decoder.raw_decode(left)
        texts |= _texts(document)
        left = left[end:].lstrip()
    assert TEXT in texts or not texts  # an answer may have no texts


@pytest.mark.parametrize("example", examples())
def test_no_text_of_an_error_acts_on_a_terminal(
    federation: ScriptedFederation, example: str
) -> None:
    details = [
        ErrorInfo(reason="INVALID_FIELD", domain="federation", metadata={"neuron_id": TEXT}),
        BadRequest(field_violations=[BadRequest.FieldViolation(field=TEXT, description=TEXT)]),
    ]
    for service in SERVICES:
        for method in service.methods:
            refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, TEXT, details)
            federation.answers[method.name] = [refusal]
    result = run(*shlex.split(example))
    assert result.exit_code
    assert "evil" in result.stderr
    harmless(result.stderr)


def _texts(value: Any) -> set[str]:
    match value:
        case str():
            return {value}
        case dict():
            return {text for each in value.items() for one in each for text in _texts(one)}
        case list():
            return {text for each in value for text in _texts(each)}
    return set()
