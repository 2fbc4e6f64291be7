"""Makes sample values for a JSON Schema, to try a model before its first use.

Pure. A sample is a guess: it may not match a pattern or pass a validator of the model. The caller tries each sample
and skips those that the model refuses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

MAX_SAMPLES = 32
"""The most samples of one schema: enough for a dozen members with two or three options each."""

_MAX_DEPTH = 6
"""A recursive model is followed to this depth. Below it, samples have no optional members."""

_BY_FORMAT = {
    "date-time": "2026-01-31T12:00:00.5Z",
    "date": "2026-01-31",
    "time": "12:00:00.5Z",
    "duration": "PT90S",
    "uuid": "0192f3a4-5b6c-7d8e-9f00-112233445566",
    "uri": "https://example.com/a",
    "email": "ann@example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "json-string": "{}",
}


class _NoSample(Exception):
    """No value can be guessed here."""


def samples(schema: Schema) -> Iterator[Any]:
    """Yields at most `MAX_SAMPLES` values: required members only, all members, then each option of each member.

    Args:
        schema: JSON Schema (draft 2020-12) as pydantic writes it, with its `$defs`.
    """
    definitions: dict[str, Schema] = schema.get("$defs", {})
    count = 0
    for choice in _choices(schema, definitions):
        if count == MAX_SAMPLES:
            return
        try:
            yield choice.value(schema, 0)
            count += 1
        except _NoSample:
            continue


def _choices(schema: Schema, definitions: dict[str, Schema]) -> Iterator[_Choice]:
    yield _Choice(definitions, only_required=True)
    yield _Choice(definitions)
    for name, member in schema.get("properties", {}).items():
        for option in range(1, len(_options(member))):
            yield _Choice(definitions, member=name, option=option)


def _options(schema: Schema) -> list[Any]:
    return schema.get("anyOf") or schema.get("oneOf") or schema.get("enum") or [schema]


class _Choice:
    """One selection: required or all members, and an option of one member. All other members use their first option."""

    def __init__(
        self, definitions: dict[str, Schema], *, only_required: bool = False, member: str = "", option: int = 0
    ) -> None:
        self._definitions = definitions
        self._only_required = only_required
        self._member = member
        self._option = option

    def value(self, schema: Schema | bool, depth: int, option: int = 0) -> Any:
        if depth > 2 * _MAX_DEPTH:
            raise _NoSample
        if isinstance(schema, bool):
            return "any"
        if "$ref" in schema:
            return self.value(self._definitions[schema["$ref"].rpartition("/")[2]], depth)
        if "const" in schema:
            return schema["const"]
        if schema.get("examples"):
            return schema["examples"][0]
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self.value(schema[keyword][option], depth + 1)
        if "enum" in schema:
            return schema["enum"][option]
        if "allOf" in schema:
            return self.value(schema["allOf"][0], depth + 1)
        kind = schema.get("type", "string")
        match kind[0] if isinstance(kind, list) else kind:
            case "null":
                return None
            case "boolean":
                return True
            case "integer" | "number":
                return _number(schema, whole=kind == "integer")
            case "array":
                return self._array(schema, depth)
            case "object":
                return self._object(schema, depth)
        return _text(schema)

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        items = [self.value(item, depth + 1) for item in schema.get("prefixItems", ())]
        least, most = schema.get("minItems", 0), schema.get("maxItems", 1)
        if schema.get("items", True) is not False and len(items) < most and (least or depth < _MAX_DEPTH):
            items += [self.value(schema.get("items", True), depth + 1)] * max(1, least - len(items))
        if schema.get("uniqueItems") and least > 1:
            raise _NoSample
        return items

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        found: dict[str, Any] = {}
        for name, member in schema.get("properties", {}).items():
            if name in required or not (self._only_required or depth >= _MAX_DEPTH):
                option = self._option if name == self._member and depth == 0 else 0
                found[name] = self.value(member, depth + 1, option)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict) and not found and depth < _MAX_DEPTH:
            found["a"] = self.value(extra, depth + 1)
        return found


def _number(schema: Schema, *, whole: bool) -> float | int:
    step = schema.get("multipleOf", 1)
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None and high is None:
        return int(step) if whole else 1.5 * step
    if low is None:
        return int((math.floor(high / step) - 1) * step)
    number = math.ceil(low / step) * step
    if "exclusiveMinimum" in schema and number <= low:
        number += step
    if high is not None and (number > high or ("exclusiveMaximum" in schema and number >= high)):
        number = (low + high) / 2
    return int(number) if whole else float(number)


def _text(schema: Schema) -> str:
    text = _BY_FORMAT.get(schema.get("format", ""), "text")
    return text.ljust(schema.get("minLength", 0), "x")[: schema.get("maxLength")]
