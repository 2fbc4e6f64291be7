"""Models that do not read what they write, and values that a page would not get as they were passed."""

# ruff: noqa: RUF012 - pydantic copies defaults.

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    AliasPath,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NaiveDatetime,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    ValidationError,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from typing_extensions import TypedDict

from bridge.event import EventData, encode_data
from bridge.roundtrip import MAX_SAFE_INTEGER, check_model, declaring_class, find_loss, zoneless_times

Make = Callable[[], type[EventData]]


def loss(data: EventData) -> str | None:
    return find_loss(data, encode_data(data).encode())


# Models


def serialization_alias() -> type[EventData]:
    class M(EventData, type="m"):
        carrier: str | None = Field(None, serialization_alias="carrierName")

    return M


def validation_alias() -> type[EventData]:
    class M(EventData, type="m"):
        carrier: str | None = Field(None, validation_alias="carrierName")

    return M


def path_alias() -> type[EventData]:
    class M(EventData, type="m"):
        carrier: str | None = Field(None, validation_alias=AliasPath("carriers", 0))

    return M


def choices_without_the_written_name() -> type[EventData]:
    class M(EventData, type="m"):
        carrier: str | None = Field(None, validation_alias=AliasChoices("a", "b"), serialization_alias="c")

    return M


def alias_generator_for_writing_only() -> type[EventData]:
    class M(EventData, type="m"):
        model_config = ConfigDict(alias_generator=AliasGenerator(serialization_alias=str.upper))
        carrier: str | None = None

    return M


def read_by_name_only() -> type[EventData]:
    class M(EventData, type="m"):
        model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)
        carrier: str | None = Field(None, alias="carrierName")

    return M


def two_members_under_one_name() -> type[EventData]:
    class M(EventData, type="m"):
        a: str = ""
        b: str = Field("", serialization_alias="a", validation_alias=AliasChoices("a", "b"))

    return M


def nested_alias() -> type[EventData]:
    class Part(BaseModel):
        carrier: str | None = Field(None, serialization_alias="carrierName")

    class M(EventData, type="m"):
        parts: dict[str, list[Part]] = {}

    return M


def dataclass_alias() -> type[EventData]:
    @dataclasses.dataclass
    class Part:
        carrier: Annotated[str | None, Field(serialization_alias="carrierName")] = None

    class M(EventData, type="m"):
        part: Part | None = None

    return M


def required_and_excluded() -> type[EventData]:
    class M(EventData, type="m"):
        carrier: str = Field(exclude=True)

    return M


def computed_and_forbidden() -> type[EventData]:
    class M(EventData, type="m"):
        model_config = ConfigDict(extra="forbid")
        a: int = 1

        @computed_field  # type: ignore[prop-decorator]
        @property
        def twice(self) -> int:
            return 2 * self.a

    return M


def computed_and_forbidden_in_a_base() -> type[EventData]:
    class Part(BaseModel):
        model_config = ConfigDict(extra="forbid")

        @computed_field  # type: ignore[prop-decorator]
        @property
        def one(self) -> int:
            return 1

    class M(EventData, type="m"):
        parts: list[Part] = []

    return M


def validator_that_adds_each_time() -> type[EventData]:
    class M(EventData, type="m"):
        path: str

        @field_validator("path")
        @classmethod
        def _root(cls, value: str) -> str:
            return "/" + value

    return M


def annotated_validator_that_adds_each_time() -> type[EventData]:
    class M(EventData, type="m"):
        count: Annotated[int, AfterValidator(lambda value: value + 1)]

    return M


def serializer_in_another_form() -> type[EventData]:
    class M(EventData, type="m"):
        at: AwareDatetime

        @field_serializer("at")
        def _german(self, value: datetime) -> str:
            return value.strftime("%d.%m.%Y")

    return M


def serializer_that_loses() -> type[EventData]:
    class M(EventData, type="m"):
        name: Annotated[str, PlainSerializer(lambda value: value[:1])]

    return M


def secret() -> type[EventData]:
    class M(EventData, type="m"):
        token: SecretStr

    return M


def optional_secret() -> type[EventData]:
    class M(EventData, type="m"):
        tokens: list[SecretStr] | None = None

    return M


