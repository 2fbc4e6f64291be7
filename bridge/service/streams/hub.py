"""All streams of the process: which connections are open, and which event goes to which.

Owns the limits, the index from audience to connections, and the drain. Asyncio, but no framework and no socket: the
broker's side delivers, the web's side attaches and detaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

import structlog

from bridge.amqp import BrokerError
from bridge.routing import Audience, InvalidId, RoutingError, TypeFilter, split_key
from bridge.service import clock
from bridge.service.broker.eventlog import EventLog, OnWatermark, Request
from bridge.service.budgets import Budgets
from bridge.service.http.auth import Subscriber
from bridge.service.http.claims import Refusal, TryAgain
from bridge.service.metrics import Metrics
from bridge.service.streams import deadlines
from bridge.service.streams.cursor import Anchor, digest
from bridge.service.streams.deadlines import Deadlines
from bridge.service.streams.progress import Entry
from bridge.service.streams.reader import EventReader
from bridge.service.streams.session import ReadTail, Replay, Session, State, Step
from bridge.service.streams.sse import EndReason, GapReason
from bridge.service.streams.streamevent import StreamEvent

_log = structlog.get_logger("bridge.hub")

ATTACH_SECONDS = 20.0
"""A stream whose queues are not bound by then is ended as `busy`: the browser returns, perhaps to another replica. Long
enough for five thousand streams at once: a client that is sent away has to wait again from the end of the queue."""

BROKER_MOMENT_SECONDS = 3.0
"""How long a new stream waits for a broker that is away. A restart of a node's listener takes less."""

WATERMARK_INTERVAL_SECONDS = 10.0
"""How often the bridge writes an entry to the log that may become the position of open streams."""

WATERMARKS_KEPT = 3
"""Watermarks that a stream can still need: the newest, the one before, which the newest proves, and a delayed one."""

MANY_BEHIND = 8
"""A stream that was sent as many events after its position asks for a newer one. A cursor can name sixteen."""

COPIES_SECONDS = 10.0
"""How often the log reports a message that arrived in a queue that its key does not lead to."""

OPENINGS_SECONDS = 20.0
"""A user's openings are full again after this long. With the default settings that is three streams a second, so that
twenty streams that return after `busy`, each after 5 to 15 s, are all admitted."""

OPENINGS_FACTOR = 3
"""Openings at once, for each stream that a user may have open: a broker, a proxy and a replica may restart in a row."""

LEAST_OPENINGS = 60
"""The same where a user may have fewer than twenty streams open: a page may be loaded again and again."""

USERS_KEPT = 20_000
"""Users whose openings are remembered, about 6 MB. Users that have opened nothing for a while are not among them."""

Cause = Literal["drain", "revoked", "connections", "connections-per-user", "openings-per-user"]
"""Why a stream is refused before RabbitMQ is asked for anything."""

CAUSES: tuple[Cause, ...] = get_args(Cause)


class Limits(Protocol):
    """The settings that the hub reads (see bridge.service.settings)."""

    @property
    def heartbeat_seconds(self) -> float: ...
    @property
    def retry_seconds(self) -> float: ...
    @property
    def max_age_seconds(self) -> float: ...
    @property
    def drain_seconds(self) -> float: ...
    @property
    def stall_seconds(self) -> float: ...
    @property
    def max_connections(self) -> int: ...
    @property
    def max_connections_per_user(self) -> int: ...
    @property
    def openings_per_user(self) -> int | None: ...
    @property
    def backlog_events(self) -> int: ...
    @property
    def backlog_bytes(self) -> int: ...


class Subscription(Protocol):
    """What a feed has for one stream."""

    number: int
    """Of the stream, in this process."""

    @property
    def queue(self) -> str:
        """The stream's own queue; empty without one."""

    @property
    def bound(self) -> bool: ...
    def close(self) -> None:
        """Ends the deliveries at once. May be called again."""


