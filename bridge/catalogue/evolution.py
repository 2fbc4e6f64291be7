"""Finds what a change of the catalogue breaks, before a page or a worker fails.

Pure. Compares two exports of the catalogue (`bridge schemas export`). Two sides can break:

- *publishers*, if data that was accepted is now refused,
- *pages*, if they receive data that the old catalogue did not allow.

Workers, bridge and pages are never replaced at the same moment. So each change runs for some time with the old version
of the other side.

A walk compares two schemas, and reports where the new one accepts less, accepts more, or cannot be compared. It runs
twice: for the data of publishers, where less breaks publishers, and for the data of pages, where more breaks pages.
The walk never guesses: an unknown keyword, fact or combination that differs is a "cannot tell".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

from bridge.event import shorten

Schema = Mapping[str, Any]

Verdict = Literal["compatible", "breaks publishers", "breaks pages", "cannot tell"]

RECEIVED = ":received"
"""Name of the definition of the data that a page receives. No class has this name: pydantic uses no colon in names."""

MARK = "bridge:"
"""Text in a `$comment` before the facts, which are JSON. `facts.py` writes them."""

# How the set of allowed values changed. "same": it did not change, but the change is worth a report.
_Relation = Literal["less", "more", "unknown", "same"]

_MOST_STEPS = 50_000
"""The most pairs of schemas that are compared for one event type. A type with 100 members needs a few hundred."""

_IGNORED = frozenset({"$schema", "$defs", "$comment", "title", "description", "examples", "deprecated", "readOnly",
                      "discriminator"})  # fmt: skip
_KNOWN = frozenset(
    {"type", "const", "enum", "anyOf", "oneOf", "properties", "required", "additionalProperties", "patternProperties",
     "propertyNames", "minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems", "uniqueItems",
     "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
     "format", "default", "writeOnly", "facts"}
)  # fmt: skip
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else", "contentSchema",
           "unevaluatedProperties", "unevaluatedItems")  # fmt: skip

_TIMES = ("date-time", "date", "time", "duration")
"""Formats that pydantic also reads from numbers, except in strict mode."""
_TEXTS = ("uuid", "uri", "email", "ipv4", "ipv6", "binary", "base64url", "password", "path", "file-path")

_LENGTHS = {
    "minLength": "smallest length",
    "maxLength": "largest length",
    "minItems": "fewest items",
    "maxItems": "most items",
    "minProperties": "fewest members",
    "maxProperties": "most members",
}

_BOUND_FACTS = {"ge": 1, "gt": 1, "least": 1, "le": -1, "lt": -1, "most": -1, "max_digits": -1, "decimal_places": -1}


@dataclass(frozen=True, slots=True)
class Change:
    verdict: Verdict
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def compare(old: Mapping[str, Schema], new: Mapping[str, Schema]) -> list[Change]:
    """Returns all changes from one catalogue to another, sorted by event type.

    Args:
        old, new: event type to JSON Schema of its data, as `schemas export` prints it.
    """
    changes: list[Change] = []
    lacking: list[str] = []
    for kind in sorted(old.keys() | new.keys()):
        if kind not in new:
            changes.append(Change("breaks publishers", kind, "the type is gone: the bridge refuses events of it"))
        elif kind not in old:
            changes.append(Change("compatible", kind, "a new type"))
        else:
            changes += _compare_type(old[kind], new[kind], f"{kind} data")
            if not (_is_whole(old[kind]) and _is_whole(new[kind])):
                lacking.append(kind)
    if lacking:
        words = "an export of an earlier bridge lacks the data of pages, and some rules for publishers"
        changes.append(Change("cannot tell", ", ".join(lacking), f"{words}; write it again with this bridge"))
    return changes


def _is_whole(schema: Schema) -> bool:
    return RECEIVED in schema.get("$defs", {})


def _compare_type(old: Schema, new: Schema, where: str) -> list[Change]:
    whole = _is_whole(old) and _is_whole(new)
    found: list[Change] = []
    try:
        for delta in _Walk(old, new, received=False, facts=whole).run(where):
            verdict: dict[_Relation, Verdict] = {"less": "breaks publishers", "unknown": "cannot tell"}
            found.append(Change(verdict.get(delta.relation, "compatible"), delta.where, delta.what))
        published = {change.where for change in found}
        if whole:
            for delta in _Walk(old, new, received=True, facts=True).run(where):
                verdict = {"more": "breaks pages", "unknown": "cannot tell"}
                if delta.relation not in verdict and delta.where in published:
                    continue  # This breaks nothing, and the first walk has reported the member.
                found.append(Change(verdict.get(delta.relation, "compatible"), delta.where, delta.what))
    except (_TooMuch, RecursionError):
        found.append(Change("cannot tell", where, "the two schemas are too large or too nested to be compared"))
    except (AttributeError, KeyError, LookupError, TypeError, ValueError) as error:
        # Invalid schemas may come from files, or from a team's own `__get_pydantic_json_schema__`.
        found.append(Change("cannot tell", where, f"a schema is not understood ({type(error).__name__}: {error})"))
    # Both walks may report the same change. If it breaks one side, drop the other walk's "compatible".
    broken = {(change.where, change.what) for change in found if change.verdict != "compatible"}
    kept = [change for change in found if change.verdict != "compatible" or (change.where, change.what) not in broken]
    return list(dict.fromkeys(kept))


@dataclass(frozen=True, slots=True)
class _Delta:
    relation: _Relation
    where: str
    what: str


class _TooMuch(Exception):
    """The walk needs more than `_MOST_STEPS` steps."""


@dataclass(slots=True)
class _Side:
    """One of the two schemas without its annotations, and its definitions by reference."""

    root: dict[str, Any]
    definitions: dict[str, Any]
    reach: dict[str, str] = field(default_factory=dict)

    def text(self, schema: Any) -> str:
        """The schema and all definitions that it refers to, as text. Equal texts mean equal schemas."""
        names: dict[str, None] = {}
        pending = [schema]
        while pending:
            for name in _references(pending.pop()):
                if name not in names:
                    names[name] = None
                    pending.append(self.definitions.get(name))
        used = {name: self.definitions.get(name) for name in sorted(names)}
        return json.dumps([schema, used], sort_keys=True)


def _side(export: Schema, *, received: bool, facts: bool) -> _Side:
    root = export["$defs"][RECEIVED] if received else export
    prefix = f"#/$defs/{RECEIVED}/$defs/" if received else "#/$defs/"
    definitions = {
        prefix + name: _stripped(schema, facts=facts)
        for name, schema in root.get("$defs", {}).items()
        if name != RECEIVED
    }
    return _Side(_stripped(root, facts=facts), definitions)


def _stripped(schema: Any, *, facts: bool) -> Any:
    """The schema without annotations for people. Its facts become the member `facts`."""
    if schema is True:
        return {}
    if schema is False or not isinstance(schema, Mapping):
        return {"not": {}}
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _SCHEMAS_BY_NAME:
            if name != "$defs":
                found[name] = {key: _stripped(part, facts=facts) for key, part in value.items()}
        elif name in _SCHEMAS and isinstance(value, list):
            found[name] = [_stripped(part, facts=facts) for part in value]
        elif name in _SCHEMA:
            found[name] = value if isinstance(value, bool) else _stripped(value, facts=facts)
        elif name not in _IGNORED:
            found[name] = value
    known = str(schema.get("$comment", "")).partition(MARK)[2]
    if known and facts:
        found["facts"] = json.loads(known)
    return found


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name == "$ref" and isinstance(value, str):
                yield value
            elif name not in ("const", "enum", "default", "facts"):
                yield from _references(value)
    elif isinstance(schema, list):
        for part in schema:
            yield from _references(part)


class _Walk:
    def __init__(self, old: Schema, new: Schema, *, received: bool, facts: bool) -> None:
        self._old = _side(old, received=received, facts=facts)
        self._new = _side(new, received=received, facts=facts)
        self._received = received
        self._open: set[tuple[str, str]] = set()
        self._steps = 0

    def run(self, where: str) -> list[_Delta]:
        return list(self._values(self._old.root, self._new.root, where))

    def _values(self, old: Any, new: Any, where: str) -> Iterator[_Delta]:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise _TooMuch
        if self._old.text(old) == self._new.text(new):
            return
        # A recursive model: an outer call is comparing this pair already, and reports its differences.
        pair = (json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True))
        if pair in self._open:
            return
        self._open.add(pair)
        try:
            old, new = _resolved(old, self._old), _resolved(new, self._new)
            if self._received:
                old, new = self._with_default(old, self._old), self._with_default(new, self._new)
            yield from self._defaults(old, new, where)
            if {**old, "default": None} == {**new, "default": None} and self._old.text(old) == self._new.text(new):
                return
            yield from self._facts(old, new, where)
            yield from self._shapes(old, new, where)
        finally:
            self._open.discard(pair)

    def _silently(self, old: Any, new: Any) -> list[_Delta]:
        return list(self._values(old, new, ""))

    def _defaults(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        if "default" in old and "default" in new and _key(old["default"]) != _key(new["default"]):
            yield _Delta("same", where, f"the default is {shorten(new['default'])}, was {shorten(old['default'])}")

    def _with_default(self, schema: Schema, side: _Side) -> Schema:
        """Adds the default to the schema's values: it is not validated, so `x: int = None` writes null to a page."""
        if "default" not in schema or self._takes(schema["default"], schema, side):
            return schema
        rest = {name: value for name, value in schema.items() if name != "default"}
        return {"anyOf": [rest, {"const": schema["default"]}], "default": schema["default"]}

    def _takes(self, value: Any, schema: Any, side: _Side) -> bool:
        """Whether the schema allows the value. Objects and texts with a format are assumed to be allowed."""
        schema = _resolved(schema, side)
        branches = _branches_of(schema)
        if branches is not None:
            return any(self._takes(value, branch, side) for branch in branches)
        return _fits(value, schema) is not False

    # Facts

    def _facts(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        before, after = old.get("facts", {}), new.get("facts", {})
        for name in sorted(before.keys() | after.keys()):
            was, now = before.get(name), after.get(name)
            if name == "code" and was == now:
                words = "the catalogue's own code checks or writes this value, with an unknown effect on the change"
                yield _Delta("unknown", where, words)
            if was != now and name != "names":
                yield from self._fact(name, was, now, old, new, where)

    def _fact(self, name: str, was: Any, now: Any, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        if name == "strict":
            if now:
                words = "is strict now: a value that needs conversion, such as a number in a text, is refused"
                yield _Delta("less", where, words)
            else:
                yield _Delta("more", where, "is no longer strict: a value that needs conversion is accepted too")
        elif name == "numbers":
            if now:
                yield _Delta("more", where, "a number is accepted too, and converted to text")
            else:
                yield _Delta("less", where, "a number, which was converted to text, is refused")
        elif name == "tz_constraint" and None in (was, now):
            meanings = {"aware": "a UTC offset", "naive": "no UTC offset"}
            if was is None:
                yield _Delta("less", where, f"must now have {meanings.get(now, f'the offset {now}')}")
            else:
                yield _Delta("more", where, f"need no longer have {meanings.get(was, f'the offset {was}')}")
        elif name in ("strip", "lower", "upper") and not _limits_text(old) and not _limits_text(new):
            yield _Delta("same", where, f"the text is now changed by {name}" if now else f"no longer changed by {name}")
        elif name in _BOUND_FACTS:
            relation = _bound_fact(was, now, _BOUND_FACTS[name])
            yield _Delta(relation, where, f"{name} is now {shorten(now)}, was {shorten(was)}")
        elif name in ("code", "writes"):
            change = "was added" if was is None else "is gone" if now is None else "has changed"
            yield _Delta("unknown", where, f"the catalogue's own code that checks or writes it {change}")
        elif name == "kind":
            kinds = [" and ".join(kind) if kind else "the plain kind" for kind in (was or [], now or [])]
            yield _Delta("unknown", where, f"pydantic reads it as {kinds[1]}, was {kinds[0]}")
        elif name == "tag" and now is None:
            yield _Delta("more", where, "the option need no longer be named by a discriminator")
        else:
            what = f"a fact that JSON Schema does not express has changed ({name})"
            yield _Delta("unknown", where, f"{what}, from {shorten(was)} to {shorten(now)}")

    # Shapes

    def _shapes(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        for keyword in sorted((old.keys() | new.keys()) - _KNOWN):
            if self._old.text(old.get(keyword)) != self._new.text(new.get(keyword)):
                words = f"{keyword!r} has changed, and is not understood"
                yield _Delta("unknown", where, words)
        formats = old.get("format"), new.get("format")
        if formats[0] != formats[1] and "password" in formats:
            hidden = formats[1] == "password"
            words = f"pages receive {'asterisks in place of the text' if hidden else 'the text itself'}"
            yield _Delta("more" if self._received else "same", where, words)
        before, after = _branches(old, self._old), _branches(new, self._new)
        if len(before) == 1 and len(after) == 1 and before[0] is old and after[0] is new:
            yield from self._plain(old, new, where)
        else:
            yield from self._unions(before, after, where)

    def _unions(self, before: list[Schema], after: list[Schema], where: str) -> Iterator[_Delta]:
        deltas = {(i, j): self._silently(one, other) for i, one in enumerate(before) for j, other in enumerate(after)}
        lost = [i for i in range(len(before)) if not any(_within(deltas[i, j]) for j in range(len(after)))]
        more = [j for j in range(len(after)) if not any(_around(deltas[i, j]) for i in range(len(before)))]
        said: set[tuple[int, int]] = set()
        for i in lost:
            near = [j for j in range(len(after)) if not self._disjoint(before[i], after[j])]
            if not near:
                gone = f"{_name(before[i], self._old)} is no longer accepted"
                yield _Delta("less", where, f"{gone}, only {_names(after, self._new)}")
            elif len(near) == 1:
                said.add((i, near[0]))
            else:
                words = f"it is not known whether one of {_names(after, self._new)} accepts all that"
                yield _Delta("unknown", where, f"{words} {_name(before[i], self._old)} did")
        for j in more:
            near = [i for i in range(len(before)) if not self._disjoint(before[i], after[j])]
            if not near:
                may = f"may now be {_name(after[j], self._new)}"
                yield _Delta("more", where, f"{may}, was always {_names(before, self._old)}")
            elif len(near) == 1:
                said.add((near[0], j))
            else:
                words = f"it is not known whether {_name(after[j], self._new)} is more than"
                yield _Delta("unknown", where, f"{words} {_names(before, self._old)}")
        for i, j in sorted(said):
            for delta in self._values(before[i], after[j], self._into(where, before, before[i])):
                if (
                    delta.relation in ("unknown", "same")
                    or (delta.relation == "less" and i in lost)
                    or (delta.relation == "more" and j in more)
                ):
                    yield delta

    def _into(self, where: str, options: list[Schema], option: Schema) -> str:
        others = [name for one in options if (name := _name(one, self._old)) != "null"]
        return where if len(others) < 2 else f"{where} ({_name(option, self._old)})"

    def _disjoint(self, old: Schema, new: Schema) -> bool:
        """Whether certainly no value matches both."""
        old, new = _resolved(old, self._old), _resolved(new, self._new)
        if _branches_of(old) is not None or _branches_of(new) is not None:
            return False
        kinds = _kinds_of(old), _kinds_of(new)
        if not any(_meet(one, other) for one in kinds[0] for other in kinds[1]):
            return True
        choices = _choices_of(old), _choices_of(new)
        if choices[0] is not None and choices[1] is not None:
            return not {_key(value) for value in choices[0]} & {_key(value) for value in choices[1]}
        if kinds == ({"object"}, {"object"}):
            for name in set(old.get("properties", {})) & set(new.get("properties", {})):
                members = [_choices_of(_resolved(one["properties"][name], side))
                           for one, side in ((old, self._old), (new, self._new))]  # fmt: skip
                if members[0] is None or members[1] is None:
                    continue
                if not {_key(value) for value in members[0]} & {_key(value) for value in members[1]}:
                    return True
        return False

    def _plain(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        before, after = _choices_of(old), _choices_of(new)
        if before is not None or after is not None:
            yield from self._choices(old, new, before, after, where)
            return
        was, now = old.get("type"), new.get("type")
        if "not" in old or "not" in new:
            yield _Delta("unknown", where, "a schema with `not`, or one that allows no value, is not understood")
            return
        if was != now:
            if was is None:
                yield _Delta("less", where, f"must now be {now}, was anything")
            elif now is None:
                yield _Delta("more", where, f"may now be anything, was always {was}")
            elif (was, now) == ("integer", "number"):
                yield _Delta("more", where, "may now be number, was always integer")
                yield from self._numbers(old, new, where)
            elif (was, now) == ("number", "integer"):
                yield _Delta("less", where, "number is no longer accepted, only integer")
                yield from self._numbers(old, new, where)
            else:
                yield _Delta("less", where, f"{was} is no longer accepted, only {now}")
                yield _Delta("more", where, f"may now be {now}, was always {was}")
            return
        # JSON Schema ignores a bound for another type (a `minimum` for a text), and so does this walk.
        if was in ("integer", "number"):
            yield from self._numbers(old, new, where)
        elif was == "string":
            yield from self._texts(old, new, where)
        elif was == "object":
            yield from self._objects(old, new, where)
        elif was == "array":
            yield from self._arrays(old, new, where)

    def _choices(
        self, old: Schema, new: Schema, before: list[Any] | None, after: list[Any] | None, where: str
    ) -> Iterator[_Delta]:
        if before is not None and after is not None:
            was, now = {_key(value) for value in before}, {_key(value) for value in after}
            if gone := [value for value in before if _key(value) not in now]:
                yield _Delta("less", where, f"no longer accepts {', '.join(map(shorten, gone))}")
            if more := [value for value in after if _key(value) not in was]:
                yield _Delta("more", where, f"may now be {', '.join(map(shorten, more))}")
        elif before is not None:
            yield from self._from_choices(before, new, where)
        elif after is not None:
            yield _Delta("less", where, f"must now be one of {', '.join(map(shorten, after))}")
            verdicts = [_fits(value, old) for value in after]
            if not all(verdicts):
                relation: _Relation = "more" if False in verdicts else "unknown"
                yield _Delta(relation, where, f"may now be one of {', '.join(map(shorten, after))}")

    def _from_choices(self, before: list[Any], new: Schema, where: str) -> Iterator[_Delta]:
        yield _Delta("more", where, f"may now be any {_name(new, self._new)}, was one of a list")
        verdicts = {_key(value): _fits(value, new) for value in before}
        if gone := [value for value in before if verdicts[_key(value)] is False]:
            yield _Delta("less", where, f"no longer accepts {', '.join(map(shorten, gone))}")
        elif None in verdicts.values():
            yield _Delta("unknown", where, "it is not known whether all values of the old list are still accepted")
        elif not self._received and new.get("facts", {}).get("strict"):
            # For the 1 of a list, pydantic also accepts 1.0 and true, strict or not.
            yield _Delta("unknown", where, "is strict now; the list was not")

    def _numbers(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        for up, words in ((True, "smallest value"), (False, "largest value")):
            was, now = _limit(old, up=up), _limit(new, up=up)
            if was != now:
                yield _limited(was, now, words, where, up=up)
        step, by = old.get("multipleOf"), new.get("multipleOf")
        if step == by:
            return
        if by is None:
            yield _Delta("more", where, f"need no longer be a multiple of {step}")
        elif step is None:
            yield _Delta("less", where, f"must now be a multiple of {by}")
        elif not (isinstance(step, int) and isinstance(by, int)):
            yield _Delta("unknown", where, f"must be a multiple of {by}, was of {step}")
        else:
            if step % by:
                yield _Delta("less", where, f"must now be a multiple of {by}, was of {step}")
            if by % step:
                yield _Delta("more", where, f"may now be any multiple of {by}, was of {step}")

    def _texts(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        yield from _lengths(old, new, "minLength", "maxLength", where)
        was, now = old.get("pattern"), new.get("pattern")
        if was != now:
            if now is None:
                yield _Delta("more", where, f"the pattern {was!r} is no longer required")
            elif was is None:
                yield _Delta("less", where, f"the pattern must be {now!r}")
            else:
                yield _Delta("unknown", where, f"the pattern must be {now!r} instead of {was!r}")
        was, now = old.get("format"), new.get("format")
        if was == now:
            return
        if was is None:
            yield _Delta("less", where, f"the format must be {now!r}")
        elif now is not None:
            yield _Delta("more" if self._received else "unknown", where, f"the format is {now!r} instead of {was!r}")
        elif self._received or was in _TEXTS or (was in _TIMES and old.get("facts", {}).get("strict")):
            yield _Delta("more", where, f"the format {was!r} is no longer required")
        elif was in _TIMES:
            yield _Delta("less", where, f"is no longer read as {was!r}: a number is refused")
            yield _Delta("more", where, f"the format {was!r} is no longer required")
        else:
            yield _Delta("unknown", where, f"the format {was!r} is no longer required")

    def _arrays(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        yield from _lengths(old, new, "minItems", "maxItems", where)
        if old.get("uniqueItems", False) != new.get("uniqueItems", False):
            if not self._received:  # Pydantic drops repeated items before it counts.
                yield _Delta("unknown", where, "the way that equal items are counted has changed")
            elif new.get("uniqueItems"):
                yield _Delta("less", where, "two items are no longer equal")
            else:
                yield _Delta("more", where, "two items may now be equal")
        deltas = list(self._items(old, new, where))
        yield from deltas
        sized = old.keys() & {"minItems", "maxItems"} or new.keys() & {"minItems", "maxItems"}
        if deltas and sized and new.get("uniqueItems") and not self._received:
            yield _Delta("unknown", where, "equal items count once, and which ones are equal may have changed")

    def _items(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        first, second = old.get("prefixItems", []), new.get("prefixItems", [])
        rest = old.get("items", {}), new.get("items", {})
        most = max(_most(old), _most(new))
        for index in range(max(len(first), len(second))):
            if index >= most:
                break
            one = first[index] if index < len(first) else rest[0]
            other = second[index] if index < len(second) else rest[1]
            yield from self._parts(one, other, f"{where}, item {index}")
        if most > max(len(first), len(second)):
            yield from self._parts(rest[0], rest[1], f"{where}, each item")

    def _parts(self, old: Any, new: Any, where: str) -> Iterator[_Delta]:
        if old is False or new is False:
            if old is not new:
                relation: _Relation = "more" if old is False else "less"
                yield _Delta(relation, where, "may now be there" if old is False else "is no longer accepted")
            return
        yield from self._values({} if old is True else old, {} if new is True else new, where)

    def _objects(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        yield from _lengths(old, new, "minProperties", "maxProperties", where)
        yield from self._keys(old, new, where)
        before, after = old.get("properties", {}), new.get("properties", {})
        must, needs = set(old.get("required", ())), set(new.get("required", ()))
        rest, others = old.get("additionalProperties", True), new.get("additionalProperties", True)
        names, also = old.get("facts", {}).get("names", {}), new.get("facts", {}).get("names", {})
        known: set[str] = set()  # Members of the new model that read a name of an old member.
        for name in sorted(before):
            place = f"{where}.{name}"
            taken = names.get(name, [name])
            same = [shown for shown in sorted(after) if _heads(taken) & _heads(also.get(shown, [shown]))]
            known |= set(same)
            if not same:
                yield from self._gone(before[name], others, name in must, place)
                continue
            if len(same) > 1:
                words = f"its names now belong to several members, {', '.join(same)}"
                yield _Delta("unknown", place, words)
            shown = name if name in same else same[0]
            if shown in needs and name not in must:
                yield _Delta("less", place, "must now be given: events without it are refused")
            elif name in must and shown not in needs:
                default = after[shown].get("default")
                words = f"may now be left out; pages then read {shorten(default)}"
                yield _Delta("more", place, "may now be missing" if self._received else words)
            yield from self._names(name, shown, taken, also.get(shown, [shown]), place)
            yield from self._values(before[name], after[shown], place)
        for name in sorted(after.keys() - known):
            place = f"{where}.{name}"
            if self._received:
                yield _Delta("same", place, "a new member: pages receive it")
            elif name in needs:
                yield _Delta("less", place, "a new member that must be given: events without it are refused")
            elif rest is not False:
                yield _Delta("same", place, "a new member that may be left out")
            if rest is False:
                yield _Delta("more", place, "a new member, where only the known ones were allowed")
            elif rest is not True and rest:
                yield from self._values(rest, after[name], place)

    def _gone(self, old: Any, others: Any, was_required: bool, place: str) -> Iterator[_Delta]:
        if others is False:
            yield _Delta("less", place, "the member is gone: events with it are refused")
        if self._received:
            yield _Delta("more" if was_required else "same", place, "the member is gone: pages no longer receive it")
        elif others is not False:
            yield _Delta("same", place, "the member is gone: the bridge drops it if publishers still write it")
            if was_required:
                yield _Delta("more", place, "the member is gone: it may be left out")
            if others is not True and others:
                yield from self._values(old, others, place)

    def _names(self, name: str, shown: str, was: list[Any], now: list[Any], place: str) -> Iterator[_Delta]:
        gone = [path for path in was if path not in now]
        more = [path for path in now if path not in was]
        if name != shown and not gone:
            yield _Delta("same", place, f"is now named {shown}; the old name is accepted too")
        if gone:
            yield _Delta("less", place, f"is no longer accepted under the name {', '.join(map(_path, gone))}")
        if more:
            yield _Delta("more", place, f"is accepted under the name {', '.join(map(_path, more))} too")

    def _keys(self, old: Schema, new: Schema, where: str) -> Iterator[_Delta]:
        """Compares the members without a declared name, such as those of a dict."""
        for keyword in ("patternProperties", "propertyNames"):
            was, now = old.get(keyword), new.get(keyword)
            if self._old.text(was) == self._new.text(now):
                continue
            if keyword == "propertyNames" and was is not None and now is not None:
                yield from self._values(was, now, f"{where}, each name")
            elif keyword == "patternProperties" and was is not None and now is not None and was.keys() == now.keys():
                for pattern in sorted(was):
                    yield from self._values(was[pattern], now[pattern], f"{where}, each value")
            else:
                yield _Delta("unknown", where, f"the names that members may have ({keyword}) have changed")
        rest, others = old.get("additionalProperties", True), new.get("additionalProperties", True)
        rest, others = (True if part == {} else part for part in (rest, others))
        if rest == others and isinstance(rest, bool):
            return
        place = f"{where}, each value"
        if others is False:
            yield _Delta("less", where, "a member that is not declared is refused now")
        elif rest is False:
            yield _Delta("more", where, "a member that is not declared is accepted now")
        elif rest is True and "properties" in old:
            yield _Delta("same", where, "has members of any name now")
        elif others is True and "properties" in new:
            # A model replaces a dict. Its declared members are compared one by one; the others are dropped.
            yield _Delta("same", where, "now has only the declared members")
        else:
            yield from self._values({} if rest is True else rest, {} if others is True else others, place)


def _resolved(schema: Any, side: _Side) -> Schema:
    """The schema that a reference points to, merged with the keywords beside the reference."""
    seen: set[str] = set()
    while isinstance(reference := schema.get("$ref"), str):
        if reference in seen:
            raise ValueError(f"{reference} leads to itself")
        seen.add(reference)
        beside = {name: value for name, value in schema.items() if name != "$ref"}
        target = side.definitions[reference] if reference != "#" else side.root
        if "facts" in beside and "facts" in target:
            beside["facts"] = {**target["facts"], **beside["facts"], "beside": beside["facts"]}
        schema = {**target, **beside}
    return dict(schema)


def _branches_of(schema: Schema) -> list[Any] | None:
    found = schema.get("anyOf") or schema.get("oneOf")
    if found is not None:
        return list(found)
    kinds = schema.get("type")
    return [{**schema, "type": kind} for kind in kinds] if isinstance(kinds, list) else None


def _branches(schema: Schema, side: _Side) -> list[Schema]:
    """The options of a union, with nested unions flattened and each listed value as an option."""
    found: list[Schema] = []
    branches = _branches_of(schema)
    if branches is None:
        return [schema]
    for branch in branches:
        inside = _resolved(branch, side)
        if _branches_of(inside) is not None and "facts" not in inside and "default" not in inside:
            found += _branches(inside, side)
        elif (choices := _choices_of(inside)) is not None and len(choices) > 1 and "facts" not in inside:
            found += [{"const": value} for value in choices]
        else:
            found.append(branch)
    return found


def _choices_of(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values: list[Any] | None = schema.get("enum")
    return values


def _key(value: Any) -> str:
    """A text that is the same for values that are equal in JSON: 1 and 1.0, but not 1 and true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _heads(names: list[Any]) -> set[str]:
    """The top-level members that the names, which may be paths, are read from."""
    return {name if isinstance(name, str) else str(name[0]) for name in names}


def _path(name: Any) -> str:
    return name if isinstance(name, str) else ".".join(map(str, name))


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


def _kinds_of(schema: Schema) -> set[str]:
    choices = _choices_of(schema)
    if choices is not None:
        return {_kind_of(value) for value in choices}
    kind = schema.get("type", "anything")
    return {kind} if isinstance(kind, str) else set(kind)


def _meet(one: str, other: str) -> bool:
    numbers = ("integer", "number")
    return one == other or "anything" in (one, other) or (one in numbers and other in numbers)


def _fits(value: Any, schema: Schema) -> bool | None:
    """Whether a plain schema allows a value. None: unknown."""
    choices = _choices_of(schema)
    if choices is not None:
        return _key(value) in {_key(choice) for choice in choices}
    kind, found = schema.get("type"), _kind_of(value)
    if schema.keys() - _KNOWN:
        return None
    if kind is None:
        return True
    if kind == "integer" and found == "number":
        found = "integer" if isinstance(value, int) or value.is_integer() else "number"
    if found != kind and not (found == "number" and kind == "number"):
        return False
    if found in ("number", "integer"):
        for up in (True, False):
            limit = _limit(schema, up=up)
            if limit is not None and _is_outside(value, limit, up=up):
                return False
        return None if "multipleOf" in schema else True
    if found == "string":
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return False
        return None if schema.keys() & {"pattern", "format"} or "facts" in schema else True
    return True if found in ("null", "boolean") else None


def _is_outside(value: Any, limit: tuple[Any, bool], *, up: bool) -> bool:
    bound, open_end = limit
    if value == bound:
        return open_end
    return bool(value < bound if up else value > bound)


def _limit(schema: Schema, *, up: bool) -> tuple[Any, bool] | None:
    """The tighter of the two limits at one end, and whether the limit itself is excluded."""
    closed, opened = ("minimum", "exclusiveMinimum") if up else ("maximum", "exclusiveMaximum")
    limits = [(schema[name], name == opened) for name in (closed, opened) if name in schema]
    if schema.get("type") == "integer":
        limits = [((bound + 1 if up else bound - 1) if open_end and isinstance(bound, int) else bound,
                   open_end and not isinstance(bound, int)) for bound, open_end in limits]  # fmt: skip
    if not limits:
        return None
    return max(limits) if up else min(limits, key=lambda limit: (limit[0], not limit[1]))


def _limited(was: Any, now: Any, words: str, where: str, *, up: bool) -> _Delta:
    def text(limit: Any) -> str:
        return "not limited" if limit is None else f"{'beyond ' if limit[1] else ''}{limit[0]}"

    if now is None:
        return _Delta("more", where, f"the {words} is no longer limited (was {text(was)})")
    if was is None:
        tighter = True
    elif was[0] == now[0]:
        tighter = now[1]
    else:
        tighter = now[0] > was[0] if up else now[0] < was[0]
    return _Delta("less" if tighter else "more", where, f"the {words} is now {text(now)}, was {text(was)}")


def _lengths(old: Schema, new: Schema, least: str, most: str, where: str) -> Iterator[_Delta]:
    for keyword, up in ((least, True), (most, False)):
        was, now = ((schema[keyword], False) if schema.get(keyword, 0 if up else None) not in (None, 0)
                    or (not up and keyword in schema) else None for schema in (old, new))  # fmt: skip
        if was != now:
            yield _limited(was, now, _LENGTHS[keyword], where, up=up)


def _most(schema: Schema) -> float:
    if schema.get("items") is False:
        return float(min(len(schema.get("prefixItems", [])), schema.get("maxItems", float("inf"))))
    return float(schema.get("maxItems", float("inf")))


def _limits_text(schema: Schema) -> bool:
    facts = schema.get("facts", {})
    return bool(schema.keys() & {"minLength", "maxLength", "pattern", "format"} or facts.keys() & {"least", "most"})


def _bound_fact(was: Any, now: Any, sign: int) -> _Relation:
    if was is None or now is None:
        return "less" if was is None else "more"
    numbers = [_number(value) for value in (was, now)]
    if numbers[0] is None or numbers[1] is None:
        return "unknown"
    return "less" if (numbers[1] - numbers[0]) * sign > 0 else "more"


def _number(value: Any) -> Fraction | None:
    try:
        return None if isinstance(value, bool) else Fraction(Decimal(str(value)))
    except (InvalidOperation, ValueError, OverflowError):
        return None


def _within(deltas: list[_Delta]) -> bool:
    return not any(delta.relation in ("less", "unknown") for delta in deltas)


def _around(deltas: list[_Delta]) -> bool:
    return not any(delta.relation in ("more", "unknown") for delta in deltas)


def _name(schema: Schema, side: _Side) -> str:
    """A name for an option in messages: its value, its class, or its JSON type."""
    choices = _choices_of(schema)
    if choices is not None:
        return " or ".join(map(shorten, choices))
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return re.sub(r"^.*/", "", reference)
    if (branches := _branches_of(schema)) is not None:
        return " or ".join(_name(branch, side) for branch in branches)
    kind = schema.get("type", "anything")
    return f"{kind} ({schema['format']})" if "format" in schema else str(kind)


def _names(options: list[Schema], side: _Side) -> str:
    return " or ".join(dict.fromkeys(_name(option, side) for option in options))
