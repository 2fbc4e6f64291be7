"""Exports the catalogue as TypeScript for pages, and as AsyncAPI for documentation and tools.

Pure. Both describe the data that a page receives: as its model writes it, with all defaults. The data that a publisher
may write is described by `Catalogue.json_schema`, where members with a default are optional.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from bridge.catalogue import dialects
from bridge.catalogue.load import Catalogue
from bridge.event import SPECVERSION

Schema = dict[str, Any]

_INDENT = "  "
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")

# Names of the exported module, names of TypeScript's types, and reserved words.
# fmt: off
_TAKEN = {
    "CloudEvent", "EventType", "EventDataByType", "BridgeEvent",
    "any", "bigint", "boolean", "never", "null", "number", "object", "string", "symbol",
    "undefined", "unknown", "void", "await", "break", "case", "catch", "class", "const",
    "continue", "debugger", "default", "delete", "do", "else", "enum", "export", "extends",
    "false", "finally", "for", "function", "if", "implements", "import", "in", "instanceof",
    "interface", "let", "new", "package", "private", "protected", "public", "return", "static",
    "super", "switch", "this", "throw", "true", "try", "typeof", "var", "while", "with",
    "yield", "infer", "keyof", "readonly", "unique", "asserts", "is",
}
# fmt: on

_PREAMBLE = """\
// The event catalogue's types, as browsers receive them.
// Made by `bridge schemas export --format typescript`; edit the models instead.

/** A CloudEvent 1.0 in JSON, as in an SSE `data:` line. */
export interface CloudEvent<Type extends string = string, Data = unknown> {
  specversion: "1.0";
  id: string;
  source: string;
  type: Type;
  subject?: string;
  time?: string;
  datacontenttype?: "application/json";
  dataschema?: string;
  traceparent?: string;
  tracestate?: string;
  data: Data;
}
"""

_UNION = """\

export type EventType = keyof EventDataByType;