class Feed(Protocol):
    """Where live events come from: a queue for each stream (`broker.live`), or the log itself (`broker.tail`).

    Positions, and what has to be read besides, are the feed's. So the hub and the sessions do not know which it is.
    """

    @property
    def down_since(self) -> float | None:
        """Monotonic time since which no event arrives; None while they do."""

    @property
    def connected(self) -> bool: ...
    @property
    def connects(self) -> int:
        """Connections since the start, the first included."""

    @property
    def instance(self) -> str:
        """The process's name, another one at each start."""

    @property
    def last_error(self) -> BrokerError | None: ...
    @property
    def dropped(self) -> int:
        """Messages that RabbitMQ has dropped from queues of the feed since the start."""

    @property
    def refused(self) -> int:
        """Queues that RabbitMQ has refused for a limit since the start."""

    @property
    def has_dropped(self) -> bool:
        """Whether RabbitMQ has just dropped messages, and the streams are not being read from the log yet."""

    @property
    def shared_queue(self) -> str | None: ...
    @property
    def exchanges_lost(self) -> int:
        """How often events may have been lost before the log had them."""

    @property
    def overlaps(self) -> bool:
        """Whether an event may arrive live before or after it is in the log. If not, each comes as its log's entry."""

    @property
    def reached(self) -> Anchor | None:
        """The entry up to which the hub was given everything; None if events do not come as entries."""

    def find_position(self, on_found: OnWatermark, *, resumes: bool) -> None:
        """Calls back with an entry of the log: every later event of a bound stream arrives live.

        Args:
            resumes: the client has a cursor. The entry is not before any event that was sent with that cursor.
        """

    def subscribe(
        self,
        keys: Sequence[str],
        groups: Sequence[str],
        *,
        on_delivery: Callable[[str, bytes], None],
        on_bound: Callable[[], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[], None],
    ) -> Subscription: ...

    async def run(self) -> None:
        """Keeps the feed until it is cancelled.

        Raises:
            AccessRefused, TopologyMismatch, NotFound: at the start only: waiting does not fix it.
        """


class StreamRefused(Exception):
    """No stream is opened now. `reason` and `retry_ms` belong into the `bridge.bye` to send."""

    def __init__(self, reason: EndReason, retry_ms: int, cause: Cause) -> None:
        self.reason = reason
        self.retry_ms = retry_ms
        self.cause = cause
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """A subscription request of a browser, parsed and valid."""

    subscriber: Subscriber
    identity: str
    types: TypeFilter
    named: bool
    last_event_id: str | None
    keys: tuple[str, ...]
    """Binding keys of the live queue."""
    audience: bool = False
    """Whether each event carries the attribute `audience`."""
    is_revoked: Callable[[], bool] = bool
    """Whether the login was revoked meanwhile: asked when the stream is counted, so that no order can miss it."""
    renew: Callable[[], Awaitable[Subscriber]] | None = None
    """Asks whether the login is still valid, shortly before it expires. None: a token's expiry cannot change. It raises
    `Refusal`."""


