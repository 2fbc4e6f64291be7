"""The HTTP routes. The only file that imports quart.

Owns the checks before the first byte of a stream: the token, the origin and the query. Until then, an error is a status
with a problem document (RFC 9457). A browser's EventSource never reconnects after one, so a temporary fault is answered
with a stream that has only `bridge.bye` (docs/contract.md, "GET /events").
"""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Set
from functools import partial
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
from bridge.service.broker.control import MOST_USERS, Control, ControlClient, read_moment
from bridge.service.broker.lookup import MAX_ANSWERS, LogQuestion, LookUp
from bridge.service.forms import MessageReader
from bridge.service.health import CHECKS
from bridge.service.http.auth import Authenticator, GroupsElsewhere, InvalidToken, Subscriber, TryAgain
from bridge.service.http.claims import RevokedToken
from bridge.service.http.headers import admits_stream, allowed_headers, bearer_token, is_own_origin, normal_origin
from bridge.service.http.login import ApplicationLogin, LoginForbidden, NotLoggedIn
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
"""The largest body of a request. An unread body of a GET stays in memory as long as its stream."""

PREFLIGHT_SECONDS = 7200
"""How long a browser may cache a preflight. Chromium's own limit is two hours."""

IDENTITY = "Bridge-Identity"
"""Header with the identity of a stream (docs/contract.md, "Identity")."""

UNKNOWN_IDENTITY = "unknown"
"""The header's value if the token cannot be judged now. A real identity is longer."""

STREAM_HEADERS = {
    "Content-Type": sse.MEDIA_TYPE,
    # no-transform stops proxies from compression, which would delay events until a block is full.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
    # A stream ends with its connection. With this header no proxy sends another request on it (RFC 9112, section 9.6).
    "Connection": "close",
}

TAKE_OVER = "bridge.take_over"
"""Name of the ASGI extension that takes a connection over from the server: a function without arguments. It returns the
transport, which then belongs to the caller, or None if the client is gone."""

CONSOLE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""If the console ever inserts an event as HTML by mistake, the event's scripts still cannot run."""

_log = structlog.get_logger("bridge.web")


class Problem(Exception):
    """An error before the first byte of a stream. `code` is stable, for programs. `detail` is for people."""

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
    """The body of an error answer (RFC 9457), on one line."""
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
    login: ApplicationLogin | None = None,
    control: Control | None = None,
) -> Quart:
    """The public application.

    Args:
        control: knows which tokens were revoked. None: no token is.
        login: asks the application whose a request is. None: only tokens count.
        publisher: publishes the console's samples. None: the console may not publish.
        tracing: makes spans of deliveries. None: tracing is off.
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
        # Also on errors: without it, a page that uses `fetch` cannot read the reason for a refusal.
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
            raise Problem(406, "not-acceptable", "`Accept` does not admit text/event-stream: add it, or omit Accept")
        try:
            subscriber, renew = await _authenticate(authenticator, login, control, settings)
        except LoginForbidden as error:
            raise Problem(403, error.code, str(error)) from None
        except GroupsElsewhere as error:
            no_groups.log(error=str(error))
            raise Problem(403, error.code, str(error)) from None
        except TryAgain as error:
            not_judged.log(error=str(error))
            metrics.streams_ended.labels("busy").inc()
            bye = sse.encode_bye("busy", deadlines.busy_retry_ms(time.time() % 1), cursor=echo(_last_event_id()))
            return _stream_response(bye, UNKNOWN_IDENTITY)
        stream_request = _read_stream_request(
            subscriber, subscriber.identity(identity_key), renew, partial(_is_revoked, control, subscriber)
        )
        if request.method == "HEAD":
            return _stream_response([], stream_request.identity)
        return _stream_response(_hand_over(request.scope, streams, stream_request), stream_request.identity)

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
            messages=MessageReader.of(catalogue, settings),
        )
        _add_development(app, authenticator, login, control, settings, catalogue, publisher, look_up)
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
    login: ApplicationLogin | None,
    control: Control | None,
    settings: Settings,
    catalogue: Catalogue,
    publisher: Publisher,
    look_up: LookUp,
) -> None:
    """The console's routes for development: each user with a token may publish to everybody, and sees all events."""

    def check_page(verb: str) -> None:
        # A page of another origin, even an allowed one, must not use a user's cookie here. Browsers send no `Origin`
        # with a GET to the page's own host, and send `Sec-Fetch-Site` only to hosts that they trust (HTTPS, localhost).
        origin = request.headers.get("Origin")
        if (origin is not None and not is_own_origin(origin, request.headers.get("Host", ""))) or request.headers.get(
            "Sec-Fetch-Site", "none"
        ) not in ("same-origin", "none"):
            raise Problem(403, "origin-not-allowed", f"only the console's own page may {verb}")

    async def check_token() -> None:
        try:
            await _authenticate(authenticator, login, control, settings)
        except (GroupsElsewhere, LoginForbidden) as error:
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
                f"Give the bridge's user `read` on {settings.quarantine!r}, or run `bridge quarantine list` as another "
                "user"
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
        sample = await request.get_json()
        if not isinstance(sample, dict) or sample.keys() != {"to", "type", "data"}:
            raise Problem(400, "bad-sample", "a sample must be an object with exactly `to`, `type` and `data`")
        try:
            data = catalogue.parse(str(sample["type"]), json.dumps(sample["data"]))
            event_id = await publisher.publish(Audience.parse(str(sample["to"])), data)
        except (ValueError, RoutingError, EventRefused) as error:
            raise Problem(400, "bad-sample", str(error)) from None
        except PublishError as error:
            raise Problem(503, "not-published", str(error)) from None
        return _json({"id": event_id})


