"""An export says more than JSON Schema can: it shows each difference between two models."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
    field_validator,
)
from pydantic.json_schema import SkipJsonSchema

from bridge.catalogue import facts
from bridge.catalogue.evolution import MARK, RECEIVED
from bridge.catalogue.facts import describe

Hidden = Annotated[None, SkipJsonSchema()]


def model(annotation: Any, default: Any = ..., /, **config: Any) -> type[BaseModel]:
    namespace = {"__annotations__": {"x": annotation}, "__module__": __name__, "model_config": config}
    return type("Model", (BaseModel,), namespace if default is ... else {**namespace, "x": default})


def found(schema: Any) -> list[dict[str, Any]]:
    """All facts of an export."""
    if isinstance(schema, list):
        return [fact for part in schema for fact in found(part)]
    if not isinstance(schema, dict):
        return []
    comment = str(schema.get("$comment", ""))
    own = [json.loads(comment.partition(MARK)[2])] if MARK in comment else []
    return own + [fact for name, part in schema.items() if name != "$comment" for fact in found(part)]


def text(kind: type[BaseModel]) -> str:
    return json.dumps(describe(kind), sort_keys=True)


def first(value: str) -> str:
    return value + "1"


def second(value: str) -> str:
    return value + "2"


class Loud(Enum):
    A = "a"


class Lenient(Enum):
    A = "a"

    @classmethod
    def _missing_(cls, value: object) -> Lenient:
        return cls.A


class Number(IntEnum):
    ONE = 1


class Late(BaseModel):
    x: str

    def model_post_init(self, _: Any) -> None:
        assert self.x


class OnTime(BaseModel):
    x: str

    @field_validator("x")
    @classmethod
    def check(cls, value: str) -> str:
        return value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (model(int), model(int, strict=True)),
        (model(datetime), model(AwareDatetime)),
        (model(str), model(str, str_strip_whitespace=True)),
        (model(str), model(str, str_to_lower=True)),
        (model(str), model(str, str_to_upper=True)),
        (model(str), model(str, str_min_length=3)),
        (model(str), model(str, str_max_length=3)),
        (model(str), model(str, coerce_numbers_to_str=True)),
        (model(str), model(Annotated[str, AfterValidator(first)])),
        (model(Annotated[str, AfterValidator(first)]), model(Annotated[str, AfterValidator(second)])),
        (model(Annotated[str, AfterValidator(first)]), model(Annotated[str, BeforeValidator(first)])),
        (model(Annotated[str, AfterValidator(functools.partial(first))]), model(Annotated[str, AfterValidator(first)])),
        (
            model(Annotated[str, StringConstraints(pattern="^a$")]),
            model(Annotated[str, StringConstraints(pattern="a")]),
        ),
        (model(Loud), model(Lenient)),
        (model(Number), model(Literal[1])),
        (model(dict[str, int]), model(dict[Annotated[str, Field(min_length=2)], int])),
        (model(dict[str, int]), model(dict[int, int])),
        (model(str, Field(alias="y")), model(str, Field(validation_alias=AliasChoices("y", "z"), alias="y"))),
        (model(str, Field(alias="y")), model(str, Field(alias="y"), populate_by_name=True)),
        (model(str), model(Annotated[str, WithJsonSchema({"type": "string", "maxLength": 1})])),
        (model(str | None, None), model(str | Hidden, None)),
        (model(Decimal), model(Annotated[Decimal, Field(decimal_places=2)])),
        (model(set[int]), model(list[int])),
        (Late, model(str)),
        (OnTime, model(str)),
        (model(datetime, ser_json_timedelta="iso8601"), model(datetime, ser_json_timedelta="float")),
    ],
)
def test_two_models_that_differ_have_different_exports(one: type[BaseModel], other: type[BaseModel]) -> None:
    first, second = (text(each).replace(each.__name__, "Model") for each in (one, other))
    assert first != second


@pytest.mark.parametrize(
    "annotation", [int, str, bool, float, list[int], dict[str, int], datetime, str | None, Literal["a"]]
)
def test_a_plain_field_has_no_facts(annotation: Any) -> None:
    assert found(describe(model(annotation))) == []


def test_an_export_says_what_a_page_receives() -> None:
    received = describe(model(Annotated[int, PlainSerializer(str, return_type=str)]))["$defs"][RECEIVED]
    assert received["properties"]["x"]["type"] == "string"


def test_the_same_code_has_the_same_digest_wherever_it_is() -> None:
    def first(value: str) -> str:
        # A comment is not a difference.
        return value + "1"

    assert facts._digest(first) == facts._digest(globals()["first"])
    assert facts._digest(first) != facts._digest(second)


def test_a_constant_that_code_uses_is_a_part_of_it() -> None:
    def made(limit: int) -> Any:
        return lambda value: value < limit

    assert facts._digest(made(1)) != facts._digest(made(2))
    assert facts._digest(made(1)) == facts._digest(made(1))


def test_code_without_a_text_is_compared_by_its_instructions() -> None:
    spaces: list[dict[str, Any]] = [{"__name__": __name__} for _ in range(3)]
    for space, body in zip(spaces, ("value + 1", "value + 1", "value + 2"), strict=True):
        exec(f"def made(value): return {body}", space)
    one, same, other = (facts._digest(space["made"]) for space in spaces)
    assert one == same != other


class Callable:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, value: int) -> bool:
        return value < self.limit


def test_an_object_that_is_called_is_compared_by_its_contents() -> None:
    assert facts._digest(Callable(1)) == facts._digest(Callable(1)) != facts._digest(Callable(2))


@pytest.mark.parametrize(
    ("value", "canonical"),
    [
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset("ba"), ["a", "b"]),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
        ({"type": "str", "metadata": 1, "ref": "r", "serialization": 1}, {"type": "str"}),
        (Loud.A, "a"),
        ((1, (2,)), [1, [2]]),
        (Decimal("1.50"), "1.50"),
        (int, "int"),
        (object(), ["object", None]),
    ],
)
def test_a_value_is_the_same_in_every_process(value: Any, canonical: Any) -> None:
    assert facts._canonical(value) == canonical


def test_a_value_that_holds_itself_ends() -> None:
    value: list[Any] = []
    value.append(value)
    assert "..." in json.dumps(facts._canonical(value))


def test_a_long_fact_is_a_digest() -> None:
    assert facts._short("x" * 10) == "x" * 10
    assert len(facts._short("x" * 1000)) == 12


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": [1]}, {"a": [2]}, {"a": [1, 2]}),
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": 1}, {"a": 1}, {"a": 1}),
        ({"a": 1}, {"a": 2}, {"a": [1, 2]}),
    ],
)
def test_the_facts_of_two_nodes_that_become_one(
    one: dict[str, Any], other: dict[str, Any], both: dict[str, Any]
) -> None:
    assert facts._merged(one, other) == both
