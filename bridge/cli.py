"""The command line: `bridge serve`, `publish`, `listen`, `token`, `schemas`, `check`, `kick`, `who`, `quarantine`.

Exit codes: 0 success; 1 failure of RabbitMQ or the network; 2 invalid input or settings. `publish` needs only the SDK's
dependencies. A command that needs the server's dependencies reports it if they are missing.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import random
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import wraps
from typing import IO, TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from bridge import __version__
from bridge.amqp import BrokerError
from bridge.catalogue import evolution, exports
from bridge.catalogue.load import Catalogue, InvalidCatalogue, load_catalogue
from bridge.event import EventData, InvalidEvent
from bridge.publisher import EventRefused, Publisher, PublishError
from bridge.roundtrip import zoneless_times
from bridge.routing import Audience, RoutingError, split_key

if TYPE_CHECKING:
    from bridge.service.broker.control import ControlClient
    from bridge.service.broker.quarantine import RefusedMessage
    from bridge.service.settings import BrokerSettings, Kind, PublicSettings, Settings

BAD_INPUT = 2

Params = ParamSpec("Params")


def _fail(code: int, *lines: str) -> NoReturn:
    for line in lines:
        click.echo(f"bridge: {line}", err=True)
    sys.exit(code)


def _broker_settings() -> BrokerSettings:
    from bridge.service.settings import BrokerSettings

    return _load(BrokerSettings)


def _public_settings() -> PublicSettings:
    from bridge.service.settings import PublicSettings

    return _load(PublicSettings)


def _settings() -> Settings:
    from bridge.service.settings import Settings

    return _load(Settings)


def _load(kind: type[Kind]) -> Kind:
    from bridge.service.settings import InvalidSettings, load

    try:
        return load(kind)
    except InvalidSettings as error:
        _fail(BAD_INPUT, f"{len(error.faults)} setting(s) to fix:", *(f"  {fault}" for fault in error.faults))


def _catalogue(package: str) -> Catalogue:
    _use_working_directory()
    try:
        return load_catalogue(package)
    except InvalidCatalogue as error:
        head = f"the event catalogue {error.package!r} has {len(error.faults)} fault(s):"
        _fail(BAD_INPUT, head, *(f"  {fault}" for fault in error.faults))


def _use_working_directory() -> None:
    """Puts the working directory first on the import path, as `python -m` does, so that a catalogue there is found.

    `python -P` and PYTHONSAFEPATH prevent it. Called after the bridge's own imports, so that a file in the working
    directory cannot replace one of the bridge's modules.
    """
    if sys.flags.safe_path:
        return
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # The directory was deleted.
        return
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)


def _runs(function: Callable[Params, Coroutine[Any, Any, None]]) -> Callable[Params, None]:
    """Runs a coroutine as a command. Ctrl-C ends it without a traceback, with exit code 130."""

    @wraps(function)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        try:
            asyncio.run(function(*args, **kwargs))
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            # `bridge listen | head -1` closes the pipe. Without this, Python reports the error again when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="bridge")
def main() -> None:
    """Stream events from RabbitMQ to browsers. Settings are environment variables; see docs/settings.md."""


@main.command()
def serve() -> None:
    """Run the service until SIGTERM."""
    _need_server()
    from bridge.service import logs
    from bridge.service.main import run

    loaded = _settings()
    _need_tracing(loaded)
    catalogue = _catalogue(loaded.schemas)
    logs.configure()
    sys.exit(run(loaded, catalogue))


def _need_server() -> None:
    try:
        import httpx_sse  # noqa: F401
        import hypercorn  # noqa: F401
        import quart  # noqa: F401
    except ImportError as error:
        _fail(BAD_INPUT, f"{error.name} is not installed: pip install 'rabbitmq-sse-bridge[server]'")


def _need_tracing(loaded: Settings) -> None:
    if not loaded.tracing:
        return
    try:
        import bridge.service.tracing  # noqa: F401
    except ImportError as error:
        _fail(BAD_INPUT, f"BRIDGE_TRACING: {error.name} is not installed: pip install 'rabbitmq-sse-bridge[tracing]'")


# publish


@main.command()
@click.option("--to", "to", help="user:<id>, group:<id> or all.")
@click.option("--type", "event_type", help="Event type, for example job.completed.")
@click.option("--data", help="The event's data as JSON.")
@click.option("--file", "file", type=click.File("r", encoding="utf-8"), help="One event per line; - is standard input.")
@click.option("--source", default="/bridge/cli", show_default=True, help="The publishing program (CloudEvents source).")
@click.option("--id", "event_id", help="The event's id. To publish an event again, pass the same id and source.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait for RabbitMQ's confirm.")
@_runs
async def publish(
    to: str | None,
    event_type: str | None,
    data: str | None,
    file: IO[str] | None,
    source: str,
    event_id: str | None,
    timeout: float,
) -> None:
    """Publish one event, or one per line, and print its id once RabbitMQ has confirmed it.

    With --type, --data or each line is an event's data. Without --type, it is an object with `type` and `data`, and
    with `to` unless --to is given. All lines are checked before the first is sent.
    """
    loaded = _broker_settings()
    catalogue = _catalogue(loaded.schemas)
    if data is not None and file is not None:
        _fail(BAD_INPUT, "--data and --file cannot be combined: give one of them")
    if data is not None:
        lines = [("--data", data)]
    else:
        stream = file or sys.stdin
        lines = [(f"line {number}", line) for number, line in enumerate(stream, 1) if line.strip()]
    if event_id is not None and len(lines) != 1:
        _fail(BAD_INPUT, f"--id needs exactly one event, but the input has {len(lines)}: leave out --id")
    events: list[tuple[Audience, EventData]] = []
    faults = []
    for where, line in lines:
        try:
            events.append(_read_line(line, to, event_type, catalogue))
        except (ValueError, InvalidEvent) as error:
            faults.append(f"{where}: {error}")
    if not lines:
        faults.append("no event: give --data, --file, or lines on standard input")
    if faults:
        _fail(BAD_INPUT, *faults, "nothing was published")
    url = loaded.amqp_url.get_secret_value()
    attributes = {} if event_id is None else {"id": event_id}
    try:
        async with Publisher(
            url,
            source=source,
            exchange=loaded.exchange,
            timeout=timeout,
            max_event_bytes=loaded.max_event_bytes,
            log=bool(loaded.log),
        ) as publisher:
            for audience, event in events:
                click.echo(await publisher.publish(audience, event, **attributes))
    except EventRefused as error:
        _fail(BAD_INPUT, str(error))
    except PublishError as error:
        _fail(1, str(error))


def _read_line(line: str, to: str | None, event_type: str | None, catalogue: Catalogue) -> tuple[Audience, EventData]:
    """
    Raises:
        ValueError: the line is not an event. The message says why.
        InvalidEvent: the catalogue refuses the event.
    """
    text = line
    if event_type is None:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(value, dict) or not {"type", "data"} <= value.keys() <= {"to", "type", "data"}:
            raise ValueError("without --type, a line must be an object with `type`, `data` and, without --to, `to`")
        event_type, text = str(value["type"]), json.dumps(value["data"])
        to = to or value.get("to")
    if not to:
        raise ValueError("the audience is missing: give --to user:<id>, --to group:<id> or --to all")
    try:
        return Audience.parse(str(to)), catalogue.parse(event_type, text)
    except RoutingError as error:
        raise ValueError(str(error)) from None


# listen


@main.command()
@click.option("--url", required=True, help="The stream's URL, for example http://127.0.0.1:8080/events.")
@click.option("--token", required=True, help="The JWT, or @FILE to read it from a file.")
@click.option("--types", help="Patterns joined by commas, for example job.*,billing.#")
@click.option("--last-event-id", help="Cursor to resume from.")
@click.option("--count", type=int, help="Exit after this number of events.")
@_runs
async def listen(url: str, token: str, types: str | None, last_event_id: str | None, count: int | None) -> None:
    """Print events, one CloudEvent per line, and resume after every lost connection. Frames of the bridge itself go to
    standard error.
    """
    _need_server()
    import httpx
    import httpx_sse

    if token.startswith("@"):
        with open(token[1:], encoding="utf-8") as file:  # noqa: ASYNC230 - no other task runs yet.
            token = file.read().strip()
    seen = 0
    pause = 3.0
    async with httpx.AsyncClient(timeout=httpx.Timeout(10, read=60)) as client:
        while True:
            headers = {"Authorization": f"Bearer {token}"}
            if last_event_id:
                headers["Last-Event-ID"] = last_event_id
            try:
                params = {"types": types} if types else {}
                async with httpx_sse.aconnect_sse(client, "GET", url, headers=headers, params=params) as source:
                    if source.response.status_code != 200:
                        await source.response.aread()
                        _fail(1, f"{source.response.status_code}: {source.response.text.strip()}")
                    async for frame in source.aiter_sse():
                        last_event_id = frame.id or last_event_id
                        pause = frame.retry / 1000 if frame.retry is not None else pause
                        own = frame.event.startswith("bridge.")
                        click.echo(f"{frame.event} {frame.data}" if own else frame.data, err=own)
                        seen += not own
                        if count is not None and seen >= count:
                            return
            except httpx.HTTPError as error:
                click.echo(f"bridge: {error or type(error).__name__}; next try in about {pause:.1f} s", err=True)
                await asyncio.sleep(pause * (0.5 + random.random()))
                continue
            await asyncio.sleep(pause)


# token, schemas, check


@main.command()
@click.option("--user", required=True, help="User id (`sub`).")
@click.option("--group", "groups", multiple=True, help="Group id. Repeat the option for more groups.")
@click.option("--ttl", default=3600, show_default=True, type=click.IntRange(min=1), help="Seconds until it expires.")
def token(user: str, groups: tuple[str, ...], ttl: int) -> None:
    """Print a token for development, signed with BRIDGE_JWT_SECRET."""
    _need_server()
    from bridge.service.http import auth

    loaded = _settings()
    secret = loaded.jwt_secret
    if secret is None:
        _fail(BAD_INPUT, "BRIDGE_JWT_SECRET is not set; with BRIDGE_JWKS, only your login service can sign tokens")
    token = auth.mint(
        secret.get_secret_value(),
        user=user,
        groups=groups,
        ttl_seconds=ttl,
        now=time.time(),
        user_claim=loaded.jwt_user_claim,
        groups_claim=loaded.jwt_groups_claim,
    )
    click.echo(token)


@main.group()
def schemas() -> None:
    """The event catalogue."""


@schemas.command("export")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonschema", "typescript", "asyncapi", "openapi"]),
    default="jsonschema",
    show_default=True,
)
def export(form: str) -> None:
    """Print the catalogue as JSON Schemas for publishers, TypeScript types for pages, an AsyncAPI 3 document of the
    stream, or an OpenAPI 3.2 document of all routes.
    """
    loaded = _public_settings()
    catalogue = _catalogue(loaded.schemas)
    if form == "typescript":
        click.echo(exports.typescript(catalogue), nl=False)
    elif form == "asyncapi":
        click.echo(_pretty(exports.asyncapi(catalogue, version=__version__)))
    elif form == "openapi":
        from bridge.service.http.openapi import openapi

        document = openapi(
            catalogue,
            version=__version__,
            cookie=loaded.cookie,
            query_token=loaded.query_token,
            console=loaded.console,
        )
        click.echo(_pretty(document))
    else:
        click.echo(_pretty({name: catalogue.json_schema(name) for name in catalogue}))


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


@schemas.command("diff")
@click.argument("old", type=click.File("r", encoding="utf-8"))
@click.argument("new", type=click.File("r", encoding="utf-8"), required=False)
def diff(old: IO[str], new: IO[str] | None) -> None:
    """List what a change of the catalogue breaks. OLD and NEW are files that `schemas export` printed. Without NEW, OLD
    is compared with the current catalogue.

    \b
    compatible         no publisher and no page must change
    breaks publishers  data that OLD accepted is refused
    breaks pages       a page may receive data that OLD did not allow
    cannot tell        the command cannot classify the change: a person must decide

    Exit code 0: no change, or only compatible ones. 1: one of the last three. 2: a file is not an export.
    """
    before = _read_export(old)
    if new is not None:
        after = _read_export(new)
    else:
        catalogue = _catalogue(_broker_settings().schemas)
        after = {name: catalogue.json_schema(name) for name in catalogue}
    changes = evolution.compare(before, after)
    for change in changes:
        click.echo(f"{change.verdict:17} {change}")
    if not changes:
        click.echo("no change")
    sys.exit(any(change.verdict != "compatible" for change in changes))


def _read_export(file: IO[str]) -> dict[str, Any]:
    try:
        value = json.load(file)
    except ValueError as error:
        _fail(BAD_INPUT, f"{file.name}: not JSON: {error}")
    if not isinstance(value, dict) or not all(isinstance(schema, dict) for schema in value.values()):
        _fail(BAD_INPUT, f"{file.name}: not an object of JSON Schemas, as `bridge schemas export` prints it")
    return value


@main.command()
@click.option("--sample", type=click.File("rb"), help="Say what the bridge would do with this message; see below.")
@click.option("--routing-key", help="The sample's routing key, if the file has only its body.")
@_runs
async def check(sample: IO[bytes] | None, routing_key: str | None) -> None:
    """Check the settings, the catalogue, the keys, RabbitMQ and the rights, and say how to fix each fault.

    With --sample, only say what the bridge would do with the messages in a file, and connect to nothing. The file has
    messages as JSON from RabbitMQ's management (`rabbitmqadmin get`, or the page of a queue), or one message's body.
    """
    _need_server()
    if sample is not None:
        _check_sample(sample, routing_key)
        return
    from bridge.service import descriptors
    from bridge.service.broker import live, topology
    from bridge.service.http.auth import Authenticator, InvalidKeySet
    from bridge.service.settings import Settings, unknown_names

    loaded = _settings()
    _need_tracing(loaded)
    _passed("settings")
    for problem in unknown_names(Settings):
        click.echo(f"  ?  {problem}")
    catalogue = _catalogue(loaded.schemas)
    for place in (place for model in catalogue.values() for place in zoneless_times(model)):
        click.echo(
            f"  ?  {place} allows times without a zone, which browsers read in their own zones: use AwareDatetime"
        )
    _passed(f"catalogue {loaded.schemas!r} of {', '.join(catalogue.places)}: {', '.join(catalogue)}")
    for note in catalogue.notes:
        click.echo(f"  ?  {note}")
    try:
        plan = descriptors.divide(descriptors.raise_limit(), descriptors.count_open(), streams=loaded.max_connections)
    except descriptors.TooFewDescriptors as error:
        _failed(str(error))
    _passed(f"file descriptors for {plan.streams:,} streams, if `bridge serve` has the same limit as this command")
    if shortage := plan.shortage(loaded.max_connections):
        click.echo(f"  ?  {shortage}")
    if loaded.jwks is not None:
        try:
            await Authenticator(jwks=loaded.jwks).start(strict=True)
        except InvalidKeySet as error:
            _failed(str(error))
        _passed(f"key set {loaded.jwks}")
    if loaded.auth_url is not None:
        await _check_login(loaded)
    try:
        async for step in topology.rehearse(
            loaded.addresses,
            exchange=loaded.exchange,
            quarantine=loaded.quarantine,
            log=loaded.log_stream,
            control=(loaded.control, loaded.control_max_age) if loaded.control else None,
            makes_queues=loaded.feed == "queues",
            describe_channels=live.describe_channels,
        ):
            _passed(step)
    except BrokerError as error:
        _failed(str(error))


async def _check_login(loaded: Settings) -> None:
    from bridge.service.http.claims import TryAgain
    from bridge.service.http.login import ApplicationLogin, LoginForbidden, NotLoggedIn

    assert loaded.auth_url is not None, "the caller checks it"
    login = ApplicationLogin(
        loaded.auth_url, forwarded=(), timeout=loaded.auth_timeout_seconds, remember_seconds=0, concurrency=1
    )
    try:
        user = (await login.ask([])).user
    except (NotLoggedIn, LoginForbidden) as refusal:
        _passed(f"the application refuses a request without a login: {refusal}")
    except TryAgain as error:
        _failed(f"BRIDGE_AUTH_URL: {error}")
    else:
        _failed(f"BRIDGE_AUTH_URL: the application takes a request without a login for {user!r}; it must answer 401")
    finally:
        await login.close()


def _check_sample(file: IO[bytes], routing_key: str | None) -> None:
    from bridge.service.captured import read_captured
    from bridge.service.forms import MessageReader

    loaded = _broker_settings()
    messages = MessageReader.of(_catalogue(loaded.schemas), loaded)
    try:
        samples = read_captured(file.read(), routing_key)
    except ValueError as error:
        _fail(BAD_INPUT, f"{file.name}: {error}")
    refused = False
    for number, (key, body) in enumerate(samples, 1):
        try:
            event = messages.read(body, key, 0)  # 0 stands for the offset in the log.
        except InvalidEvent as error:
            refused = True
            click.echo(f"  !! message {number}, {key}: refused as {error.reason}: {error.detail}")
        else:
            audience = split_key(key)[0]
            _passed(f"message {number}, {key}: shown to {audience} as {event.text.decode()}")
    sys.exit(1 if refused else 0)


def _passed(what: str) -> None:
    click.echo(f"  ok {what}")


def _failed(what: str) -> NoReturn:
    click.echo(f"  !! {what}")
    sys.exit(1)


# kick, who


@main.command()
@click.option("--user", required=True, help="The user's id.")
@click.option("--session", help="Only this stream, as `bridge who` names it.")
@click.option("--reason", default="", help="Why, for the bridge's log.")
@click.option("--until", help="Also refuse tokens issued before: now, 2026-01-31T12:00:00Z, or seconds since 1970.")
@_runs
async def kick(user: str, session: str | None, reason: str, until: str | None) -> None:
    """End a user's streams on every replica. With --until, the user cannot come back with an older token."""
    client, by = _control_client(), f"{getpass.getuser()}@{socket.gethostname()}"
    from bridge.service.broker.control import read_moment

    try:
        moment = None if until is None else read_moment(until, time.time())
    except ValueError as error:
        _fail(BAD_INPUT, f"--until: {error}")
    try:
        kicked = await client.kick(user, by=by, session=session, reason=reason, until=moment)
    except ValueError as error:
        _fail(BAD_INPUT, str(error), "no stream was ended")
    except BrokerError as error:
        _fail(1, str(error))
    for replica, ended in sorted(kicked.replicas.items()):
        click.echo(f"replica {replica}: {ended} ended")
    if not kicked.replicas:
        _fail(1, "no replica has answered; those that are cut off end the streams when they are back")


