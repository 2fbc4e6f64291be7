"""One connection as a state machine: what arrives for it goes in, the bytes to write come out.

Pure: no clock, no I/O, no idea of RabbitMQ or HTTP. The state of a connection is here and nowhere else. Its shell (the
hub on one side, the stream on the other) does the waiting and calls in:

    offer(event)    the broker delivered an event for this connection
    bound(now)      its queues are bound and consumed: from here on nothing is missed
    lost()          its queues are gone (broker, network, an operator); `bound` follows when they are there again
    beat, place     the deadlines of `pacing` came up
    end(reason)     it is over; what may still be said is said
    take()          the bytes to write now, empty when there is nothing to say

What a client has is known from its cursor only: bytes that were taken may sit in a dozen buffers. So nothing here
counts as arrived, and everything that ends a stream leaves the client a place to come back to.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from itertools import islice

from bridge import sse
from bridge.cursor import MAX_DIGESTS, Cursor, InvalidCursor
from bridge.event import Event
from bridge.routing import TypeFilter
from bridge.sse import EndReason, GapReason

RECENT_IDS = 256
"""Ids remembered to drop an event that comes again. A publisher that had no confirm repeats within its deadline; the
window is in events, so it costs a quiet connection nothing."""

CHUNK_BYTES = 65_536
"""Most that one `take` gathers. What waits goes out in one write, but a slow client's bytes stay in its backlog, where
they are counted, and not in a socket's buffer, where they are not."""


class State(Enum):
    OPENING = "opening"
    """Not a byte has been sent: the queues are being made."""
    LIVE = "live"
    DETACHED = "detached"
    """The stream is open, its queues are not: nothing arrives, and something may be missed."""
    ENDED = "ended"


# What may happen in which state. Anything not listed is a bug of the caller. `offer` and `end` may come at any time,
# because the broker does not know what a stream is doing: both are ignored once it has ended.
_NEXT = {
    (State.OPENING, "bound"): State.LIVE,
    (State.OPENING, "lost"): State.OPENING,
    (State.LIVE, "lost"): State.DETACHED,
    (State.DETACHED, "lost"): State.DETACHED,
    (State.DETACHED, "bound"): State.LIVE,
}


