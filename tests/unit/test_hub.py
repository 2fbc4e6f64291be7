"""The hub serves all streams at once. No broker runs: the tests call the hub's callbacks."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from bridge.routing import TypeFilter
from bridge.service.broker.quarantine import Quarantine
from bridge.service.forms import MessageReader
from bridge.service.http.auth import Subscriber
from bridge.service.http.claims import TryAgain
from bridge.service.http.login import LoginForbidden, NotLoggedIn
from bridge.service.metrics import Metrics
from bridge.service.streams.cursor import Anchor
from bridge.service.streams.deadlines import POSITION_SECONDS, Deadlines
from bridge.service.streams.hub import Connection, Hub, StreamRefused, StreamRequest
from bridge.service.streams.reader import EventReader
from bridge.service.streams.session import Session, State
from tests.events import make_event

NOTHING: Any = None


class Log:
    """Records fences. The test decides when a queue delivers them."""

    def __init__(self) -> None:
        self.fences: list[tuple[str, bytes]] = []

    def expect(self, user: str, count: int) -> None: ...

    def fence(self, queue: str, body: bytes) -> None:
        self.fences.append((queue, body))


class Broker:
    shared_queue = "bridge.shared.1"
    has_dropped = False
    exchanges_lost = 0
    overlaps = True
    reached: Anchor | None = None


class Limits:
    max_event_bytes = 65_536
    max_connections = 10_000
    max_connections_per_user = 20
    openings_per_user: int | None = None
    drain_seconds = 10.0
    heartbeat_seconds = 15.0
    retry_seconds = 3.0
    max_age_seconds = 3600.0
    backlog_events = 1000
    backlog_bytes = 1_048_576


class Subscription:
    queue = "bridge.live.1"
    bound = True
    number = 1


def anchor(number: int) -> Anchor:
    return Anchor(100 * number, f"anchor{number}"[-6:])


def new_session() -> Session:
    return Session(
        identity="",
        user="42",
        types=TypeFilter(),
        named=True,
        last_event_id=None,
        has_log=True,
        retry_ms=3000,
        heartbeat_seconds=15,
        max_events=1000,
        max_bytes=1_000_000,
    )


def make(quarantine: Any = NOTHING) -> tuple[Hub, Log, Connection]:
    """The catalogue has no types: each event has a type that only another replica knows."""
    log: Any = Log()
    broker: Any = Broker()
    metrics = Metrics()
    reader = EventReader(MessageReader({}, 65_536, "events"), metrics=metrics, quarantine=quarantine)
    limits: Any = Limits()
    hub = Hub(reader=reader, limits=limits, metrics=metrics, make_feed=lambda _: broker, log=log)
    session = new_session()
    session.bound(0, Anchor(1, "AAAAAA"))
    session.tail_ended()
    assert session.state is State.LIVE
    subscriber = Subscriber("42", (), 1e12)
    request = StreamRequest(subscriber, "", TypeFilter(), named=True, last_event_id=None, keys=())
    connection = Connection(hub, request, session, NOTHING, lambda: None, 0.0)
    hub._by_user = {"user.42.": [connection]}
    subscription: Any = Subscription()
    connection.subscription = subscription
    return hub, log, connection


def offset_of(connection: Connection) -> int:
    """The offset of the position in the cursor with which a client would return."""
    connection.session.send_position(0)
    text = connection.session.take().decode()
    return int(text.rpartition("id: ")[2].split(".")[1], 16)


def send(connection: Connection, first: int, count: int = 6) -> None:
    for number in range(first, first + count):
        connection.offer(make_event(number), number * 1000)
        connection.session.take()


@pytest.mark.contract("5.51")
def test_a_position_is_used_when_both_queues_have_delivered_a_fence() -> None:
    hub, log, connection = make()
    send(connection, 100)
    hub._on_watermark(anchor(1), 0)
    assert log.fences == [], "nothing proves the first watermark yet"
    send(connection, 200)
    hub._on_watermark(anchor(2), 0)
    ((queue, shared),) = log.fences
    assert queue == "bridge.shared.1"
    send(connection, 300)
    (_, (queue, own)) = log.fences
    assert queue == "bridge.live.1"
    assert offset_of(connection) == 1
    connection.on_delivery(queue, own)
    assert offset_of(connection) == 1, "the shared queue may still be behind"
    hub.on_shared("bridge.shared.1", shared)
    connection.on_delivery(queue, own)
    assert offset_of(connection) == 100


@pytest.mark.contract("5.51")
def test_a_fence_of_another_sender_proves_nothing() -> None:
    hub, log, connection = make()
    for number in (1, 2):
        hub._on_watermark(anchor(number), 0)
        send(connection, 100 * number, count=9 if number == 1 else 1)
    (_, shared), (_, own) = log.fences
    hub.on_shared("bridge.shared.1", b"0123456789abcdef:1")
    connection.on_delivery("bridge.live.1", own)
    assert offset_of(connection) == 1
    hub.on_shared("bridge.shared.1", shared)
    for forged in (b"", b"1", b":1", b"0123456789abcdef:1", own[:-1], own + b"x"):
        connection.on_delivery("bridge.live.1", forged)
        assert offset_of(connection) == 1
    connection.on_delivery("bridge.live.1", own)
    assert offset_of(connection) == 100


def test_a_stream_that_was_sent_little_asks_for_no_fence() -> None:
    hub, log, connection = make()
    for number in range(1, 5):
        hub._on_watermark(anchor(number), 0)
        send(connection, 100 * number, count=1)
    assert {queue for queue, _ in log.fences} == {"bridge.shared.1"}


def test_watermarks_from_before_a_stream_went_live_are_left_out() -> None:
    hub, log, connection = make()
    hub._on_watermark(anchor(1), 0)
    connection.on_lost()
    connection.session.bound(0, Anchor(150, "BBBBBB"))
    connection.session.found()
    connection.caught_up()
    hub._on_watermark(anchor(2), 0)
    connection.ask_for_proof()
    for queue, body in log.fences:
        (hub.on_shared if "shared" in queue else connection.on_delivery)(queue, body)
    assert offset_of(connection) == 150, "events that were buffered then may be before or after the first watermark"
    send(connection, 100, count=9)
    hub._on_watermark(anchor(3), 0)
    send(connection, 200)
    for queue, body in log.fences:
        (hub.on_shared if "shared" in queue else connection.on_delivery)(queue, body)
    for queue, body in log.fences:
        if "live" in queue:
            connection.on_delivery(queue, body)
    assert offset_of(connection) == 200, "the watermark that was written while the stream was live"


def test_a_fence_proves_nothing_while_messages_were_dropped() -> None:
    hub, log, connection = make()
    for number in (1, 2):
        hub._on_watermark(anchor(number), 0)
        send(connection, 100 * number, count=9 if number == 1 else 1)
    (_, shared), (queue, own) = log.fences
    hub.on_shared("bridge.shared.1", shared)
    broker: Any = hub.feed
    broker.has_dropped = True
    connection.on_delivery(queue, own)
    assert offset_of(connection) == 1


BODY = b'{"specversion":"1.0","id":"1","source":"/t","type":"test.done","data":{}}'


@pytest.mark.contract("5.58", "5.62")
def test_a_live_event_that_cannot_be_read_is_a_gap_for_those_who_asked_for_its_type() -> None:
    quarantine: Any = Quarantine([], queue="q", on_dropped=lambda: None)
    hub, _, connection = make(quarantine)
    hub._by_prefix = {"all.": {connection: None}}
    connection.session.take()
    connection.on_delivery("user.42.test.done", b"{")
    assert b"bridge.gap" not in connection.session.take(), "no catalogue can read it"
    connection.session.types = TypeFilter.parse("job.*")
    hub.on_shared("bridge.shared.1", BODY)
    hub.on_shared("all.test.done", BODY)
    assert b"bridge.gap" not in connection.session.take()
    connection.session.types = TypeFilter.parse("test.*")
    hub.on_shared("all.test.done", BODY)
    assert b'"not-readable"' in connection.session.take()


class Openings:
    """A hub whose broker counts subscriptions. Each stream ends at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
        self.now = 0.0
        monkeypatch.setattr("bridge.service.streams.hub.time.monotonic", lambda: self.now)
        self.asked = 0
        broker: Any = Broker()
        broker.subscribe = self.subscribe
        made: Any = type("OfThisTest", (Limits,), limits)
        self.hub = Hub(reader=NOTHING, limits=made, metrics=Metrics(), make_feed=lambda _: broker, log=None)

    def subscribe(self, *_: Any, **__: Any) -> Any:
        self.asked += 1
        subscription: Any = Subscription()
        subscription.close = lambda: None
        return subscription

    def open(self, user: str) -> str:
        request = StreamRequest(
            Subscriber(user, (), 1e12), "identity", TypeFilter(), named=True, last_event_id=None, keys=()
        )
        try:
            self.hub.detach(self.hub.attach(request, lambda: None))
        except StreamRefused as refused:
            self.refused = refused
            return refused.cause
        return "opened"


