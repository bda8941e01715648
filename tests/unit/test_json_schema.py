"""Command data against JSON Schemas that come from outside."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from federation_server.domain.json_schema import MAX_VIOLATIONS, schema_violations, violations

Schema = dict[str, Any]

TASK: Schema = {
    "type": "object",
    "properties": {
        "source": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2},
        "limit": {"type": "integer", "minimum": 1},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "mode": {"enum": ["fast", "slow"]},
        "a b": {"$ref": "#/$defs/count"},
    },
    "required": ["source"],
    "additionalProperties": False,
    "$defs": {"count": {"type": "number", "exclusiveMinimum": 0}},
}


def found(schema: Mapping[str, Any], data: Any) -> dict[str, str]:
    return {v.field: v.description for v in violations(schema, data, "command.data")}


@pytest.mark.parametrize(
    "data",
    [
        {"source": "ab"},
        {"source": "ab", "limit": 1, "tags": [], "mode": "fast", "a b": 0.5},
        {"source": "ab", "limit": 1.0, "tags": ["a", "b"]},
    ],
)
def test_data_that_fits_has_no_violations(data: Any) -> None:
    assert schema_violations(TASK, "s") == []
    assert found(TASK, data) == {}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, {"command.data.source": "is required"}),
        ({"source": 1}, {"command.data.source": "must be of type string"}),
        ({"source": "a"}, {"command.data.source": "breaks minLength 2; it has 1"}),
        ({"source": "aB"}, {"command.data.source": "does not match ^[a-z]+$"}),
        ({"source": "ab", "limit": 0}, {"command.data.limit": "breaks minimum 1; it is 0"}),
        ({"source": "ab", "extra": 0}, {"command.data.extra": "is not known"}),
        ({"source": "ab", "tags": ["a", 1]}, {"command.data.tags[1]": "must be of type string"}),
        ({"source": "ab", "tags": ["a", "a"]}, {"command.data.tags": "has items that are alike"}),
        (
            {"source": "ab", "mode": "x"},
            {"command.data.mode": 'must be one of ["fast", "slow"]'},
        ),
        (
            {"source": "ab", "a b": 0},
            {'command.data["a b"]': "breaks exclusiveMinimum 0; it is 0"},
        ),
        (
            {"limit": "x", "mode": 1},
            {
                "command.data.source": "is required",
                "command.data.limit": "must be of type integer",
                "command.data.mode": 'must be one of ["fast", "slow"]',
            },
        ),
    ],
)
def test_each_part_that_does_not_fit_is_named_with_its_path(
    data: Any, expected: dict[str, str]
) -> None:
    assert found(TASK, data) == expected


BAD_SCHEMAS: list[tuple[dict[str, Any], str]] = [
    ({"type": "int"}, "s.type"),
    ({"type": []}, "s.type"),
    ({"properties": []}, "s.properties"),
    ({"properties": {"a": {"minimum": "1"}}}, "s.properties.a.minimum"),
    ({"properties": {"a": 1}}, "s.properties.a"),
    ({"items": [{}]}, "s.items"),
    ({"anyOf": []}, "s.anyOf"),
    ({"anyOf": [True, {"not": 0}]}, "s.anyOf[1].not"),
    ({"required": ["a", "a"]}, "s.required"),
    ({"required": "a"}, "s.required"),
    ({"minLength": -1}, "s.minLength"),
    ({"minLength": 1.5}, "s.minLength"),
    ({"maxItems": True}, "s.maxItems"),
    ({"multipleOf": 0}, "s.multipleOf"),
    ({"uniqueItems": 1}, "s.uniqueItems"),
    ({"enum": "a"}, "s.enum"),
    ({"dependentRequired": {"a": "b"}}, "s.dependentRequired"),
    ({"$ref": 1}, 's["$ref"]'),
    ({"title": 1}, "s.title"),
]


@pytest.mark.parametrize(("schema", "field"), BAD_SCHEMAS)
def test_what_the_metaschema_refuses_is_refused_and_named(
    schema: dict[str, Any], field: str
) -> None:
    with pytest.raises(SchemaError):
        Draft202012Validator.check_schema(schema)
    assert [v.field for v in schema_violations(schema, "s")] == [field]


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://e.example/s"},
        {"properties": {"type": {"type": ["string", "null"]}, "required": True}},
        {"prefixItems": [{"const": 1}], "items": False, "contains": {}, "minContains": 0},
        {"if": {}, "then": {}, "else": {}, "dependentSchemas": {"a": {}}, "x-own": {"type": 7}},
        {"$defs": {"a/b": {"$anchor": "here"}}, "anyOf": [{"$ref": "#/$defs/a~1b"}]},
        {"$defs": {"a": {"$anchor": "here"}}, "allOf": [{"$ref": "#here"}]},
        {"$ref": "#"},
    ],
)
def test_what_the_metaschema_takes_is_taken(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    assert schema_violations(schema, "s") == []


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"$ref": "https://e.example/schema"}, 's["$ref"]'),
        ({"$ref": "file:///etc/passwd"}, 's["$ref"]'),
        ({"$ref": "other.json#/a"}, 's["$ref"]'),
        ({"$ref": "#/$defs/none"}, 's["$ref"]'),
        ({"$ref": "#none"}, 's["$ref"]'),
        ({"items": {"$dynamicRef": "x"}}, 's.items["$dynamicRef"]'),
        ({"items": {"$id": "https://e.example/"}}, 's.items["$id"]'),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, 's["$schema"]'),
        ({"pattern": "("}, "s.pattern"),
        ({"pattern": "(?=a)"}, "s.pattern"),
        ({"pattern": "a" * 1025}, "s.pattern"),
        ({"patternProperties": {"(": {}}}, "s.patternProperties"),
        ({"unevaluatedProperties": False, "patternProperties": {}}, "s"),
    ],
)
def test_a_schema_that_could_not_be_checked_safely_is_refused(
    schema: dict[str, Any], field: str
) -> None:
    assert [v.field for v in schema_violations(schema, "s")] == [field]


def test_a_remote_reference_is_not_followed_even_if_it_was_stored() -> None:
    schema = {"$ref": "https://e.example/schema"}
    assert list(found(schema, {})) == ["command.data"]


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "(.*a){12}$"])
def test_no_pattern_takes_exponential_time(pattern: str) -> None:
    schema: Schema = {"properties": {"a": {"pattern": pattern}}}
    assert schema_violations(schema, "s") == []
    began = time.process_time()
    found(schema, {"a": "a" * 5_000 + "b"})
    assert time.process_time() - began < 5  # a backtracking engine would need years


def test_references_that_multiply_are_cut_off() -> None:
    doubling = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    schema: Schema = {"$defs": {**doubling, "d40": {}}, "$ref": "#/$defs/d0"}
    assert schema_violations(schema, "s") == []
    assert list(found(schema, {})) == ["command.data"]


def test_a_reference_to_itself_is_cut_off() -> None:
    assert list(found({"$ref": "#"}, {})) == ["command.data"]


def test_a_recursive_schema_that_follows_the_data_works() -> None:
    tree: Schema = {"properties": {"children": {"items": {"$ref": "#"}}, "n": {"type": "integer"}}}
    assert schema_violations(tree, "s") == []
    data = {"children": [{"n": 1}, {"children": [{"n": "x"}]}]}
    assert list(found(tree, data)) == ["command.data.children[1].children[0].n"]


def test_many_alike_items_are_found_in_one_pass() -> None:
    began = time.process_time()
    data: list[Any] = [{"n": i} for i in range(30_000)]
    assert found({"uniqueItems": True}, data) == {}
    assert time.process_time() - began < 5  # each with each would be 450 million comparisons


def test_patterns_decide_which_properties_are_known() -> None:
    schema = {"patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False}
    assert found(schema, {"x-a": "b"}) == {}
    assert found(schema, {"x-a": 1, "b": 1}) == {
        'command.data["x-a"]': "must be of type string",
        "command.data.b": "is not known",
    }


POINT: Schema = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "tags": {"items": {"type": "string"}}},
    "required": ["x"],
}


def kind(name: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"kind": {"const": name}, **properties},
        "required": ["kind", *properties],
    }


TEXT, NUMBER = {"type": "string"}, {"type": "number"}


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf"])
@pytest.mark.parametrize(
    ("branches", "value", "expected"),
    [
        ([POINT, {"type": "null"}], {"x": "1"}, {".x": "must be of type integer"}),
        ([{"type": "null"}, POINT], {}, {".x": "is required"}),
        (
            [POINT, {"type": "null"}],
            {"x": "1", "tags": ["a", 1]},
            {".x": "must be of type integer", ".tags[1]": "must be of type string"},
        ),
        ([{"$ref": "#/$defs/point"}, {"type": "null"}], {}, {".x": "is required"}),
        (
            [{"anyOf": [POINT, {"type": "array"}]}, {"type": "null"}],
            {"x": 0.5},
            {".x": "must be of type integer"},
        ),
        (
            [{"type": "integer", "minimum": 1}, {"type": "null"}],
            0,
            {"": "breaks minimum 1; it is 0"},
        ),
        (
            [kind("a", of=TEXT), kind("b", of=NUMBER)],
            {"kind": "b", "of": "x"},
            {".of": "must be of type number"},
        ),
    ],
)
def test_what_does_not_fit_the_likely_one_of_several_schemas_is_named_with_its_path(
    keyword: str, branches: list[Schema], value: Any, expected: dict[str, str]
) -> None:
    schema = {"properties": {"at": {keyword: branches}}, "$defs": {"point": POINT}}
    assert found(schema, {"at": value}) == {
        f"command.data.at{path}": text for path, text in expected.items()
    }


def test_a_value_of_a_type_that_none_of_several_schemas_takes_is_told_all_types() -> None:
    schema = {"anyOf": [POINT, {"oneOf": [TEXT, NUMBER]}, {"type": ["null", "number"]}]}
    assert found(schema, []) == {
        "command.data": "must be of type object or string or number or null"
    }


def test_no_field_is_blamed_where_two_schemas_are_as_likely() -> None:
    schema = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    assert list(found(schema, {})) == ["command.data"]


def test_no_more_violations_are_named_than_the_bound_also_inside_a_choice() -> None:
    schema: Schema = {"anyOf": [{"type": "array", "items": TEXT}, {"type": "null"}]}
    assert len(violations(schema, [0] * 1000, "data")) == MAX_VIOLATIONS


def test_a_description_is_short_whatever_the_data() -> None:
    schema = {"oneOf": [{"type": "string"}, {"type": "null"}]}
    (description,) = found(schema, {"a": "x" * 100_000}).values()
    assert len(description) <= 300
