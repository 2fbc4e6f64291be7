"""Changes of a catalogue, and whether they break publishers or pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NotRequired, TypeVar

import jsonschema  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    AnyUrl,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    Json,
    PlainSerializer,
    RootModel,
    SecretStr,
    computed_field,
    create_model,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

from bridge.catalogue.evolution import compare
from bridge.catalogue.load import Catalogue
from bridge.cli import main
from bridge.event import EventData


class Inner(EventData):
    a: int


class InnerWithMore(EventData):
    a: int
    b: int


class Tree(EventData):
    leaf: str
    children: list[Tree]


def schemas(**members: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: value if isinstance(value, tuple) else (value, ...) for name, value in members.items()
    }
    model = create_model("Model", __base__=EventData, **fields)
    return {"job.done": Catalogue({"job.done": model}).json_schema("job.done")}


COMPATIBLE, PUBLISHERS, PAGES, UNKNOWN = "compatible", "breaks publishers", "breaks pages", "cannot tell"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]


class DogWithTail(BaseModel):
    kind: Literal["dog"]
    tail: int


class Fish(BaseModel):
    kind: Literal["fish"]


def tagged(*options: Any) -> Any:
    union = options[0]
    for option in options[1:]:
        union = union | option
    return Annotated[union, Field(discriminator="kind")]


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    items: list[Item]


class Names(RootModel[list[str]]): ...


class Numbers(RootModel[list[int]]): ...


class Leaf(BaseModel):
    leaf: str
    children: list[Leaf] = []


class LeafOfNumber(BaseModel):
    leaf: int
    children: list[LeafOfNumber] = []


class WithMissing(Enum):
    A = "a"

    @classmethod
    def _missing_(cls, value: object) -> WithMissing:
        return cls.A


class WithoutMissing(Enum):
    A = "a"


class OneMember(BaseModel):
    a: int


class Guarded(BaseModel):
    a: int

    def model_post_init(self, context: Any) -> None:
        assert self.a


@dataclass
class Guarding:
    a: int

    def __post_init__(self) -> None:
        assert self.a


class Whole(TypedDict):
    a: int


class Partly(TypedDict):
    a: NotRequired[int]


class Computed(BaseModel):
    a: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def b(self) -> int:
        return 2


def limited(**limits: Any) -> Any:
    return Field(**limits)


@pytest.mark.contract("3.14", "3.15", "3.16", "3.17", "3.19")
@pytest.mark.parametrize(
    ("old", "new", "verdict", "words"),
    [
        ({"x": str}, {"x": str, "y": (int, 0)}, COMPATIBLE, "data.y: a new member that may be left out"),
        ({"x": str}, {"x": str, "y": int}, PUBLISHERS, "data.y: a new member that must be given"),
        ({"x": str, "y": int}, {"x": str}, PAGES, "data.y: the member is gone"),
        ({"x": (str, "")}, {"x": str}, PUBLISHERS, "data.x: must now be given"),
        ({"x": str}, {"x": (str, "?")}, COMPATIBLE, "data.x: may now be left out; pages then read '?'"),
        ({"x": (str, "a")}, {"x": (str, "b")}, COMPATIBLE, "data.x: the default is 'b', was 'a'"),
        ({"x": (int, 1)}, {"x": (int, None)}, PAGES, "data.x: may now be None"),
        ({"x": str}, {"x": str | None}, PAGES, "data.x: may now be null, was always string"),
        ({"x": str | None}, {"x": str}, PUBLISHERS, "data.x: null is no longer accepted, only string"),
        ({"x": int}, {"x": float}, PAGES, "data.x: may now be number, was always integer"),
        ({"x": float}, {"x": int}, PUBLISHERS, "data.x: number is no longer accepted, only integer"),
        ({"x": bool}, {"x": int}, PUBLISHERS, "data.x: boolean is no longer accepted"),
        ({"x": Literal["a", "b"]}, {"x": Literal["a"]}, PUBLISHERS, "data.x: no longer accepts 'b'"),
        ({"x": Literal["a"]}, {"x": Literal["a", "b"]}, PAGES, "data.x: may now be 'b'"),
        ({"x": Literal[1]}, {"x": Literal[True]}, PAGES, "data.x: may now be True"),
        ({"x": Literal["a"]}, {"x": str}, PAGES, "data.x: may now be any string"),
        ({"x": str}, {"x": Literal["a"]}, PUBLISHERS, "data.x: must now be one of 'a'"),
        ({"x": str}, {"x": Annotated[str, limited(max_length=5)]}, PUBLISHERS, "largest length is now 5, was not"),
        # The old schema says to a page that no value is below 1.
        ({"x": Annotated[int, limited(ge=1)]}, {"x": Annotated[int, limited(ge=0)]}, PAGES, "value is now 0, was 1"),
        ({"x": Annotated[int, limited(ge=1)]}, {"x": Annotated[int, limited(ge=2)]}, PUBLISHERS, "value is now 2"),
        ({"x": Annotated[int, limited(le=1)]}, {"x": int}, PAGES, "largest value is no longer limited"),
        ({"x": Annotated[int, limited(multiple_of=2)]}, {"x": Annotated[int, limited(multiple_of=4)]}, PUBLISHERS,
         "must now be a multiple of 4"),
        ({"x": Annotated[str, limited(pattern="a")]}, {"x": Annotated[str, limited(pattern="b")]}, UNKNOWN,
         "must be 'b'"),
        ({"x": list[int]}, {"x": list[str]}, PUBLISHERS, "data.x, each item: integer is no longer accepted"),
        ({"x": Inner}, {"x": InnerWithMore}, PUBLISHERS, "data.x.b: a new member that must be given"),
        ({"x": Inner | None}, {"x": InnerWithMore | None}, PUBLISHERS, "data.x.b: a new member that must be given"),
        ({"x": dict[str, Inner]}, {"x": dict[str, InnerWithMore]}, PUBLISHERS, "data.x, each value.b: a new member"),
        ({"x": dict[int, int]}, {"x": dict[str, int]}, UNKNOWN, "does not express has changed (keys)"),
        ({"x": tagged(Cat, Dog)}, {"x": tagged(Cat, Dog, Fish)}, PAGES,
         "data.x: may now be Fish, was always Cat or Dog"),
        ({"x": tagged(Cat, Dog, Fish)}, {"x": tagged(Cat, Dog)}, PUBLISHERS, "data.x: Fish is no longer accepted"),
        ({"x": tagged(Cat, Dog)}, {"x": tagged(Cat, DogWithTail)}, PUBLISHERS,
         "data.x (Dog).tail: a new member that must"),
        ({"x": tagged(Cat, Dog)}, {"x": Cat | Dog}, COMPATIBLE, "need no longer be named by a discriminator"),
        ({"x": list[Cat | Dog]}, {"x": list[Cat | Dog | Fish]}, PAGES, "data.x, each item: may now be Fish"),
        ({"x": int | str}, {"x": list[int] | int | str}, PAGES, "data.x: may now be array"),
        ({"x": tuple[int, str]}, {"x": tuple[int, int]}, PUBLISHERS, "data.x, item 1: string is no longer accepted"),
        ({"x": tuple[int, str]}, {"x": tuple[int, str, int]}, PUBLISHERS, "data.x: the fewest items is now 3, was 2"),
        ({"x": tuple[int, ...]}, {"x": tuple[str, ...]}, PUBLISHERS,
         "data.x, each item: integer is no longer accepted"),
        ({"x": set[int]}, {"x": list[int]}, PAGES, "data.x: two items may now be equal"),
        ({"x": list[int]}, {"x": set[int]}, UNKNOWN, "the way that equal items are counted"),
        ({"x": datetime}, {"x": AwareDatetime}, PUBLISHERS, "data.x: must now have a UTC offset"),
        ({"x": AwareDatetime}, {"x": datetime}, PAGES, "data.x: need no longer have a UTC offset"),
        ({"x": datetime}, {"x": date}, PAGES, "the format is 'date' instead of 'date-time'"),
        ({"x": datetime}, {"x": str}, PUBLISHERS, "data.x: is no longer read as 'date-time': a number is refused"),
        ({"x": date}, {"x": Annotated[date, limited(ge=date(2026, 1, 1))]}, PUBLISHERS, "ge is now '2026-01-01'"),
        ({"x": Decimal}, {"x": Annotated[Decimal, limited(max_digits=3)]}, PUBLISHERS, "max_digits is now 3"),
        ({"x": Annotated[Decimal, limited(ge=2)]}, {"x": Annotated[Decimal, limited(ge=1)]}, COMPATIBLE, "ge is now"),
        ({"x": str}, {"x": SecretStr}, PAGES, "data.x: pages receive asterisks"),
        ({"x": str}, {"x": Json[int]}, UNKNOWN, "data.x: "),
        ({"x": Json[int]}, {"x": Json[str]}, PAGES, "data.x: may now be string"),
        ({"x": Page[int]}, {"x": Page[str]}, PUBLISHERS, "data.x.items, each item: integer is no longer accepted"),
        ({"x": Names}, {"x": Numbers}, PUBLISHERS, "data.x, each item: string is no longer accepted"),
        ({"x": Leaf}, {"x": LeafOfNumber}, PUBLISHERS, "data.x.leaf: string is no longer accepted"),
        ({"x": int}, {"x": Annotated[int, Field(strict=True)]}, PUBLISHERS, "data.x: is strict now"),
        ({"x": Annotated[int, Field(strict=True)]}, {"x": int}, COMPATIBLE, "data.x: is no longer strict"),
        ({"x": int}, {"x": Annotated[int, Field(exclude=True)]}, PAGES, "data.x: the member is gone"),
        ({"x": int}, {"x": Annotated[int, Field(exclude_if=bool)]}, PAGES, "data.x: may now be missing"),
        ({"x": int}, {"x": Annotated[int, Field(alias="y")]}, PUBLISHERS, "data.y: a new member that must be given"),
        ({"x": int}, {"x": Annotated[int, Field(serialization_alias="y")]}, PAGES, "data.x: the member is gone"),
        ({"x": int}, {"x": Annotated[int, Field(validation_alias=AliasChoices("x", "y"))]}, COMPATIBLE,
         "data.x: is accepted under the name y too"),
        ({"x": Annotated[int, Field(validation_alias=AliasChoices("x", "y"))]}, {"x": int}, PUBLISHERS,
         "data.x: is no longer accepted under the name y"),
        ({"x": int},
         {"y": Annotated[int, Field(validation_alias=AliasChoices("y", "x"), serialization_alias="x")]},
         COMPATIBLE, "data.x: is now named y; the old name is accepted too"),
        ({"x": str}, {"x": Annotated[str, AfterValidator(str.strip)]}, UNKNOWN, "the catalogue's own code"),
        ({"x": int}, {"x": Annotated[int, PlainSerializer(lambda value: str(value))]}, UNKNOWN, "writes it was added"),
        ({"x": int}, {"x": Annotated[int, PlainSerializer(lambda value: str(value), return_type=str)]}, PAGES,
         "data.x: may now be string, was always integer"),
        ({"x": WithMissing}, {"x": WithoutMissing}, UNKNOWN,
         "catalogue's own code that checks or writes it is gone"),
        ({"x": OneMember}, {"x": Guarded}, UNKNOWN, "catalogue's own code that checks or writes it was added"),
        ({"x": OneMember}, {"x": Guarding}, UNKNOWN, "catalogue's own code that checks or writes it was added"),
        ({"x": OneMember}, {"x": Computed}, COMPATIBLE, "data.x.b: a new member: pages receive it"),
        ({"x": Computed}, {"x": OneMember}, PAGES, "data.x.b: the member is gone"),
        ({"x": int | SkipJsonSchema[str]}, {"x": int}, UNKNOWN, "does not express has changed (hidden)"),
        ({"x": Annotated[str, Field(pattern=re.compile("a"))]},
         {"x": Annotated[str, Field(pattern=re.compile("a", re.IGNORECASE))]}, UNKNOWN, "has changed (flags)"),
        ({"x": Annotated[int, Field(validation_alias=AliasChoices("y", "x"))]}, {"x": str}, PUBLISHERS,
         "data.y: integer is no longer accepted, only string"),
        ({"x": int}, {"x": Annotated[int, Field(validation_alias=AliasPath("y", 0))]}, PUBLISHERS,
         "data.x: a new member that must be given"),
        ({"x": Whole}, {"x": Partly}, PAGES, "data.x.a: may now be missing"),
        ({"x": AnyUrl}, {"x": HttpUrl}, UNKNOWN, "does not express has changed (schema)"),
        ({"x": Literal["a"]}, {"x": Literal["a", "b"] | int}, PAGES, "data.x: may now be integer"),
        ({"x": dict[str, int]}, {"x": OneMember}, PUBLISHERS, "data.x.a: a new member that must be given"),
        ({"x": int}, {"x": Annotated[int, Field(json_schema_extra={"contains": 3})]}, UNKNOWN, "data.x: "),
    ],
)  # fmt: skip
def test_one_change(old: dict[str, Any], new: dict[str, Any], verdict: str, words: str) -> None:
    changes = compare(schemas(**old), schemas(**new))
    assert verdict in [change.verdict for change in changes if words in str(change)], changes
    if verdict == COMPATIBLE:
        assert {change.verdict for change in changes} == {COMPATIBLE}


@pytest.mark.parametrize(
    ("old", "new", "verdict", "words"),
    [
        ({}, {"extra": "forbid"}, PUBLISHERS, "data: a member that is not declared is refused now"),
        ({"extra": "forbid"}, {}, PAGES, "data: a member that is not declared is accepted now"),
        ({}, {"strict": True}, PUBLISHERS, "data.x: is strict now"),
        ({}, {"coerce_numbers_to_str": True}, COMPATIBLE, "data.y: a number is accepted too"),
        ({"coerce_numbers_to_str": True}, {}, PUBLISHERS, "data.y: a number, which was converted to text, is refused"),
        ({}, {"str_strip_whitespace": True}, COMPATIBLE, "data.y: the text is now changed by strip"),
        ({}, {"str_max_length": 3}, PUBLISHERS, "data.y: most is now 3, was None"),
        ({}, {"alias_generator": str.upper}, PUBLISHERS, "data.X: a new member that must be given"),
        ({}, {"ser_json_temporal": "seconds"}, UNKNOWN, "does not express has changed (config)"),
        ({}, {"title": "Another", "frozen": True, "from_attributes": True}, None, ""),
    ],
)
def test_one_setting_of_a_model(old: ConfigDict, new: ConfigDict, verdict: str | None, words: str) -> None:
    changes = compare(configured(old), configured(new))
    found = [change.verdict for change in changes if words in str(change)]
    assert verdict in found if verdict else not changes, changes


def configured(config: ConfigDict) -> dict[str, Any]:
    class Model(EventData):
        model_config = config
        x: int
        y: str

    return {"job.done": Catalogue({"job.done": Model}).json_schema("job.done")}


def test_a_type_that_is_added_or_removed() -> None:
    one, both = schemas(x=str), {**schemas(x=str), "job.new": schemas(x=str)["job.done"]}
    assert [(change.verdict, str(change)) for change in compare(one, both)] == [(COMPATIBLE, "job.new: a new type")]
    assert [change.verdict for change in compare(both, one)] == [PUBLISHERS]


def halved(value: int) -> int:
    return value // FACTOR


FACTOR = 2


def checked(value: Any) -> Any:
    return halved(value)


class Checked(EventData):
    x: Annotated[int, BeforeValidator(checked)]
    y: Annotated[set[Literal["c", "b", "a"]], Field(default={"a", "b", "c"})]

    @model_validator(mode="after")
    def whole(self) -> Checked:
        return self


@pytest.mark.parametrize(
    "members",
    [
        {"x": Tree},
        {"x": list[Tree], "y": dict[str, int], "z": (Any, None)},
        {"x": Checked, "y": SecretStr, "z": tagged(Cat, Dog)},
    ],
)
def test_two_equal_schemas_have_no_change_and_a_recursive_one_ends(members: dict[str, Any]) -> None:
    assert compare(schemas(**members), schemas(**members)) == []


def test_another_order_and_other_descriptions_are_not_a_change() -> None:
    old = schemas(x=Annotated[int, Field(description="one")], y=str, z=Cat | Dog | None)
    assert compare(old, schemas(z=None | Dog | Cat, y=str, x=Annotated[int, Field(title="two")])) == []


def test_another_process_writes_the_same() -> None:
    """The text does not depend on the order of sets, nor on the addresses of objects."""
    program = "import json, tests.unit.test_evolution as t; print(json.dumps(t.schemas(x=t.Checked)))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert compare(json.loads(texts.pop()), schemas(x=Checked)) == []


@pytest.mark.contract("3.20")
@pytest.mark.parametrize("change", ["FACTOR", "halved"])
def test_the_code_that_a_validator_uses_belongs_to_it(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = schemas(x=Checked)
    new_value: Any = 3 if change == "FACTOR" else (lambda value: value)
    monkeypatch.setattr(sys.modules[__name__], change, new_value)
    assert UNKNOWN in {each.verdict for each in compare(old, schemas(x=Checked))}


def test_a_change_under_a_teams_own_validator_cannot_be_judged() -> None:
    def model(inner: Any) -> dict[str, Any]:
        return schemas(x=Annotated[inner, AfterValidator(checked)])

    assert UNKNOWN in {change.verdict for change in compare(model(int), model(Annotated[int, Field(ge=3)]))}


def without_facts(value: Any) -> Any:
    """The export as an older bridge wrote it."""
    if isinstance(value, dict):
        return {name: without_facts(part) for name, part in value.items() if name not in ("$comment", ":received")}
    return [without_facts(part) for part in value] if isinstance(value, list) else value


@pytest.mark.contract("3.21")
def test_an_old_export_is_read_and_its_missing_facts_are_not_guessed() -> None:
    old = without_facts(schemas(x=str))
    assert [change.verdict for change in compare(old, schemas(x=str))] == [UNKNOWN]
    changes = compare(old, schemas(x=str, y=int))
    assert [change.verdict for change in changes] == [PUBLISHERS, UNKNOWN]
    assert "write it again" in str(changes[-1])


@pytest.mark.parametrize(
    "break_it",
    [
        lambda schema: schema["properties"]["x"].update({"$ref": "#/$defs/Nowhere"}),
        lambda schema: schema["properties"]["x"].update({"$comment": "bridge:{not json"}),
        lambda schema: schema.update({"properties": 3}),
        lambda schema: schema["properties"]["x"].update({"minimum": "one"}),
    ],
)
def test_a_change_of_a_broken_file_cannot_be_judged(break_it: Callable[[Any], None]) -> None:
    old, new = schemas(x=Annotated[int, Field(ge=1)]), schemas(x=Annotated[int, Field(ge=1)])
    break_it(new["job.done"])
    assert {change.verdict for change in compare(old, new)} == {UNKNOWN}


@pytest.mark.contract("2.63", "3.11", "3.12")
def test_an_export_is_a_schema_for_other_programs_too() -> None:
    schema = schemas(x=tagged(Cat, Dog), y=Leaf, z=AwareDatetime)["job.done"]
    jsonschema.Draft202012Validator.check_schema(schema)
    data = {"x": {"kind": "cat", "lives": 9}, "y": {"leaf": "a"}, "z": "2026-01-31T12:00:00Z"}
    jsonschema.validate(data, schema)
    received = {"$ref": "#/$defs/:received", "$defs": schema["$defs"]}
    with pytest.raises(jsonschema.ValidationError, match="'children' is a required property"):
        jsonschema.validate(data, received)
    jsonschema.validate({**data, "y": {"leaf": "a", "children": []}}, received)


@pytest.mark.contract("3.13", "3.14", "3.16", "3.17")
@pytest.mark.parametrize(
    ("new", "exit_code", "output"),
    [
        ({"x": str}, 0, "no change\n"),
        ({"x": str, "y": (int, 0)}, 0, "compatible        job.done data.y: a new member that may be left out\n"),
        ({"x": str | None}, 1, "breaks pages      job.done data.x: may now be null, was always string\n"),
        ({"x": Annotated[str, Field(json_schema_extra={"not": {}})]}, 1, "cannot tell       job.done data.x: "),
    ],
)
def test_the_command(new: dict[str, Any], exit_code: int, output: str, tmp_path: Path) -> None:
    files = tmp_path / "old.json", tmp_path / "new.json"
    for file, members in zip(files, ({"x": str}, new), strict=True):
        file.write_text(json.dumps(schemas(**members)))
    result = CliRunner().invoke(main, ["schemas", "diff", *map(str, files)])
    assert result.exit_code == exit_code, result.output
    assert output in result.output
