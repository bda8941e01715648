"""What handlers return, made plain and measured: the size must be that of the real encoding."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_sdk.convert import from_struct, to_struct
from neuron_sdk.payload import (
    MAX_RESPONSE_BYTES,
    NotJson,
    TooLarge,
    _walk,
    as_response,
    clean_text,
    plain,
    tail_bytes,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=200),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text("aé\0x", max_size=9), inner)
    ),
    max_leaves=30,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=5))
def test_the_size_is_never_below_the_real_encoding_and_hardly_above(data: dict[str, Any]) -> None:
    try:
        walked, size = _walk(data, 32, "")
    except NotJson:
        return  # a lone surrogate
    real = to_struct(walked).ByteSize()
    assert real <= size <= real + 16


@given(json_values)
def test_what_was_made_plain_survives_the_wire(value: Any) -> None:
    answer = plain({"value": value}, max_bytes=10**9, max_depth=64)
    assert from_struct(to_struct(answer)) == answer


def test_integers_beyond_2_53_travel_as_strings() -> None:
    assert as_response({"a": 2**53, "b": 2**53 + 1, "c": -(2**70)}) == {
        "a": 2**53,
        "b": "9007199254740993",
        "c": str(-(2**70)),
    }


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Row:
    name: str
    when: datetime.date


class Shape(msgspec.Struct):
    sides: int


def test_the_usual_python_values_have_a_json_form() -> None:
    an_id = uuid.UUID(int=5)
    answer = as_response(
        {
            "row": Row("x", datetime.date(2026, 1, 2)),
            "shape": Shape(3),
            "color": Color.RED,
            "id": an_id,
            "set": {1},
            "tuple": (1, 2),
            5: "a number as a key",
        }
    )
    assert answer == {
        "row": {"name": "x", "when": "2026-01-02"},
        "shape": {"sides": 3},
        "color": "red",
        "id": str(an_id),
        "set": [1],
        "tuple": [1, 2],
        "5": "a number as a key",
    }


def test_pydantic_models_have_a_json_form() -> None:
    from pydantic import BaseModel

    class Model(BaseModel):
        when: datetime.date

    answer = as_response(Model(when=datetime.date(2026, 1, 2)))
    assert answer == {"when": "2026-01-02"}


@pytest.mark.parametrize(
    ("returned", "response"),
    [(None, {}), ({}, {}), (5, {"result": 5}), ([1], {"result": [1]}), ("x", {"result": "x"})],
)
def test_an_answer_becomes_an_object(returned: Any, response: dict[str, Any]) -> None:
    assert as_response(returned) == response


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), {"a": [float("inf")]}, _circle(), _deep(40), "\ud800", lambda: 1],
    ids=["object", "nan", "infinity", "circle", "deep", "surrogate", "function"],
)
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(NotJson):
        as_response(value)


def test_an_object_may_have_32_levels_and_no_more() -> None:
    as_response({"a": _deep(31)})
    with pytest.raises(NotJson, match="too deep"):
        as_response({"a": _deep(32)})


def test_more_than_a_mebibyte_is_too_large() -> None:
    as_response({"a": "x" * (MAX_RESPONSE_BYTES - 100)})
    with pytest.raises(TooLarge):
        as_response({"a": "x" * MAX_RESPONSE_BYTES})


def test_a_nul_is_replaced_because_databases_cannot_keep_it() -> None:
    assert as_response({"a\0": "b\0"}) == {"a\ufffd": "b\ufffd"}
    assert clean_text("a\0b", 10) == "a\ufffdb"


def test_text_is_cut_at_its_limit() -> None:
    assert clean_text("x" * 20, 10) == "x" * 9 + "…"


def test_a_tail_begins_at_a_whole_character() -> None:
    assert tail_bytes("é" * 10, 5) == "éé"
    assert tail_bytes("short", 100) == "short"