BROKEN = {
    serialization_alias: r"M\.carrier: it is written as 'carrierName' and read as 'carrier': .*alias='carrierName'",
    validation_alias: "written as 'carrier' and read as 'carrierName'",
    path_alias: "written as 'carrier' and read as no name of its own",
    choices_without_the_written_name: "written as 'c' and read as 'a' or 'b'",
    alias_generator_for_writing_only: "written as 'CARRIER' and read as 'carrier'",
    read_by_name_only: "written as 'carrierName' and read as 'carrier'",
    two_members_under_one_name: "both written as 'a'",
    nested_alias: r"Part\.carrier: it is written as 'carrierName'",
    dataclass_alias: r"Part\.carrier: it is written as 'carrierName'",
    required_and_excluded: "exclude=True leaves it out",
    computed_and_forbidden: r"M\.twice is computed and written, but extra='forbid'",
    computed_and_forbidden_in_a_base: r"Part\.one is computed",
    validator_that_adds_each_time: "'/text' was passed, and a page would get '//text'",
    annotated_validator_that_adds_each_time: "reads back other data than it wrote",
    serializer_in_another_form: r"cannot read back its own JSON: data\.at",
    serializer_that_loses: "'text' was passed, and a page would get 't'",
    secret: "SecretStr, which is written as asterisks",
    optional_secret: r"tokens\[0\] is a SecretStr",
}


@pytest.mark.contract("5.72")
@pytest.mark.parametrize(("make", "words"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_that_does_not_read_what_it_writes_is_a_fault(make: Make, words: str) -> None:
    faults = check_model(make())
    assert len(faults) == 1
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(faults[0])), faults[0]


class Colour(enum.Enum):
    RED = "red"


class Tree(BaseModel):
    name: str = ""
    children: list[Tree] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: set[str] = set()


class Whole(EventData, type="whole"):
    """Members in which the check finds no fault."""

    text: str
    number: float = Field(0.0, ge=0, lt=10)
    small: Annotated[int, Field(gt=3, le=4)] = 4
    steps: Annotated[int, Field(multiple_of=5)] = 5
    both: str = Field("", alias="theBoth")
    either: str = Field("", validation_alias=AliasChoices("new", "old"), serialization_alias="new")
    hidden: str = Field("", exclude=True)
    at: AwareDatetime | None = None
    plain: datetime | None = None
    local: NaiveDatetime | None = None
    day: date | None = None
    lasts: timedelta | None = None
    price: Decimal = Decimal("1.10")
    identity: UUID | None = None
    colour: Colour = Colour.RED
    pet: Cat | Dog | None = Field(None, discriminator="kind")
    tree: Tree = Tree()
    pair: tuple[int, str] | None = None
    tags: frozenset[str] = frozenset()
    by_number: dict[int, str] = {}
    anything: Any = None
    raw: bytes = b""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def length(self) -> int:
        return len(self.text)

    @field_validator("text")
    @classmethod
    def _strip(cls, value: str) -> str:
        return value.strip()


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.title() for word in rest)


class Camel(EventData, type="camel"):
    model_config = ConfigDict(alias_generator=camel, populate_by_name=True, extra="forbid")
    job_id: str
    tries_left: int = 3


@pytest.mark.parametrize("model", [Whole, Camel])
def test_a_model_that_reads_what_it_writes_has_no_fault(model: type[EventData]) -> None:
    assert check_model(model) == []


def test_members_that_take_a_time_without_a_zone_are_found() -> None:
    assert zoneless_times(Whole) == ["Whole.plain"]
    assert zoneless_times(Shipped) == ["Address.since", "Shipped.at"]
    assert zoneless_times(Camel) == []


# Values


@pytest.mark.contract("4.5")
def test_values_that_a_page_gets_as_they_were_passed() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    whole = Whole(
        text=" a ",
        theBoth="x",
        new="y",
        hidden="not shown, as declared",
        at=now,
        plain=now,
        local=datetime(2026, 1, 31, 12),
        pet=Dog(kind="dog", tricks={"sit", "roll", "beg"}),
        tree=Tree(name="a", children=[Tree(name="b")]),
        pair=(1, "a"),
        tags=frozenset("abc"),
        by_number={1: "a"},
        anything={"time": now, "tuple": (1, 2), "model": Tree(name="c"), "deep": [None, 1.5, True]},
        raw=b"abc",
    )
    assert loss(whole) is None
    assert loss(Camel(job_id="r")) is None


