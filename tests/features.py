"""A catalogue that uses all of pydantic's common features, with test data for each model.

`VALID` and `INVALID` are data as a publisher writes it. The tests check with pydantic itself that they are so.
"""

# ruff: noqa: RUF012 - pydantic copies a default.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypeAlias, TypeVar
from uuid import UUID

from pydantic import (
    AliasChoices,
    AnyUrl,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    HttpUrl,
    Json,
    PlainSerializer,
    RootModel,
    StringConstraints,
    Tag,
    computed_field,
)
from pydantic.alias_generators import to_camel
from pydantic.networks import IPvAnyAddress
from typing_extensions import TypeAliasType, TypedDict

from bridge.catalogue.load import Catalogue
from bridge.event import EventData
from tests import features_elsewhere

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    QUOTED = 'a "quoted" \\ one'


class Level(IntEnum):
    LOW = 1
    HIGH = -2


class Scalars(EventData, type="test.scalars"):
    """All plain values. */ alert(`1`) /* ${x} \u2028 "é" 日本"""

    text: str
    number: int
    ratio: float
    flag: bool
    nothing: None
    optional: int | None = None
    literal: Literal["a", 'b"', 3, True, None]
    one: Literal["only"] = "only"
    colour: Colour
    level: Level
    amount: Decimal
    price: Annotated[Decimal, Field(max_digits=6, decimal_places=2, ge=0)] = Decimal("1.50")
    identity: UUID
    day: date
    at: time
    lasted: timedelta
    moment: AwareDatetime
    local: datetime
    raw: bytes
    anything: Any = None
    url: AnyUrl
    page: HttpUrl
    address: IPv4Address
    any_address: IPvAnyAddress
    network: IPv6Network
    place: Path
    name: Annotated[str, StringConstraints(min_length=1, max_length=5, pattern=r"^[a-z\-]+\-?$")] = "abc"
    shout: Annotated[str, Field(pattern=r"^(?i)[a-z]+$")] = "ABC"
    handle: Annotated[str, Field(pattern=r"\A(?P<at>\@)\w+\z")] = "@me"
    share: Annotated[float, Field(gt=0, lt=1, multiple_of=0.25)] = 0.5
    count: Annotated[int, Field(ge=0, le=10)] = 3
    described: Annotated[str, Field(description="Ends */ here, `ticks`, \u202e, 'q' and \"Q\"", examples=["*/"])] = "x"
    deprecated: Annotated[str, Field(deprecated=True, json_schema_extra={"readOnly": True})] = "x"


SCALARS: dict[str, Any] = {
    "text": "x",
    "number": 1,
    "ratio": 0.5,
    "flag": True,
    "nothing": None,
    "literal": 'b"',
    "colour": 'a "quoted" \\ one',
    "level": -2,
    "amount": "1.10",
    "identity": "0189c1f0-0000-7000-8000-000000000000",
    "day": "2026-01-31",
    "at": "12:30:00.5",
    "lasted": "PT3.5S",
    "moment": "2026-01-31T12:00:00Z",
    "local": "2026-01-31T12:00:00Z",
    "raw": "abc",
    "url": "https://example.com/a?b=c",
    "page": "https://example.com/",
    "address": "192.0.2.1",
    "any_address": "2001:db8::1",
    "network": "2001:db8::/32",
    "place": "/tmp/x",
}


class Node(BaseModel):
    name: str
    children: list[Node] = []
    parent: Node | None = None


class Tree(RootModel[dict[str, "Tree | int"]]):
    """A model that is a dict of itself."""


class Names(RootModel[list[str]]):
    pass


Nested: TypeAlias = "Json_ | None"
Json_ = TypeAliasType("Json_", "str | int | list[Json_] | dict[str, Json_]")


class Box(BaseModel, Generic[T]):
    content: T
    more: list[T] = []


class Position(NamedTuple):
    x: float
    y: float
    label: str | None = None


@dataclass
class Money:
    amount: int
    currency: str = "EUR"


class Options(TypedDict):
    size: int
    title: NotRequired[str]


class Partial(TypedDict, total=False):
    first: int


class Containers(EventData, type="test.containers"):
    items: list[int]
    nested: list[list[str | None]] = []
    pair: tuple[int, str] = (1, "")
    many: tuple[int, ...] = ()
    unpacked: tuple[int, Colour] = (1, Colour.RED)
    empty: tuple[()] = ()
    unique: set[str] = set()
    frozen: Annotated[frozenset[int], Field(min_length=1, max_length=3)] = frozenset({1})
    by_name: dict[str, float] = {}
    by_key: dict[Annotated[str, StringConstraints(pattern="^a")], int] = {}
    by_number: dict[int, str] = {}
    by_colour: dict[Colour, int] = {}
    by_literal: dict[Literal["a", "b"], int] = {}
    tree: Tree = Tree({})
    names: Names = Names([])
    node: Node | None = None
    json_like: Json_ = 1
    box: Box[int] = Box[int](content=1)
    box_of_boxes: Box[Box[str | None]] = Box[Box[str | None]](content=Box[str | None](content=None))
    position: Position = Position(1, 2)
    money: Money | None = None
    options: Options = {"size": 1}
    partial: Partial = {}
    either: int | list[int] | dict[str, int] | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"] = "dog"
    good: bool = True