@pytest.mark.contract("2.44", "2.45")
def test_a_user_who_opens_streams_without_a_pause_is_refused_before_the_broker_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to = Openings(monkeypatch)
    assert Counter(to.open("attacker") for _ in range(2_440)) == {"opened": 60, "openings-per-user": 2_380}
    assert to.asked == 60
    assert to.refused.reason == "busy"
    assert 5_000 <= to.refused.retry_ms <= 15_000
    assert to.open("innocent") == "opened"
    to.now = 8.0
    assert Counter(to.open("attacker") for _ in range(2_440))["opened"] == 24, "three a second"
    refused = to.hub._metrics.streams_refused.labels("openings-per-user")
    assert refused._value.get() == 2 * 2_440 - 60 - 24


def test_streams_that_return_after_restarts_in_a_row_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Openings(monkeypatch)
    # Twenty streams of one user return every three seconds, while a proxy restarts repeatedly.
    for number in range(4):
        to.now = 3.0 * number
        assert {to.open("42") for _ in range(20)} == {"opened"}


@pytest.mark.contract("2.44")
@pytest.mark.parametrize(
    ("connections", "given", "at_once"), [(1, None, 60), (20, None, 60), (100, None, 300), (20, 5, 5)]
)
def test_openings_at_once(monkeypatch: pytest.MonkeyPatch, connections: int, given: int | None, at_once: int) -> None:
    to = Openings(monkeypatch, max_connections_per_user=connections, openings_per_user=given)
    assert [to.open("42") for _ in range(2 * at_once)].count("opened") == at_once