class Session:
    """
    Args:
        user: the user id, told to the page in `bridge.ready`.
        types: the types asked for; what does not match is not taken.
        named: whether events carry their `event:` line.
        last_event_id: what the client sent as Last-Event-ID; None or empty when it did not come back from anywhere.
        heartbeat_seconds: told in `bridge.ready`, so that a page knows when silence means a dead stream.
        max_events, max_bytes: the backlog's limits; a client further behind than either is ended as `slow`.
    """

    __slots__ = (
        "_backlog",
        "_backlog_bytes",
        "_digests",
        "_frames",
        "_gap",
        "_heartbeat_seconds",
        "_max_bytes",
        "_max_events",
        "_named",
        "_recent",
        "_retry_ms",
        "_time_ms",
        "delivered",
        "duplicates",
        "end_reason",
        "oldest_ms",
        "state",
        "types",
        "user",
    )

    def __init__(
        self,
        *,
        user: str,
        types: TypeFilter,
        named: bool,
        last_event_id: str | None,
        retry_ms: int,
        heartbeat_seconds: float,
        max_events: int,
        max_bytes: int,
    ) -> None:
        self.user = user
        self.types = types
        self.state = State.OPENING
        self.end_reason: EndReason | None = None
        self.delivered = 0
        """Events handed out by `take`."""
        self.duplicates = 0
        """Events not sent because their id had just been sent."""
        self.oldest_ms: int | None = None
        """When the oldest event of the last `take` was received."""
        self._named = named
        self._retry_ms = retry_ms
        self._heartbeat_seconds = heartbeat_seconds
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._frames = b""  # The bridge's own frames; they stand before the backlog.
        self._backlog: deque[tuple[Event, int] | bytes] = deque()
        self._backlog_bytes = 0
        self._digests: deque[str] = deque(maxlen=MAX_DIGESTS)
        self._time_ms = 0
        self._recent: dict[str, None] = {}
        self._gap = self._judge(last_event_id)

    @staticmethod
    def _judge(last_event_id: str | None) -> GapReason | None:
        """What has to be told about the time before this stream."""
        if not last_event_id:
            return None
        try:
            Cursor.parse(last_event_id)
        except InvalidCursor:
            return "unknown"
        return "no-log"

    @property
    def backlog_bytes(self) -> int:
        return self._backlog_bytes

    @property
    def has_output(self) -> bool:
        return bool(self._frames) or (bool(self._backlog) and self.state is not State.OPENING)

    def _advance(self, step: str) -> None:
        self.state = _NEXT[self.state, step]

    def bound(self, now_ms: int) -> GapReason | None:
        """The queues are bound. The first time it is `bridge.ready`; later the hole before it is told.

        Args:
            now_ms: the bridge's clock, in ms since 1970. Ready's cursor is this moment: whatever was offered before is
                sent after ready, with a cursor of its own.

        Returns:
            The gap that the client is told of, if any.
        """
        if self.state is State.ENDED:
            return None
        first = self.state is State.OPENING
        self._advance("bound")
        if first:
            self._frames = sse.encode_ready(
                user=self.user,
                resumed=False,
                heartbeat_seconds=self._heartbeat_seconds,
                cursor=str(Cursor(now_ms)),
                retry_ms=self._retry_ms,
            )
            self._time_ms = now_ms
            if self._gap is not None:
                self._frames += sse.encode_gap(self._gap)
            return self._gap
        # Told only now, not when the queues were lost: a page fetches its state when it reads this, and what it fetches
        # must not be older than the new queue. It stands behind what came before the loss.
        gap = sse.encode_gap("no-log")
        if not self._backlog or self._backlog[-1] != gap:
            self._backlog.append(gap)
        return "no-log"

    def lost(self) -> None:
        """The queues are gone. What has arrived is still sent; the stream stays open."""
        if self.state is not State.ENDED:
            self._advance("lost")

    def offer(self, event: Event, now_ms: int) -> None:
        """Takes an event that the broker delivered.

        An event whose id was offered a short while ago is the same event (a publisher's retry, or one that came by two
        of the connection's audiences) and is dropped. A backlog over its limit ends the stream as `slow`.
        """
        if self.state is State.ENDED:
            return
        if event.id in self._recent:
            self.duplicates += 1
            return
        self._recent[event.id] = None
        if len(self._recent) > RECENT_IDS:
            del self._recent[next(iter(self._recent))]
        self._backlog.append((event, now_ms))
        self._backlog_bytes += len(event.named)
        waiting = len(self._backlog)
        # One event alone always fits, however small the limit: a client could never get past it otherwise.
        if waiting > self._max_events or (self._backlog_bytes > self._max_bytes and waiting > 1):
            self.end("slow", self._retry_ms)

    def beat(self) -> None:
        """Nothing was sent for a while: a heartbeat."""
        if self.state is not State.OPENING and not self.has_output and self.state is not State.ENDED:
            self._frames = sse.HEARTBEAT

    def place(self, now_ms: int) -> None:
        """No event for a while: the client's place is moved to now, if it is certain that nothing is missing."""
        if self.state is State.LIVE and not self._backlog:
            self._time_ms = max(self._time_ms, now_ms)
            self._frames += sse.encode_position(str(self._cursor()))

    def end(self, reason: EndReason, retry_ms: int) -> None:
        """Ends the stream with `bridge.bye`. The first reason counts.

        `rotate` and `drain` send what has already arrived first. The others drop it, and the client finds it again from
        its cursor: a slow client because it would take for ever, an expired or revoked one because it may not see it.
        """
        if self.state is State.ENDED:
            return
        if reason not in ("rotate", "drain") or self.state is State.OPENING:
            self._backlog.clear()
            self._backlog_bytes = 0
        self.state = State.ENDED
        self.end_reason = reason
        self._backlog.append(sse.encode_bye(reason, retry_ms))

    def take(self) -> bytes:
        """Bytes to write now, whole frames, about 64 KiB at most (one frame more than that if it is larger).

        Each event's `id:` is the cursor of a client that has this event and all that were taken before it.
        """
        self.oldest_ms = None
        parts: list[bytes] = []
        size = 0
        if self._frames:
            parts.append(self._frames)
            size = len(self._frames)
            self._frames = b""
        if self.state is State.OPENING:
            return b"".join(parts)
        backlog = self._backlog
        while backlog and size < CHUNK_BYTES:
            item = backlog.popleft()
            if isinstance(item, bytes):
                parts.append(item)
                size += len(item)
                continue
            event, received_ms = item
            self._backlog_bytes -= len(event.named)
            self.delivered += 1
            if self.oldest_ms is None:
                self.oldest_ms = received_ms
            self._digests.append(event.digest)
            # The bridge's clock may be set back; a cursor never is.
            self._time_ms = max(self._time_ms, received_ms)
            tail = event.named if self._named else event.plain
            parts += (sse.encode_id(str(self._cursor())), tail)
            size += len(tail)
        return b"".join(parts)

    def _cursor(self) -> Cursor:
        return Cursor(self._time_ms, "".join(self._digests))

    def __repr__(self) -> str:
        waiting = len(self._backlog)
        shown = ", ".join(item[0].type for item in islice(self._backlog, 3) if not isinstance(item, bytes))
        return f"<Session {self.state.value} backlog={waiting} [{shown}] delivered={self.delivered}>"
