"""The HTTP routes. The only file that imports quart.

Owns what is said before the first byte of a stream: who asks, from where, for what. Until then an error is a status
with a problem document (RFC 9457); a browser's EventSource never comes back after one, so what is only temporary is
answered as a stream that says goodbye (docs/contract.md, "GET /events").
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Set
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from quart import Quart, Response, request
from werkzeug.exceptions import HTTPException

from bridge import __version__
from bridge.amqp import AccessRefused, BrokerError, NotFound
from bridge.catalogue import exports
from bridge.catalogue.load import Catalogue
from bridge.publisher import EventRefused, Publisher, PublishError
from bridge.routing import MAX_PATTERNS, Audience, InvalidId, InvalidPattern, KeyTooLong, RoutingError, TypeFilter
from bridge.service.broker.lookup import MAX_ANSWERS, LogQuestion, LookUp
from bridge.service.health import CHECKS
from bridge.service.http.auth import Authenticator, GroupsElsewhere, InvalidToken, Subscriber, TryAgain
from bridge.service.http.headers import admits_stream, allowed_headers, bearer_token, is_own_origin, normal_origin
from bridge.service.http.openapi import openapi
from bridge.service.logs import RareLine
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings
from bridge.service.streams import deadlines, sse
from bridge.service.streams.cursor import echo
from bridge.service.streams.hub import Hub, StreamRequest
from bridge.service.streams.writer import Streams, WriteBatch

if TYPE_CHECKING:
    from bridge.service.tracing import Tracing

MAX_REQUEST_BYTES = 16_384
"""An unread body of a GET stays in memory as long as its stream."""

PREFLIGHT_SECONDS = 7200
"""Chromium keeps a preflight no longer than two hours."""

IDENTITY = "Bridge-Identity"
"""Header with the name of what a stream may show (docs/contract.md, "Identity")."""

UNKNOWN_IDENTITY = "unknown"
"""Its value where the token cannot be judged now. No digest is as short."""

STREAM_HEADERS = {
    "Content-Type": sse.MEDIA_TYPE,
    # no-transform keeps compressing proxies away, which would hold events back until a block is full.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    # A stream ends with its connection, so that no proxy sends another request into it (RFC 9112, section 9.6).
    "Connection": "close",
}

TAKE_OVER = "bridge.take_over"
"""Name of the ASGI extension by which a connection is had from the server: a function without arguments. It returns the
transport, whose bytes are the caller's from then on, or None when the client is gone."""

CONSOLE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Were an event ever set as HTML by mistake, it still could not run."""

_log = structlog.get_logger("bridge.web")


class Problem(Exception):
    """An error before the first byte. `code` is stable, for programs; `detail` is for whoever reads it."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers or {}
        super().__init__(detail)

    def response(self) -> Response:
        return _problem(self.status, self.code, self.detail, self.headers)


PROBLEM_TYPE = "application/problem+json"

_TITLES = {
    400: "Bad request",
    401: "Not authenticated",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    406: "Not acceptable",
    408: "Too slow",
    413: "Too large",
    431: "Headers too large",
    500: "Internal error",
    501: "Not implemented",
    503: "Not available",
    505: "HTTP version not supported",
}


def problem_document(status: int, code: str, detail: str) -> str:
    """The body of an error (RFC 9457), as one line."""
    document = {
        "type": f"urn:bridge:problem:{code}",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
    }
    return json.dumps(document, ensure_ascii=False) + "\n"


