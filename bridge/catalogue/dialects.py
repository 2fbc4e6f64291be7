"""Translates pydantic's JSON Schema into the dialects that other tools read.

Pure. pydantic writes JSON Schema 2020-12, but three parts of it make strict tools fail:

- OpenAPI's `discriminator`,
- formats that no standard defines, or that pydantic's own data does not match,
- patterns in the syntax of Rust or Python.

`standard` removes all three. `openapi` keeps the discriminator. `draft_07` is for AsyncAPI.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

Schema = dict[str, Any]

DEFINITIONS = "#/$defs/"

# The keywords whose values are schemas. Other keywords have plain values: a `const` of {"$ref": ...} is not a
# reference, and neither is a member with the name `$ref`.
_ONE = {"items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
        "contentSchema", "if", "then", "else", "not", "propertyNames"}  # fmt: skip
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_MAPS = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}

_TROUBLESOME = frozenset({"$ref", "__proto__"})
"""Member names that tools mishandle: they resolve `$ref` as a reference, and a JavaScript copy of `__proto__` sets the
prototype. A pattern for the name replaces each of them."""

_TIME = r"\d{2}:\d{2}(:\d{2}(\.\d+)?)?([Zz]|[+-]\d{2}:?\d{2})?"
_DECIMAL = r"^\s*[+-]?(?=\.?\d)[\d_]*\.?[\d_]*([eE][+-]?\d+)?\s*$"
_ADDRESS = "[0-9A-Fa-f:.]+"
_FORMATS: dict[str, str | None] = {
    # RFC 3339 requires an offset in a time, and no fraction in a duration. pydantic reads and writes other forms too.
    "time": f"^{_TIME}$",
    "duration": r"^[+-]?(P.*\d.*|.*\d{1,2}:\d{2}.*)$",
    "base64url": "^[A-Za-z0-9_+/=-]*$",
    "ipvanyaddress": f"^{_ADDRESS}$",
    "ipvanyinterface": f"^{_ADDRESS}(/[0-9.]+)?$",
    "ipvanynetwork": f"^{_ADDRESS}(/[0-9.]+)?$",
    "ipv4interface": r"^[0-9.]+(/[0-9.]+)?$",
    "ipv4network": r"^[0-9.]+(/[0-9.]+)?$",
    "ipv6interface": f"^{_ADDRESS}(/[0-9]+)?$",
    "ipv6network": f"^{_ADDRESS}(/[0-9]+)?$",
    "multi-host-uri": "^[A-Za-z][A-Za-z0-9+.-]*:",
    "name-email": "@",
    # These formats accept any text.
    "binary": None,
    "color": None,
    "directory-path": None,
    "file-path": None,
    "json-string": None,
    "path": None,
    "phone": None,
}
"""pydantic's formats that JSON Schema does not define, or defines differently, and a pattern in place of each."""


class Generator(GenerateJsonSchema):
    """pydantic's generator, corrected where its schema differs from what the models accept."""

    def tagged_union_schema(self, schema: Any) -> Schema:
        # A discriminator that is a function is not visible in the data, so more than one option may match.
        union: Schema = super().tagged_union_schema(schema)
        return union if "discriminator" in union or "oneOf" not in union else {"anyOf": union["oneOf"]}

    def get_decimal_pattern(self, schema: Any) -> str | None:
        # pydantic's pattern refuses exponents, which its models read and write.
        return None if schema.get("allow_inf_nan") else _DECIMAL

    def dict_schema(self, schema: Any) -> Schema:
        found: Schema = super().dict_schema(schema)
        if "patternProperties" in found:  # The model refuses other keys, but pydantic's schema does not.
            found.setdefault("additionalProperties", False)
        return found

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        # For example PlainValidator(f): only `f` knows what it accepts. A schema for any value is correct.
        return {}


class Received(Generator):
    """The data as the bridge writes it. A member with a default is always present."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        if field.get("serialization_exclude_if") is not None:
            return False
        if field["type"] == "typed-dict-field":  # A typed dict has no defaults.
            return bool(field.get("required", total))
        return True

    def ser_schema(self, schema: Any) -> Schema | None:
        # pydantic assumes that a serializer without a return annotation changes nothing.
        if schema["type"] in ("function-plain", "function-wrap") and schema.get("return_schema") is None:
            if schema.get("when_used") == "json-unless-none":
                return None
            return {}
        return super().ser_schema(schema)

    def _whole(self, schema: Schema) -> Schema:
        if "prefixItems" in schema:
            schema["minItems"] = len(schema["prefixItems"])
        return schema

    def named_tuple_schema(self, schema: Any) -> Schema:
        return self._whole(super().named_tuple_schema(schema))

    def p_arguments_schema(self, arguments: Any, var_args_schema: Any) -> Schema:
        return self._whole(super().p_arguments_schema(arguments, var_args_schema))


def standard(schema: Schema) -> Schema:
    """Plain JSON Schema 2020-12, which passes ajv's strict mode."""
    return _rewritten(schema, lambda part: _without(_tidy(part), "discriminator"))


