"""A handler's signature: what is advertised, what is converted, and what is a mistake."""

from __future__ import annotations

import datetime
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

import jsonschema
import msgspec
import pytest
from pydantic import BaseModel

from neuron_sdk import CommandContext, HandlerError, Neuron
from neuron_sdk.commands import make_command
from neuron_sdk.problems import InvalidData
from neuron_sdk.schema import read_signature

if TYPE_CHECKING:
    from decimal import Decimal


class Mode(enum.Enum):
    FAST = "fast"
    SAFE = "safe"


@dataclass
class Point:
    x: int
    y: float = 1.0


class Options(TypedDict):
    dry: NotRequired[bool]


class Source(msgspec.Struct):
    url: str


class Inner(BaseModel):
    q: int


class Model(BaseModel):
    inner: Inner


async def everything(  # noqa: PLR0917 - one of each kind
    ctx: CommandContext,
    text: str,
    point: Point,
    model: Model,
    source: Source,
    mode: Mode,
    rows: list[int],
    table: dict[str, float],
    anything: Any,
    options: Options,
    level: Literal["low", "high"] = "low",
    note: str | None = None,
    limit: int = 100,
) -> None:
    """Do it all.

    At length.
    """


GOOD: dict[str, Any] = {
    "text": "t",
    "point": {"x": 1},
    "model": {"inner": {"q": 2}},
    "source": {"url": "u"},
    "mode": "fast",
    "rows": [1, 2],
    "table": {"a": 1},
    "anything": {"b": [None]},
    "options": {"dry": True},
}


def test_data_becomes_the_types_of_the_signature() -> None:
    values = read_signature(everything).convert(GOOD)
    assert values == {
        **GOOD,
        "point": Point(1, 1.0),
        "model": Model(inner=Inner(q=2)),
        "source": Source("u"),
        "mode": Mode.FAST,
    }
    assert isinstance(values["table"]["a"], float)


def test_the_schema_takes_what_the_conversion_takes() -> None:
    schema = read_signature(everything).data_schema
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(GOOD)
    for field, wrong in [
        ("text", 5),
        ("point", {"x": "1"}),
        ("model", {"inner": {}}),
        ("mode", "slow"),
        ("rows", ["1"]),
        ("limit", 1.5),
        ("unknown", 1),
        ("level", "middle"),
    ]:
        bad = {**GOOD, field: wrong}
        assert not validator.is_valid(bad), field
        with pytest.raises(InvalidData):
            read_signature(everything).convert(bad)


def test_a_schema_tells_defaults_and_what_is_required() -> None:
    schema = read_signature(everything).data_schema
    assert schema["properties"]["limit"] == {"type": "integer", "default": 100}
    assert schema["required"] == [name for name in GOOD]  # noqa: C416 - says what it compares
    assert schema["additionalProperties"] is False
    assert "ctx" not in schema["properties"]


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"text": 5}, "text", "expected str, got int"),
        ({"point": {"x": 1, "y": "z"}}, "point.y", "expected float, got str"),
        ({"rows": [1, "2"]}, "rows[1]", "expected int, got str"),
        ({"surprise": 1}, "surprise", "is not a parameter"),
        ({"source": {}}, "source.url", "is required"),
        ({"mode": "x"}, "mode", "invalid enum value"),
        ({"model": {"inner": {"q": "x"}}}, "model.inner.q", "valid integer"),
    ],
)
def test_bad_data_names_the_field(change: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InvalidData, match=problem.replace("[", r"\[")) as caught:
        read_signature(everything).convert({**GOOD, **change})
    assert [problem.field for problem in caught.value.problems] == [field]


def test_missing_data_names_the_field() -> None:
    with pytest.raises(InvalidData, match="text: is required") as caught:
        read_signature(everything).convert({})
    assert {p.field for p in caught.value.problems} == set(GOOD), "each one"


def test_a_default_that_json_cannot_say_still_applies() -> None:
    marker = object()

    def handler(x: Any = marker, many: list[int] = [1]) -> None: ...  # noqa: B006 - never changed

    parameters = read_signature(handler)
    assert parameters.convert({}) == {}
    assert "default" not in parameters.data_schema["properties"]["x"]
    assert parameters.data_schema["properties"]["many"]["default"] == [1]


