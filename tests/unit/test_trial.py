"""A sample fits the schema that it was made for, if a sample can be guessed at all."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from bridge.trial import MAX_SAMPLES, samples


class Node(BaseModel):
    value: int
    next: Node | None = None
    children: list[Node] = []


@pytest.mark.parametrize(
    "kind",
    [
        str, int, float, bool, None, bytes, list[int], set[str], tuple[int, str], dict[str, float], Node, Any,
        Literal["a", "b"], Literal["a"] | None, int | str | None,
        Annotated[int, Field(gt=5, lt=7)], Annotated[float, Field(gt=5, lt=6)], Annotated[int, Field(le=-3)],
        Annotated[int, Field(multiple_of=7, gt=7)], Annotated[str, Field(min_length=9, max_length=9)],
        Annotated[str, Field(max_length=2)], Annotated[list[int], Field(min_length=3)],
        Annotated[str, Field(pattern="^[0-9]+$", examples=["42"])],
    ],
)  # fmt: skip
def test_each_sample_fits(kind: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    made = list(samples(adapter.json_schema(mode="validation")))
    assert made
    for sample in made:
        adapter.validate_json(json.dumps(sample))


class Many(BaseModel):
    required: int
    one: int | str | None = None
    other: Literal["a", "b", "c"] = "a"


def test_members_are_left_out_given_and_each_option_is_tried() -> None:
    made = list(samples(Many.model_json_schema()))
    assert made[0] == {"required": 1}
    assert {"required": 1, "one": 1, "other": "a"} in made
    assert [sample["one"] for sample in made[1:]].count("text") == 1
    assert {sample["other"] for sample in made[1:]} == {"a", "b", "c"}


def test_the_number_of_samples_is_limited() -> None:
    wide = {f"m{n}": {"anyOf": [{"type": "string"}, {"type": "null"}]} for n in range(100)}
    assert len(list(samples({"type": "object", "properties": wide}))) == MAX_SAMPLES


def test_a_schema_that_cannot_be_guessed_has_no_sample() -> None:
    endless = {
        "$ref": "#/$defs/A",
        "$defs": {"A": {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/A"}}}},
    }
    assert list(samples(endless)) == []
    assert list(samples({"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 2})) == []
