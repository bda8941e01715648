"""Every kind of parameter as the federation sees it: its schema is one, and both sides agree."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NotRequired,
    Optional,
    TypedDict,
    TypeVar,
)

import msgspec
import pydantic
import pytest
from pydantic import BaseModel, Field

from federation_server.domain.json_schema import schema_violations, violations
from neuron_sdk import HandlerError, Neuron
from neuron_sdk.problems import InvalidData
from neuron_sdk.schema import Parameters, read_signature
from neuron_sdk.testing import run_command_sync

T = TypeVar("T")


class Mode(enum.Enum):
    FAST = "fast"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Tree:
    value: int
    children: list[Tree] = field(default_factory=list)


@dataclass
class Page(Generic[T]):
    items: list[T]


class Options(TypedDict):
    dry: bool
    name: NotRequired[str]


class Pair(NamedTuple):
    a: int
    b: str = "x"


class Source(msgspec.Struct):
    url: str
    retries: Annotated[int, msgspec.Meta(ge=0, le=5)] = 1


class Csv(msgspec.Struct, tag="csv"):
    path: str


class Sql(msgspec.Struct, tag="sql"):
    query: str


class Order(BaseModel):
    count: Annotated[int, Field(gt=0)]
    price: decimal.Decimal = decimal.Decimal("1.5")
    due: dt.datetime | None = None
    mode: Mode = Mode.FAST


class Folder(BaseModel):
    name: str
    folders: list[Folder] = []


class Box(BaseModel, Generic[T]):
    items: list[T]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Strict(BaseModel, strict=True):
    due: dt.datetime


@pydantic.dataclasses.dataclass
class Size:
    width: Annotated[int, Field(gt=0)]


@dataclass
class Mixed:
    order: Order
    share: Annotated[float, Field(le=1)] = 1.0


class Wrapped(msgspec.Struct):
    order: Order


def takes(hint: Any) -> Parameters:
    def handler(x: Any) -> None: ...

    handler.__annotations__ = {"x": hint}
    return read_signature(handler)


# A kind, data that is good, data that is bad, and the fields that are bad in it.
TYPES: list[tuple[Any, Any, Any, set[str]]] = [
    (int, 5, "5", {"x"}),
    (float, 5, "5", {"x"}),
    (bool, True, 1, {"x"}),
    (int | None, None, "5", {"x"}),
    (Optional[Mode], "fast", "slow", {"x"}),  # noqa: UP045 - as it is written
    (Mode, "fast", "slow", {"x"}),
    (Level, 1, 2, {"x"}),
    (Literal["a", 1, None], 1, "b", {"x"}),
    (dt.datetime, "2026-01-01T00:00:00Z", 5, {"x"}),
    (dt.date, "2026-01-01", 5, {"x"}),
    (dt.timedelta, "PT5S", [], {"x"}),
    (uuid.UUID, str(uuid.UUID(int=1)), 5, {"x"}),
    (decimal.Decimal, "1.5", [], {"x"}),
    (bytes, "aGk=", 5, {"x"}),
    (list[int], [1], [1, "2"], {"x[1]"}),
    (set[str], ["a"], [1], {"x[0]"}),
    (tuple[int, str], [1, "a"], [1, 2], {"x[1]"}),
    (tuple[int, ...], [1, 2], ["a"], {"x[0]"}),
    (dict[str, int], {"a": 1}, {"a": "1", "b": 2, "c": None}, {"x.a", "x.c"}),
    (dict[str, list[int]], {"a": [1]}, {"a": [1, ""]}, {"x.a[1]"}),
    (dict[int, str], {"1": "a"}, {"1": 5}, {"x.1"}),
    (
        Tree,
        {"value": 1, "children": [{"value": 2}]},
        {"value": 1, "children": [{}]},
        {"x.children[0].value"},
    ),
    (Page[int], {"items": [1]}, {"items": ["a"]}, {"x.items[0]"}),
    (Options, {"dry": True}, {"dry": "yes"}, {"x.dry"}),
    (Pair, [1, "b"], ["b"], {"x[0]"}),
    (Source, {"url": "u"}, {"url": "u", "retries": 9}, {"x.retries"}),
    (Csv | Sql, {"type": "csv", "path": "p"}, {"type": "xml"}, {"x.type"}),
    (str | int, 5, 1.5, {"x"}),
    (Annotated[int, msgspec.Meta(ge=1, le=5)], 5, 6, {"x"}),
    (Annotated[str, msgspec.Meta(pattern="^a+$")], "aa", "b", {"x"}),
    (Annotated[str, msgspec.Meta(pattern="^(?=a)a$")], "a", None, {"x"}),
    (Any, {"a": [None, 1.5]}, ..., set()),
    (
        Order,
        {"count": 1, "due": "2026-01-01T00:00:00Z"},
        {"count": 0, "mode": "slow"},
        {"x.count", "x.mode"},
    ),
    (Order | None, None, {"count": 0}, {"x.count"}),
    (list[Order], [{"count": 1}], [{"count": 1}, {"count": "x"}], {"x[1].count"}),
    (dict[str, Order], {"a": {"count": 1}}, {"a": {}}, {"x.a.count"}),
    (
        Folder,
        {"name": "a", "folders": [{"name": "b"}]},
        {"name": "a", "folders": [{}]},
        {"x.folders[0].name"},
    ),
    (Box[int], {"items": [1]}, {"items": ["a"]}, {"x.items[0]"}),
    (
        Annotated[Cat | Dog, Field(discriminator="kind")],
        {"kind": "cat", "lives": 7},
        {"kind": "cat"},
        {"x.cat.lives"},
    ),
    (Cat | Dog, {"kind": "dog", "name": "d"}, 5, {"x.Cat", "x.Dog"}),
    (Annotated[int, Field(gt=0)], 1, 0, {"x"}),
    (pydantic.HttpUrl, "http://a/", 5, {"x"}),
    (pydantic.RootModel[list[int]], [1], ["a"], {"x[0]"}),
    (Strict, {"due": "2026-01-01T00:00:00Z"}, {"due": 5}, {"x.due"}),
    (Size, {"width": 1}, {"width": 0}, {"x.width"}),
    (
        Mixed,
        {"order": {"count": 1}},
        {"order": {"count": 0}, "share": 2},
        {"x.order.count", "x.share"},
    ),
    (Wrapped, {"order": {"count": 1}}, {"order": {"count": 0}}, {"x.order"}),
]


@pytest.mark.parametrize(
    # A set's text is another one in each process.
    ("hint", "good", "bad", "fields"),
    TYPES,
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:40],
)
def test_the_federation_takes_each_kind_s_schema_and_agrees_on_data(
    hint: Any, good: Any, bad: Any, fields: set[str]
) -> None:
    parameters = takes(hint)
    schema = parameters.data_schema
    assert schema_violations(schema, "data_schema") == []
    assert violations(schema, {"x": good}, "data") == []
    parameters.convert({"x": good})
    if bad is ...:
        return
    assert violations(schema, {"x": bad}, "data") != []
    with pytest.raises(InvalidData) as caught:
        parameters.convert({"x": bad})
    assert {problem.field for problem in caught.value.problems} == fields


def test_every_bad_parameter_is_named_at_once() -> None:
    neuron = Neuron("n-1", type="worker")

    @neuron.command()
    def task(
        order: Order, rows: list[int], table: dict[str, int], name: str, limit: int = 1
    ) -> None: ...

    data = {"order": {"count": 0}, "rows": [1, "2"], "table": {"a": ""}, "limit": 1.5, "odd": 1}
    outcome = run_command_sync(neuron, "task", data)
    assert outcome.error is not None
    assert outcome.error.details is not None
    assert [each["field"] for each in outcome.error.details["violations"]] == [
        "limit",
        "name",
        "odd",
        "order.count",
        "rows[1]",
        "table.a",
    ]
    assert "name: is required; odd: is not a parameter" in outcome.error.message


def test_models_of_one_name_do_not_get_into_each_other_s_way() -> None:
    def local() -> tuple[type[BaseModel], type[BaseModel]]:
        class Inner(BaseModel):
            a: int

        class Outer(BaseModel):
            inner: Inner

        return Outer, Inner

    def other() -> type[BaseModel]:
        class Inner(BaseModel):
            b: str

        class Outer(BaseModel):
            inner: Inner

        return Outer

    def handler(x: Any, y: Any) -> None: ...

    handler.__annotations__ = {"x": local()[0], "y": other()}
    parameters = read_signature(handler)
    good = {"x": {"inner": {"a": 1}}, "y": {"inner": {"b": "c"}}}
    assert schema_violations(parameters.data_schema, "data_schema") == []
    assert violations(parameters.data_schema, good, "data") == []
    parameters.convert(good)


@pytest.mark.parametrize(
    ("hint", "remedy"),
    [
        (Annotated[list[Order], msgspec.Meta(max_length=3)], "use pydantic.Field"),
        (Order | Source, "pydantic cannot read"),
        (list[Callable[[], None]], "a dataclass"),
        (Annotated[Callable[[], None], Field()], "pydantic cannot read"),
    ],
    ids=["mixed", "struct", "callable", "callable of pydantic"],
)
def test_a_type_that_neither_can_read_is_a_mistake_when_the_neuron_is_built(
    hint: Any, remedy: str
) -> None:
    with pytest.raises(HandlerError, match=remedy) as caught:
        takes(hint)
    assert "'x'" in str(caught.value)


def test_a_handler_gets_what_it_has_asked_for() -> None:
    parameters = read_signature(_asks)
    values = parameters.convert(
        {"order": {"count": 2}, "sizes": [{"width": 3}], "tree": {"value": 1}, "mode": "fast"}
    )
    assert values == {
        "order": Order(count=2),
        "sizes": [Size(width=3)],
        "tree": Tree(1),
        "mode": Mode.FAST,
    }


def _asks(
    order: Order, sizes: list[Size], tree: Tree, mode: Mode, due: dt.date | None = None
) -> None: ...
