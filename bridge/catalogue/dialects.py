"""What the catalogue's models say, in the dialects of JSON Schema that other tools read.

Pure. pydantic writes JSON Schema 2020-12 with three kinds of foreign parts, which strict tools refuse: OpenAPI's
`discriminator`, formats that no standard defines or that pydantic's own data does not fit, and patterns in the syntax
of Rust or Python. `standard` takes them out, `openapi` keeps the discriminator, `draft_07` is for AsyncAPI.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

Schema = dict[str, Any]

DEFINITIONS = "#/$defs/"

# Where a schema holds other schemas. Everything else in a schema is a value: a `const` of {"$ref": ...} is not
# a reference, and neither is a member that is called `$ref`.
_ONE = {"items", "additionalItems", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "contains",
        "contentSchema", "if", "then", "else", "not", "propertyNames"}  # fmt: skip
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_MAPS = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}

_TROUBLESOME = frozenset({"$ref", "__proto__"})
"""Names of members that tools with a whole document lose: they resolve the one as a reference, and copying objects in
JavaScript sets the prototype instead of the other. A pattern says the same."""

_TIME = r"\d{2}:\d{2}(:\d{2}(\.\d+)?)?([Zz]|[+-]\d{2}:?\d{2})?"
_DECIMAL = r"^\s*[+-]?(?=\.?\d)[\d_]*\.?[\d_]*([eE][+-]?\d+)?\s*$"
_ADDRESS = "[0-9A-Fa-f:.]+"
_FORMATS: dict[str, str | None] = {
    # RFC 3339 wants an offset in a time and no fraction in a duration. pydantic reads and writes both otherwise.
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
    # These take any text.
    "binary": None,
    "color": None,
    "directory-path": None,
    "file-path": None,
    "json-string": None,
    "path": None,
    "phone": None,
}
"""pydantic's formats that JSON Schema does not define, or defines otherwise, and a pattern that says as much."""


class Generator(GenerateJsonSchema):
    """pydantic's own, where that one does not say what its models accept."""

    def tagged_union_schema(self, schema: Any) -> Schema:
        # A discriminator that is a function leaves no mark in the data, so that more than one option may fit.
        union: Schema = super().tagged_union_schema(schema)
        return union if "discriminator" in union or "oneOf" not in union else {"anyOf": union["oneOf"]}

    def get_decimal_pattern(self, schema: Any) -> str | None:
        # pydantic's own pattern refuses the exponents that its models read and write.
        return None if schema.get("allow_inf_nan") else _DECIMAL

    def dict_schema(self, schema: Any) -> Schema:
        found: Schema = super().dict_schema(schema)
        if "patternProperties" in found:  # A key that does not fit is refused, and pydantic does not say so.
            found.setdefault("additionalProperties", False)
        return found

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        # For example PlainValidator(f): only `f` knows. A schema for anything is true; an exception would not help.
        return {}


class Received(Generator):
    """The data as the bridge writes it out. A member with a default is always there."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        if field.get("serialization_exclude_if") is not None:
            return False
        if field["type"] == "typed-dict-field":  # It has no defaults.
            return bool(field.get("required", total))
        return True

    def ser_schema(self, schema: Any) -> Schema | None:
        # pydantic would take a serializer without a return annotation for one that changes nothing.
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
    """JSON Schema 2020-12 and nothing besides, as ajv's strict mode wants it."""
    return _rewritten(schema, lambda part: _without(_tidy(part), "discriminator"))


def openapi(schema: Schema, definitions: str) -> Schema:
    """A Schema Object of OpenAPI 3.1 and 3.2, which is JSON Schema 2020-12 with a discriminator.

    Args:
        definitions: JSON pointer to the definitions, with a slash at its end.
    """

    def change(part: Schema) -> Schema:
        part = _move_reference(_tidy(part), definitions)
        if isinstance(found := part.get("discriminator"), dict):
            # An option that is a union itself has no name to be referred to by.
            mapping = {
                tag: _moved(name, definitions)
                for tag, name in found.get("mapping", {}).items()
                if isinstance(name, str)
            }
            part = {**part, "discriminator": {"propertyName": found["propertyName"], "mapping": mapping}}
        return part

    return _rewritten(schema, change)