class Bird(BaseModel):
    kind: Literal["bird"]
    size: Literal["big"]


class SmallBird(BaseModel):
    kind: Literal["bird"]
    size: Literal["small"]
    song: str


Birds = Annotated[Bird | SmallBird, Field(discriminator="size")]


class Circle(BaseModel):
    radius: float = 1


class Square(BaseModel):
    side: float = 1


def _shape(value: Any) -> str:
    return "square" if "side" in (value if isinstance(value, dict) else value.model_fields_set) else "circle"


class Unions(EventData, type="test.unions"):
    pet: Annotated[Cat | Dog, Field(discriminator="kind", description="A sibling of a union")]
    any_pet: Annotated[Cat | Dog | Birds, Field(discriminator="kind")] | None = None
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = []
    shape: Annotated[Annotated[Circle, Tag("circle")] | Annotated[Square, Tag("square")], Discriminator(_shape)] = (
        Circle()
    )
    plain: Circle | Square = Circle()
    described: Annotated[Cat | None, Field(description="A sibling of a reference")] = None
    only: Annotated[Cat, Field(description="A sibling of one reference", title="Only")]


class Same(BaseModel):
    """There is another class of this name."""

    here: int


class Record(BaseModel):
    value: int


class string(BaseModel):
    """The name of a type of TypeScript."""

    value: int


class CloudEvent(BaseModel):
    value: int


class delete(BaseModel):
    """A reserved word."""

    value: int


class Größe(BaseModel):
    value: int


class Naming(EventData, type="test.naming"):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    snake_case: int
    odd: Annotated[str, Field(alias='odd "name"')] = "x"
    ref: Annotated[str, Field(alias="$ref")] = "x"
    discriminator: dict[str, str] = {}
    const: str = "x"
    class_: Annotated[str, Field(alias="class")] = "x"
    proto: Annotated[str, Field(alias="__proto__")] = "x"
    umlaut: Annotated[str, Field(alias="größe")] = "x"
    either: Annotated[int, Field(validation_alias=AliasChoices("either", "or"), serialization_alias="either")] = 1
    same: Same
    other: features_elsewhere.Same
    record: Record = Record(value=1)
    text: string = string(value=1)
    event: CloudEvent = CloudEvent(value=1)
    gone: delete = delete(value=1)
    size: Größe = Größe(value=1)

    @computed_field(description="Ends */ here")  # type: ignore[prop-decorator]
    @property
    def twice_it(self) -> int:
        return self.snake_case * 2


class Written(EventData, type="test.written"):
    """Data that is serialized in another form than it is parsed."""

    parsed: Json[list[int]]
    hidden: Annotated[str, Field(exclude=True)] = "x"
    spoken: Annotated[int, PlainSerializer(lambda value: f"<{value}>")] = 1
    typed: Annotated[int, PlainSerializer(lambda value: str(value), return_type=str)] = 1
    sometimes: Annotated[int, Field(exclude_if=lambda value: value == 0)] = 0


class Nothing(EventData, type="test.nothing-at_all"):
    model_config = ConfigDict(extra="forbid")


CATALOGUE = Catalogue({model.event_type: model for model in (Scalars, Containers, Unions, Naming, Written, Nothing)})

_CONTAINERS: dict[str, Any] = {"items": [1]}
_UNIONS: dict[str, Any] = {"pet": {"kind": "dog"}, "only": {"kind": "cat", "lives": 9}}
_NAMING: dict[str, Any] = {"snakeCase": 1, "same": {"here": 1}, "other": {"elsewhere": "x"}}


