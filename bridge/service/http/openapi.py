"""The HTTP side as an OpenAPI 3.2 document.

Pure. Version 3.2 is the first that can describe a stream: `itemSchema` is the schema of one frame. The descriptions
must agree with `docs/contract.md`, and a test compares the routes with the server's.
"""

from __future__ import annotations

from typing import Any, get_args

from bridge.catalogue import dialects
from bridge.catalogue.exports import COMPONENTS, envelope, received
from bridge.catalogue.load import Catalogue
from bridge.routing import MAX_PATTERNS, MAX_TYPE_CHARS
from bridge.service.streams import sse

Schema = dict[str, Any]

# No class of the catalogue has these names, because they contain a hyphen.
_PROBLEM = "bridge-problem"
_FRAME = "bridge-frame"

_CURSOR: Schema = {"type": "string", "pattern": "^[A-Za-z0-9._:~-]{1,160}$"}
_TYPE_PATTERN: Schema = {
    "type": "string",
    "maxLength": MAX_TYPE_CHARS,
    "pattern": r"^(?!.*#.*#.*#)([a-z0-9_-]+|\*|#)(\.([a-z0-9_-]+|\*|#))*$",
}
_TYPES: Schema = {"type": "array", "minItems": 1, "maxItems": MAX_PATTERNS, "items": _TYPE_PATTERN}
_JOINED = {"style": "form", "explode": False}
_AUDIENCE: Schema = {"type": "string", "pattern": "^(all|(user|group):.+)$"}
_OFFSET: Schema = {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}
_TEXT: Schema = {"type": "string"}