def draft_07(schema: Schema, definitions: str) -> Schema:
    """A Schema Object of AsyncAPI 3.0, which is JSON Schema draft-07 with a discriminator that is a name.

    Everything that draft-07 says otherwise is said so; what it cannot say is left out, so that it refuses nothing that
    the schema takes.

    Args:
        definitions: JSON pointer to the definitions, with a slash at its end.
    """
    return _rewritten(schema, lambda part: _to_draft_07(_move_reference(_tidy(part), definitions)))


def _rewritten(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    found: Schema = _rewrite(schema, change)
    return found


def _rewrite(schema: Any, change: Callable[[Schema], Schema]) -> Any:
    """Each schema in a schema, changed, the inner ones first."""
    if not isinstance(schema, dict):
        return schema  # True, False, or what somebody wrote by hand.
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
            note = f"the pattern {schema['pattern']} cannot be said in ECMA-262"
            noted = f"{note}. {schema['$comment']}" if "$comment" in schema else note
            schema = {**_without(schema, "pattern"), "$comment": noted}
    if isinstance(schema.get("patternProperties"), dict):
        members: Schema = {}
        for pattern, part in schema["patternProperties"].items():
            known = ecma_pattern(pattern)
            members["" if known is None else known] = part  # An empty pattern fits every name.
        schema = {**schema, "patternProperties": members}
    return schema


def unsayable(pattern: re.Pattern[str] | str | None) -> str | None:
    """A pattern that `standard` leaves out."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    return text if text is not None and ecma_pattern(text) is None else None


_SYNTAX = frozenset("^$\\.*+?()[]{}|/")
_CLASS_ESCAPES = frozenset("dDwWsSbBtnvfr0123456789")


def ecma_pattern(pattern: str) -> str | None:
    """The pattern of Rust's or Python's syntax in that of ECMA-262 with its flag `u`, as JSON Schema has it.

    Returns:
        None where it cannot be said there: inline flags, verbose patterns, classes with operators, possessive matches.
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
                found.append(escaped)  # `\@` is an error with the flag `u`, and means `@`.
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
            if pattern.startswith("]", position):  # First in a class it is a character.
                found.append("\\]")
                position += 1
        elif char == "(" and rest.startswith("(?"):
            group = re.match(r"\(\?(?:[:=!]|<[=!]|P?<([A-Za-z_]\w*)>|P=(\w+)\))", rest)
            if group is None or (group[2] and group[2] not in names):
                return None
            position += group.end() - 1
            if group[1]:  # Python writes `(?P<name>`, JavaScript `(?<name>`: a number is understood by both.
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
    # A schema that holds a reference holds nothing else: all besides `$ref` would be passed over.
    applied = schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"}
    schema = _without(schema, "$schema", "$id", "$anchor", "$dynamicAnchor", "$vocabulary", "maxContains")
    if schema.pop("minContains", 1) == 0:
        schema.pop("contains", None)
    for name, plain in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if name in schema:
            value = schema.pop(name)
            if not applied:  # Else it depends on what the others took, which draft-07 does not know.
                schema.setdefault(plain, value)
    if "prefixItems" in schema:
        first, others = schema.pop("prefixItems"), schema.pop("items", None)
        schema["items"] = first
        if others is not None:
            schema["additionalItems"] = others
    elif schema.get("items") is False:  # AsyncAPI's `items` is a schema and no boolean, in its own parser.
        schema["items"] = _NEVER
    dependencies = {**schema.pop("dependentRequired", {}), **schema.pop("dependentSchemas", {})}
    if dependencies:
        schema["dependencies"] = dependencies
    if "$defs" in schema:
        schema["definitions"] = schema.pop("$defs")
    if isinstance(schema.get("discriminator"), dict):
        # AsyncAPI's is the name of a member, whose values the options have as `const` or `enum`.
        schema["discriminator"] = schema["discriminator"]["propertyName"]
    if "$ref" in schema and len(schema) > 1:
        reference = {"$ref": schema.pop("$ref")}
        schema["allOf"] = [reference, *schema.get("allOf", ())]
    return schema
