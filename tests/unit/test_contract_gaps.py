"""Promises of docs/contract.md that no other test holds, and that need no RabbitMQ."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import SecretStr
from quart import Quart

import bridge
from bridge import amqp, routing
from bridge.catalogue.load import load_catalogue
from bridge.cli import main
from bridge.event import Cut, TooLarge
from bridge.publisher import EventWriter
from bridge.routing import TypeFilter, split_key
from bridge.samples.jobs import JobCompleted
from bridge.service.broker import quarantine
from bridge.service.broker.scans import cost
from bridge.service.http.auth import Authenticator, mint
from bridge.service.http.web import create_app
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings
from bridge.service.streams.cursor import Anchor, Cursor
from bridge.service.streams.reader import EventReader
from bridge.service.streams.session import Session
from tests.decoder import Decoder, Frame
from tests.events import make_event

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
    """A queue with one message, and a publisher that keeps what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, body: bytes, **headers: Any) -> None:
        self.sent: list[bytes] = []
        self.taken = 0
        properties = SimpleNamespace(headers={"x-routing-key": "all.job.completed", **headers})
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
    """Though the part that was kept is a good event, and the limit is above the size of the whole."""
    event = {"specversion": "1.0", "id": "e", "source": "/t", "type": "job.completed"}
    body = json.dumps({**event, "data": {"job_id": "r-7", "duration_seconds": 1}}).encode()
    queue = Replayed(monkeypatch, body, **headers)
    options: dict[str, Any] = {"queue": "q", "exchange": "e", "models": SAMPLE, "max_bytes": 1_000_000, "limit": 10}
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
async def test_an_identity_opens_nothing() -> None:
    client = make_app(query_token=True).test_client()
    token = mint(SECRET, user="42", groups=(), ttl_seconds=3600, now=4_000_000_000)
    answer = await client.head("/events", headers={"Authorization": f"Bearer {token}"})
    identity = answer.headers["Bridge-Identity"]
    for headers in (
        {"Bridge-Identity": identity},
        {"Authorization": f"Bearer {identity}"},
        {"Cookie": f"bridge_token={identity}"},
    ):
        assert (await client.head("/events", headers=headers)).status_code == 401
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
    reader = EventReader({}, max_event_bytes=65_536, metrics=Metrics(), quarantine=kept)
    one, other = Cut(b"x" * 4_096, 200_000), Cut(b"x" * 4_096, 300_000)
    for queue in (0, 1):
        reader.read("all.x", one, via=queue)
    assert kept.sizes == [200_000]
    reader.read("all.x", other, via=0)
    assert len(kept.sizes) == 2, "the same queue delivered it again"
    reader.read("all.x", other, via=1)
    assert len(kept.sizes) == 2


def live(anchor: Anchor) -> Session:
    made = Session(
        user="42",
        identity="i",
        types=TypeFilter(),
        named=True,
        last_event_id=None,
        has_log=True,
        retry_ms=3000,
        heartbeat_seconds=15,
        max_events=1000,
        max_bytes=1_000_000,
    )
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
    assert Cursor.parse(event.id).anchor == Anchor(10, "AAAAAA"), "a client that comes back has the event read again"
    made.watermark(Anchor(100, "BBBBBB"), 9_000)
    made.prove(Anchor(100, "BBBBBB"))
    made.offer(make_event(2), 20_000)
    (event,) = frames(made)
    assert Cursor.parse(event.id).anchor == Anchor(100, "BBBBBB"), "it is read from behind the event"