def openapi(
    catalogue: Catalogue,
    *,
    version: str,
    cookie: str = "bridge_token",
    query_token: bool = False,
    console: str = "false",
) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        version: the bridge's version.
        cookie: name of the cookie that may contain the token.
        query_token: whether `?access_token=` is accepted.
        console: the setting `console`: `false`, `true` or `development`.
    """
    names, definitions = received(catalogue)
    schemes = _security_schemes(cookie, query_token=query_token)
    security: list[dict[str, Any]] = [{name: []} for name in schemes]
    paths: dict[str, Any] = {
        "/events": _events(security),
        "/schemas": _resource(
            "Schemas",
            "The JSON Schema of each event type's data, as a publisher writes it.",
            {"application/json": {"schema": {"type": "object", "additionalProperties": {"type": "object"}}}},
        ),
        "/schemas/{type}": _resource(
            "Schema",
            "The JSON Schema of one event type's data, as a publisher writes it.",
            {"application/json": {"schema": {"type": "object"}}},
            name=("type", "The event type.", next(iter(catalogue))),
        ),
        "/asyncapi.json": _resource(
            "AsyncApi",
            "The stream as an AsyncAPI 3.0 document.",
            {"application/json": {"schema": {"type": "object", "required": ["asyncapi"]}}},
        ),
        "/openapi.json": _resource(
            "OpenApi",
            "This document.",
            {"application/json": {"schema": {"type": "object", "required": ["openapi"]}}},
        ),
        "/client.js": _resource("Client", "The client for browsers, a module.", {"text/javascript": {}}, tagged=True),
    }
    if console != "false":
        paths |= _console(security, list(catalogue) if console == "development" else [])
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "Events for browsers",
            "version": version,
            "description": "Server-Sent Events for the user of the request's token. Before the first byte of a stream, "
            "an error is a problem document (RFC 9457). After it, everything is a frame.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "The bridge that serves this document."}],
        "paths": paths,
        "components": {
            "securitySchemes": schemes,
            "schemas": {
                **{name: dialects.openapi(schema, COMPONENTS) for name, schema in definitions.items()},
                _PROBLEM: _problem_schema(),
                _FRAME: _frame(catalogue, names),
            },
        },
    }


def _security_schemes(cookie: str, *, query_token: bool) -> dict[str, Any]:
    schemes: dict[str, Any] = {
        "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
        "cookie": {"type": "apiKey", "in": "cookie", "name": cookie, "description": "The JWT, in a cookie."},
    }
    if query_token:
        schemes["query"] = {
            "type": "apiKey",
            "in": "query",
            "name": "access_token",
            "description": "The JWT, for clients that can set neither a header nor a cookie.",
        }
    return schemes


# Schemas


def _problem_schema() -> Schema:
    return {
        "title": "Problem",
        "description": "RFC 9457. The code in `type` is stable; `detail` is for a person.",
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string", "format": "uri", "pattern": "^urn:bridge:problem:[a-z0-9-]+$"},
            "title": _TEXT,
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": _TEXT,
        },
    }


def _frame(catalogue: Catalogue, names: dict[str, str]) -> Schema:
    """The schema of one block of the stream. Comments are not frames: a parser ignores them."""
    retry = {"type": "integer", "minimum": 0, "description": "Milliseconds until a client may reconnect."}

    def frame(name: str, title: str, data: Schema, required: list[str], **fields: Schema) -> Schema:
        return {
            "title": title,
            "type": "object",
            "required": [*required, "data"],
            "properties": {
                **fields,
                "event": {"const": name},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
            },
        }

    def reason(*reasons: str) -> Schema:
        return _object(reason={"enum": list(reasons)})

    ready = _object(
        user=_TEXT,
        identity=_TEXT,
        resumed={"type": "boolean"},
        heartbeat_seconds={"type": "number", "exclusiveMinimum": 0},
    )
    always = ["event"]
    return {
        "title": "Frame",
        "description": "With `named=false` an event of the catalogue has no `event` field. Its type is in its data.",
        "anyOf": [
            frame("bridge.ready", "First", ready, ["retry", "id", *always], retry=retry, id=_CURSOR),
            frame("bridge.gap", "Fetch your state again", reason(*get_args(sse.GapReason)), always),
            frame("bridge.position", "A new cursor", _object(), ["id", *always], id=_CURSOR),
            frame("bridge.status", "Whether events can arrive", _object(receiving={"type": "boolean"}), always),
            frame("bridge.bye", "Last", reason(*sse.END_REASONS), ["retry", *always], retry=retry, id=_CURSOR),
            *(frame(kind, kind, envelope(kind, names[kind]), ["id"], id=_CURSOR) for kind in catalogue),
        ],
    }


def _object(**members: Schema) -> Schema:
    return {"type": "object", "required": list(members), "properties": members}


# Answers


def _problem(description: str, **headers: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/problem+json": {"schema": {"$ref": COMPONENTS + _PROBLEM}}},
    }
    if headers:
        answer["headers"] = {
            name.replace("_", "-"): {"description": text, "schema": _TEXT} for name, text in headers.items()
        }
    return answer


def _without_body(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "content"}


# Answers that every route may give.
_ALWAYS = {
    "413": _problem("The body of the request is larger than 16,384 bytes."),
    "500": _problem("The bridge failed. Its log has the reason."),
    "505": _problem("The request is HTTP/2. Use HTTP/2 only at the proxy in front of the bridge."),
}
_UNKNOWN_TOKEN = {
    "401": _problem(
        "The token is missing or not valid: `missing-token`, `invalid-token`, `expired-token`, `revoked-token`. Or the "
        "application knows no user: `not-logged-in`.",
        WWW_Authenticate="The challenge (RFC 6750, section 3).",
    )
}


def _heads(get: dict[str, Any]) -> dict[str, Any]:
    """The operation of HEAD, derived from that of GET."""
    responses = {status: _without_body(answer) for status, answer in get["responses"].items()}
    return {**get, "operationId": "head" + get["operationId"].removeprefix("get"), "responses": responses}


def _resource(
    operation: str,
    summary: str,
    content: dict[str, Any],
    *,
    name: tuple[str, str, str] | None = None,
    tagged: bool = False,
) -> dict[str, Any]:
    """A path with the same answer for all users.

    Args:
        operation: the operation's name, after `get` or `head`.
        content: the content of the answer.
        name: the path parameter's name, description and example.
        tagged: whether the answer has an ETag.
    """
    answer: dict[str, Any] = {
        "description": summary,
        "headers": {"Cache-Control": {"description": "Checked at each use.", "schema": {"const": "no-cache"}}},
        "content": content,
    }
    responses: dict[str, Any] = {"200": answer}
    if tagged:
        answer["headers"]["ETag"] = {"description": "For `If-None-Match`.", "schema": _TEXT}
        responses["304"] = {"description": "The client has it already."}
    if name:
        responses["404"] = _problem("There is no resource of this name.")
    get = {"operationId": f"get{operation}", "summary": summary, "security": [], "responses": responses | _ALWAYS}
    path: dict[str, Any] = {"get": get, "head": _heads(get)}
    if name:
        parameter = {"name": name[0], "in": "path", "required": True, "description": name[1], "example": name[2]}
        path["parameters"] = [{**parameter, "schema": _TEXT}]
    return path


# Routes


def _events(security: list[dict[str, Any]]) -> dict[str, Any]:
    header = {"schema": _TEXT}
    get = {
        "operationId": "getEvents",
        "summary": "The stream of one user's events.",
        "description": "A temporary fault (too many connections, draining, RabbitMQ is away) has no error status. The "
        "answer is a stream with one `bridge.bye`, because a browser never reconnects after another status than 200.",
        "security": security,
        "parameters": [
            {
                "name": "types",
                "in": "query",
                "description": "Patterns of event types, joined by commas. `*` is one word, `#` any number of words. "
                "Default: every type.",
                **_JOINED,
                "schema": _TYPES,
                "example": ["job.*", "billing.#"],
            },
            {
                "name": "named",
                "in": "query",
                "description": "With `false`, events have no `event` field, so that `onmessage` gets them all.",
                "schema": {"type": "string", "enum": ["true", "false"], "default": "true"},
            },
            {
                "name": "audience",
                "in": "query",
                "description": "With `true`, each event has the attribute `audience`: `user:42`, `group:ops` or `all`.",
                "schema": {"type": "string", "enum": ["true", "false"], "default": "false"},
            },
            {
                "name": "lastEventId",
                "in": "query",
                "description": "The same as the header Last-Event-ID, which has priority. For clients that open a new "
                "stream.",
                "schema": _TEXT,
            },
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "The `id` of the last frame. The stream continues after it. If the bridge cannot read "
                "the id, the stream has `bridge.gap`.",
                "schema": _TEXT,
            },
        ],
        "responses": {
            "200": {
                "description": "The stream. It ends with `bridge.bye`, or with the connection.",
                "headers": {
                    "Cache-Control": header,
                    "X-Accel-Buffering": header,
                    "Bridge-Identity": {
                        "description": "An opaque name for the events that the stream may show, or `unknown`.",
                        "schema": {"type": "string", "pattern": "^(unknown|[A-Za-z0-9_-]{22})$"},
                    },
                },
                "content": {sse.MEDIA_TYPE: {"itemSchema": {"$ref": COMPONENTS + _FRAME}}},
            },
            "400": _problem("The query cannot be read: `invalid-types`, `invalid-named`, `invalid-audience`."),
            **_UNKNOWN_TOKEN,
            "403": _problem(
                "The page's origin or the user may have no stream: `origin-not-allowed`, `id-too-long`, `invalid-id`, "
                "`groups-elsewhere`, `forbidden-by-application`."
            ),
            "406": _problem("`Accept` does not admit text/event-stream."),
            **_ALWAYS,
        },
    }
    granted = ("Allow-Methods", "Allow-Headers", "Max-Age")
    preflight = {
        "operationId": "optionsEvents",
        "summary": "The preflight (CORS) for a page of another origin.",
        "security": [],
        "responses": {
            "204": {
                "description": "The origin is allowed.",
                "headers": dict.fromkeys(["Allow", *(f"Access-Control-{name}" for name in granted)], header),
            },
            "403": _problem("The page's origin is not allowed: `origin-not-allowed`."),
            **_ALWAYS,
        },
    }
    return {"get": get, "head": _heads(get), "options": preflight}


def _query(name: str, description: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _looked_up(**members: Schema) -> Schema:
    refused = {"anyOf": [_object(reason=_TEXT, detail=_TEXT), {"type": "null"}]}
    return _object(
        **members,
        routing_key=_TEXT,
        audience={"type": ["string", "null"]},
        body=_TEXT,
        bytes={"type": "integer", "minimum": 0, "description": "Size of the whole body."},
        is_cut={"type": "boolean", "description": "Whether `body` is only its beginning."},
        refused=refused,
    )


def _look_up(
    operation: str,
    summary: str,
    security: list[dict[str, Any]],
    schema: Schema,
    parameters: list[dict[str, Any]],
    problems: dict[str, Any],
) -> dict[str, Any]:
    limit = {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    get = {
        "operationId": f"get{operation}",
        "summary": summary,
        "security": security,
        "parameters": [*parameters, _query("limit", "The most results.", limit)],
        "responses": {
            "200": {"description": summary, "content": {"application/json": {"schema": schema}}},
            "400": _problem("The query cannot be read: `bad-look-up`."),
            **_UNKNOWN_TOKEN,
            "403": _problem("The request is of another page (`origin-not-allowed`), or `groups-elsewhere`."),
            **problems,
            "503": _problem(
                "RabbitMQ or the key set gave no answer: `not-permitted`, `broker-unavailable`, `keys-unavailable`."
            ),
            **_ALWAYS,
        },
    }
    return {"get": get, "head": _heads(get)}


def _console(security: list[dict[str, Any]], published: list[str]) -> dict[str, Any]:
    paths = {
        "/": _resource("Console", "A page that shows events live.", {"text/html": {}}, tagged=True),
        "/console/{name}": _resource(
            "ConsoleFile",
            "A file of the console.",
            {"text/javascript": {}, "text/css": {}},
            name=("name", "`app.js`, another module of the console, or `style.css`.", "app.js"),
            tagged=True,
        ),
    }
    if published:
        paths["/console/log"] = _look_up(
            "Log",
            "Look up entries of the event log, the newest first. For the console's own page only.",
            security,
            _object(
                entries={"type": "array", "items": _looked_up(offset={"type": "integer", "minimum": 0})},
                further={"type": ["integer", "null"], "description": "The `before` of the next look-up."},
            ),
            [
                _query("search", "Text of the routing key or the body, in any case.", _TEXT),
                {**_query("types", "Patterns of event types, joined by commas.", _TYPES), **_JOINED},
                _query("audience", "`user:42`, `group:ops` or `all`.", _AUDIENCE),
                _query("before", "Only entries before this offset.", _OFFSET),
            ],
            {"404": _problem("There is no log: `no-log`.")},
        )
        paths["/console/quarantine"] = _look_up(
            "Quarantine",
            "The oldest messages in quarantine. They stay there. For the console's own page only.",
            security,
            _object(messages={"type": "array", "items": _looked_up()}),
            [],
            {},
        )
        to = {**_AUDIENCE, "description": "`user:42`, `group:ops` or `all`."}
        sample = {
            **_object(to=to, type={"enum": published}, data={"type": "object"}),
            "additionalProperties": False,
        }
        paths["/console/publish"] = {
            "post": {
                "operationId": "publishSample",
                "summary": "Publish an event. For the console's own page only.",
                "security": security,
                "requestBody": {"required": True, "content": {"application/json": {"schema": sample}}},
                "responses": {
                    "200": {
                        "description": "RabbitMQ has confirmed the event.",
                        "content": {"application/json": {"schema": _object(id=_TEXT)}},
                    },
                    "400": _problem("The body is not a sample: `not-json`, `bad-sample`."),
                    **_UNKNOWN_TOKEN,
                    "403": _problem("The request is of another page (`origin-not-allowed`), or `groups-elsewhere`."),
                    "503": _problem("The event is not published: `not-published`, `keys-unavailable`."),
                    **_ALWAYS,
                },
            }
        }
    return paths