def test_the_context_is_optional_and_may_stand_anywhere() -> None:
    def without(x: int) -> None: ...
    def last(x: int, context: CommandContext) -> None: ...
    def untyped(ctx, x: int) -> None: ...  # type: ignore[no-untyped-def]

    assert read_signature(without).context_name is None
    assert read_signature(last).context_name == "context"
    assert read_signature(untyped).context_name == "ctx"


def _star(*rows: int) -> None: ...
def _double_star(**rows: int) -> None: ...
def _bare(x) -> None: ...  # type: ignore[no-untyped-def]
def _positional(x: int, /) -> None: ...
def _two(a: CommandContext, b: CommandContext) -> None: ...
def _stranger(x: pytest.MonkeyPatch) -> None: ...
def _hidden(x: Decimal) -> None: ...
def _generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("handler", "remedy"),
    [
        (_star, "name each parameter"),
        (_double_star, "name each parameter"),
        (_bare, "`x: str`"),
        (_positional, "remove the `/`"),
        (_two, "keep one"),
        (_stranger, "a dataclass"),
        (_hidden, "outside of `if TYPE_CHECKING`"),
        (_generator, "ctx.progress"),
    ],
)
def test_a_mistake_in_a_signature_shows_when_the_neuron_is_built(handler: Any, remedy: str) -> None:
    neuron = Neuron("n-1", type="worker")
    with pytest.raises(HandlerError) as caught:
        neuron.command("task")(handler)
    assert handler.__name__ in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["Bad", "", "9", "a b", "x" * 129])
def test_a_bad_command_name_is_refused(name: str) -> None:
    with pytest.raises(HandlerError, match="command's type"):
        Neuron("n-1", type="worker").command(name)(everything)


def test_two_handlers_cannot_have_one_command() -> None:
    neuron = Neuron("n-1", type="worker")
    neuron.command("task")(everything)
    with pytest.raises(HandlerError, match="has a handler already"):
        neuron.command("task")(everything)


def test_a_built_in_is_replaced_only_on_purpose() -> None:
    neuron = Neuron("n-1", type="worker")
    with pytest.raises(HandlerError, match="replace=True"):
        neuron.command("stop")(everything)
    neuron.command("stop", replace=True)(everything)
    command = neuron.commands.get("stop")
    assert command is not None
    assert command.handler is everything


def test_the_decorator_leaves_the_function_as_it_was() -> None:
    assert Neuron("n-1", type="worker").command("task")(everything) is everything


def test_name_and_description_come_from_the_function() -> None:
    command = make_command(everything)
    assert (command.type, command.description) == ("everything", "Do it all.")
    assert command.is_coroutine


def test_an_isolated_handler_must_be_importable() -> None:
    def local() -> None: ...

    with pytest.raises(HandlerError, match="module level"):
        make_command(local, isolation="process")
    make_command(everything, isolation="process")


def test_every_built_in_command_is_a_control_command() -> None:
    built_in = {c.type: c for c in Neuron("n-1", type="worker").commands}
    assert set(built_in) == {
        "health_check",
        "config_update",
        "restart",
        "restart_worker",
        "stop",
        "pause",
        "resume",
    }
    for command in built_in.values():
        assert command.control
        assert command.description
        jsonschema.Draft202012Validator.check_schema(command.parameters.data_schema)


class _Checked(msgspec.Struct):
    number: int

    def __post_init__(self) -> None:
        raise ValueError("anything may happen here")


@pytest.mark.parametrize(
    ("hint", "standard"),
    [
        (str, True),
        (list[dict[str, int | None]], True),
        (datetime.datetime, True),
        (Literal["a", "b"], True),
        (Annotated[int, msgspec.Meta(ge=1)], True),
        (_Checked, False),
        (list[_Checked], False),
        (Annotated[list[_Checked], msgspec.Meta(max_length=2)], False),
    ],
)
def test_parameters_are_standard_if_no_code_of_the_services_makes_them(
    hint: Any, standard: bool
) -> None:
    def handler(value: Any) -> None:
        del value

    handler.__annotations__["value"] = hint
    assert read_signature(handler).standard is standard