def _number(name: str, default: int, *, largest: int) -> int:
    """Reads a number of the query.

    Raises:
        Problem: 400.
    """
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,19}", text) or not 1 <= int(text) <= largest:
        raise Problem(400, "bad-look-up", f"`{name}` must be a number from 1 to {largest}, not {text[:40]!r}")
    return int(text)


def _private(value: object) -> Response:
    """An answer with other users' events: no cache may keep it."""
    response = _json(value)
    response.headers["Cache-Control"] = "no-store"
    return response


def create_internal_app(
    *,
    why_not_ready: Callable[[Set[str]], str | None],
    metrics: Metrics,
    control: ControlClient | None = None,
    key: str | None = None,
) -> Quart:
    """The internal application: probes, metrics, and who is connected.

    Args:
        control: asks all replicas. None: there are no routes for users.
        key: the bearer key that these routes need. None: they need none.
    """
    app = _bare_app("bridge.internal")
    if control is not None:
        _add_users(app, control, key)

    @app.get("/livez")
    async def livez() -> Response:
        # The answer itself is the check. It does not depend on RabbitMQ, whose outage would then restart all replicas.
        return _json({"status": "alive", "version": __version__})

    @app.get("/readyz")
    async def readyz() -> Response:
        # The same form as in the Kubernetes API server: /readyz?exclude=broker&exclude=connections.
        exclude = set(request.args.getlist("exclude"))
        if unknown := exclude - CHECKS:
            fault = f"exclude={min(unknown)} is not a check: use {' or '.join(sorted(CHECKS))}"
            return _json({"status": "not known", "reason": fault}, status=400)
        reason = why_not_ready(exclude)
        if reason is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": reason}, status=503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), content_type=CONTENT_TYPE_LATEST)

    return app


def _add_users(app: Quart, control: ControlClient, key: str | None) -> None:
    @app.errorhandler(Problem)
    async def refuse(problem: Problem) -> Response:
        return problem.response()

    def check_key() -> None:
        if key is None:
            return
        given = bearer_token(request.headers.getlist("Authorization")) or ""
        if not hmac.compare_digest(given.encode(), key.encode()):
            challenge = {"WWW-Authenticate": 'Bearer realm="bridge.internal"'}
            raise Problem(401, "internal-key", "send BRIDGE_INTERNAL_KEY as Authorization: Bearer", challenge)

    @app.errorhandler(BrokerError)
    async def fail(error: BrokerError) -> Response:
        return _problem(503, "broker-unavailable", str(error), {"Retry-After": "5"})

    @app.get("/users")
    async def list_users() -> Response:
        check_key()
        found = await control.users(
            after=request.args.get("after", ""), limit=_number("limit", 100, largest=MOST_USERS)
        )
        return _private({"replicas": found.replicas, "users": found.users, "further": found.further})

    @app.get("/users/<path:user>/streams")
    async def show_streams(user: str) -> Response:
        check_key()
        found = await control.streams(user)
        return _private({"replicas": found.replicas, "streams": found.streams})

    @app.delete("/users/<path:user>/streams")
    async def end_streams(user: str) -> Response:
        check_key()
        try:
            until = read_moment(request.args["until"], time.time()) if "until" in request.args else None
        except ValueError as error:
            raise Problem(400, "invalid-until", str(error)) from None
        kicked = await control.kick(
            user,
            by=f"http {request.remote_addr}",
            session=request.args.get("session"),
            reason=request.args.get("reason", ""),
            until=until,
        )
        return _private({"replicas": kicked.replicas, "ended": sum(kicked.replicas.values())})


