"""What a change of the catalogue breaks, in words, before somebody's page or worker finds out.

Pure. Compares two exports of JSON Schemas (`bridge schemas export`). Two sides can break: *publishers*, whose events
were good and are now refused, and *pages*, which read what they did not have to expect. Workers, bridge and pages are
never replaced at one moment, so every change meets the other side's old version for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Schema = Mapping[str, Any]

_LOWER_BOUNDS = {
    "minimum": "smallest value",
    "exclusiveMinimum": "exclusive lower bound",
    "minLength": "smallest length",
    "minItems": "fewest items",
    "minProperties": "fewest members",
}
_UPPER_BOUNDS = {
    "maximum": "largest value",
    "exclusiveMaximum": "exclusive upper bound",
    "maxLength": "largest length",
    "maxItems": "most items",
    "maxProperties": "most members",
}
_EXACT = {"pattern": "pattern", "format": "format", "multipleOf": "step", "uniqueItems": "uniqueness of items"}


@dataclass(frozen=True, slots=True)
class Change:
    """`breaks` is who is broken, None where nobody is."""

    breaks: Literal["publishers", "pages"] | None
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def compare(old: Mapping[str, Schema], new: Mapping[str, Schema]) -> list[Change]:
    """All changes from one catalogue to another, event type by event type.

    Args:
        old, new: event type to JSON Schema of its data.
    """
    changes: list[Change] = []
    for kind in sorted(old.keys() | new.keys()):
        if kind not in new:
            changes.append(Change("publishers", kind, "the type is gone: events of it are refused"))
        elif kind not in old:
            changes.append(Change(None, kind, "a new type"))
        else:
            changes += _Comparison(old[kind], new[kind]).run(kind)
    return changes


class _Comparison:
    def __init__(self, old: Schema, new: Schema) -> None:
        self._old = old
        self._new = new
        self._seen: set[tuple[str, str]] = set()

    def run(self, kind: str) -> Iterator[Change]:
        yield from self._values(self._old, self._new, f"{kind} data")

    def _values(self, old: Schema, new: Schema, where: str) -> Iterator[Change]:
        references = (str(old.get("$ref")), str(new.get("$ref")))
        if references != ("None", "None"):
            if references in self._seen:
                return  # A model that holds itself.
            self._seen.add(references)
        old, new = _resolve(old, self._old), _resolve(new, self._new)
        before, after = _options(old, self._old), _options(new, self._new)
        yield from _kinds(before, after, where)
        for name, option in before.items():
            if name in after:
                yield from self._bounds(option, after[name], where)
                if name == "object":
                    yield from self._members(option, after[name], where)
                elif name == "array":
                    yield from self._values(
                        option.get("items") or {}, after[name].get("items") or {}, f"{where}, each item"
                    )

    def _bounds(self, old: Schema, new: Schema, where: str) -> Iterator[Change]:
        yield from _choices(old, new, where)
        for keyword, words in _LOWER_BOUNDS.items():
            yield from _bound(old.get(keyword), new.get(keyword), words, where, up=True)
        for keyword, words in _UPPER_BOUNDS.items():
            yield from _bound(old.get(keyword), new.get(keyword), words, where, up=False)
        for keyword, words in _EXACT.items():
            before, after = old.get(keyword), new.get(keyword)
            if before == after:
                continue
            if after is None:
                yield Change(None, where, f"the {words} {before!r} is no longer asked for")
            else:
                was = "" if before is None else f" instead of {before!r}"
                yield Change("publishers", where, f"the {words} must be {after!r}{was}")

    def _members(self, old: Schema, new: Schema, where: str) -> Iterator[Change]:
        before, after = old.get("properties", {}), new.get("properties", {})
        was_required, is_required = set(old.get("required", ())), set(new.get("required", ()))
        for name in sorted(before.keys() | after.keys()):
            place = f"{where}.{name}"
            if name not in after:
                yield Change("pages", place, "the member is gone: what publishers still write of it is dropped")
                continue
            if name not in before:
                if name in is_required:
                    yield Change("publishers", place, "a new member that must be given: events without it are refused")
                else:
                    yield Change(None, place, "a new member that may be left out")
                continue
            if name in is_required - was_required:
                yield Change("publishers", place, "must now be given: events without it are refused")
            elif name in was_required - is_required:
                yield Change(None, place, f"may now be left out; pages then read {after[name].get('default')!r}")
            elif before[name].get("default") != after[name].get("default"):
                yield Change(
                    None, place, f"the default is {after[name].get('default')!r}, was {before[name].get('default')!r}"
                )
            yield from self._values(before[name], after[name], place)


def _resolve(schema: Schema, root: Schema) -> Schema:
    while isinstance(reference := schema.get("$ref"), str):
        schema = root.get("$defs", {}).get(reference.rpartition("/")[2], {})
    return schema


def _options(schema: Schema, root: Schema) -> dict[str, Schema]:
    """The JSON types that a value may have, each with what is asked of it."""
    found: dict[str, Schema] = {}
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        for branch in branches:
            for name, option in _options(_resolve(branch, root), root).items():
                # Two branches of one type: what either takes. Only the choices can be joined; bounds are left out.
                found[name] = _join(found[name], option) if name in found else option
        return found
    kinds = schema.get("type")
    if kinds is None:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        names = {_kind_of(value) for value in values} if values is not None else {"anything"}
        return dict.fromkeys(sorted(names), schema)
    return dict.fromkeys([kinds] if isinstance(kinds, str) else kinds, schema)


def _join(one: Schema, other: Schema) -> Schema:
    choices = [_choices_of(one), _choices_of(other)]
    if None in choices:
        return {"type": one.get("type")}
    return {"enum": [value for choice in choices for value in choice or ()]}


def _kind_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _kinds(before: Mapping[str, Schema], after: Mapping[str, Schema], where: str) -> Iterator[Change]:
    def takes(kinds: Mapping[str, Schema], name: str) -> bool:
        return name in kinds or "anything" in kinds or (name == "integer" and "number" in kinds)

    gone = [name for name in before if not takes(after, name)]
    if gone:
        yield Change("publishers", where, f"{_one_of(gone)} is no longer taken, only {_one_of(list(after))}")
    more = [name for name in after if not takes(before, name)]
    if more:
        yield Change("pages", where, f"may now be {_one_of(more)}, was always {_one_of(list(before))}")


def _one_of(names: list[str]) -> str:
    return " or ".join(sorted(names))


def _choices_of(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values: list[Any] | None = schema.get("enum")
    return values


def _choices(old: Schema, new: Schema, where: str) -> Iterator[Change]:
    before, after = _choices_of(old), _choices_of(new)
    if before == after:
        return
    if after is None:
        yield Change("pages", where, "may now be any value, was one of a list")
        return
    if before is None:
        yield Change("publishers", where, f"must now be one of {after!r}")
        return
    if gone := [value for value in before if value not in after]:
        yield Change("publishers", where, f"no longer takes {', '.join(map(repr, gone))}")
    if more := [value for value in after if value not in before]:
        yield Change("pages", where, f"may now be {', '.join(map(repr, more))}")


def _bound(before: Any, after: Any, words: str, where: str, *, up: bool) -> Iterator[Change]:
    if before == after:
        return
    if after is None:
        yield Change(None, where, f"the {words} is no longer limited (was {before})")
        return
    tighter = before is None or (after > before if up else after < before)
    was = "not limited" if before is None else str(before)
    yield Change("publishers" if tighter else None, where, f"the {words} is now {after}, was {was}")
