"""Promises of docs/contract.md that no other test checks, and that need no RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from pamqp.commands import Basic
from pydantic import SecretStr
from quart import Quart

import bridge
from bridge import amqp, blocking, event, publisher, routing, sender
from bridge.catalogue.load import load_catalogue
from bridge.cli import main
from bridge.event import Cut, InvalidEvent, TooLarge, read_event
from bridge.publisher import EventWriter
from bridge.routing import TypeFilter, split_key
from bridge.samples.jobs import JobCompleted
from bridge.service import descriptors, logs
from bridge.service import main as service_main
from bridge.service.broker import deliveries, eventlog, lookup, quarantine, scans, topology
from bridge.service.broker.eventlog import EventLog
from bridge.service.broker.scans import cost
from bridge.service.forms import MessageReader
from bridge.service.http import auth, entrance, headers, keys, web
from bridge.service.http.auth import Authenticator, mint
from bridge.service.http.entrance import Entrance, Guest, Phase, listen
from bridge.service.http.http1 import host
from bridge.service.http.web import create_app
from bridge.service.metrics import Metrics
from bridge.service.settings import MIN_SECRET_BYTES, LogSettings, Settings
from bridge.service.streams import cursor, deadlines, progress, reader, recall, session
from bridge.service.streams import hub as streams_hub
from bridge.service.streams.cursor import Anchor, Cursor
from bridge.service.streams.hub import Hub
from bridge.service.streams.reader import EventReader
from bridge.service.streams.session import Session
from deploy.local.node import free_ports
from tests.decoder import Decoder, Frame
from tests.events import make_event
from tests.patience import PATIENCE
from tests.unit.loopback import serving, site, until

ROOT = Path(__file__).parent.parent.parent
SECRET = "0123456789abcdef0123456789abcdef"
SAMPLE = load_catalogue("bridge.samples")
NOTHING: Any = None


@pytest.mark.contract("1.6")
def test_publisher_and_bridge_make_keys_by_one_public_function() -> None:
    assert bridge.Audience is routing.Audience
    assert "Audience" in bridge.__all__
    audience = bridge.Audience.user("a.b")
    writer = EventWriter(source="/t", exchange="events", max_event_bytes=65_536, log=True)
    message = writer.message(audience, JobCompleted(job_id="r-7", duration_seconds=1), {})
    assert message.routing_key == audience.routing_key("job.completed")
    assert split_key(message.routing_key) == (audience, "job.completed")


class Replayed:
    """A queue with one message, and a publisher that records its messages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, body: bytes, **headers: Any) -> None:
        self.sent: list[bytes] = []
        self.taken = 0
        properties = Basic.Properties(headers={"x-routing-key": "all.job.completed", **headers})
        self._message = SimpleNamespace(
            body=body, delivery=None, delivery_tag=1, routing_key="q", header=SimpleNamespace(properties=properties)
        )

        async def self_for(*_: Any, **__: Any) -> Any:
            return self

        monkeypatch.setattr(amqp, "connect", self_for)
        monkeypatch.setattr(amqp, "open_channel", self_for)
        monkeypatch.setattr(amqp, "close", self_for)
        monkeypatch.setattr(amqp, "translating", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(quarantine, "Sender", lambda *_, **__: self)

    async def queue_declare(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(message_count=1)

    async def basic_get(self, _: str) -> Any:
        return self._message

    async def basic_ack(self, _: int) -> None:
        self.taken += 1

    async def send(self, body: bytes, **_: Any) -> None:
        self.sent.append(body)

    async def close(self) -> None: ...


@pytest.mark.contract("1.24")
@pytest.mark.parametrize("headers", [{}, {"x-size": 300_000}], ids=["whole", "cut"])
async def test_a_cut_message_is_never_replayed(monkeypatch: pytest.MonkeyPatch, headers: dict[str, Any]) -> None:
    """Even if the kept part is a valid event, and the limit is above the size of the whole message."""
    event = {"specversion": "1.0", "id": "e", "source": "/t", "type": "job.completed"}
    body = json.dumps({**event, "data": {"job_id": "r-7", "duration_seconds": 1}}).encode()
    queue = Replayed(monkeypatch, body, **headers)
    options: dict[str, Any] = {"queue": "q", "messages": MessageReader(SAMPLE, 1_000_000, "e"), "limit": 10}
    ((_, error),) = [each async for each in quarantine.replay(["amqp://nobody/"], **options)]
    if headers:
        assert isinstance(error, TooLarge)
        assert (queue.sent, queue.taken) == ([], 0)
    else:
        assert error is None
        assert (queue.sent, queue.taken) == ([body], 1)


def make_app(**changes: Any) -> Quart:
    settings = Settings(jwt_secret=SecretStr(SECRET), **changes)
    return create_app(
        hub=NOTHING,
        authenticator=Authenticator(secret=SECRET),
        settings=settings,
        catalogue=SAMPLE,
        metrics=Metrics(),
        write_batch=NOTHING,
    )


@pytest.mark.contract("2.22")
async def test_an_identity_is_not_accepted_as_a_token() -> None:
    client = make_app(query_token=True).test_client()
    token = mint(SECRET, user="42", groups=(), ttl_seconds=3600, now=4_000_000_000)
    answer = await client.head("/events", headers={"Authorization": f"Bearer {token}"})
    identity = answer.headers["Bridge-Identity"]
    for shown in (
        {"Bridge-Identity": identity},
        {"Authorization": f"Bearer {identity}"},
        {"Cookie": f"bridge_token={identity}"},
    ):
        assert (await client.head("/events", headers=shown)).status_code == 401
    assert (await client.head(f"/events?access_token={identity}")).status_code == 401


@pytest.mark.contract("2.47")
@pytest.mark.parametrize(("body_bytes", "counts"), [(0, 1), (1023, 1), (1024, 2), (2047, 2), (65_536, 65)])
def test_an_entry_counts_once_and_once_more_for_each_kib(body_bytes: int, counts: int) -> None:
    assert cost(body_bytes) == counts


def run(*args: str) -> str:
    result = CliRunner().invoke(main, [*args], env={"BRIDGE_SCHEMAS": "bridge.samples"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.contract("3.6")
@pytest.mark.parametrize(
    ("form", "start"),
    [("jsonschema", '{\n  "approval.'), ("typescript", "// "), ("asyncapi", '{\n  "asyncapi": "3.'),
     ("openapi", '{\n  "openapi": "3.2')],
)  # fmt: skip
def test_the_catalogue_is_printed_in_each_format(form: str, start: str) -> None:
    printed = run("schemas", "export", "--format", form)
    assert printed.startswith(start)
    assert "job.completed" in printed


@pytest.mark.contract("3.10")
async def test_the_export_is_what_the_route_gives() -> None:
    served = await (await make_app().test_client().get("/schemas")).get_json()
    assert json.loads(run("schemas", "export")) == served
    assert all(schema["$schema"].endswith("/draft/2020-12/schema") for schema in served.values())


@pytest.mark.contract("5.27")
def test_two_cut_bodies_with_the_same_beginning_are_one_message_published_twice() -> None:
    class Kept:
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def put(self, body: Cut, **_: str) -> None:
            self.sizes.append(body.size)

    kept: Any = Kept()
    reader = EventReader(MessageReader({}, 65_536, "events"), metrics=Metrics(), quarantine=kept)
    one, other = Cut(b"x" * 4_096, 200_000), Cut(b"x" * 4_096, 300_000)
    for queue in (0, 1):
        reader.read("all.x", one, via=queue)
    assert kept.sizes == [200_000]
    reader.read("all.x", other, via=0)
    assert len(kept.sizes) == 2, "the same queue delivered it again"
    reader.read("all.x", other, via=1)
    assert len(kept.sizes) == 2


SESSION: dict[str, Any] = {
    "user": "42",
    "identity": "i",
    "types": TypeFilter(),
    "named": True,
    "last_event_id": None,
    "has_log": True,
    "retry_ms": 3000,
    "heartbeat_seconds": 15,
    "max_events": 1000,
    "max_bytes": 1_000_000,
}


def live(anchor: Anchor) -> Session:
    made = Session(**SESSION)
    made.bound(1_000, anchor)
    made.tail_ended()
    made.take()
    return made


def frames(made: Session) -> list[Frame]:
    found, decoder = [], Decoder()
    while chunk := made.take():
        found += decoder.feed(chunk)
    return found


@pytest.mark.contract("5.59")
def test_a_live_stream_gets_at_most_one_gap_in_five_seconds() -> None:
    made = live(Anchor(10, "AAAAAA"))
    sent_at: list[int] = []
    for now_ms in range(1_000, 13_000, 500):
        made.unreadable(now_ms)
        sent_at += [now_ms for frame in frames(made) if frame.event == "bridge.gap"]
    assert sent_at == [1_000, 6_000, 11_000]


@pytest.mark.contract("5.61")
def test_after_a_gap_the_cursor_stays_before_the_event_until_the_next_position() -> None:
    made = live(Anchor(10, "AAAAAA"))
    made.unreadable(2_000)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]
    made.offer(make_event(1), 3_000)
    (event,) = frames(made)
    assert Cursor.parse(event.id).anchor == Anchor(10, "AAAAAA"), "for a client that returns, the event is read again"
    made.watermark(Anchor(100, "BBBBBB"), 9_000)
    made.prove(Anchor(100, "BBBBBB"))
    made.offer(make_event(2), 20_000)
    (event,) = frames(made)
    assert Cursor.parse(event.id).anchor == Anchor(100, "BBBBBB"), "the log is read from after the event"


@pytest.mark.contract("2.13")
@pytest.mark.parametrize("query", ["types=a..b", "named=maybe", "audience=1"])
async def test_a_head_request_checks_the_query_as_get_does(query: str) -> None:
    client = make_app().test_client()
    token = mint(SECRET, user="42", groups=(), ttl_seconds=3600, now=4_000_000_000)
    given = {"Authorization": f"Bearer {token}"}
    answer = await client.head(f"/events?{query}", headers=given)
    assert (answer.status_code, answer.mimetype) == (400, "application/problem+json")
    assert (await client.get(f"/events?{query}", headers=given)).status_code == 400


@pytest.mark.contract("5.2")
@pytest.mark.parametrize(
    "written",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=utf-8",
        'application/json ;\tcharset="utf-8"; profile="a;\\"b"',
        "application/json;",
        "APPLICATION/JSON",
        "text/json",
        "application/vnd.acme.job+json; v=2",
        "application/problem+json",
        "model/gltf+json",
        "image/json",
        'application/json; a="\\\u00e9"',
    ],
)
def test_the_data_may_have_any_type_of_json(written: str) -> None:
    event = {"specversion": "1.0", "id": "e", "source": "/t", "type": "job.completed", "datacontenttype": written}
    body = json.dumps({**event, "data": {"job_id": "r-7", "duration_seconds": 1}}).encode()
    assert json.loads(read_event(body, "all.job.completed", SAMPLE).text)["datacontenttype"] == "application/json"


@pytest.mark.contract("5.2")
@pytest.mark.parametrize(
    "written",
    ["application/jsonp", "application/json charset=utf-8", "application/json; charset", "json", "text/plain", "",
     "application/xml; a=json", "application/json; a=\"", "application/+jsonx", "application/json, a/b", "/json",
     "json/", "application/j\u017fon", "app\u0131ication/json", "application/vnd.\u212a+json",
     "application/json; a=\"\x01\""],
)  # fmt: skip
def test_another_type_of_the_data_is_refused(written: str) -> None:
    event = {"specversion": "1.0", "id": "e", "source": "/t", "type": "job.completed", "datacontenttype": written}
    body = json.dumps({**event, "data": {"job_id": "r-7", "duration_seconds": 1}}).encode()
    with pytest.raises(InvalidEvent) as caught:
        read_event(body, "all.job.completed", SAMPLE)
    assert caught.value.reason == "not-a-cloudevent"


# The limits of connections, on real sockets. The tests do not wait: they set a guest's time back.


async def dial(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


def set_back(guest: Guest, seconds: float) -> None:
    guest.since = time.monotonic() - seconds


@pytest.mark.contract("2.59")
async def test_a_connection_without_a_further_request_is_closed_after_75_s() -> None:
    async with site() as here:
        reader, writer = await dial(here.url)
        writer.write(b"GET /schemas/job.completed HTTP/1.1\r\nHost: b\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        idle = here.entrance._guests[Phase.IDLE]
        await until(lambda: len(idle) == 1 and next(iter(idle)).is_silent)
        (guest,) = idle
        set_back(guest, 74)
        here.entrance._sweep()
        assert here.ended == []
        set_back(guest, 76)
        here.entrance._sweep()
        assert here.ended == ["idle"]
        async with asyncio.timeout(PATIENCE):
            assert b"HTTP/1.1 4" not in await reader.read(), "the connection ends without an error"
        writer.close()


@pytest.mark.contract("2.60")
async def test_an_answer_that_is_not_a_stream_is_cut_after_60_s() -> None:
    app, leave = Quart("slow"), asyncio.Event()

    @app.get("/")
    async def slow() -> str:
        await leave.wait()
        return "too late"

    ended: list[str] = []
    async with serving(app, ended=ended) as (url, entrance):
        reader, writer = await dial(url)
        writer.write(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n")
        answering = entrance._guests[Phase.ANSWERING]
        await until(lambda: len(answering) == 1)
        (guest,) = answering
        set_back(guest, 59)
        entrance._sweep()
        assert ended == []
        set_back(guest, 61)
        entrance._sweep()
        assert ended == ["answer-timeout"]
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        leave.set()
        writer.close()


@pytest.mark.contract("2.61")
async def test_the_internal_address_takes_16_connections_and_makes_room_as_the_public_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entrances: dict[str, Entrance] = {}

    async def record(*args: Any, name: str, **options: Any) -> None:
        options["on_entrance"] = partial(entrances.__setitem__, name)
        await host(*args, name=name, **options)

    monkeypatch.setattr(service_main, "host", record)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # The test process continues.
    (port,) = free_ports(1)
    settings = Settings(
        amqp_url=SecretStr(f"amqp://127.0.0.1:{port}/"), jwt_secret=SecretStr(SECRET), schemas="bridge.samples",
        drain_seconds=0,
    )  # fmt: skip
    made = service_main._Service(settings, SAMPLE, descriptors.divide(10_000, 100, streams=10))
    public, internal = (listen("127.0.0.1:0", stall_seconds=30) for _ in range(2))
    address, stop = service_main._address(internal), asyncio.Event()
    running = asyncio.create_task(made.run(public, internal, stop))
    clients = []
    for _ in range(17):
        reader, writer = await dial(address)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: b\r\n\r\n")
        clients.append((reader, writer))
    for reader, _ in clients[:16]:
        async with asyncio.timeout(PATIENCE):
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    internal_entrance = entrances["internal"]
    await until(lambda: len(internal_entrance._guests[Phase.IDLE]) == 16 and internal_entrance._is_full)
    assert len(internal_entrance) == 16, "the last one waits to be accepted"
    oldest = next(iter(internal_entrance._guests[Phase.IDLE]))
    await until(lambda: oldest.is_silent)
    set_back(oldest, 2)
    async with asyncio.timeout(PATIENCE):
        assert b" 200 " in await clients[16][0].readuntil(b"\r\n\r\n")
        await clients[0][0].read()  # It ends.
    stop.set()
    assert await running == 0
    for _, writer in clients:
        writer.close()


# RabbitMQ, as the bridge sees it.


@pytest.mark.contract("5.20")
async def test_a_user_who_may_not_declare_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three exist, and do not fit. RabbitMQ reports this only to a user who may declare."""
    asked: list[bool] = []

    async def on_new_channel(*_: Any, passive: bool = False) -> None:
        asked.append(passive)
        if not passive:
            raise amqp.AccessRefused("declaring: ACCESS_REFUSED")

    monkeypatch.setattr(topology, "_on_new_channel", on_new_channel)
    log = LogSettings("events.log", "1h", 1_000_000)
    for declaring in (
        topology.declare_exchange(NOTHING, "events"),
        topology.declare_quarantine(NOTHING, "events.invalid"),
        topology.declare_log(NOTHING, log, "events"),
    ):
        assert await declaring == topology.Declared(may_declare=False)
    assert asked == [False, True] * 3


@pytest.mark.contract("5.47")
async def test_a_log_that_does_not_answer_within_eight_seconds_is_a_gap(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, Anchor | None] = {}
    failures = 0

    async def write() -> Anchor:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise amqp.BrokerUnavailable("no answer in time")
        return Anchor(9, "abcdef")

    monkeypatch.setattr(log, "_write_watermark", write)
    monkeypatch.setattr(amqp, "pauses", lambda *_: lambda: 0.0)

    def answer(name: str, anchor: Anchor | None, _: int) -> None:
        answers[name] = anchor

    for name, waited in (("patient", 7.0), ("overdue", 8.1)):
        log.write_watermark(partial(answer, name))
        on_written, asked = log._watermark_waiters.pop()
        log._watermark_waiters.append((on_written, asked - waited))
    running = asyncio.create_task(log._write_watermarks())
    await until(lambda: len(answers) == 2)
    running.cancel()
    assert answers == {"overdue": None, "patient": Anchor(9, "abcdef")}
    made = Session(**{**SESSION, "last_event_id": "3.7.abcdef..."})
    assert made.bound(1_000, answers["overdue"]).gap == "no-log"


@pytest.mark.contract("5.36")
async def test_the_bridges_own_entries_go_to_the_logs_queue_directly(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default exchange (`""`) routes them to the queue of that name only. No binding can get them."""
    sent: list[dict[str, Any]] = []
    readers: list[Any] = []

    class Reading:
        def __init__(self, _: Any, stream: str, offset: str, on_entry: Any, __: Any) -> None:
            readers.append((stream, offset, on_entry))

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *_: object) -> None: ...

    async def send(body: bytes, **options: Any) -> None:
        sent.append({"body": body, **options})
        readers[0][2](41, "events.log", b"of somebody else")
        readers[0][2](42, "events.log", body)

    async def connect() -> None: ...

    monkeypatch.setattr(eventlog, "LogConsumer", Reading)
    monkeypatch.setattr(log, "_connect", connect)
    monkeypatch.setattr(log._sender, "send", send)
    written = await log._write_watermark()
    (message,) = sent
    assert (message["exchange"], message["routing_key"], message["mandatory"]) == ("", "events.log", True)
    assert message["properties"].message_type == "bridge.tick"
    assert str(UUID(message["body"].decode())) == message["body"].decode()
    assert written.offset == 42
    # One watermark in ten seconds serves all open streams. Without a stream, the hub writes none.
    limits = Settings(jwt_secret=SecretStr(SECRET))
    hub = Hub(reader=NOTHING, limits=limits, metrics=Metrics(), make_feed=lambda _: NOTHING, log=log)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            hub._connections = dict.fromkeys([NOTHING])
        if len(pauses) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await hub.write_watermarks()
    assert pauses == [10.0] * 4
    assert len(log._watermark_waiters) == 2


async def test_a_lost_reader_ends_the_wait_for_a_watermark(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[Any] = []

    class Reading:
        def __init__(self, *given: Any) -> None:
            readers.append(given[-1])

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *_: object) -> None: ...

    async def send(_: bytes, **__: Any) -> None:
        readers[0]()
        readers[0]()

    async def connect() -> None: ...

    async def newest() -> Anchor:
        return Anchor(7, "AAAAAA")

    monkeypatch.setattr(eventlog, "LogConsumer", Reading)
    monkeypatch.setattr(eventlog, "WATERMARK_TIMEOUT_SECONDS", 1e6)
    monkeypatch.setattr(log, "_connect", connect)
    monkeypatch.setattr(log, "newest", newest)
    monkeypatch.setattr(log._sender, "send", send)
    assert await log._write_watermark() == Anchor(7, "AAAAAA")


# The numbers. Other tests check the behaviour, often with these constants. These tests check the values.

CONTRACT = (ROOT / "docs" / "contract.md").read_text()
IN_WORDS = {"a": 1, "an": 1, "two": 2, "three": 3, "third": 3, "five": 5, "eight": 8, "ten": 10, "sixteen": 16}
DAY_MS = 86_400_000
QUARANTINE: Any = topology.QUARANTINE
DEFAULT = re.compile(r"`BRIDGE_([A-Z_]+)` \[(?!\d+\.\d+\])`?([^\]`]+)`?\]")


def text_of(clause: str) -> str:
    """The text from the previous number to this one, with the bullets inside it that have no number."""
    before, after = CONTRACT.split(f"[{clause}]")
    inside = re.match(r"(?:\n {2,}- [^\[]*?(?=\n {2,}- |\n- ))*", after)
    assert inside is not None
    return " ".join((re.split(r"\[\d+\.\d+\]", before)[-1] + inside[0]).split())


def default(name: str) -> Any:
    return Settings.model_fields[name].default


def of_the_client(name: str) -> int:
    found = re.search(rf"^const {name} = ([\d_]+);", (ROOT / "bridge/client/client.js").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1])


NUMBERS: list[tuple[str, str, float]] = [
    ("1.4", "255 bytes", routing.MAX_KEY_BYTES),
    ("1.5", "128 characters", routing.MAX_TYPE_CHARS),
    ("1.9", "128 characters", event.MAX_ID_CHARS),
    ("1.20", "10,000 messages", QUARANTINE["x-max-length"]),
    ("1.20", "7 days", QUARANTINE["x-message-ttl"] / DAY_MS),
    ("1.22", "1,000 characters", event.MAX_DETAIL_CHARS),
    ("1.23", "4,096 bytes", deliveries.KEPT_BYTES),
    ("2.4", "32 bytes", MIN_SECRET_BYTES),
    ("2.6", "16", routing.MAX_PATTERNS),
    ("2.26", "60 s", deadlines.POSITION_SECONDS),
    ("2.40", "10000", default("max_connections")),
    ("2.41", "20", default("max_connections_per_user")),
    ("2.42", "1000 and", default("backlog_events")),
    ("2.42", "1048576", default("backlog_bytes")),
    ("2.43", "30", default("stall_seconds")),
    ("2.44", "three times", streams_hub.OPENINGS_FACTOR),
    ("2.44", "60.", streams_hub.LEAST_OPENINGS),
    ("2.44", "20 s", streams_hub.OPENINGS_SECONDS),
    ("2.46", "ten minutes", scans.REFILL_SECONDS / 60),
    ("2.52", "20 s", streams_hub.ATTACH_SECONDS),
    ("2.52", "3 s", streams_hub.BROKER_MOMENT_SECONDS),
    ("2.57", "eight of the rest", descriptors.GUEST_SHARE),
    ("2.57", "32 to", descriptors.LEAST_GUESTS),
    ("2.57", "1,024", descriptors.MOST_GUESTS),
    ("2.57", "a second", entrance.ROOM_SECONDS),
    ("2.57", "5 s", entrance.ROOM_ANSWER_SECONDS),
    ("2.58", "10 s", entrance.HEADER_SECONDS),
    ("2.59", "75 s", entrance.KEEP_ALIVE_SECONDS),
    ("2.60", "60 s", entrance.ANSWER_SECONDS),
    ("2.61", "16 connections", descriptors.INTERNAL_CONNECTIONS),
    ("4.9", "30 s", publisher.TIMEOUT_SECONDS),
    ("4.9", "two seconds", blocking.MARGIN_SECONDS),
    ("4.13", "255", sender.PIPELINE_EVENTS - 1),
    ("5.21", "500 at once", quarantine.BURST),
    ("5.21", "100 a second", quarantine.PER_SECOND),
    ("5.21", "1,000 messages", quarantine.MAX_PENDING),
    ("5.21", "32 MB", quarantine.MAX_PENDING_BYTES / 2**20),
    ("5.22", "ten seconds", logs.REPEATED_LINE_SECONDS),
    ("5.25", "10,000 refused", reader.REFUSALS),
    ("5.27", "4,096 bytes", deliveries.KEPT_BYTES),
    ("5.28", "eight times", deliveries.HEADER_FRAMES),
    ("5.30", "five seconds", publisher.RECOVERY_SECONDS),
    ("5.36", "ten seconds", streams_hub.WATERMARK_INTERVAL_SECONDS),
    ("5.37", "third `#`", routing.MAX_HASHES + 1),
    ("5.47", "eight seconds", eventlog.PATIENCE_SECONDS),
    ("5.49", "sixteen", cursor.MAX_DIGESTS),
    ("5.52", "512", session.RECENT_IDS),
    ("5.52", "20,000", session.OVERLAP_IDS),
    ("5.53", "two events", recall.MAX_UNSENT),
    ("5.53", "sixteen", cursor.MAX_DIGESTS),
    ("5.53", "20,000 events", recall.RECALL_EVENTS),
    ("5.53", "4 MiB", recall.RECALL_BYTES / 2**20),
    ("5.54", "10 to 30 s", streams_hub.WATERMARK_INTERVAL_SECONDS),
    ("5.54", "50 ms", progress.NEAR_MS),
    ("5.54", "10,000", progress.MANY_BEHIND),
    ("5.66", "50, at most", lookup.LogQuestion().limit),
    ("5.66", "200", lookup.MAX_ANSWERS),
    ("5.67", "20,000", lookup.SCAN_ENTRIES),
    ("6.2", "2 s", keys.WAIT_SECONDS),
    ("6.3", "30 s", keys.VERDICT_SECONDS),
    ("6.5", "five readings", keys.FETCH_BURST),
    ("6.5", "ten seconds", keys.FETCH_EVERY_SECONDS),
    ("6.6", "4,096", keys.MAX_REMEMBERED),
    ("6.8", "an hour", keys.REFRESH_SECONDS / 3600),
    ("6.10", "5 s", keys.FIRST_READ_EVERY_SECONDS),
    ("6.25", "five cookies", auth.MAX_TOKENS),
    ("6.29", "100 names", headers.MOST_ASKED),
    ("6.29", "4,096 bytes", headers.MOST_ASKED_BYTES),
    ("6.30", "two hours", web.PREFLIGHT_SECONDS / 3600),
    ("7.14", "5 s", of_the_client("LEADER_TOKEN_MS") / 1000),
    ("7.15", "5 s", of_the_client("PING_MS") / 1000),
    ("7.16", "1 s", of_the_client("GATHER_MS") / 1000),
    ("7.17", "10,000", of_the_client("RECENT_IDS")),
    ("7.18", "500,000", of_the_client("RING_CHARS")),
    ("7.19", "8 ms", of_the_client("SLICE_MS")),
    ("7.20", "1,000", of_the_client("BATCH_EVENTS")),
    ("7.22", "60", of_the_client("LOAD_SECONDS")),
    ("7.23", "10,000", of_the_client("WAITING_EVENTS")),
    ("7.23", "10 million", of_the_client("WAITING_CHARS") / 1_000_000),
    ("7.31", "16", of_the_client("MAX_PATTERNS")),
]


@pytest.mark.contract(
    "1.4", "1.5", "1.9", "1.20", "1.22", "1.23", "2.4", "2.6", "2.26", "2.40", "2.41", "2.42", "2.43", "2.44", "2.46",
    "2.52", "2.57", "2.58", "2.59", "2.60", "2.61", "4.9", "4.13", "5.21", "5.22", "5.25", "5.27", "5.28", "5.30",
    "5.36", "5.37", "5.47", "5.49", "5.52", "5.53", "5.54", "5.66", "5.67", "6.2", "6.3", "6.5", "6.6", "6.8", "6.10",
    "6.25", "6.29", "6.30", "7.14", "7.15", "7.16", "7.17", "7.18", "7.19", "7.20", "7.22", "7.23", "7.31",
)  # fmt: skip
@pytest.mark.parametrize(("clause", "words", "value"), NUMBERS)
def test_a_number_of_the_contract_is_that_of_the_code(
    clause: str, words: str, value: float, request: pytest.FixtureRequest
) -> None:
    (mark,) = request.node.iter_markers("contract")
    assert clause in mark.args
    assert re.search(rf"(?<![\w,]){re.escape(words)}(?!\d)", text_of(clause)), f"{clause} does not say {words!r}"
    number = words.split()[0].rstrip(".,").replace(",", "")
    assert IN_WORDS.get(number, number) == (value if number in IN_WORDS else f"{value:.15g}"), "the code differs"


@pytest.mark.contract(
    "1.1", "1.7", "1.19", "1.20", "2.1", "2.3", "2.28", "2.34", "2.46", "2.53", "2.54", "2.75", "2.77", "4.2"
)
def test_a_default_of_the_contract_is_that_of_the_settings(request: pytest.FixtureRequest) -> None:
    (mark,) = request.node.iter_markers("contract")
    assert [clause for clause in mark.args if not DEFAULT.search(text_of(clause))] == [], "these have no default"
    for name, written in DEFAULT.findall(CONTRACT):
        value = default(name.lower())
        value = value.get_secret_value() if isinstance(value, SecretStr) else value
        assert written == str(value), name