def _bare_app(name: str) -> Quart:
    app = Quart(name, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    app.url_map.strict_slashes = False

    @app.before_request
    async def refuse_http_2() -> Response | None:
        # Hypercorn speaks HTTP/2 with a client that sends its preface, but without back-pressure: for a client that
        # reads nothing, the bridge would buffer everything. 505 is RFC 9110, section 15.6.6.
        if request.http_version not in ("1.0", "1.1"):
            return _problem(
                505, "http-version", "this port speaks only HTTP/1.1: use HTTP/2 at the proxy in front of it"
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
        _log.exception("request failed", path=request.path)  # Only the path: a query may contain a token.
        return _problem(500, "internal-error", "the bridge failed to answer this request; its log has the reason")

    return app


def _json(value: object, *, status: int = 200) -> Response:
    response = Response(json.dumps(value, ensure_ascii=False) + "\n", status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store" if status != 200 else "no-cache"
    return response


async def _file(content: bytes, content_type: str) -> Response:
    response = Response(content, content_type=content_type)
    response.headers["Cache-Control"] = "no-cache"  # Cached, but checked at each use: a new bridge may have a new file.
    response.headers["X-Content-Type-Options"] = "nosniff"
    await response.add_etag()
    return await response.make_conditional(request)


def _stream_response(body: Any, identity: str) -> Response:
    response = Response(body)
    response.headers.update(STREAM_HEADERS)
    response.headers[IDENTITY] = identity
    response.headers.pop("Content-Length", None)  # Quart adds it for a short body, but this is always a stream.
    response.timeout = None  # Quart's default ends every response after 60 s, without an error.
    return response


async def _hand_over(scope: Any, streams: Streams, stream_request: StreamRequest) -> AsyncGenerator[bytes]:
    """The body of a stream for Quart: one empty piece. After it, the connection no longer belongs to Quart.

    Nothing is acquired before the head is written: a generator that was never started never runs its `finally`.
    """
    yield b""  # Hypercorn writes the head with the first piece of the body, even with an empty one.
    transport = scope["extensions"][TAKE_OVER]()
    if transport is not None:
        streams.open(transport, stream_request, chunked=scope["http_version"] == "1.1")


def _check_origin(settings: Settings) -> None:
    """Refuses pages of other origins. A browser hides the answer from such a page anyway (CORS), but the bridge would
    open the stream, with the user's cookie.

    Raises:
        Problem: 403 if the origin is neither the bridge's own nor allowed.
    """
    # `null` (a sandboxed frame, a file) identifies no site, so it is never allowed (RFC 6454, section 7.3). No browser
    # sends an empty line.
    origin = request.headers.get("Origin")
    if not origin or normal_origin(origin) in settings.allowed_origins:
        return
    if is_own_origin(origin, request.headers.get("Host", "")):
        return
    raise Problem(
        403,
        "origin-not-allowed",
        f"pages of {origin[:200]!r} may not read this stream: the operator must add the origin to "
        "BRIDGE_ALLOWED_ORIGINS",
    )


Renew = Callable[[], Awaitable[Subscriber]]


async def _authenticate(
    authenticator: Authenticator, login: ApplicationLogin | None, control: Control | None, settings: Settings
) -> tuple[Subscriber, Renew | None]:
    """Returns the subscriber of the request's tokens, or of its session with the application, and how to renew that.

    A request with a token is judged by its token, if the bridge reads tokens; any other one by the application.

    Raises:
        Problem: 401, with a challenge (RFC 9110, section 11.6.1; RFC 6750, section 3).
        GroupsElsewhere: the token is valid but leaves out its groups.
        LoginForbidden: the application refuses the user.
        TryAgain: the request cannot be judged now.
    """
    tokens = _find_tokens(settings)
    try:
        if login is None or (tokens and authenticator.reads_tokens):
            subscriber = await authenticator.authenticate_any(tokens, time.time())
            if control is not None:
                await _check_revocations(control, subscriber)
            return subscriber, None
        headers = login.pick(request.headers.items())
        renew = partial(login.ask, headers, again=True)
        subscriber = await login.ask(headers)
        # An answer to a question from before the order may be of a session that the application has ended since.
        return await renew() if _is_revoked(control, subscriber) else subscriber, renew
    except NotLoggedIn as error:
        # No scheme of browsers: with one of theirs they would ask for a password.
        raise Problem(401, error.code, str(error), {"WWW-Authenticate": 'Session realm="bridge"'}) from None
    except InvalidToken as error:
        challenge = 'Bearer realm="bridge"'
        if error.code != "missing-token":
            challenge += f', error="invalid_token", error_description="{_quotable(str(error))}"'
        raise Problem(401, error.code, str(error), {"WWW-Authenticate": challenge}) from None


async def _check_revocations(control: Control, subscriber: Subscriber) -> None:
    """
    Raises:
        RevokedToken: the token was issued before the user's tokens were revoked.
        TryAgain: the process has just started, and does not know yet what was revoked.
    """
    if not await control.wait_until_known():
        raise TryAgain("the control stream has not been read yet, so it is not known which tokens were revoked")
    if _is_revoked(control, subscriber):
        raise RevokedToken("the token was revoked: log in again")


def _is_revoked(control: Control | None, subscriber: Subscriber) -> bool:
    return control is not None and control.revocations.refuses(subscriber.user, subscriber.issued_at)


def _quotable(text: str) -> str:
    return "".join(char if " " <= char <= "~" and char not in '"\\' else "'" for char in text)


def _find_tokens(settings: Settings) -> list[str]:
    token = bearer_token(request.headers.getlist("Authorization"))
    if token is not None:
        return [token]
    # Cookies with one name may come from several paths and domains, and their order is not reliable (RFC 6265, section
    # 4.2.2).
    cookies = [cookie for cookie in request.cookies.getlist(settings.cookie) if cookie]
    if cookies:
        return list(dict.fromkeys(cookies))
    # RFC 6750, section 2.3. An empty value is ignored.
    return [token for token in request.args.getlist("access_token") if token][:1] if settings.query_token else []


def _read_stream_request(
    subscriber: Subscriber, identity: str, renew: Renew | None, is_revoked: Callable[[], bool]
) -> StreamRequest:
    """Reads the subscription request in the query.

    Raises:
        Problem: 400 or 403.
    """
    try:
        # Repeated members are joined, and spaces around a comma (`+` or `%20`) are ignored.
        given = request.args.getlist("types")
        # Splits off at most the allowed number; `parse` counts the commas in the rest.
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
        raise Problem(403, "invalid-id", f"the user id or a group id is invalid in a routing key: {error}") from None
    try:
        keys = types.binding_keys(audience)
    except KeyTooLong as error:
        raise Problem(400, "invalid-types", f"a pattern is too long together with this user's id: {error}") from None
    return StreamRequest(
        subscriber, identity, types, named, _last_event_id(), keys, audience_shown, is_revoked=is_revoked, renew=renew
    )


def _flag(name: str, *, default: str) -> bool:
    """Reads a member of the query that is `true` or `false`.

    Raises:
        Problem: 400.
    """
    value = request.args.get(name, default)
    if value not in ("true", "false"):
        raise Problem(400, f"invalid-{name}", f"`{name}` must be true or false, not {value[:40]!r}")
    return value == "true"


def _last_event_id() -> str | None:
    # The header has priority: a browser that reconnects by itself repeats its first query, with an older cursor.
    return request.headers.get("Last-Event-ID") or request.args.get("lastEventId") or None