@main.command()
@click.option("--user", help="Show this user's streams. Without it, list the users.")
@click.option("--after", default="", help="List the users after this one.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000))
@_runs
async def who(user: str | None, after: str, limit: int) -> None:
    """Print who is connected, one user or one stream per line, and on standard error which replicas have answered."""
    client = _control_client()
    try:
        if user is None:
            page = await client.users(after=after, limit=limit)
            rows, replicas, further = page.users, page.replicas, page.further
        else:
            found = await client.streams(user)
            rows, replicas, further = found.streams, found.replicas, False
    except ValueError as error:
        _fail(BAD_INPUT, str(error))
    except BrokerError as error:
        _fail(1, str(error))
    for row in rows:
        click.echo(json.dumps(row, ensure_ascii=False))
    click.echo(f"{len(replicas)} replica(s) answered: {', '.join(replicas)}", err=True)
    if further:
        click.echo(f"more: --after {rows[-1]['user']}", err=True)
    sys.exit(0 if replicas else 1)


def _control_client() -> ControlClient:
    _need_server()
    from bridge.service.broker.control import ControlClient

    loaded = _broker_settings()
    if not loaded.control:
        _fail(BAD_INPUT, "BRIDGE_CONTROL is empty: the replicas take no orders")
    return ControlClient(loaded.addresses, exchange=loaded.control)


# quarantine


@main.group()
def quarantine() -> None:
    """List or replay the messages that the bridge refused."""


@quarantine.command("list")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1))
@_runs
async def list_refused(limit: int) -> None:
    """Print the oldest refused messages, one per line, and leave them in the queue."""
    _need_server()
    from bridge.service.broker.quarantine import peek

    loaded = _broker_settings()
    try:
        for message in await peek(loaded.addresses, queue=loaded.quarantine, limit=limit):
            click.echo(_shown(message))
    except BrokerError as error:
        _fail(1, str(error))