def openapi(schema: Schema, definitions: str) -> Schema:
    """A Schema Object of OpenAPI 3.1 and 3.2, which is JSON Schema 2020-12 with a discriminator.

    Args:
        definitions: JSON pointer to the definitions. It ends with a slash.
    """

    def change(part: Schema) -> Schema:
        part = _move_reference(_tidy(part), definitions)
        if isinstance(found := part.get("discriminator"), dict):
            # An option that is itself a union has no name to refer to.
            mapping = {
                tag: _moved(name, definitions)
                for tag, name in found.get("mapping", {}).items()
                if isinstance(name, str)
            }
            part = {**part, "discriminator": {"propertyName": found["propertyName"], "mapping": mapping}}
        return part

    return _rewritten(schema, change)


def draft_07(schema: Schema, definitions: str) -> Schema:
    """A Schema Object of AsyncAPI 3.0, which is JSON Schema draft-07 with a member's name as discriminator.

    Keywords are translated to those of draft-07. Rules that draft-07 cannot express are left out: the result accepts
    everything that the schema accepts.

    Args:
        definitions: JSON pointer to the definitions. It ends with a slash.
    """
    return _rewritten(schema, lambda part: _to_draft_07(_move_reference(_tidy(part), definitions)))


def _rewritten(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    found: Schema = _rewrite(schema, change)
    return found


def _rewrite(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """Applies `change` to a schema and to all schemas inside it, the inner ones first."""
    if not isinstance(schema, dict):
        return schema  # True, False, or a handwritten value.
    changed: Schema = {}
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, dict):
            changed[name] = {key: _rewrite(part, change) for key, part in value.items()}
        elif name in _LISTS and isinstance(value, list):
            changed[name] = [_rewrite(part, change) for part in value]
        else:
            changed[name] = _rewrite(value, change) if name in _ONE else value
    return change(changed)


def _without(schema: Schema, *names: str) -> Schema:
    return {name: value for name, value in schema.items() if name not in names}


def _moved(reference: str, definitions: str) -> str:
    if not reference.startswith(DEFINITIONS):
        return reference
    return definitions + reference.removeprefix(DEFINITIONS)


def _move_reference(schema: Schema, definitions: str) -> Schema:
    for name in _TROUBLESOME & set(schema.get("properties", ())):
        patterns = {**schema.get("patternProperties", {}), f"^{re.escape(name)}$": schema["properties"][name]}
        schema = {**schema, "properties": _without(schema["properties"], name), "patternProperties": patterns}
    if isinstance(schema.get("$ref"), str):
        return {**schema, "$ref": _moved(schema["$ref"], definitions)}
    return schema


def _tidy(schema: Schema) -> Schema:
    form = schema.get("format")
    if isinstance(form, str) and form in _FORMATS:
        schema = _without(schema, "format")
        pattern = _FORMATS[form]
        if pattern is not None and "pattern" not in schema:
            schema["pattern"] = pattern
    if isinstance(schema.get("pattern"), str):
        pattern = ecma_pattern(schema["pattern"])
        if pattern is not None:
            schema = {**schema, "pattern": pattern}
        else:
            lost = f"the pattern {schema['pattern']} cannot be written in ECMA-262"
            comment = f"{lost}. {schema['$comment']}" if "$comment" in schema else lost
            schema = {**_without(schema, "pattern"), "$comment": comment}
    if isinstance(schema.get("patternProperties"), dict):
        members: Schema = {}
        for pattern, part in schema["patternProperties"].items():
            known = ecma_pattern(pattern)
            members["" if known is None else known] = part  # An empty pattern matches every name.
        schema = {**schema, "patternProperties": members}
    return schema


def unsayable(pattern: re.Pattern[str] | str | None) -> str | None:
    """The text of the pattern if `standard` leaves it out. None: it keeps the pattern, or there is none."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    return text if text is not None and ecma_pattern(text) is None else None


_SYNTAX = frozenset("^$\\.*+?()[]{}|/")
_CLASS_ESCAPES = frozenset("dDwWsSbBtnvfr0123456789")


def ecma_pattern(pattern: str) -> str | None:
    """Translates a pattern of Rust or Python to ECMA-262 with the flag `u`, as JSON Schema requires.

    Returns:
        None if ECMA-262 cannot express it: inline flags, verbose patterns, classes with operators, possessive matches.
    """
    found: list[str] = []
    names: dict[str, int] = {}
    groups = 0
    in_class = False
    position = 0
    while position < len(pattern):
        char = pattern[position]
        rest = pattern[position:]
        position += 1
        if char == "\\":
            if position == len(pattern):
                return None
            escaped = pattern[position]
            position += 1
            if escaped in "Az" + "Z" and not in_class:
                found.append("^" if escaped == "A" else "$")
            elif escaped in "xu":
                code = re.match(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|[xu]\{([0-9A-Fa-f]{1,6})\})", rest)
                if code is None:
                    return None
                position += code.end() - 2
                point = int(next(digits for digits in code.groups() if digits), 16)
                found.append(f"\\u{point:04x}" if point < 0x10000 else chr(point))
            elif escaped in "pP":
                name = re.match(r"\\[pP](?:\{\^?[A-Za-z_=]+\}|[A-Z])", rest)
                if name is None or "^" in name[0]:
                    return None
                position += name.end() - 2
                found.append(name[0] if "{" in name[0] else f"\\{escaped}{{{name[0][2:]}}}")
            elif escaped in _SYNTAX or escaped in _CLASS_ESCAPES or (escaped == "-" and in_class):
                found.append(char + escaped)
            elif escaped.isalnum():
                return None
            else:
                found.append(escaped)  # `\@` means `@`, but is an error with the flag `u`.
        elif in_class:
            if char == "[" or rest.startswith(("&&", "--", "~~")):
                return None
            in_class = char != "]"
            found.append(char)
        elif char == "[":
            in_class = True
            found.append(char)
            if pattern.startswith("^", position):
                found.append("^")
                position += 1
            if pattern.startswith("]", position):  # The first `]` in a class is a character.
                found.append("\\]")
                position += 1
        elif char == "(" and rest.startswith("(?"):
            group = re.match(r"\(\?(?:[:=!]|<[=!]|P?<([A-Za-z_]\w*)>|P=(\w+)\))", rest)
            if group is None or (group[2] and group[2] not in names):
                return None
            position += group.end() - 1
            if group[1]:  # Python writes `(?P<name>`, JavaScript `(?<name>`: both can use the group's number.
                groups += 1
                names[group[1]] = groups
                found.append("(")
            else:
                found.append(rf"(?:\{names[group[2]]})" if group[2] else group[0])
        elif char == "(":
            groups += 1
            found.append(char)
        elif char == "{" and not (bounds := re.match(r"\{\d+(?:,\d*)?\}", rest)):
            if rest.startswith("{,"):
                return None
            found.append("\\{")
        elif char == "{":
            assert bounds is not None
            found.append(bounds[0])
            position += bounds.end() - 1
            if pattern.startswith("+", position):
                return None
        elif char in "]}":
            found.append("\\" + char)
        elif char in "*+?" and pattern.startswith("+", position):
            return None
        else:
            found.append(char)
    return None if in_class else "".join(found)


_NEVER: Schema = {"not": {}}


def _to_draft_07(schema: Schema) -> Schema:
    # In draft-07, a tool ignores all keywords beside `$ref`.
    applied = schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"}
    schema = _without(schema, "$schema", "$id", "$anchor", "$dynamicAnchor", "$vocabulary", "maxContains")
    if schema.pop("minContains", 1) == 0:
        schema.pop("contains", None)
    for name, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if name in schema:
            value = schema.pop(name)
            if not applied:  # Otherwise it depends on the other keywords' results, which draft-07 cannot express.
                schema.setdefault(plain, value)
    if "prefixItems" in schema:
        first, others = schema.pop("prefixItems"), schema.pop("items", None)
        schema["items"] = first
        if others is not None:
            schema["additionalItems"] = others
    elif schema.get("items") is False:  # AsyncAPI's parser accepts no boolean as `items`.
        schema["items"] = _NEVER
    dependencies = {**schema.pop("dependentRequired", {}), **schema.pop("dependentSchemas", {})}
    if dependencies:
        schema["dependencies"] = dependencies
    if "$defs" in schema:
        schema["definitions"] = schema.pop("$defs")
    if isinstance(schema.get("discriminator"), dict):
        # AsyncAPI's discriminator is a member's name; each option has its values as `const` or `enum`.
        schema["discriminator"] = schema["discriminator"]["propertyName"]
    if "$ref" in schema and len(schema) > 1:
        reference = {"$ref": schema.pop("$ref")}
        schema["allOf"] = [reference, *schema.get("allOf", ())]
    return schema