def test_a_stream_that_is_refused_for_another_cause_uses_no_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Openings(monkeypatch, openings_per_user=1, max_connections=0)
    assert [to.open("42") for _ in range(9)] == ["connections"] * 9
    to.hub._limits.max_connections = 1  # type: ignore[misc]
    assert to.open("42") == "opened"


@pytest.mark.parametrize(
    "callback",
    [
        lambda connection: connection.offer(make_event(1), 1),
        lambda connection: connection.found(),
        lambda connection: connection.caught_up(),
        lambda connection: connection.not_found("expired"),
        lambda connection: connection.unreadable(),
        lambda connection: connection.tail_ended(),
        lambda connection: connection.read_tail("user.42.test.done", b"{}"),
        lambda connection: connection.on_lost(),
        lambda connection: connection.on_refused(),
    ],
)
def test_a_fault_in_a_callback_is_kept_for_the_writer_of_its_stream(callback: Any) -> None:
    _, _, connection = make()
    connection.session = connection._hub = NOTHING  # Each use of them raises.
    callback(connection)
    assert isinstance(connection.fault, AttributeError)


# The deadlines of a stream.


def due(**changes: Any) -> Connection:
    hub, _, connection = make()
    limits: dict[str, float] = {"heartbeat_seconds": 15.0, "ends_at": 3_000.0, "expires_at": 2_000.0, **changes}
    connection.deadlines = Deadlines(0.0, **limits)
    broker: Any = hub.feed
    broker.down_since = None
    connection.session.take()
    return connection