class Address(BaseModel):
    street: str = ""
    since: datetime | None = None


class DetailedAddress(Address):
    floor: int = 0


class SameAddress(Address):
    """It adds no member."""


class Shipped(EventData, type="shipped"):
    parcel_id: str
    count: int = 0
    address: Address = Address()
    addresses: list[Address] = []
    at: datetime | None = None
    anything: Any = None
    secret: SecretStr | None = None
    carrier: str | None = Field(None, serialization_alias="carrierName")


class ShippedByUs(Shipped):
    """A worker's own subclass, with a member that the bridge does not know."""

    truck: str = ""


class ShippedAsIs(Shipped):
    """A worker's own subclass with methods only."""


def broken(**values: Any) -> Shipped:
    """An event after assignments, which pydantic does not validate."""
    made = Shipped(parcel_id="p")
    for name, value in values.items():
        setattr(made, name, value)
    return made


NAIVE = datetime(2026, 1, 31, 12)


@pytest.mark.contract("4.4", "5.12")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Shipped(parcel_id="p", carrier="DHL"), r"data\.carrier: 'DHL' was passed, .* get None.* alias='carrierName'"),
        (ShippedByUs(parcel_id="p", truck="t"), "ShippedByUs, but the event declares Shipped: truck would not reach"),
        (Shipped(parcel_id="p", address=DetailedAddress(floor=3)), r"data\.address is a DetailedAddress, .*floor"),
        (Shipped(parcel_id="p", addresses=[Address(), DetailedAddress()]), r"data\.addresses\[1\] is a Detailed"),
        (Shipped(parcel_id="p", at=NAIVE), r"data\.at is 2026-01-31T12:00:00, a time without a zone.*AwareDatetime"),
        (Shipped(parcel_id="p", address=Address(since=NAIVE)), r"data\.address\.since is .* without a zone"),
        (Shipped(parcel_id="p", anything={"a": [NAIVE]}), r"data\.anything\.a\[0\] is .* without a zone"),
        (Shipped(parcel_id="p", secret=SecretStr("s3cret")), r"data\.secret is a SecretStr"),
        (Shipped(parcel_id="p", count=2**53), r"data\.count is 9007199254740992, beyond 2\^53 - 1"),
        (Shipped(parcel_id="p", count=-(2**53)), r"data\.count is -9007199254740992"),
        (Shipped(parcel_id="p", anything=[{"n": 10**30}]), r"data\.anything\[0\]\.n is 1000"),
        (broken(count=1.5), r"data\.count"),
        (broken(count="5"), r"data\.count: '5' was passed, and a page would get 5"),
        (broken(address={"street": "x"}), r"data\.address"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_value_that_a_page_would_not_get(data: Shipped, words: str) -> None:
    try:
        found = loss(data)
    except ValidationError as error:  # The event is refused, too.
        found = "; ".join(f"data.{fault['loc'][0]}" for fault in error.errors())
    assert found is not None
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(found)), found
    assert "s3cret" not in found


def test_values_at_the_limit_are_accepted() -> None:
    assert loss(Shipped(parcel_id="p", count=MAX_SAFE_INTEGER, anything=-MAX_SAFE_INTEGER)) is None
    assert loss(Shipped(parcel_id="12345678901234567890", anything=0.12345678901234567)) is None
    assert loss(ShippedAsIs(parcel_id="p")) is None
    assert loss(Shipped(parcel_id="p", address=SameAddress(street="x"))) is None
    assert loss(Shipped(parcel_id="p", anything=DetailedAddress(floor=3))) is None


def test_the_declaring_class_is_the_one_that_the_catalogue_has() -> None:
    assert declaring_class(ShippedByUs) is Shipped
    assert declaring_class(Shipped) is Shipped