/** Any event of the catalogue; `switch (event.type)` narrows its `data`. */
export type BridgeEvent = { [Type in EventType]: CloudEvent<Type, EventDataByType[Type]> }[EventType];
"""


def received(catalogue: Catalogue) -> tuple[dict[str, str], dict[str, Schema]]:
    """Returns the name of each event type's definition, and all definitions, including those of nested models.

    A reference is `#/$defs/` and a name with the characters `A-Z a-z 0-9 - _`.
    """
    models = list(catalogue.values())
    references, schema = models_json_schema(
        [(model, "serialization") for model in models],
        by_alias=True,
        ref_template=dialects.DEFINITIONS + "{model}",
        schema_generator=dialects.Received,
    )
    names = {
        model.event_type: references[model, "serialization"]["$ref"].removeprefix(dialects.DEFINITIONS)
        for model in models
    }
    return names, schema.get("$defs", {})


# TypeScript
#
# Written without json-schema-to-typescript or quicktype: they are npm packages, and `bridge schemas export` must work
# with Python alone. The tests check the result with the TypeScript compiler.


def typescript(catalogue: Catalogue) -> str:
    """A TypeScript module: one interface for each model, a map from event type to data, and the union of all events."""
    names, definitions = received(catalogue)
    known = _identifiers(definitions)
    writer = _TypeScriptWriter(known)
    parts = [_PREAMBLE, *(writer.declare(known[name], schema) for name, schema in definitions.items())]
    members = "".join(f"{_INDENT}{json.dumps(kind)}: {known[names[kind]]};\n" for kind in catalogue)
    return "\n".join([*parts, f"export interface EventDataByType {{\n{members}}}\n"]) + _UNION


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """A unique TypeScript identifier for each definition."""
    known: dict[str, str] = {}
    taken = set(_TAKEN)
    for name in names:
        identifier = re.sub(r"[^A-Za-z0-9_$]", "_", name)
        if not _NAME.fullmatch(identifier):
            identifier = f"_{identifier}"
        while identifier in taken:
            identifier += "_"
        taken.add(identifier)
        known[name] = identifier
    return known


def _comment(schema: Schema, indent: str) -> str:
    # A `*/` in the text would end the comment, and the rest would be code.
    text = " ".join(str(schema.get("description", "")).split()).replace("*/", "*\\/")
    return f"{indent}/** {text} */\n" if text else ""


def _literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _union(options: Iterable[str]) -> str:
    """A union type without repeated options. `unknown` replaces all other options."""
    found = dict.fromkeys(f"({option})" if " & " in option else option for option in options)
    return "unknown" if "unknown" in found else " | ".join(found) or "never"


def _group(text: str) -> str:
    return f"({text})" if " | " in text or " & " in text else text


class _TypeScriptWriter:
    """Writes TypeScript types. TypeScript has no lengths, patterns or ranges; the bridge has validated these."""

    def __init__(self, known: dict[str, str]) -> None:
        self._known = known

    def declare(self, identifier: str, schema: Schema) -> str:
        comment = _comment(schema, "")
        if schema.get("type") == "object" and "properties" in schema:
            return f"{comment}export interface {identifier} {self._object(schema, '')}\n"
        return f"{comment}export type {identifier} = {self._type(schema, '')};\n"

    def _type(self, schema: Schema | bool, indent: str) -> str:
        if isinstance(schema, bool):
            return "unknown" if schema else "never"
        if "$ref" in schema:
            # A handwritten reference may have an unknown target.
            return self._known.get(schema["$ref"].removeprefix(dialects.DEFINITIONS), "unknown")
        if "const" in schema:
            return _literal(schema["const"])
        if "enum" in schema:
            return _union(_literal(value) for value in schema["enum"])
        for choice in ("anyOf", "oneOf"):
            if choice in schema:
                return _union(self._type(option, indent) for option in schema[choice])
        if "allOf" in schema:
            return " & ".join(_group(self._type(part, indent)) for part in schema["allOf"])
        kind = schema.get("type")
        if isinstance(kind, list):
            return _union(self._type({**schema, "type": each}, indent) for each in kind)
        match kind:
            case "string":
                return "string"
            case "integer" | "number":
                return "number"
            case "boolean" | "null":
                return str(kind)
            case "array":
                return self._array(schema, indent)
            case "object":
                return self._object(schema, indent)
        return "unknown"

    def _array(self, schema: Schema, indent: str) -> str:
        if schema.get("maxItems") == 0:
            return "[]"
        if "prefixItems" not in schema:
            return f"{_group(self._type(schema.get('items', True), indent))}[]"
        items = [self._type(item, indent) for item in schema["prefixItems"]]
        least = schema.get("minItems", 0)
        items = [item if number < least else f"{_group(item)}?" for number, item in enumerate(items)]
        if schema.get("items", True) is not False and schema.get("maxItems") != len(items):
            items.append(f"...{_group(self._type(schema.get('items', True), indent))}[]")
        return f"[{', '.join(items)}]"

    def _object(self, schema: Schema, indent: str) -> str:
        properties: dict[str, Schema] = schema.get("properties", {})
        if not properties:
            # Not `Record<string, ...>`: a type may refer to itself only inside braces.
            return f"{{ [key: string]: {self._others(schema, indent)} }}"
        required = set(schema.get("required", ()))
        inner = indent + _INDENT
        lines = []
        for name, member in properties.items():
            key = name if _NAME.fullmatch(name) else _literal(name)
            optional = "" if name in required else "?"
            lines.append(f"{_comment(member, inner)}{inner}{key}{optional}: {self._type(member, inner)};\n")
        if schema.get("additionalProperties") or "patternProperties" in schema:
            lines.append(f"{inner}[key: string]: unknown;\n")  # `unknown`, because it must match declared members too.
        return f"{{\n{''.join(lines)}{indent}}}"

    def _others(self, schema: Schema, indent: str) -> str:
        """The type of the members that are not declared by name."""
        kinds = [self._type(part, indent) for part in schema.get("patternProperties", {}).values()]
        extra = schema.get("additionalProperties")
        if extra or not kinds:
            kinds.append("unknown" if extra is None else self._type(extra, indent))
        return _union(kinds)


# AsyncAPI


COMPONENTS = "#/components/schemas/"
"""The place of the definitions in AsyncAPI and OpenAPI documents."""

# The payloads are AsyncAPI's own Schema Objects, a superset of draft-07, which every tool must support.
# `schemaFormat` could name JSON Schema 2020-12. But AsyncAPI does not list that format, and @asyncapi/parser 3.6
# cannot read it: it passes such a payload on unread.


def asyncapi(catalogue: Catalogue, *, version: str) -> dict[str, Any]:
    """An AsyncAPI 3.0 document of the stream. It describes the page's side, which receives events.

    Args:
        version: the bridge's version.
    """
    names, definitions = received(catalogue)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Events for browsers",
            "version": version,
            "description": "Server-Sent Events for the user of the request's token (WHATWG HTML, section 9.2). Each "
            "event's `id:` is a cursor. A request with that cursor in Last-Event-ID resumes the stream.",
        },
        "defaultContentType": "application/json",
        "channels": {
            "events": {
                "address": "/events",
                "title": "The stream",
                "description": "`GET /events?types=job.*,billing.#`. The bridge's own frames are named `bridge.*`.",
                "messages": {kind: {"$ref": f"#/components/messages/{_pointer(kind)}"} for kind in catalogue},
            }
        },
        "operations": {
            "receiveEvents": {
                "action": "receive",
                "channel": {"$ref": "#/channels/events"},
                "messages": [{"$ref": f"#/channels/events/messages/{_pointer(kind)}"} for kind in catalogue],
            }
        },
        "components": {
            "messages": {
                kind: {
                    "name": kind,
                    "title": kind,
                    "summary": " ".join((model.__doc__ or "").split()),
                    "contentType": "application/cloudevents+json",
                    "payload": envelope(kind, names[kind]),
                }
                for kind, model in catalogue.items()
            },
            "schemas": {name: dialects.draft_07(schema, COMPONENTS) for name, schema in definitions.items()},
        },
    }


def _pointer(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")  # RFC 6901, section 3.


def envelope(kind: str, name: str) -> Schema:
    """The schema of a CloudEvent as pages get it.

    Args:
        kind: the event type.
        name: the name of the definition of its data.
    """
    text = {"type": "string"}
    return {
        "type": "object",
        "required": ["specversion", "id", "source", "type", "data"],
        "properties": {
            "specversion": {"const": SPECVERSION},
            "id": text,
            "source": text,
            "type": {"const": kind},
            "subject": text,
            "time": {"type": "string", "format": "date-time"},
            "datacontenttype": {"const": "application/json"},
            "dataschema": text,
            "traceparent": text,
            "tracestate": text,
            "data": {"$ref": COMPONENTS + name},
        },
    }