@quarantine.command("replay")
@click.option("--limit", default=10_000, show_default=True, type=click.IntRange(min=1))
@_runs
async def replay_refused(limit: int) -> None:
    """Publish each message that the catalogue now accepts, with its old id, and leave the others. Exit code 1: some
    messages are still refused.
    """
    _need_server()
    from bridge.service.broker.quarantine import replay
    from bridge.service.forms import MessageReader

    loaded = _broker_settings()
    readable = MessageReader.of(_catalogue(loaded.schemas), loaded)
    sent = left = 0
    try:
        messages: AsyncIterator[tuple[RefusedMessage, InvalidEvent | None]] = replay(
            loaded.addresses,
            queue=loaded.quarantine,
            messages=readable,
            limit=limit,
        )
        async for message, error in messages:
            if error is None:
                sent += 1
            else:
                left += 1
                click.echo(_shown(message, error))
    except BrokerError as error:
        _fail(1, str(error), f"{sent} published again before this error")
    click.echo(f"{sent} published again, {left} still refused", err=True)
    sys.exit(1 if left else 0)


def _shown(message: RefusedMessage, error: InvalidEvent | None = None) -> str:
    return json.dumps(
        {
            "reason": error.reason if error else message.reason,
            "detail": error.detail if error else message.detail,
            "routing_key": message.routing_key,
            # Bytes that are not UTF-8 are shown as \xNN; the queue keeps the original bytes.
            "body": message.body.decode("utf-8", errors="backslashreplace"),
        },
        ensure_ascii=False,
    )