def _each(usual: dict[str, Any], *others: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return ({**usual, **other} for other in others)


VALID: dict[str, list[dict[str, Any]]] = {
    "test.scalars": [
        SCALARS,
        *_each(
            SCALARS,
            {"optional": 3},
            {"literal": None},
            {"literal": 3},
            {"amount": 1.5},
            {"price": "12.25"},
            {"amount": "1E+3"},
            {"amount": "-.5"},
            {"name": "a-b"},
            {"at": "12:30"},
            {"at": "12:30:00+02:00"},
            {"lasted": "-P1DT2H"},
            {"lasted": "P3D"},
            {"handle": "@you"},
            {"anything": {"a": [1, None]}},
            {"any_address": "192.0.2.1"},
            {"share": 0.25},
            {"count": 10},
            {"shout": "aB"},
            {"unknown member": 1},
        ),
    ],
    "test.containers": [
        _CONTAINERS,
        *_each(
            _CONTAINERS,
            {"nested": [["a", None]]},
            {"pair": [2, "b"]},
            {"many": [1, 2, 3]},
            {"unique": ["a", "b"]},
            {"frozen": [1, 2]},
            {"by_name": {"a b": 1.5}},
            {"by_key": {"ab": 1}},
            {"by_number": {"1": "x"}},
            {"by_colour": {"red": 1}},
            {"by_literal": {"a": 1}},
            {"tree": {"a": {"b": 1}, "c": {}}},
            {"names": ["a"]},
            {"node": {"name": "a", "children": [{"name": "b"}], "parent": {"name": "c"}}},
            {"json_like": [1, "a", {"b": [2]}]},
            {"box_of_boxes": {"content": {"content": "x"}, "more": [{"content": None}]}},
            {"position": [1, 2]},
            {"position": [1, 2, "x"]},
            {"money": {"amount": 1}},
            {"options": {"size": 1, "title": "x"}},
            {"partial": {"first": 1}},
            {"either": {"a": 1}},
            {"either": [1]},
            {"empty": []},
        ),
    ],
    "test.unions": [
        _UNIONS,
        *_each(
            _UNIONS,
            {"pet": {"kind": "cat", "lives": 1}},
            {"pet": {"kind": "puppy", "good": False}},
            {"plain": {"side": 2}},
            {"any_pet": {"kind": "bird", "size": "small", "song": "x"}},
            {"pets": [{"kind": "dog"}, {"kind": "cat", "lives": 2}]},
            {"shape": {}},
            {"shape": {"side": 2}},
            {"described": {"kind": "cat", "lives": 1}},
            {"any_pet": None},
        ),
    ],
    "test.naming": [
        _NAMING,
        {**_NAMING, "$ref": "y", "class": "z", "discriminator": {"mapping": "x"}, 'odd "name"': "q", "const": "c"},
    ],
    "test.written": [{"parsed": "[1]"}, {"parsed": "[]", "sometimes": 1}],
    "test.nothing-at_all": [{}],
}

INVALID: dict[str, list[dict[str, Any]]] = {
    "test.scalars": [
        {},
        *_each(
            SCALARS,
            {"text": 1},
            {"number": "x"},
            {"number": 1.5},
            {"ratio": "x"},
            {"flag": "maybe"},
            {"nothing": 0},
            {"literal": "c"},
            {"colour": "blue"},
            {"level": 2},
            {"amount": "x"},
            {"price": -1},
            {"price": "x"},
            {"identity": "x"},
            {"day": "2026-13-01"},
            {"at": "noon"},
            {"lasted": "long"},
            {"moment": "2026-01-31T12:00:00"},
            {"url": "no address"},
            {"address": "192.0.2.256"},
            {"any_address": "x"},
            {"network": "x"},
            {"name": ""},
            {"name": "toolong"},
            {"name": "A"},
            {"handle": "me"},
            {"share": 1},
            {"share": 0.3},
            {"count": 11},
            {"optional": "x"},
        ),
    ],
    "test.containers": [
        {},
        *_each(
            _CONTAINERS,
            {"items": 1},
            {"items": ["x"]},
            {"pair": [1]},
            {"pair": [1, "a", 2]},
            {"frozen": []},
            {"frozen": [1, 2, 3, 4]},
            {"by_name": {"a": "x"}},
            {"by_key": {"b": 1}},
            {"by_colour": {"blue": 1}},
            {"by_literal": {"c": 1}},
            {"tree": {"a": "x"}},
            {"node": {"name": 1}},
            {"box": {"content": "x"}},
            {"position": [1]},
            {"position": [1, 2, "x", 4]},
            {"money": {}},
            {"options": {}},
            {"partial": {"first": "x"}},
            {"either": "x"},
            {"empty": [1]},
            {"json_like": [None]},
        ),
    ],
    "test.unions": [
        {},
        *_each(
            _UNIONS,
            {"pet": {"kind": "cow"}},
            {"pet": {"kind": "cat"}},
            {"pets": [{"kind": "bird"}]},
            {"any_pet": {"kind": "bird", "size": "small"}},
            {"described": {"kind": "dog"}},
        ),
    ],
    "test.naming": [{}, {**_NAMING, "class": 1}, {**_NAMING, "same": {"elsewhere": "x"}}],
    "test.written": [{}, {"parsed": 1}],
    "test.nothing-at_all": [{"a": 1}],
}