def test_a_stream_ends_with_its_token() -> None:
    connection = due()
    connection.advance(1_999.0)
    assert connection.session.end_reason is None
    connection.advance(2_000.0)
    assert connection.session.end_reason == "expired"
    connection.advance(3_000.0)
    assert connection.session.end_reason == "expired", "the first reason stays"


@pytest.mark.contract("9.3")
def test_a_login_that_is_revoked_before_its_stream_is_counted_opens_none() -> None:
    hub, _, connection = make()
    with pytest.raises(StreamRefused) as refused:
        hub.attach(replace(connection.request, is_revoked=lambda: True), lambda: None)
    assert (refused.value.reason, refused.value.cause) == ("revoked", "revoked")


@pytest.mark.contract("9.2")
def test_a_users_streams_are_listed_and_ended() -> None:
    hub, _, connection = make()
    feed: Any = hub.feed
    feed.instance = "abc"
    (described,) = hub.describe_streams("42")
    assert (described["session"], described["types"], described["events"]) == ("abc.1", [], 0)
    assert hub.list_users("", 10) == [{"user": "42", "streams": 1}]
    assert hub.list_users("42", 10) == []
    assert hub.describe_streams("43") == hub.describe_streams("") == []
    assert described["opened"] == pytest.approx(time.time() - time.monotonic() + connection.opened_at, abs=60)
    assert hub.end_streams("42", None, described["opened"] - 60) == 0, "it was opened later"
    assert hub.end_streams("43", None) == hub.end_streams("42", "abc.2") == 0
    assert hub.end_streams("42", "abc.1") == 1
    assert connection.session.end_reason == "revoked"
    assert hub.end_streams("42", None) == 0, "it has ended"


async def renew(connection: Connection, answer: Subscriber | Exception) -> None:
    """The application gives this answer shortly before the login expires."""

    async def ask() -> Subscriber:
        if isinstance(answer, Exception):
            raise answer
        return answer

    connection.request = replace(connection.request, renew=ask)
    connection.advance(1_990.0)
    assert connection._renewing is not None
    await connection._renewing
    assert connection._renewing is None


@pytest.mark.contract("6.46")
async def test_a_login_that_is_still_valid_keeps_the_stream_open() -> None:
    connection = due(renew_at=1_990.0)
    await renew(connection, Subscriber("42", (), time.time() + 1e6))
    connection.advance(2_000.0)
    assert connection.session.end_reason is None
    assert connection.deadlines.end == 3_000.0


@pytest.mark.contract("6.46")
@pytest.mark.parametrize(
    "answer", [Subscriber("43", (), 1e12), Subscriber("42", ("ops",), 1e12), NotLoggedIn(), LoginForbidden()]
)
async def test_another_login_or_none_ends_the_stream_at_once(answer: Subscriber | Exception) -> None:
    connection = due(renew_at=1_990.0)
    await renew(connection, answer)
    assert connection.session.end_reason == "expired"


@pytest.mark.contract("6.46")
async def test_without_an_answer_a_stream_asks_again_and_ends_with_its_login() -> None:
    connection = due(renew_at=1_990.0)
    await renew(connection, TryAgain("away"))
    assert connection.session.end_reason is None
    connection.advance(1_990.5)
    assert connection._renewing is None, "there is a pause"
    connection.advance(1_991.5)
    assert connection._renewing is not None
    connection.advance(2_000.0)
    assert connection.session.end_reason == "expired"
    connection.cancel_renewal()