class Connection:
    """One open stream: its session, its subscription at the broker, its read of the log, its deadlines.

    The broker's side, the log's side and the stream's writer call it. A fault in a callback ends this stream alone: the
    writer aborts it, and the client resumes by its cursor.
    """

    __slots__ = (
        "_epoch",
        "_expected",
        "_fenced",
        "_hub",
        "_paused_at",
        "_prefix",
        "_renewing",
        "_request",
        "_waits_since",
        "_watermarks_seen",
        "deadlines",
        "fault",
        "opened_at",
        "prefixes",
        "ready_at",
        "request",
        "session",
        "subscription",
        "wake",
    )

    def __init__(
        self,
        hub: Hub,
        request: StreamRequest,
        session: Session,
        own_deadlines: Deadlines,
        wake: Callable[[], None],
        now: float,
    ) -> None:
        self._hub = hub
        self.request = request
        self.session = session
        self.deadlines = own_deadlines
        self.wake = wake
        self.opened_at = self._waits_since = now
        self.ready_at: float | None = None
        self.fault: Exception | None = None
        """What went wrong in a callback; the stream's writer ends the stream."""
        self.subscription: Subscription
        self._epoch = 0
        """Counts how often its queues were lost or bound. An answer to an earlier epoch's request is dropped."""
        self._request: Request | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._paused_at: int | None = None
        self._expected = False
        self._watermarks_seen = hub.watermarks
        self._fenced = 0
        """The newest watermark for which a fence was put into its queue."""
        subscriber = request.subscriber
        audiences = [Audience.user(subscriber.user), *map(Audience.group, subscriber.groups), Audience.everyone()]
        self.prefixes = [audience.prefix for audience in audiences]
        """First words of the routing keys of its events; the user's own audience is the first."""
        self._prefix = self.prefixes[0]

    # Called by the broker's side.

    def on_delivery(self, routing_key: str, body: bytes) -> None:
        if not f"{routing_key}.".startswith(self._prefix):
            if routing_key == self.subscription.queue:
                self._on_fence(body)
            else:
                self._hub.record_copy(routing_key)
            return
        hub = self._hub
        event = hub.reader.read(routing_key, body, via=self.subscription.number, only=hub.is_only(self))
        if isinstance(event, StreamEvent):
            self.offer(event, clock.now_ms())
        elif event.depends_on_catalogue:
            self.unreadable()

    def offer(self, event: StreamEvent, now_ms: int, *, shared: bool = False, anchor: Anchor | None = None) -> None:
        try:
            if self._watermarks_seen != self._hub.watermarks:
                self._take_watermarks()
            self.session.offer(event, now_ms, shared=shared, anchor=anchor)
        except Exception as fault:  # noqa: BLE001
            self._fail(fault)
        self.wake()

    def unreadable(self, *, logged: bool = False) -> None:
        """An event for this stream, of a type that it asked for, cannot be read here."""
        with self._contained():
            self._take_watermarks()
            self.session.unreadable(clock.now_ms(), logged=logged)

    def on_bound(self) -> None:
        self._epoch += 1
        if self._hub.log is None:
            self._on_bound_watermark(self._epoch, None, 0)
        else:
            resumes = not self.session.is_ready and bool(self.request.last_event_id)
            self._hub.feed.find_position(partial(self._on_bound_watermark, self._epoch), resumes=resumes)

    def on_lost(self) -> None:
        with self._contained():
            self.forget()
            self._waits_since = time.monotonic()
            self._take_reached()
            self.session.lost()
            self.expect(self.session.is_ready or bool(self.request.last_event_id))

    def on_refused(self) -> None:
        """RabbitMQ takes no further queue. An open stream waits for one; a new stream is ended, and returns later."""
        with self._contained():
            if not self.session.is_ready:
                self.session.end("busy", deadlines.busy_retry_ms(random.random()))

    def expect(self, replay: bool) -> None:
        """Whether it will ask for a replay once its queues are bound. A scan waits for the clients that will."""
        log = self._hub.log
        if log is not None and replay is not self._expected:
            self._expected = replay
            log.expect(self.request.subscriber.user, 1 if replay else -1)

    def cancel_renewal(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()

    def forget(self) -> None:
        """Drops every request to the log, and the answers that are on their way."""
        self._epoch += 1
        self._paused_at = None
        self._end_request()

    def _end_request(self) -> None:
        if self._request is not None:
            self._request.cancel()
            self._request = None

    @contextlib.contextmanager
    def _contained(self) -> Iterator[None]:
        """Around a callback: wakes the stream after it. A fault ends this stream, and harms no other."""
        try:
            yield
        except Exception as fault:  # noqa: BLE001
            self._fail(fault)
        self.wake()

    def _fail(self, fault: Exception) -> None:
        self.fault = fault
        self.forget()

    # Watermarks and fences.

    def _wants(self, routing_key: str) -> bool:
        """Whether an event that could not be read is of a type that this stream asked for."""
        try:
            _, event_type = split_key(routing_key)
        except RoutingError:
            return False
        return self.session.types.matches(event_type)

    def _take_watermarks(self) -> None:
        """Takes the watermarks that were written since the last event of this stream.

        They count from when they were written as long as they are taken before the next event. Ten thousand streams
        are not woken for them: that took a sixth of the process's time.
        """
        hub = self._hub
        for anchor, seen_ms in hub.watermarks_since(self._watermarks_seen):
            self.session.watermark(anchor, seen_ms)
        self._watermarks_seen = hub.watermarks
        if self.session.sent_behind_anchor >= MANY_BEHIND:
            self.ask_for_proof()

    def _take_reached(self) -> None:
        if (anchor := self._hub.feed.reached) is not None:
            self.session.reached(anchor)

    def _skip_watermarks(self) -> None:
        """A stream that goes live is sent buffered events. They may be on either side of an earlier watermark."""
        self._watermarks_seen = self._hub.watermarks

    def ask_for_proof(self) -> None:
        """Puts a fence into the stream's own queue, behind everything that is before the newest watermark but one.

        When the fence arrives, this queue has delivered everything that is in the log before that watermark.
        """
        hub, queue = self._hub, self.subscription.queue
        if hub.log is not None and queue and self.subscription.bound and self._fenced < hub.watermarks - 1:
            self._fenced = hub.watermarks - 1
            hub.log.fence(queue, hub.fence(self._fenced))

    def _on_fence(self, body: bytes) -> None:
        number = self._hub.read_fence(body)
        # A fence passes a message that was dropped. Then it proves nothing, and the log is about to be read.
        if number is None or self._hub.feed.has_dropped:
            return
        with self._contained():
            self._take_watermarks()
            # The shared queue gets its own fence with each watermark.
            anchor = self._hub.watermark(min(number, self._hub.shared_fence))
            if anchor is not None:
                self.session.prove(anchor)

    # Called by the log's side.

    def _on_bound_watermark(self, epoch: int, watermark: Anchor | None, _: int) -> None:
        if epoch != self._epoch:
            return
        with self._contained():
            step = self.session.bound(clock.now_ms(), watermark, complete_from=self._hub.complete_from(watermark))
            self._skip_watermarks()
            self._carry_out(step)
            self.expect(False)

    def _on_later_watermark(self, epoch: int, watermark: Anchor | None, _: int) -> None:
        if epoch != self._epoch:
            return
        with self._contained():
            if watermark is None:
                self._carry_out(self.session.not_found("no-log"))
            else:
                self._carry_out(self.session.extend(watermark), extends=True)

    def _carry_out(self, step: Step, *, extends: bool = False) -> None:
        """Does what the session asks for, and records the gap that it sends."""
        self._hub.record(self, step.gap)
        log, action, user = self._hub.log, step.action, self.request.subscriber.user
        if action is None:
            return
        assert log is not None, "the session asks for the log only after a watermark"
        if isinstance(action, Replay):
            since = self._waits_since
            reads_tail = self._hub.feed.overlaps
            self._request = log.replay(
                action, self.prefixes, self, user=user, since=since, extends=extends, reads_tail=reads_tail
            )
        elif isinstance(action, ReadTail):
            if self._hub.feed.overlaps:
                self._request = log.read_tail(action.after, self.prefixes, self, user=user)
            else:
                self.session.tail_ended()
        else:
            self._end_request()
            self._hub.feed.find_position(partial(self._on_later_watermark, self._epoch), resumes=False)

    def found(self) -> None:
        with self._contained():
            self.session.found()
            self._hub.record(self, None, outcome="complete")

    def not_found(self, reason: GapReason) -> None:
        with self._contained():
            self._request = None
            self._carry_out(self.session.not_found(reason))

    def read(self, offset: int, check: str, routing_key: str, body: bytes) -> bool:
        event = self._hub.reader.read_logged(routing_key, body, offset)
        if not isinstance(event, StreamEvent):
            if event.depends_on_catalogue and self._wants(routing_key):
                self.unreadable(logged=True)
            return True
        if not self.session.types.matches(event.type):
            return True
        taken = True
        try:
            taken = self.session.replayed(Entry(offset, check, event, _is_shared(routing_key)))
        except Exception as fault:  # noqa: BLE001
            self._fail(fault)
        if not taken:
            self._request = None
            self._paused_at = offset
        self.wake()
        return taken

    def caught_up(self) -> None:
        with self._contained():
            step = self.session.caught_up(clock.now_ms())
            self._skip_watermarks()
            self._carry_out(step)

    def read_tail(self, routing_key: str, body: bytes) -> None:
        with self._contained():
            event = self._hub.reader.read_logged(routing_key, body)
            if not isinstance(event, StreamEvent):
                if event.depends_on_catalogue and self._wants(routing_key):
                    self.unreadable()
            elif self.session.types.matches(event.type):
                self._take_watermarks()
                self.session.offer_tail(event, clock.now_ms(), shared=_is_shared(routing_key))

    def tail_ended(self) -> None:
        with self._contained():
            self._request = None
            self._take_watermarks()
            self.session.tail_ended()

    # Called by the stream's writer.

    def advance(self, now: float) -> None:
        """Does what is due at this moment (monotonic seconds)."""
        session, due = self.session, self.deadlines
        if session.state is State.ENDED:
            return
        if due.is_renewal(now) and self._renewing is None:
            self._renewing = asyncio.create_task(self._renew(), name="renew-login")
        if due.is_expired(now):
            session.end("expired", self._hub.retry_ms())
        elif due.is_rotated(now):
            session.end("rotate", self._hub.retry_ms())
        elif not session.is_ready:
            if now >= self.opened_at + ATTACH_SECONDS or self._hub.broker_is_away(now):
                session.end("busy", deadlines.busy_retry_ms(random.random()))
        elif due.position_due(now):
            self._take_reached()
            session.send_position(clock.now_ms())
            due.moved(now)
            self._take_watermarks()
            self.ask_for_proof()
            if not session.has_output and due.heartbeat_due(now):
                session.heartbeat()
        elif due.heartbeat_due(now):
            session.heartbeat()

    async def _renew(self) -> None:
        """Asks whether the login is still valid. Another user, or other groups, are another stream."""
        renew = self.request.renew
        assert renew is not None, "only then is a renewal due"
        with self._contained():
            try:
                renewed = await renew()
            except TryAgain as error:
                _log.warning("login not renewed", stream=self.subscription.number, error=str(error))
            except Refusal:
                self.session.end("expired", self._hub.retry_ms())
            else:
                before = self.request.subscriber
                if renewed.user == before.user and set(renewed.groups) == set(before.groups):
                    self.deadlines.renewed(**_login_deadlines(renewed))
                else:
                    self.session.end("expired", self._hub.retry_ms())
            finally:
                self._renewing = None

    def read_on(self) -> None:
        """Bytes were taken. A read of the log that stopped goes on once the client has read most of its backlog."""
        if self._paused_at is not None and self.session.wants_more:
            step = self.session.read_on(self._paused_at)
            self._paused_at = None
            self._carry_out(step)

    def deadline(self, now: float) -> float:
        """When `advance` has to be called next. No later moment has an earlier one, so one timer is enough."""
        if not self.session.is_ready:
            look_again = now + min(BROKER_MOMENT_SECONDS, self.deadlines.heartbeat_seconds)
            return min(self.opened_at + ATTACH_SECONDS, look_again, self.deadlines.end)
        return self.deadlines.deadline()


class Hub:
    """
    Args:
        reader: reads messages of all queues and of the log.
        make_feed: given the hub, makes the source of live events. It calls `on_shared` or `on_logged`.
        log: what clients resume from; None without one.
    """

    def __init__(
        self,
        *,
        reader: EventReader,
        limits: Limits,
        metrics: Metrics,
        make_feed: Callable[[Hub], Feed],
        log: EventLog | None,
    ) -> None:
        self.reader = reader
        self._limits = limits
        self._metrics = metrics
        for cause in CAUSES:
            metrics.streams_refused.labels(cause)
        self.feed = make_feed(self)
        self.log = log
        self.draining = False
        self._connections: dict[Connection, None] = {}
        self._by_user: dict[str, list[Connection]] = {}
        """By the first words of a user's routing keys, as in `user.42.`: the user's few connections."""
        self._by_prefix: dict[str, dict[Connection, None]] = {}
        """By the first words of routing keys, as in `group.ops.` and `all.`: the connections that this audience has."""
        openings = limits.openings_per_user or max(LEAST_OPENINGS, OPENINGS_FACTOR * limits.max_connections_per_user)
        self._openings = Budgets(openings, OPENINGS_SECONDS / openings, most=USERS_KEPT)
        self.watermarks = 0
        """Written to the log for the open streams, since the start."""
        self._watermarks: deque[tuple[Anchor, int]] = deque(maxlen=WATERMARKS_KEPT)
        self.shared_fence = 0
        """The newest watermark before which all has come by the shared queue."""
        self._exchanges_lost = 0
        self._log_complete_from = 0
        self._fence_secret = secrets.token_hex(8)
        self._copy_logged_at = -COPIES_SECONDS
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._connections)

    # Called by the web's side.

    def attach(self, request: StreamRequest, wake: Callable[[], None]) -> Connection:
        """Makes a stream's connection, counted from here on until `detach`.

        Args:
            wake: called when the connection's session has output, at any time.

        Raises:
            StreamRefused: draining, or a limit is reached. Counting and admitting are one step, so the limit is exact.
        """
        now = time.monotonic()
        user = request.subscriber.user
        if (cause := self._why_not(request, now)) is not None:
            self._metrics.streams_refused.labels(cause).inc()
            if cause == "drain":
                raise StreamRefused(
                    "drain", deadlines.drain_retry_ms(self._limits.drain_seconds, random.random()), cause
                )
            if cause == "revoked":
                raise StreamRefused("revoked", self.retry_ms(), cause)
            raise StreamRefused("busy", deadlines.busy_retry_ms(random.random()), cause)
        session = Session(
            user=user,
            identity=request.identity,
            types=request.types,
            named=request.named,
            audience=request.audience,
            last_event_id=request.last_event_id,
            has_log=self.log is not None,
            retry_ms=self.retry_ms(),
            heartbeat_seconds=self._limits.heartbeat_seconds,
            max_events=self._limits.backlog_events,
            max_bytes=self._limits.backlog_bytes,
        )
        own_deadlines = Deadlines(
            now,
            heartbeat_seconds=self._limits.heartbeat_seconds,
            ends_at=now + deadlines.lifetime(self._limits.max_age_seconds, random.random()),
            **_login_deadlines(request.subscriber, renews=request.renew is not None),
        )
        connection = Connection(self, request, session, own_deadlines, wake, now)
        self._connections[connection] = None
        own, *shared = connection.prefixes
        self._by_user.setdefault(own, []).append(connection)
        for prefix in shared:
            self._by_prefix.setdefault(prefix, {})[connection] = None
        self._empty.clear()
        self._metrics.connections.set(len(self._connections))
        connection.expect(bool(request.last_event_id))
        connection.subscription = self.feed.subscribe(
            request.keys,
            request.subscriber.groups,
            on_delivery=connection.on_delivery,
            on_bound=connection.on_bound,
            on_lost=connection.on_lost,
            on_refused=connection.on_refused,
        )
        return connection

    def _why_not(self, request: StreamRequest, now: float) -> Cause | None:
        user = request.subscriber.user
        if self.draining:
            return "drain"
        if request.is_revoked():
            return "revoked"
        if len(self._connections) >= self._limits.max_connections:
            return "connections"
        if len(self._by_user.get(Audience.user(user).prefix, ())) >= self._limits.max_connections_per_user:
            return "connections-per-user"
        # Last: a refused stream uses no opening, so a client that keeps trying is admitted like others.
        return None if self._openings.take(user, now) else "openings-per-user"

    def detach(self, connection: Connection) -> None:
        """Forgets a connection whose socket is gone."""
        connection.subscription.close()
        connection.forget()
        connection.cancel_renewal()
        connection.expect(False)
        del self._connections[connection]
        own, *shared = connection.prefixes
        self._by_user[own].remove(connection)
        if not self._by_user[own]:
            del self._by_user[own]
        for prefix in shared:
            members = self._by_prefix[prefix]
            del members[connection]
            if not members:
                del self._by_prefix[prefix]
        if not self._connections:
            self._empty.set()
        self._metrics.connections.set(len(self._connections))

    # What the control exchange orders.

    def end_streams(self, user: str, session: str | None, opened_before: float | None = None) -> int:
        """Ends a user's streams, or the one of this session, with `revoked`. Returns how many.

        Args:
            opened_before: only streams that were opened before this moment (seconds since 1970).
        """
        ended = 0
        for connection in self._streams_of(user):
            if opened_before is not None and self._opened(connection) >= opened_before:
                continue
            if connection.session.state is not State.ENDED and session in (None, self._session_name(connection)):
                connection.session.end("revoked", self.retry_ms())
                connection.wake()
                ended += 1
        return ended

    def describe_streams(self, user: str) -> list[dict[str, Any]]:
        """A user's streams, for an operator."""
        return [
            {
                "session": self._session_name(connection),
                "opened": self._opened(connection),
                "types": list(connection.request.types.patterns),
                "groups": list(connection.request.subscriber.groups),
                "events": connection.session.delivered,
            }
            for connection in self._streams_of(user)
        ]

    def list_users(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Users with streams, in the order of their ids, from the first after `after` on."""
        counts = {connections[0].session.user: len(connections) for connections in self._by_user.values()}
        found = sorted(user for user in counts if user > after)[:limit]
        return [{"user": user, "streams": counts[user]} for user in found]

    def _streams_of(self, user: str) -> list[Connection]:
        try:
            return list(self._by_user.get(Audience.user(user).prefix, ()))
        except InvalidId:
            return []

    @staticmethod
    def _opened(connection: Connection) -> float:
        """When a stream was opened, in seconds since 1970."""
        return time.time() - (time.monotonic() - connection.opened_at)

    def _session_name(self, connection: Connection) -> str:
        return f"{self.feed.instance}.{connection.subscription.number}"

    def retry_ms(self) -> int:
        return deadlines.retry_ms(self._limits.retry_seconds, random.random())

    def broker_is_away(self, now: float) -> bool:
        """Whether it has been away for longer than a restart takes."""
        down_since = self.feed.down_since
        return down_since is not None and now >= down_since + BROKER_MOMENT_SECONDS

    def record(self, connection: Connection, gap: GapReason | None, *, outcome: str = "gap") -> None:
        """Counts what a connection is sent: its first ready, a gap, a replay."""
        if gap is not None:
            self._metrics.gaps.labels(gap).inc()
        if gap is not None or outcome == "complete":
            self._metrics.replays.labels(outcome).inc()
        if connection.ready_at is None and connection.session.is_ready:
            connection.ready_at = time.monotonic()
            self._metrics.streams_opened.inc()
            self._metrics.attach_seconds.observe(connection.ready_at - connection.opened_at)

    async def write_watermarks(self) -> None:
        """Moves the cursors of open streams forward, so that a client that resumes reads little of the log. Runs until
        it is cancelled, and leaves nothing behind."""
        while self.log is not None:
            await asyncio.sleep(WATERMARK_INTERVAL_SECONDS)
            if self._connections:
                self.log.write_watermark(self._on_watermark)

    def _on_watermark(self, anchor: Anchor | None, _: int) -> None:
        self._metrics.log_answers.set(anchor is not None)
        if anchor is None or self.log is None:
            return
        self._watermarks.append((anchor, clock.now_ms()))
        self.watermarks += 1
        # An event reaches the log and the queues at slightly different moments. So a fence proves the watermark before
        # the newest: since then RabbitMQ has answered, and has had ten seconds for events on their way.
        if self.watermarks > 1 and (queue := self.feed.shared_queue) is not None:
            self.log.fence(queue, self.fence(self.watermarks - 1))

    def complete_from(self, watermark: Anchor | None) -> int:
        """The offset from which the log has every event. Before that, its binding was gone for a time.

        Args:
            watermark: was written after the queues were bound, and so after the log was.
        """
        if watermark is not None and self._exchanges_lost != self.feed.exchanges_lost:
            self._exchanges_lost = self.feed.exchanges_lost
            self._log_complete_from = watermark.offset
        return self._log_complete_from

    def watermarks_since(self, seen: int) -> list[tuple[Anchor, int]]:
        """Each with when it was seen, in ms. `seen`: what `watermarks` was when a stream last asked."""
        count = self.watermarks - seen
        return list(self._watermarks)[-count:] if count else []

    def watermark(self, number: int) -> Anchor | None:
        """The number-th of all, counted from 1, while it is kept."""
        at = len(self._watermarks) - 1 - (self.watermarks - number)
        return self._watermarks[at][0] if number > 0 and 0 <= at < len(self._watermarks) else None

    def fence(self, number: int) -> bytes:
        """The body of a fence: a message through a queue of our own, which arrives behind everything before it. It is
        secret, so no publisher can forge one."""
        return f"{self._fence_secret}:{number}".encode("ascii")

    def read_fence(self, body: bytes) -> int | None:
        secret, _, number = body.partition(b":")
        if not hmac.compare_digest(secret, self._fence_secret.encode("ascii")) or not number.isdigit():
            return None
        return int(number)

    # Called by the broker's side.

    def on_shared(self, routing_key: str, body: bytes) -> None:
        """A message of the shared queue: for everybody, or for the members of one group."""
        if routing_key.startswith("bridge."):
            if (number := self.read_fence(body)) is not None:
                self.shared_fence = max(self.shared_fence, number)
            return
        event = self.reader.read(routing_key, body, via=0)
        if not isinstance(event, StreamEvent):
            if event.depends_on_catalogue:
                self._report_unreadable(routing_key)
            return
        now_ms = clock.now_ms()
        audience, _ = split_key(routing_key)
        if audience.kind == "user":
            self.record_copy(routing_key)
            return
        for connection in self._members(audience):
            # The live queue's bindings carry the types; this queue serves all, so each one's filter is applied here.
            if connection.session.types.matches(event.type):
                connection.offer(event, now_ms, shared=True)

    def on_logged(self, offset: int, routing_key: str, body: bytes) -> None:
        """An entry of the log, from a feed that reads the log. Nearly all of a busy log are for no stream here."""
        # `user.42.job.done` -> `user.42.`, `all.job.done` -> `all.`
        kind, _, rest = routing_key.partition(".")
        members = self._by_audience("all." if kind == "all" else f"{kind}.{rest.partition('.')[0]}.")
        if not members:
            return
        event = self.reader.read(routing_key, body, via=0, offset=offset, only=len(members) == 1)
        if not isinstance(event, StreamEvent):
            if event.depends_on_catalogue:
                self._report_unreadable(routing_key, everyone=True)
            return
        now_ms, anchor, shared = clock.now_ms(), Anchor(offset, digest(body)), _is_shared(routing_key)
        for connection in list(members):
            if connection.session.types.matches(event.type):
                connection.offer(event, now_ms, shared=shared, anchor=anchor)

    def _report_unreadable(self, routing_key: str, *, everyone: bool = False) -> None:
        try:
            audience, event_type = split_key(routing_key)
        except RoutingError:
            return
        for connection in self._members(audience) if everyone or audience.kind != "user" else ():
            if connection.session.types.matches(event_type):
                connection.unreadable()

    def _members(self, audience: Audience) -> list[Connection]:
        return list(self._by_audience(audience.prefix))

    def _by_audience(self, prefix: str) -> Collection[Connection]:
        return self._by_user.get(prefix) or self._by_prefix.get(prefix) or ()

    def record_copy(self, routing_key: str) -> None:
        """Reports a message that a `CC` or `BCC` header sent to a queue that its own key does not lead to.

        It is shown to its key's audience only, live as in the log. Otherwise a publisher with rights for one user
        could show it to everybody.
        """
        now = time.monotonic()
        if now >= self._copy_logged_at + COPIES_SECONDS:  # It may arrive by a thousand queues.
            self._copy_logged_at = now
            _log.warning(
                "copy dropped", routing_key=routing_key, detail="its CC or BCC header names somebody else's key"
            )

    def is_only(self, connection: Connection) -> bool:
        """Whether its user has no other connection here."""
        return len(self._by_user[connection.prefixes[0]]) == 1

    # The end.

    async def drain(self) -> None:
        """Refuses new streams, sends each open one its goodbye within `drain_seconds`, and waits until all are gone.

        Streams whose peer reads nothing get no goodbye. They are given up two seconds after the last one.
        """
        self.draining = True
        self._metrics.draining.set(1)
        seconds = self._limits.drain_seconds
        loop = asyncio.get_running_loop()
        connections = list(self._connections)
        random.shuffle(connections)
        for index, connection in enumerate(connections):
            at = deadlines.drain_at(index, len(connections), seconds, random.random())
            retry_ms = deadlines.drain_retry_ms(seconds, random.random())
            loop.call_later(at, self._say_goodbye, connection, retry_ms)
        _log.info("draining", streams=len(connections), seconds=seconds)
        try:
            async with asyncio.timeout(seconds + 2):
                await self._empty.wait()
        except TimeoutError:
            _log.warning("streams did not end", streams=len(self._connections))

    @staticmethod
    def _say_goodbye(connection: Connection, retry_ms: int) -> None:
        connection.session.end("drain", retry_ms)
        connection.wake()


def _login_deadlines(subscriber: Subscriber, *, renews: bool = True) -> dict[str, float]:
    """When the login expires and is renewed, by the monotonic clock."""
    now = time.monotonic()
    expires_at = now + (subscriber.expires_at - time.time())
    renew_at = deadlines.renewal_at(now, expires_at, random.random()) if renews else math.inf
    return {"expires_at": expires_at, "renew_at": renew_at}


def _is_shared(routing_key: str) -> bool:
    """Whether it arrives by the shared queue, and not by a user's own."""
    return not routing_key.startswith("user.")
