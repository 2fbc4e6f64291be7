"""JSON Schema 2020-12 in other dialects, keyword by keyword."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field, create_model

from bridge.catalogue.dialects import draft_07, ecma_pattern, openapi, standard
from bridge.catalogue.evolution import compare
from bridge.catalogue.load import Catalogue
from bridge.event import EventData

HERE = "#/components/schemas/"


@pytest.mark.contract("2.67")
@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "#/$defs/A"}, {"$ref": HERE + "A"}),
        ({"$ref": "#/$defs/A", "title": "x"}, {"title": "x", "allOf": [{"$ref": HERE + "A"}]}),
        (
            {"prefixItems": [{"$ref": "#/$defs/A"}], "items": False, "minItems": 1},
            {"items": [{"$ref": HERE + "A"}], "additionalItems": False, "minItems": 1},
        ),
        ({"prefixItems": [{}]}, {"items": [{}]}),
        ({"items": False}, {"items": {"not": {}}}),
        ({"$defs": {"A": {"prefixItems": [True]}}}, {"definitions": {"A": {"items": [True]}}}),
        (
            {"dependentRequired": {"a": ["b"]}, "dependentSchemas": {"c": {"$ref": "#/$defs/A"}}},
            {"dependencies": {"a": ["b"], "c": {"$ref": HERE + "A"}}},
        ),
        ({"unevaluatedProperties": False}, {"additionalProperties": False}),
        ({"anyOf": [True], "unevaluatedProperties": False}, {"anyOf": [True]}),
        ({"contains": {}, "minContains": 0}, {}),
        ({"contains": {}, "minContains": 2, "maxContains": 3}, {"contains": {}}),
        ({"oneOf": [True], "discriminator": {"propertyName": "k", "mapping": {"a": "#/$defs/A"}}},
         {"oneOf": [True], "discriminator": "k"}),
        ({"const": {"$ref": "#/$defs/A", "prefixItems": []}}, {"const": {"$ref": "#/$defs/A", "prefixItems": []}}),
        ({"properties": {"prefixItems": {"type": "string"}}}, {"properties": {"prefixItems": {"type": "string"}}}),
        ({"properties": {"$ref": {"type": "string"}}},
         {"properties": {}, "patternProperties": {r"^\$ref$": {"type": "string"}}}),
    ],
)  # fmt: skip
def test_draft_07(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert draft_07(schema, HERE) == expected


@pytest.mark.contract("2.63")
def test_openapi_keeps_a_discriminator_and_moves_its_mapping() -> None:
    mapping = {"a": "#/$defs/A", "b": {"oneOf": []}}
    union = {"oneOf": [], "discriminator": {"propertyName": "k", "mapping": mapping}}
    expected = {"oneOf": [], "discriminator": {"propertyName": "k", "mapping": {"a": HERE + "A"}}}
    assert openapi(union, HERE) == expected
    assert standard({"items": union}) == {"items": {"oneOf": []}}


@pytest.mark.contract("2.64")
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^\d+(?:a|b){2,3}$", r"^\d+(?:a|b){2,3}$"),
        (r"\A(?P<x>a)(?P=x)\z", r"^(a)(?:\1)$"),
        (r"a\-\@[\w\-\.]", r"a-@[\w\-\.]"),
        ("[]a][^]]", r"[\]a][^\]]"),
        (r"\x41\u{1F600}\pL", r"\u0041" "\U0001f600" r"\p{L}"),
        ("}a{", r"\}a\{"),
        ("(a)(?<y>b)(?P=z)", None),
        ("(?i)a", None),
        ("a++", None),
        ("[a&&b]", None),
        (r"\h", None),
        ("[a", None),
        ("a\\", None),
    ],
)
def test_patterns_in_the_syntax_of_javascript(pattern: str, expected: str | None) -> None:
    assert ecma_pattern(pattern) == expected
    written = standard({"type": "string", "pattern": pattern})
    assert written.get("pattern") == expected
    assert ("$comment" in written) == (expected is None)


@pytest.mark.parametrize("new", ["(?i)b", "a"])
def test_schemas_diff_sees_a_pattern_that_is_left_out(new: str) -> None:
    def export(pattern: str) -> dict[str, Any]:
        member: Any = Annotated[str, Field(pattern=pattern)]
        model: Any = create_model("M", __base__=EventData, __cls_kwargs__={"type": "test.pattern"}, text=(member, ...))
        return {"test.pattern": Catalogue({"test.pattern": model}).json_schema("test.pattern")}

    assert compare(export("(?i)a"), export("(?i)a")) == []
    assert "cannot tell" in {change.verdict for change in compare(export("(?i)a"), export(new))}