def test_a_stream_ends_with_its_age() -> None:
    connection = due(expires_at=9_000.0)
    connection.advance(3_000.0)
    assert connection.session.end_reason == "rotate"


def test_a_quiet_stream_gets_a_heartbeat_and_later_its_position() -> None:
    connection = due()
    connection.advance(14.9)
    assert connection.session.take() == b""
    connection.advance(15.0)
    assert connection.session.take().startswith(b":")
    connection.advance(POSITION_SECONDS)
    assert b"id: " in connection.session.take()


def test_a_quiet_stream_moves_with_a_feed_that_reads_the_log() -> None:
    connection = due()
    feed: Any = connection._hub.feed
    feed.reached = anchor(5)
    connection.advance(POSITION_SECONDS)
    assert offset_of(connection) == 500


@pytest.mark.contract("2.52")
@pytest.mark.parametrize(
    ("now", "down_since", "ends"), [(19.9, None, False), (20.0, None, True), (3.0, 0.0, True), (2.9, 0.0, False)]
)
def test_a_stream_that_is_not_bound_in_time_ends_with_busy(now: float, down_since: float | None, ends: bool) -> None:
    connection = due()
    broker: Any = connection._hub.feed
    broker.down_since = down_since
    connection.session = new_session()
    assert connection.deadline(0.0) == 3.0
    connection.advance(now)
    assert (connection.session.end_reason == "busy") is ends


def test_a_group_is_forgotten_with_its_last_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Openings(monkeypatch)
    request = StreamRequest(
        Subscriber("42", ("a", "b"), 1e12), "", TypeFilter(), named=True, last_event_id=None, keys=()
    )
    one, other = to.hub.attach(request, lambda: None), to.hub.attach(request, lambda: None)
    to.hub.detach(one)
    assert set(to.hub._by_prefix) == {"group.a.", "group.b.", "all."}
    assert set(to.hub._by_user) == {"user.42."}
    to.hub.detach(other)
    assert (to.hub._by_prefix, to.hub._by_user, len(to.hub)) == ({}, {}, 0)


@pytest.mark.contract("5.13")
def test_a_copy_for_another_user_is_dropped() -> None:
    _, _, connection = make()
    connection.session.take()
    with capture_logs() as lines:
        connection.on_delivery("user.43.test.done", BODY)
        connection.on_delivery("user.43.test.done", BODY)
    assert connection.session.take() == b""
    assert [line["event"] for line in lines] == ["copy dropped"], "one line for all of them"


@pytest.mark.contract("5.35")
def test_a_stream_without_a_queue_ends_unless_it_has_begun() -> None:
    connection = due()
    connection.on_refused()
    assert connection.session.end_reason is None
    connection.session = new_session()
    connection.on_refused()
    assert connection.session.end_reason == "busy"


def test_a_stream_ends_when_its_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Openings(monkeypatch)
    expired = Subscriber("42", (), time.time() - 1.0)
    request = StreamRequest(expired, "", TypeFilter(), named=True, last_event_id=None, keys=())
    connection = to.hub.attach(request, lambda: None)
    connection.advance(to.now)
    assert connection.session.end_reason == "expired"


@pytest.mark.parametrize(
    "callback",
    [
        lambda hub, connection: connection.read(9, "abcdef", "user.42.test.done", BODY),
        lambda hub, connection: connection.on_delivery("user.42.test.done", BODY),
        lambda hub, connection: connection.on_delivery("bridge.live.1", hub.fence(1)),
    ],
)
def test_a_fault_of_the_session_ends_its_stream_only(callback: Any) -> None:
    quarantine: Any = Quarantine([], queue="q", on_dropped=lambda: None)
    hub, _, connection = make(quarantine)
    session: Any = SimpleNamespace(user="42", types=TypeFilter())  # Any other attribute raises.
    connection.session = session
    hub._on_watermark(anchor(1), 0)
    callback(hub, connection)
    assert isinstance(connection.fault, AttributeError)