class FromHidden(EventData, type="from.hidden"):
    raw: str = Field("", exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def shown(self) -> str:
        return self.raw.upper()


class FromPrivate(EventData, type="from.private"):
    _raw: str = PrivateAttr("a")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def shown(self) -> str:
        return self._raw


class Linked(Shipped):
    """A worker's own subclass with a computed member only."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def link(self) -> str:
        return "/jobs/1"


class One(BaseModel):
    x: int = 0


class Two(BaseModel):
    x: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def kind(self) -> str:
        return "two"


@dataclasses.dataclass
class Moment:
    at: datetime


class Anything(EventData, type="anything"):
    either: One | Two = One()
    moment: Moment | None = None
    times: set[datetime] = set()
    recent: deque[datetime] = deque()
    keys: dict[int | str, str] = {}
    anything: Any = None


def from_private() -> EventData:
    made = FromPrivate()
    made._raw = "b"
    return made


AMSTERDAM_1850 = datetime(1850, 6, 1, tzinfo=timezone(timedelta(minutes=19, seconds=32)))


@pytest.mark.contract("4.4")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (FromHidden(raw="abc"), r"data\.shown: 'ABC' would be sent, and a page would get ''"),
        (from_private(), r"data\.shown: 'b' would be sent, and a page would get 'a'"),
        (Linked(parcel_id="p"), r"data\.link: '/jobs/1' would be sent, and a page would get 'nothing'"),
        (Anything(either=Two(x=1)), r"data\.either"),
        (Anything(anything=AMSTERDAM_1850), r"data\.anything has an offset with seconds"),
        (Anything(moment=Moment(NAIVE)), r"data\.moment\.at is .* without a zone"),
        (Anything(times={NAIVE}), r"data\.times\[0\] is .* without a zone"),
        (Anything(recent=deque([NAIVE])), r"data\.recent\[0\] is .* without a zone"),
        (Anything(anything={NAIVE: 1}), r"a key of data\.anything is .* without a zone"),
        (Anything(anything=[{SecretStr("s3cret"): 1}]), r"a key of data\.anything\[0\] is a SecretStr"),
        (Anything(keys={1: "first", "1": "b"}), r"data\.keys: "),
        (Anything(anything={1: "first", "1": "b"}), r"data\.anything: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_more_values_that_a_page_would_not_get(data: EventData, words: str) -> None:
    found = loss(data)
    assert found is not None
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(found)), found
    assert "s3cret" not in found


class LocalTimes(TypedDict):
    at: NaiveDatetime


class Calendar(EventData, type="calendar"):
    """Times that are declared without a zone, at any depth."""

    entry: LocalTimes | None = None
    all: list[NaiveDatetime] = []


class WithNames(EventData, type="with.names"):
    user: str = Field("", serialization_alias="userId")

    @model_validator(mode="before")
    @classmethod
    def _take_either(cls, values: Any) -> Any:
        return {**values, "user": values["userId"]} if "userId" in values else values


class WithSerializer(EventData, type="with.serializer"):
    user: str = Field("", validation_alias="userId")

    @model_serializer
    def _write(self) -> dict[str, str]:
        return {"userId": self.user}


def test_unusual_models_and_values_are_accepted() -> None:
    assert loss(Calendar(entry={"at": NAIVE}, all=[NAIVE])) is None
    assert check_model(WithNames) == check_model(WithSerializer) == []
    assert loss(WithNames(user="ann")) is None
    assert loss(WithSerializer(userId="ann")) is None
    assert loss(Anything(anything={1: "a", 2.5: ("b",)}, keys={1: "a", "b": "c"})) is None
    assert loss(Anything(either=One(x=1), moment=Moment(datetime(2026, 1, 31, tzinfo=UTC)))) is None


class Odd:
    """A type with neither `==` nor a JSON form of its own."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema as cs

        return cs.no_info_plain_validator_function(
            lambda value: value if isinstance(value, Odd) else Odd(value),
            serialization=cs.plain_serializer_function_ser_schema(
                lambda value: value.text, return_schema=cs.str_schema()
            ),
        )


class WithOdd(EventData, type="odd"):
    odd: Odd


def test_a_type_that_cannot_be_compared_is_not_refused() -> None:
    assert loss(WithOdd(odd=Odd("a"))) is None
