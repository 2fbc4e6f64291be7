"""What breaks whom, from one catalogue to the next."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, create_model

from bridge.catalogue import Catalogue
from bridge.event import EventData
from bridge.evolution import compare


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


@pytest.mark.parametrize(
    ("old", "new", "breaks", "words"),
    [
        ({"x": str}, {"x": str, "y": (int, 0)}, None, "data.y: a new member that may be left out"),
        ({"x": str}, {"x": str, "y": int}, "publishers", "data.y: a new member that must be given"),
        ({"x": str, "y": int}, {"x": str}, "pages", "data.y: the member is gone"),
        ({"x": (str, "")}, {"x": str}, "publishers", "data.x: must now be given"),
        ({"x": str}, {"x": (str, "?")}, None, "data.x: may now be left out; pages then read '?'"),
        ({"x": (str, "a")}, {"x": (str, "b")}, None, "data.x: the default is 'b', was 'a'"),
        ({"x": str}, {"x": str | None}, "pages", "data.x: may now be null, was always string"),
        ({"x": str | None}, {"x": str}, "publishers", "data.x: null is no longer taken, only string"),
        ({"x": int}, {"x": float}, "pages", "data.x: may now be number, was always integer"),
        ({"x": Literal["a", "b"]}, {"x": Literal["a"]}, "publishers", "data.x: no longer takes 'b'"),
        ({"x": Literal["a"]}, {"x": Literal["a", "b"]}, "pages", "data.x: may now be 'b'"),
        ({"x": Literal["a"]}, {"x": str}, "pages", "data.x: may now be any value"),
        ({"x": str}, {"x": Literal["a"]}, "publishers", "data.x: must now be one of ['a']"),
        ({"x": str}, {"x": Annotated[str, Field(max_length=5)]}, "publishers", "largest length is now 5, was not"),
        ({"x": Annotated[int, Field(ge=1)]}, {"x": Annotated[int, Field(ge=0)]}, None, "smallest value is now 0"),
        (
            {"x": Annotated[int, Field(ge=1)]},
            {"x": Annotated[int, Field(ge=2)]},
            "publishers",
            "smallest value is now 2",
        ),
        ({"x": Annotated[int, Field(le=1)]}, {"x": int}, None, "largest value is no longer limited"),
        (
            {"x": Annotated[str, Field(pattern="a")]},
            {"x": Annotated[str, Field(pattern="b")]},
            "publishers",
            "must be 'b'",
        ),
        ({"x": list[int]}, {"x": list[str]}, "publishers", "data.x, each item: integer is no longer taken"),
        ({"x": Inner}, {"x": InnerWithMore}, "publishers", "data.x.b: a new member that must be given"),
        ({"x": Inner | None}, {"x": InnerWithMore | None}, "publishers", "data.x.b: a new member that must be given"),
    ],
)
def test_one_change(old: dict[str, Any], new: dict[str, Any], breaks: str | None, words: str) -> None:
    changes = compare(schemas(**old), schemas(**new))
    assert [change.breaks for change in changes if words in str(change)] == [breaks], changes


def test_types_that_come_and_go() -> None:
    one, both = schemas(x=str), {**schemas(x=str), "job.new": {}}
    assert [(change.breaks, str(change)) for change in compare(one, both)] == [(None, "job.new: a new type")]
    assert [change.breaks for change in compare(both, one)] == ["publishers"]


@pytest.mark.parametrize("members", [{"x": Tree}, {"x": list[Tree], "y": dict[str, int], "z": (Any, None)}])
def test_what_is_the_same_is_no_change_and_a_tree_ends(members: dict[str, Any]) -> None:
    assert compare(schemas(**members), schemas(**members)) == []
