"""The catalogue in the words of others: TypeScript for pages, AsyncAPI for documentation and tools.

Pure. Both describe what a browser receives: the data as its model writes it out, with every default filled in. What a
publisher may write is the JSON Schema of `Catalogue.json_schema`, in which members with a default may be left out.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from bridge.catalogue import Catalogue
from bridge.event import SPECVERSION

Schema = dict[str, Any]

_INDENT = "  "
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")

_PREAMBLE = """\
// The event catalogue's types, as browsers receive them.
// Made by `bridge schemas export --format typescript`; edit the models instead.

/** A CloudEvent 1.0 in JSON, as it stands in an SSE `data:` line. */
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


class _Received(GenerateJsonSchema):
    """A member with a default is always there: the bridge writes it out."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return not field.get("serialization_exclude")


def _received(catalogue: Catalogue) -> tuple[dict[str, str], dict[str, Schema]]:
    """The name of each event type's definition, and all definitions, with those of nested models."""
    models = list(catalogue.values())
    references, schema = models_json_schema(
        [(model, "serialization") for model in models],
        by_alias=True,
        ref_template="{model}",
        schema_generator=_Received,
    )
    names = {model.event_type: references[model, "serialization"]["$ref"] for model in models}
    return names, schema.get("$defs", {})


# TypeScript


def typescript(catalogue: Catalogue) -> str:
    """A module: one interface a model, a map from event type to data, and the union of all events."""
    names, definitions = _received(catalogue)
    parts = [_PREAMBLE, *(_declare(name, schema) for name, schema in definitions.items())]
    members = "".join(f"{_INDENT}{json.dumps(kind)}: {_identifier(names[kind])};\n" for kind in catalogue)
    return "\n".join([*parts, f"export interface EventDataByType {{\n{members}}}\n"]) + _UNION


def _declare(name: str, schema: Schema) -> str:
    comment = _comment(schema, "")
    if schema.get("type") == "object" and "properties" in schema and not schema.get("additionalProperties"):
        return f"{comment}export interface {_identifier(name)} {_object(schema, '')}\n"
    return f"{comment}export type {_identifier(name)} = {_type(schema, '')};\n"


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_$]", "_", name)


def _comment(schema: Schema, indent: str) -> str:
    # A text that ended the comment would be code.
    text = " ".join(str(schema.get("description", "")).split()).replace("*/", "*\\/")
    return f"{indent}/** {text} */\n" if text else ""


def _type(schema: Schema | bool, indent: str) -> str:
    """The type of a value. What TypeScript cannot say (lengths, patterns, ranges) the bridge has validated."""
    if isinstance(schema, bool):
        return "unknown" if schema else "never"
    if "$ref" in schema:
        return _identifier(schema["$ref"])
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    if "enum" in schema:
        return _union([json.dumps(value, ensure_ascii=False) for value in schema["enum"]])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _union([_type(option, indent) for option in schema[choice]])
    if "allOf" in schema:
        return " & ".join(_group(_type(part, indent)) for part in schema["allOf"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return _union([_type({**schema, "type": each}, indent) for each in kind])
    match kind:
        case "string":
            return "string"
        case "integer" | "number":
            return "number"
        case "boolean" | "null":
            return str(kind)
        case "array":
            return _array(schema, indent)
        case "object":
            return _object(schema, indent)
    return "unknown"


def _union(options: list[str]) -> str:
    return " | ".join(dict.fromkeys(_group(option) if "&" in option else option for option in options)) or "never"


def _group(text: str) -> str:
    return f"({text})" if " | " in text or " & " in text else text


def _array(schema: Schema, indent: str) -> str:
    if "prefixItems" in schema:
        items = [_type(item, indent) for item in schema["prefixItems"]]
        if schema.get("items") not in (None, False) and schema.get("maxItems") != len(items):
            items.append(f"...{_group(_type(schema['items'], indent))}[]")
        return f"[{', '.join(items)}]"
    return f"{_group(_type(schema.get('items', True), indent))}[]"


def _object(schema: Schema, indent: str) -> str:
    properties: dict[str, Schema] = schema.get("properties", {})
    extra = schema.get("additionalProperties")
    if not properties:
        return f"Record<string, {_type(extra, indent)}>" if extra is not None else "Record<string, unknown>"
    required = set(schema.get("required", ()))
    inner = indent + _INDENT
    lines = []
    for name, member in properties.items():
        key = name if _NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False)
        optional = "" if name in required else "?"
        lines.append(f"{_comment(member, inner)}{inner}{key}{optional}: {_type(member, inner)};\n")
    return f"{{\n{''.join(lines)}{indent}}}"


# AsyncAPI


def asyncapi(catalogue: Catalogue, *, version: str) -> dict[str, Any]:
    """An AsyncAPI 3.0 document of the stream, from the page's side: it receives.

    Args:
        version: of the bridge.
    """
    names, definitions = _received(catalogue)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Events for browsers",
            "version": version,
            "description": "Server-Sent Events of the person whose token the request carries (WHATWG HTML, section "
            "9.2). Each event's `id:` is a cursor; sent back in Last-Event-ID it resumes the stream.",
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
                    "payload": _envelope(kind, names[kind]),
                }
                for kind, model in catalogue.items()
            },
            "schemas": {name: _with_pointers(schema) for name, schema in definitions.items()},
        },
    }


def _pointer(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")  # RFC 6901, section 3.


def _envelope(kind: str, name: str) -> Schema:
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
            "data": {"$ref": f"#/components/schemas/{_pointer(name)}"},
        },
    }


def _with_pointers(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            name: f"#/components/schemas/{_pointer(part)}"
            if name == "$ref" and isinstance(part, str)
            else _with_pointers(part)
            for name, part in schema.items()
        }
    return [_with_pointers(part) for part in schema] if isinstance(schema, list) else schema