def _problem(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    response = Response(problem_document(status, code, detail), status=status, content_type=PROBLEM_TYPE)
    response.headers["Cache-Control"] = "no-store"
    response.headers.update(headers or {})
    return response


def create_app(
    *,
    hub: Hub,
    authenticator: Authenticator,
    settings: Settings,
    catalogue: Catalogue,
    metrics: Metrics,
    write_batch: WriteBatch,
    publisher: Publisher | None = None,
    tracing: Tracing | None = None,
) -> Quart:
    """The public application.

    Args:
        publisher: what the console publishes samples with; None where it may not.
        tracing: makes spans of deliveries; None where nobody wants them.
    """
    app = _bare_app("bridge")
    not_judged = RareLine("token not judged", _log.error)
    no_groups = RareLine("groups not in the token", _log.error)
    streams = Streams(hub, metrics, write_batch, stall_seconds=settings.stall_seconds, tracing=tracing)
    identity_key = settings.identity_key
    client = (files("bridge") / "client" / "client.js").read_bytes()
    asyncapi = exports.asyncapi(catalogue, version=__version__)
    document = openapi(
        catalogue,
        version=__version__,
        cookie=settings.cookie,
        query_token=settings.query_token,
        console=settings.console,
    )
    schemas = {event_type: catalogue.json_schema(event_type) for event_type in catalogue}

    @app.errorhandler(Problem)
    async def refuse(problem: Problem) -> Response:
        metrics.refused.labels(problem.code).inc()
        return problem.response()

    @app.after_request
    async def add_cors(response: Response) -> Response:
        # Also on errors: without it a page that fetches by hand cannot read why it was refused.
        is_preflight = request.method == "OPTIONS"
        response.headers.add("Vary", "Origin, Access-Control-Request-Headers" if is_preflight else "Origin")
        if normal_origin(request.headers.get("Origin", "")) in settings.allowed_origins:
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
            response.headers["Access-Control-Allow-Credentials"] = "true"
            response.headers["Access-Control-Expose-Headers"] = f"{IDENTITY}, Retry-After"
            if is_preflight:
                asked = request.headers.getlist("Access-Control-Request-Headers")
                response.headers["Access-Control-Allow-Methods"] = "GET, HEAD"
                response.headers["Access-Control-Allow-Headers"] = allowed_headers(asked)
                response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return response

    @app.route("/events", methods=["OPTIONS"])
    async def preflight() -> Response:
        _check_origin(settings)
        response = Response(b"", status=204)
        response.headers["Allow"] = "GET, HEAD, OPTIONS"
        return response

    @app.route("/events", methods=["GET", "HEAD"], provide_automatic_options=False)
    async def events() -> Response:
        _check_origin(settings)
        if not admits_stream(request.headers.getlist("Accept")):
            raise Problem(406, "not-acceptable", "this resource is text/event-stream, which `Accept` does not admit")
        try:
            subscriber = await _authenticate(authenticator, settings)
        except GroupsElsewhere as error:
            no_groups.log(error=str(error))
            raise Problem(403, error.code, str(error)) from None
        except TryAgain as error:
            not_judged.log(error=str(error))
            metrics.streams_ended.labels("busy").inc()
            bye = sse.encode_bye("busy", deadlines.busy_retry_ms(time.time() % 1), cursor=echo(_last_event_id()))
            return _stream_response(bye, UNKNOWN_IDENTITY)
        wish = _read_wish(subscriber, subscriber.identity(identity_key))
        if request.method == "HEAD":
            return _stream_response([], wish.identity)
        return _stream_response(_hand_over(request.scope, streams, wish), wish.identity)

    @app.get("/schemas")
    async def list_schemas() -> Response:
        return _json(schemas)

    @app.get("/client.js")
    async def show_client() -> Response:
        return await _file(client, "text/javascript; charset=utf-8")

    @app.get("/asyncapi.json")
    async def show_asyncapi() -> Response:
        return _json(asyncapi)

    @app.get("/openapi.json")
    async def show_openapi() -> Response:
        return _json(document)

    @app.get("/schemas/<event_type>")
    async def show_schema(event_type: str) -> Response:
        if event_type not in schemas:
            raise Problem(
                404, "unknown-type", f"the catalogue has no type {event_type[:128]!r}; GET /schemas lists them"
            )
        return _json(schemas[event_type])

    if settings.console != "false":
        _add_console(app, development=publisher is not None)
    if publisher is not None:
        look_up = LookUp(
            settings.addresses,
            quarantine=settings.quarantine,
            log_name=settings.log,
            log=lambda: hub.log,
            models=catalogue,
            max_event_bytes=settings.max_event_bytes,
        )
        _add_development(app, authenticator, settings, catalogue, publisher, look_up)
    return app


def _add_console(app: Quart, *, development: bool) -> None:
    folder = files("bridge") / "console"
    page = (folder / "index.html").read_bytes()
    if development:
        page = page.replace(b"<html ", b'<html data-development="true" ', 1)
    media = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
    parts = {
        part.name: (part.read_bytes(), media[suffix])
        for part in folder.iterdir()
        if (suffix := PurePath(part.name).suffix) in media
    }

    @app.get("/")
    async def show_console() -> Response:
        response = await _file(page, "text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = CONSOLE_POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.get("/console/<name>")
    async def show_part(name: str) -> Response:
        if name not in parts:
            raise Problem(404, "not-found", "the console has no such file")
        return await _file(*parts[name])


def _add_development(
    app: Quart,
    authenticator: Authenticator,
    settings: Settings,
    catalogue: Catalogue,
    publisher: Publisher,
    look_up: LookUp,
) -> None:
    """What only a console in development may do: everybody with a token publishes to all, and sees all events."""

    def check_page(verb: str) -> None:
        # A page of another origin, even an allowed one, must not use a person's cookie here. Browsers send no `Origin`
        # with a GET of the page's own host, and `Sec-Fetch-Site` only to hosts that they trust (HTTPS, localhost).
        origin = request.headers.get("Origin")
        if (origin is not None and not is_own_origin(origin, request.headers.get("Host", ""))) or request.headers.get(
            "Sec-Fetch-Site", "none"
        ) not in ("same-origin", "none"):
            raise Problem(403, "origin-not-allowed", f"only the console itself may {verb}")

    async def check_token() -> None:
        try:
            await _authenticate(authenticator, settings)
        except GroupsElsewhere as error:
            raise Problem(403, error.code, str(error)) from None
        except TryAgain as error:
            raise Problem(503, "keys-unavailable", str(error)) from None

    @app.get("/console/quarantine")
    async def show_quarantine() -> Response:
        check_page("read the quarantine")
        await check_token()
        limit = _number("limit", 50, largest=MAX_ANSWERS)
        try:
            messages = await look_up.quarantine(limit)
        except AccessRefused as error:
            hint = (
                f"Give the bridge's user `read` on {settings.quarantine!r}, or run `bridge quarantine list` as another"
            )
            raise Problem(503, "not-permitted", f"{error}. {hint}") from None
        except BrokerError as error:
            raise Problem(503, "broker-unavailable", str(error)) from None
        return _private({"messages": messages})

    @app.get("/console/log")
    async def show_log() -> Response:
        check_page("read the log")
        await check_token()
        given = request.args
        try:
            question = LogQuestion(
                search=given.get("search", ""),
                types=TypeFilter.parse(given["types"]) if "types" in given else TypeFilter(),
                audience=Audience.parse(given["audience"]) if "audience" in given else None,
                before=_number("before", 0, largest=2**63 - 1) if "before" in given else None,
                limit=_number("limit", 50, largest=MAX_ANSWERS),
            )
        except RoutingError as error:
            raise Problem(400, "bad-look-up", str(error)) from None
        try:
            return _private(await look_up.log(question))
        except NotFound as error:
            raise Problem(404, "no-log", str(error)) from None
        except AccessRefused as error:
            raise Problem(503, "not-permitted", str(error)) from None
        except BrokerError as error:
            raise Problem(503, "broker-unavailable", str(error)) from None

    @app.post("/console/publish")
    async def publish_sample() -> Response:
        check_page("publish")
        if not request.is_json:
            raise Problem(400, "not-json", "the body must be application/json")
        await check_token()
        wish = await request.get_json()
        if not isinstance(wish, dict) or wish.keys() != {"to", "type", "data"}:
            raise Problem(400, "bad-sample", "a sample is an object of `to`, `type` and `data`")
        try:
            data = catalogue.parse(str(wish["type"]), json.dumps(wish["data"]))
            event_id = await publisher.publish(Audience.parse(str(wish["to"])), data)
        except (ValueError, RoutingError, EventRefused) as error:
            raise Problem(400, "bad-sample", str(error)) from None
        except PublishError as error:
            raise Problem(503, "not-published", str(error)) from None
        return _json({"id": event_id})


def _number(name: str, default: int, *, largest: int) -> int:
    """
    Raises:
        Problem: 400.
    """
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= largest:
        raise Problem(400, "bad-look-up", f"`{name}` is a number of 1 to {largest}, not {text[:40]!r}")
    return int(text)


def _private(value: object) -> Response:
    """What holds other people's events: no cache keeps it."""
    response = _json(value)
    response.headers["Cache-Control"] = "no-store"
    return response


def create_internal_app(*, why_not_ready: Callable[[Set[str]], str | None], metrics: Metrics) -> Quart:
    """Probes and metrics."""
    app = _bare_app("bridge.internal")

    @app.get("/livez")
    async def livez() -> Response:
        # That this answers is the whole check. It never asks the broker, whose outage would then restart every replica.
        return _json({"status": "alive", "version": __version__})

    @app.get("/readyz")
    async def readyz() -> Response:
        # As the Kubernetes API server has it: /readyz?exclude=broker&exclude=connections.
        exclude = set(request.args.getlist("exclude"))
        if unknown := exclude - CHECKS:
            fault = f"exclude={min(unknown)} is none of {', '.join(sorted(CHECKS))}"
            return _json({"status": "not known", "reason": fault}, status=400)
        reason = why_not_ready(exclude)
        if reason is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": reason}, status=503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), content_type=CONTENT_TYPE_LATEST)

    return app


def _bare_app(name: str) -> Quart:
    app = Quart(name, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    app.url_map.strict_slashes = False

    @app.before_request
    async def refuse_http_2() -> Response | None:
        # Hypercorn speaks HTTP/2 to a client that begins with its preface, and has no back-pressure there: one client
        # that reads nothing would have the bridge keep everything for it. 505 is RFC 9110, section 15.6.6.
        if request.http_version not in ("1.0", "1.1"):
            return _problem(
                505, "http-version", "this port speaks HTTP/1.1; HTTP/2 belongs to the proxy in front of it"
            )
        return None

    @app.errorhandler(HTTPException)
    async def refuse(error: HTTPException) -> Response:
        status = error.code or 500
        headers = {}
        if status == 405 and getattr(error, "valid_methods", None):
            headers["Allow"] = ", ".join(sorted(error.valid_methods))  # type: ignore[attr-defined]
        code = (error.name or "error").lower().replace(" ", "-")
        return _problem(status, code, error.description or error.name, headers)

    @app.errorhandler(Exception)
    async def fail(error: Exception) -> Response:
        _log.exception("request failed", path=request.path)  # The path only: a query may hold a token.
        return _problem(500, "internal-error", "the bridge failed to answer this; its log says why")

    return app


def _json(value: object, *, status: int = 200) -> Response:
    response = Response(json.dumps(value, ensure_ascii=False) + "\n", status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store" if status != 200 else "no-cache"
    return response


async def _file(content: bytes, content_type: str) -> Response:
    response = Response(content, content_type=content_type)
    response.headers["Cache-Control"] = "no-cache"  # Kept, but asked for each time: a new bridge brings a new one.
    response.headers["X-Content-Type-Options"] = "nosniff"
    await response.add_etag()
    return await response.make_conditional(request)


def _stream_response(body: Any, identity: str) -> Response:
    response = Response(body)
    response.headers.update(STREAM_HEADERS)
    response.headers[IDENTITY] = identity
    response.headers.pop("Content-Length", None)  # Quart counts a body that it can; this one is a stream in any case.
    response.timeout = None  # Quart's own ends every response after 60 s, without a word.
    return response


async def _hand_over(scope: Any, streams: Streams, wish: StreamRequest) -> AsyncGenerator[bytes]:
    """The body of a stream as Quart sees it: nothing, and then the connection is no longer Quart's.

    Nothing is acquired before the head is out: a generator that was never started never runs its `finally`.
    """
    yield b""  # Hypercorn writes the head with the first piece of the body, also with an empty one.
    transport = scope["extensions"][TAKE_OVER]()
    if transport is not None:
        streams.open(transport, wish, chunked=scope["http_version"] == "1.1")


def _check_origin(settings: Settings) -> None:
    """
    Raises:
        Problem: 403 for a page of an origin that is neither ours nor allowed. A browser would keep the answer from such
            a page anyway (CORS), but the stream would have been opened, with the user's cookie.
    """
    # `null` (a sandboxed frame, a file) names nobody, so it is never allowed (RFC 6454, section 7.3). An empty line is
    # not from a browser.
    origin = request.headers.get("Origin")
    if not origin or normal_origin(origin) in settings.allowed_origins:
        return
    if is_own_origin(origin, request.headers.get("Host", "")):
        return
    raise Problem(
        403,
        "origin-not-allowed",
        f"pages of {origin[:200]!r} may not read this stream; the operator lists origins in BRIDGE_ALLOWED_ORIGINS",
    )


async def _authenticate(authenticator: Authenticator, settings: Settings) -> Subscriber:
    """
    Raises:
        Problem: 401, with a challenge (RFC 6750, section 3).
        GroupsElsewhere: the token is good and leaves out its groups.
        TryAgain: the token cannot be judged now.
    """
    try:
        return await authenticator.authenticate_any(_find_tokens(settings), time.time())
    except InvalidToken as error:
        challenge = 'Bearer realm="bridge"'
        if error.code != "missing-token":
            challenge += f', error="invalid_token", error_description="{_quotable(str(error))}"'
        raise Problem(401, error.code, str(error), {"WWW-Authenticate": challenge}) from None


def _quotable(text: str) -> str:
    return "".join(char if " " <= char <= "~" and char not in '"\\' else "'" for char in text)


def _find_tokens(settings: Settings) -> list[str]:
    token = bearer_token(request.headers.getlist("Authorization"))
    if token is not None:
        return [token]
    # Cookies of one name may come from several paths and domains, and their order says nothing that can be relied on
    # (RFC 6265, section 4.2.2).
    cookies = [cookie for cookie in request.cookies.getlist(settings.cookie) if cookie]
    if cookies:
        return list(dict.fromkeys(cookies))
    # RFC 6750, section 2.3. An empty member counts as none.
    return [token for token in request.args.getlist("access_token") if token][:1] if settings.query_token else []


def _read_wish(subscriber: Subscriber, identity: str) -> StreamRequest:
    """
    Raises:
        Problem: 400 or 403.
    """
    try:
        # Repeated members add up, and spaces around a comma (`+` or `%20`) mean nothing.
        given = request.args.getlist("types")
        # Not more than are allowed are cut out; of the rest, `parse` counts the commas.
        patterns = [pattern.strip() for pattern in ",".join(given).split(",", MAX_PATTERNS)]
        types = TypeFilter.parse(",".join(patterns)) if given else TypeFilter()
    except InvalidPattern as error:
        raise Problem(400, "invalid-types", str(error)) from None
    named = _flag("named", default="true")
    audience_shown = _flag("audience", default="false")
    audience = Audience.user(subscriber.user)
    try:
        audience.binding_key()
        for group in subscriber.groups:
            Audience.group(group).binding_key()
    except KeyTooLong as error:
        raise Problem(403, "id-too-long", f"the user id or a group id is too long for a routing key: {error}") from None
    except InvalidId as error:
        raise Problem(403, "invalid-id", f"the user id or a group id cannot stand in a routing key: {error}") from None
    try:
        keys = types.binding_keys(audience)
    except KeyTooLong as error:
        raise Problem(400, "invalid-types", f"a pattern is too long together with this user's id: {error}") from None
    return StreamRequest(subscriber, identity, types, named, _last_event_id(), keys, audience_shown)


def _flag(name: str, *, default: str) -> bool:
    """
    Raises:
        Problem: 400.
    """
    value = request.args.get(name, default)
    if value not in ("true", "false"):
        raise Problem(400, f"invalid-{name}", f"`{name}` is true or false, not {value[:40]!r}")
    return value == "true"


def _last_event_id() -> str | None:
    # The header wins: a browser that reconnects by itself repeats the query that it began with.
    return request.headers.get("Last-Event-ID") or request.args.get("lastEventId") or None
