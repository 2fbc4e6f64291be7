"""The session of one connection, a state machine: events go in, the bytes to write come out.

Pure: no clock, no I/O, nothing of RabbitMQ or HTTP. All state of a connection is here. Its shell is the hub on one side
and the stream's writer on the other; the shell waits, and calls the methods here. `TABLE` lists states and events, and
docs/states.md explains them.

How log and live events are joined: events that arrive live while the log is read are buffered. The log gives every
event after the client's position, except the events that its cursor names as sent. The watermark is an entry of the log
that was written after the live queue was bound. At the watermark the buffered events follow, except those that the log
has already given. docs/join.md has an example with numbers.

Only a cursor shows which events a client has: bytes that were taken may be in a dozen buffers. So the session counts no
event as received, and each end of a stream leaves the client a position to return to.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from bridge.routing import TypeFilter
from bridge.service.streams import sse
from bridge.service.streams.cursor import NONE, Anchor, Cursor, InvalidCursor
from bridge.service.streams.progress import (
    OVERLAP_MS,
    Entry,
    Forget,
    Item,
    Live,
    Passed,
    Progress,
    Proof,
    Reached,
    Reset,
    Silent,
    Watermark,
)
from bridge.service.streams.recall import RECALL_BYTES, RECALL_EVENTS, Recall
from bridge.service.streams.sse import EndReason, GapReason
from bridge.service.streams.streamevent import StreamEvent

RECENT_IDS = 512
"""Remembered events: one that arrives twice is dropped. A publisher without a confirm repeats an event
within its deadline. The window counts events, so it costs a quiet connection nothing."""

OVERLAP_IDS = 20_000
"""The same while log and live queue are both read for a client. Each event then arrives by both, perhaps more than a
second apart. How many events that is depends on their rate alone."""

CHUNK_BYTES = 65_536
"""Most bytes that one `take` gathers. The rest of a slow client's events stays in its backlog, which has a limit, and
does not go into a socket's buffer, which has none."""

REMEMBERED_IDS = 64
"""Ids from before the log was read to its end. A publisher without a confirm may repeat one of them after the position,
and the log may be read again much later."""

UNREADABLE_MS = 5_000
"""A live stream is sent the gap `not-readable` at most this often, because its page fetches its state each time."""


class State(Enum):
    OPENING = "opening"
    """No byte has been sent: the queues are being declared, or the log is being asked."""
    REPLAYING = "replaying"
    """The log is read; live events are buffered."""
    LIVE = "live"
    DETACHED = "detached"
    """The stream is open, but its queues are gone: no event arrives, and events may be missed."""
    ENDED = "ended"


EventName = Literal[
    "bound", "lost", "found", "not_found", "replayed", "read_on", "caught_up", "extend", "offer", "offer_tail",
    "tail_ended", "unreadable", "reached", "watermark", "prove", "heartbeat", "send_position", "end", "take",
]  # fmt: skip
"""The session's methods that take an event."""

Cell = tuple[State, ...] | Literal["ignored", "wrong"]
"""The states that may follow. `ignored`: nothing changes. `wrong`: the shell has a fault; `WrongState` is raised."""

_OPENING, _REPLAYING, _LIVE, _DETACHED, _ENDED = State
_STARTS = (_LIVE, _REPLAYING)
_NOT_ATTACHED = (_OPENING, _DETACHED)

# fmt: off
_ROWS: dict[EventName, tuple[Cell, Cell, Cell, Cell, Cell]] = {
    #                 OPENING              REPLAYING                LIVE             DETACHED             ENDED
    "bound":         (_STARTS,             "wrong",                 "wrong",         _STARTS,             "ignored"),
    "lost":          ((_OPENING,),         (_OPENING, _DETACHED),   (_DETACHED,),    (_DETACHED,),        "ignored"),
    "found":         ("wrong",             (_REPLAYING,),           "wrong",         "wrong",             "ignored"),
    "not_found":     ("wrong",             (_LIVE,),                "wrong",         "wrong",             "ignored"),
    "replayed":      ("wrong",             (_REPLAYING,),           "wrong",         "wrong",             "ignored"),
    "read_on":       ("wrong",             (_REPLAYING,),           "wrong",         "wrong",             "ignored"),
    "caught_up":     ("wrong",             (_LIVE, _REPLAYING),     "wrong",         "wrong",             "ignored"),
    "extend":        ("wrong",             (_REPLAYING,),           "wrong",         "wrong",             "ignored"),
    "offer":         ((_OPENING, _ENDED),  (_REPLAYING, _ENDED),    (_LIVE, _ENDED), (_DETACHED, _ENDED), "ignored"),
    "offer_tail":    ("wrong",             "wrong",                 (_LIVE, _ENDED), "wrong",             "ignored"),
    "tail_ended":    ("wrong",             "wrong",                 (_LIVE, _ENDED), "wrong",             "ignored"),
    "unreadable":    ((_OPENING,),         (_REPLAYING,),           (_LIVE,),        "ignored",           "ignored"),
    "reached":       ("ignored",           "ignored",               (_LIVE,),        "ignored",           "ignored"),
    "watermark":     ("ignored",           "ignored",               (_LIVE,),        "ignored",           "ignored"),
    "prove":         ("ignored",           "ignored",               (_LIVE,),        "ignored",           "ignored"),
    "heartbeat":     ("ignored",           (_REPLAYING,),           (_LIVE,),        (_DETACHED,),        "ignored"),
    "send_position": ("ignored",           "ignored",               (_LIVE,),        "ignored",           "ignored"),
    "end":           ((_ENDED,),           (_ENDED,),               (_ENDED,),       (_ENDED,),           "ignored"),
    "take":          ((_OPENING,),         (_REPLAYING,),           (_LIVE,),        (_DETACHED,),        (_ENDED,)),
}
# fmt: on

TABLE: dict[EventName, dict[State, Cell]] = {
    event: dict(zip(State, cells, strict=True)) for event, cells in _ROWS.items()
}
"""By event and state: what may follow."""


class WrongState(Exception):
    """The shell has a fault: this event cannot happen in this state. The stream ends; its client resumes by cursor."""

    def __init__(self, event: EventName, state: State) -> None:
        self.event = event
        self.state = state
        super().__init__(f"{event} in the state {state.value}")


@dataclass(frozen=True, slots=True)
class Replay:
    """To do: read the log from `start` up to and with `until`.

    With `check`, the entry at `start` must have this digest.
    """

    start: int
    until: int
    check: str | None


@dataclass(frozen=True, slots=True)
class ReadTail:
    """To do: read the second after this entry, for events that the new live queue missed."""

    after: Anchor


@dataclass(frozen=True, slots=True)
class WriteWatermark:
    """To do: write a watermark and call `extend` with it. More live events arrived than the buffer takes."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an event asks of the shell."""

    action: Replay | ReadTail | WriteWatermark | None = None
    gap: GapReason | None = None
    """The gap that the client is sent, to be counted."""


_NOTHING = Step()
_NO_NAMES: frozenset[str] = frozenset()
_NO_KEYS: frozenset[bytes] = frozenset()  # One for all: an empty frozenset takes 216 bytes.


class Session:
    """
    Args:
        user: the user id, sent to the page in `bridge.ready`.
        identity: a name of what the user may see, sent there too.
        types: the types asked for; the shell offers only what matches.
        named: whether events carry their `event:` line.
        last_event_id: the client's Last-Event-ID; None or empty when it does not resume.
        has_log: whether there is a log to resume from.
        retry_ms: in `bridge.ready`, and in the goodbye to a slow client.
        heartbeat_seconds: sent in `bridge.ready`, so that a page knows when silence means a dead stream.
        max_events, max_bytes: the backlog's limits. A client that is further behind is ended as `slow`, or, while the
            log is read for it, gets the rest from the log.
        audience: whether each event carries the attribute `audience`.
    """

    __slots__ = (
        "_audience",
        "_backlog",
        "_backlog_bytes",
        "_backlog_events",
        "_buffer_overflowed",
        "_buffered",
        "_buffered_bytes",
        "_cursor",
        "_cursor_gap",
        "_frames",
        "_has_log",
        "_heartbeat_seconds",
        "_identity",
        "_interrupted",
        "_live_from",
        "_max_bytes",
        "_max_events",
        "_named",
        "_now_ms",
        "_overlapping",
        "_pending",
        "_progress",
        "_recall",
        "_recent",
        "_recent_before_log",
        "_replay",
        "_retry_ms",
        "_sent_by_cursor",
        "_unreadable_gap_ms",
        "_unreadable_pending",
        "delivered",
        "duplicates",
        "end_reason",
        "is_ready",
        "oldest_ms",
        "state",
        "types",
        "unreadable_gaps",
        "user",
    )

    def __init__(
        self,
        *,
        user: str,
        identity: str,
        types: TypeFilter,
        named: bool,
        last_event_id: str | None,
        has_log: bool,
        retry_ms: int,
        heartbeat_seconds: float,
        max_events: int,
        max_bytes: int,
        audience: bool = False,
    ) -> None:
        self.user = user
        self.types = types
        self.state = State.OPENING
        self.is_ready = False
        """Whether `bridge.ready` has been sent."""
        self.end_reason: EndReason | None = None
        self.delivered = 0
        """Events returned by `take`."""
        self.duplicates = 0
        """Events not sent because they had just been sent."""
        self.unreadable_gaps = 0
        """Gaps `not-readable` since the shell last set this to 0."""
        self.oldest_ms: int | None = None
        """When the oldest live event of the last `take` was received; None if it had none."""
        self._identity = identity
        self._named = named
        self._audience = audience
        self._has_log = has_log
        self._retry_ms = retry_ms
        self._heartbeat_seconds = heartbeat_seconds
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._now_ms = 0

        # To be written: the bridge's own frames, then the backlog.
        self._frames = b""
        self._backlog: list[Item] = []  # An idle deque takes 760 bytes.
        self._backlog_events = 0
        self._backlog_bytes = 0
        self._progress = Progress(None)
        self._recent: dict[bytes, None] = {}

        # Kept back: live events while the log is read, and events of the tail read while older ones may arrive live.
        self._buffered: dict[bytes, Entry | Live] = {}  # By the event's key.
        self._buffered_bytes = 0
        self._buffer_overflowed = False
        self._pending: dict[bytes, Live] | None = None  # By the event's key.

        # The read of the log.
        self._replay: Replay | None = None
        self._live_from: Anchor | None = None
        """The watermark after which live events follow; None without a log."""
        self._recall: Recall | None = None
        self._sent_by_cursor = _NO_NAMES
        """Digests of the events that the cursor names as sent."""
        self._recent_before_log = _NO_KEYS
        self._overlapping = False
        """Whether an event may arrive by the log and by the live queue."""

        self._interrupted = False
        """Whether the client was sent `bridge.status` with `receiving: false` since the queues were lost."""
        self._unreadable_gap_ms: int | None = None
        """When the last gap `not-readable` was sent in this live stream, or in this read of the log."""
        self._unreadable_pending = False
        """Whether such a gap is still to be sent. Until then no cursor moves past the event that it is for."""
        self._cursor: Cursor | None = None
        self._cursor_gap: GapReason | None = None
        if last_event_id:
            try:
                self._cursor = Cursor.parse(last_event_id)
            except InvalidCursor:
                self._cursor_gap = "unknown"

    @property
    def has_output(self) -> bool:
        return bool(self._frames) or bool(self._backlog)

    @property
    def replay(self) -> Replay | None:
        """The read of the log that is under way; None unless the state is REPLAYING."""
        return self._replay

    @property
    def sent_behind_anchor(self) -> int:
        """Events that the client's cursor has to account for one by one. A newer position makes them few again."""
        return self._progress.sent_behind

    @property
    def wants_more(self) -> bool:
        """Whether a read of the log that stopped because the client is slow should go on."""
        return self._backlog_events * 2 <= self._max_events and self._backlog_bytes * 2 <= self._max_bytes

    def _takes(self, event: EventName) -> bool:
        """Whether the event has an effect in this state.

        Raises:
            WrongState
        """
        cell = TABLE[event][self.state]
        if cell == "wrong":
            raise WrongState(event, self.state)
        return cell != "ignored"

    # The queues.

    def bound(self, now_ms: int, watermark: Anchor | None, *, complete_from: int = 0) -> Step:
        """The queues are bound. The stream goes live, or the log is read first.

        Args:
            now_ms: the bridge's clock, in ms since 1970.
            watermark: an entry of the log that was written after the queues were bound. None: there is no log, or it
                does not answer.
            complete_from: the log has every event from this offset on. Before it, the exchange was deleted for a time.
        """
        if not self._takes("bound"):
            return _NOTHING
        if self._interrupted:
            self._interrupted = False
            self._frames += sse.encode_status(receiving=True)
        self._now_ms = max(self._now_ms, now_ms)
        self._live_from = watermark
        self._unreadable_gap_ms = None
        if self.is_ready:
            resume_from = self._progress_behind_backlog().cursor(now_ms)
        elif self._cursor is not None:
            resume_from = self._cursor
        else:
            return self._go_live(self._cursor_gap)
        if watermark is None:
            return self._go_live("no-log")
        if resume_from.anchor is None:
            return self._go_live("unknown")
        if resume_from.anchor.offset > watermark.offset:
            return self._go_live("unknown")  # A cursor of a log that was deleted, or an invented one.
        if resume_from.anchor.offset < complete_from:
            return self._go_live("no-log")
        is_there = resume_from.anchor == watermark and self._has_sent_nothing_after(resume_from)
        if self.is_ready and is_there and not self._buffer_overflowed:
            self._release_buffered()  # Nothing was published meanwhile.
            self._overlapping = False
            return _NOTHING
        self.state = State.REPLAYING
        self._replay = Replay(resume_from.anchor.offset, watermark.offset, resume_from.anchor.check)
        self._sent_by_cursor = frozenset(resume_from.digests + resume_from.passed)
        self._recall = Recall(resume_from.unnamed)
        return Step(self._replay)

    @staticmethod
    def _has_sent_nothing_after(cursor: Cursor) -> bool:
        return not cursor.digests and cursor.unnamed == (NONE, NONE)

    def _progress_behind_backlog(self) -> Progress:
        progress = self._progress.copy()
        for item in self._backlog:
            progress.move(item)
        return progress

    def _go_live(self, gap: GapReason | None) -> Step:
        """Live from the watermark on. Everything before it is reported as a gap, or was never promised."""
        self._buffer_overflowed = False
        self._recall = None
        # After this ready or gap the page fetches its state, which has every event that was not readable before.
        self._unreadable_pending = False
        if not self.is_ready:
            self._progress = Progress(self._live_from)
            self._send_ready(self._progress.cursor(self._now_ms), resumed=False)
            if gap is not None:
                self._backlog.append(sse.encode_gap(gap))
        else:
            assert gap is not None, "an open stream goes live again by its log, or with a gap"
            self._send_gap(gap)
            self._reset()
        self._release_buffered()
        # The log was not read up to the watermark, so an event from before it may still be on its way to the live
        # queue. An event that the tail read finds waits, so that it does not overtake that one.
        self._pending = {}
        return Step(ReadTail(self._live_from) if self._live_from is not None else None, gap)

    def _send_gap(self, gap: GapReason) -> None:
        # Sent once the queues are bound again, not when they were lost. The page fetches its state when it reads this,
        # and that state must not be older than the new queue.
        frame = sse.encode_gap(gap)
        last = next((item for item in reversed(self._backlog) if not isinstance(item, Silent)), None)
        if last != frame:  # A client that reads slowly needs it once.
            self._backlog.append(frame)

    def _release_buffered(self) -> None:
        self.state = State.LIVE
        self._replay = None
        self._overlapping = self._live_from is not None
        buffered, self._buffered, self._buffered_bytes = self._buffered, {}, 0
        for item in buffered.values():
            self._admit(item.event, item)

    def _send_ready(self, cursor: Cursor, *, resumed: bool) -> None:
        self.is_ready = True
        self._frames = sse.encode_ready(
            user=self.user,
            identity=self._identity,
            resumed=resumed,
            heartbeat_seconds=self._heartbeat_seconds,
            cursor=str(cursor),
            retry_ms=self._retry_ms,
        )

    def lost(self) -> None:
        """The queues are gone. Events that have arrived are still sent; the stream stays open."""
        if not self._takes("lost"):
            return
        self.state = State.DETACHED if self.is_ready else State.OPENING
        self._replay = None
        # The log has the buffered events too, and is read again from before them.
        self._clear_buffer()
        self._buffer_overflowed = self._overlapping = False
        self._pending = self._recall = None
        self._unreadable_pending = False  # The log is read again from before the event, or a gap is sent.

    # The log.

    def found(self) -> None:
        """The entry at the start of the read has the right digest: the log reaches back to the client's position."""
        if self._takes("found") and not self.is_ready:
            assert self._cursor is not None, "only a client with a cursor is replayed before ready"
            # The position that the client came with: cut off in the middle, it must return to where it really was.
            self._progress = Progress(self._cursor.anchor, self._cursor, self._now_ms)
            self._send_ready(self._cursor, resumed=True)

    def not_found(self, reason: GapReason) -> Step:
        """The log does not reach back to the client's position, or it is another log."""
        return self._go_live(reason) if self._takes("not_found") else _NOTHING

    def replayed(self, entry: Entry) -> bool:
        """Takes the next entry of the log that is an event for this connection.

        Returns:
            False when the client reads too slowly: the entry was not taken, and the read has to stop. Once `wants_more`
            is true, `read_on` goes on with this entry.
        """
        if self.state is not State.REPLAYING and not self._takes("replayed"):
            return True
        event = entry.event
        recall = self._recall
        if recall is None:
            return self._take_entry(entry, was_sent=event.digest in self._sent_by_cursor)
        recall.see(entry, named=event.digest in self._sent_by_cursor)
        if len(recall.entries) > RECALL_EVENTS or recall.size > RECALL_BYTES:
            recall.give_up()
        if recall.is_over:
            self._end_recall()
        return True

    def _end_recall(self) -> None:
        """It is known which of the entries so far were sent. They are taken now, in their order."""
        recall, self._recall = self._recall, None
        if recall is None:
            return
        recall.give_up()
        for shared in (False, True):
            if not recall.is_sent[shared]:
                self._append(Forget(shared))
        for entry in recall.entries:
            named = entry.event.digest in self._sent_by_cursor
            self._take_entry(entry, was_sent=named or recall.was_sent(entry), fits=True)

    def _take_entry(self, entry: Entry, *, was_sent: bool, fits: bool = False) -> bool:
        event = entry.event
        # An event that the log gives is not sent again from the buffer, however many events come between the two.
        self._unbuffer(event.key)
        if was_sent or event.key in self._recent_before_log:
            self.duplicates += 1
            self._recent[event.key] = None  # A publisher's retry may yet arrive live.
            self._append(Passed(event, entry.shared))
            return True
        waiting = self._backlog_events
        if (
            waiting
            and not fits
            and (waiting >= self._max_events or self._backlog_bytes + len(event.named) > self._max_bytes)
        ):
            return False
        self._admit(event, entry)
        return True

    def _append(self, item: Silent) -> None:
        if self._backlog:
            if isinstance(item, Reset | Reached) and type(item) is type(self._backlog[-1]):
                self._backlog.pop()  # Nothing was sent between the two: losses must not pile up.
            self._backlog.append(item)
        else:
            self._progress.move(item)

    def read_on(self, offset: int) -> Step:
        """The read that stopped at the entry at `offset` goes on with it."""
        if not self._takes("read_on"):
            return _NOTHING
        assert self._replay is not None, "REPLAYING is a read of the log"
        self._replay = Replay(offset, self._replay.until, None)
        return Step(self._replay)

    def caught_up(self, now_ms: int) -> Step:
        """The log has been read up to the watermark. The stream goes live, or needs a later watermark first."""
        if not self._takes("caught_up"):
            return _NOTHING
        self._end_recall()
        if self._buffer_overflowed:
            # The new watermark is behind all events that arrived until now, except those on their way to the log. From
            # now on events are buffered, and not from the answer on: the answer comes by another connection, and may be
            # later than events that are behind the watermark.
            while self._buffered and (
                (next(iter(self._buffered.values())).received_ms or 0) < now_ms - OVERLAP_MS
                or self._is_over(2 * len(self._buffered), 2 * self._buffered_bytes)
            ):
                self._unbuffer(next(iter(self._buffered)))
            self._buffer_overflowed = False
            return Step(WriteWatermark())
        self._now_ms = max(self._now_ms, now_ms)
        if self._unreadable_pending:
            self._send_unreadable_gap()  # Before the position becomes the watermark, which may be after the event.
        self._reset()
        self._release_buffered()
        return _NOTHING

    def extend(self, watermark: Anchor) -> Step:
        """The later watermark that `caught_up` asked for: the log is read on up to it."""
        if not self._takes("extend"):
            return _NOTHING
        assert self._replay is not None, "REPLAYING is a read of the log"
        self._replay = Replay(self._replay.until + 1, watermark.offset, None)
        self._live_from = watermark
        self._overlapping = True
        self._unreadable_gap_ms = None  # An event in this part of the log may be newer than the page's state.
        return Step(self._replay)

    def offer_tail(self, event: StreamEvent, now_ms: int, *, shared: bool = False) -> None:
        """Takes an event from just behind the watermark. Nearly always it has arrived live, or will."""
        if not self._takes("offer_tail") or not self._overlapping:
            return
        if self._pending is None:
            self.offer(event, now_ms, shared=shared)
        elif event.key not in self._recent:
            self._pending[event.key] = Live(event, now_ms, shared)
            if len(self._pending) > self._max_events:
                item = self._pending.pop(next(iter(self._pending)))
                self.offer(item.event, item.received_ms, shared=item.shared)

    def tail_ended(self) -> None:
        """From now on events arrive only by the live queues."""
        if not self._takes("tail_ended"):
            return
        pending, self._pending = self._pending, None
        for item in (pending or {}).values():
            self.offer(item.event, item.received_ms, shared=item.shared)
        self._overlapping = False

    def unreadable(self, now_ms: int, *, logged: bool = False) -> None:
        """An event for this connection that another bridge may show, and that this bridge's catalogue cannot read.

        The page is sent `bridge.gap`, `not-readable`. It fetches its state, which has the event's effect. One gap is
        for all such events before it: one for each read of the log, and one in five seconds for a live stream. Until
        the gap is sent, the client's cursor stays before the event.

        Args:
            logged: the event is in the log before the watermark.
        """
        if not self._takes("unreadable"):
            return
        self._now_ms = max(self._now_ms, now_ms)
        gap_ms = self._unreadable_gap_ms
        if logged and gap_ms is not None and self.state is State.REPLAYING:
            return  # It was published before the watermark, and the page has fetched its state since then.
        self._unreadable_pending = True
        if self.is_ready and (gap_ms is None or self._now_ms >= gap_ms + UNREADABLE_MS):
            self._send_unreadable_gap()

    def _send_unreadable_gap(self) -> None:
        self._unreadable_pending = False
        self._unreadable_gap_ms = self._now_ms
        self.unreadable_gaps += 1
        self._send_gap("not-readable")

    # Live events.

    def offer(self, event: StreamEvent, now_ms: int, *, shared: bool = False, anchor: Anchor | None = None) -> None:
        """Takes an event that RabbitMQ delivered: by the client's own queue, by the shared one, or by the log itself.

        With `anchor`, the event is this entry of the log, and every event before it in the log was offered before it.
        While the stream is not attached such an event is not needed: `bound` names an entry that is not before it.

        An event whose `source` and `id` were offered a short while ago is the same event: a publisher's retry, or one
        that arrived by two of the connection's audiences. It is dropped. A backlog over its limit ends the stream as
        `slow`.
        """
        if self.state is State.ENDED:
            return
        if now_ms > self._now_ms:
            self._now_ms = now_ms
        if anchor is not None and self.state in _NOT_ATTACHED:
            return
        item: Entry | Live
        if anchor is None or self._unreadable_pending:  # Until that gap is sent, the position must not move.
            item = Live(event, now_ms, shared)
        else:
            item = Entry(anchor.offset, anchor.check, event, shared, now_ms)
        if self.state is State.LIVE:
            if self._unreadable_pending and now_ms >= (self._unreadable_gap_ms or 0) + UNREADABLE_MS:
                self._send_unreadable_gap()
            self._admit(event, item)
            if self._is_over(self._backlog_events, self._backlog_bytes):
                self.end("slow", self._retry_ms)
        elif event.key not in self._buffered:
            self._buffered[event.key] = item
            self._buffered_bytes += len(event.named)
            # Counted together with the backlog, which the buffer joins later: it must not end the stream then.
            while self._buffered and self._is_over(
                self._backlog_events + len(self._buffered), self._backlog_bytes + self._buffered_bytes
            ):
                if not self._has_log or not (self.is_ready or self._cursor is not None):
                    self.end("slow", self._retry_ms)
                    return
                self._buffer_overflowed = True  # The log has the event, and is read past it.
                self._unbuffer(next(iter(self._buffered)))

    def _unbuffer(self, key: bytes) -> None:
        if (item := self._buffered.pop(key, None)) is not None:
            self._buffered_bytes -= len(item.event.named)

    def _clear_buffer(self) -> None:
        self._buffered.clear()
        self._buffered_bytes = 0

    def _is_over(self, events: int, size: int) -> bool:
        # One event alone always fits, however small the limit. Otherwise a client could never get past it.
        return events > self._max_events or (size > self._max_bytes and events > 1)

    def _admit(self, event: StreamEvent, item: Entry | Live) -> None:
        if event.key in self._recent:
            self.duplicates += 1
            return
        self._recent[event.key] = None
        # Two for each event, so that after an overlap those that may still be on their way are forgotten last.
        excess = len(self._recent) - (OVERLAP_IDS if self._overlapping else RECENT_IDS)
        for _ in range(min(2, excess)) if excess > 0 else ():
            del self._recent[next(iter(self._recent))]
        self._backlog.append(item)
        self._backlog_events += 1
        self._backlog_bytes += len(event.named)

    # Positions and deadlines.

    def reached(self, anchor: Anchor) -> None:
        """Every event up to this entry of the log was offered: it becomes the client's position."""
        if self._takes("reached") and not self._unreadable_pending:
            self._append(Reached(anchor))

    def watermark(self, anchor: Anchor, seen_ms: int) -> None:
        """The bridge has just written this entry to the log. `prove` may make it the client's position."""
        if self._takes("watermark"):
            self._append(Watermark(anchor, seen_ms))

    def prove(self, anchor: Anchor) -> None:
        """Both queues have delivered everything before this watermark: it may be the client's position."""
        if self._takes("prove") and not self._unreadable_pending:
            self._append(Proof(anchor))

    def _reset(self) -> None:
        """From here on the watermark is the client's position, and nothing behind it has been sent."""
        self._append(Reset(self._live_from))
        self._recent_before_log = frozenset(list(self._recent)[-REMEMBERED_IDS:])

    def send_position(self, now_ms: int) -> None:
        """No event for a while: sends the client its position, so that its cursor does not age."""
        if self._takes("send_position") and not self._backlog:
            self._now_ms = max(self._now_ms, now_ms)
            if self._unreadable_pending:
                self._send_unreadable_gap()
            self._frames += sse.encode_position(self._progress.text(self._now_ms))

    def heartbeat(self) -> None:
        """No byte for a while: sends one."""
        if not self._takes("heartbeat") or not self.is_ready or self.has_output:
            return
        if self._unreadable_pending:
            self._send_unreadable_gap()
        elif self.state is State.DETACHED and not self._interrupted:
            # Also a byte. Sent once: a client that connects later gets `ready` or `busy`.
            self._interrupted = True
            self._frames = sse.encode_status(receiving=False)
        else:
            self._frames = sse.HEARTBEAT

    # The end.

    def end(self, reason: EndReason, retry_ms: int) -> None:
        """Ends the stream with `bridge.bye`. The first reason counts.

        `rotate` and `drain` send the backlog first. The other reasons drop it, and the client gets it again by its
        cursor: a slow client would need too long for it, and an expired or revoked one may not see it any more.
        """
        if not self._takes("end"):
            return
        if reason not in ("rotate", "drain"):
            self._backlog.clear()
            self._backlog_events = self._backlog_bytes = 0
        self._clear_buffer()
        self.state = State.ENDED
        self._replay = None
        self.end_reason = reason
        keeps = str(self._cursor) if self._cursor is not None and not self.is_ready else None
        self._backlog.append(sse.encode_bye(reason, retry_ms, cursor=keeps))

    def waiting(self) -> list[tuple[StreamEvent, int | None]]:
        """The events that the next `take`s return, in their order.

        Each with when it was received live, in ms; None for an event from the log.
        """
        return [(item.event, item.received_ms) for item in self._backlog if isinstance(item, Entry | Live)]

    def take(self) -> bytes:
        """Returns the bytes to write now: whole frames, about 64 KiB at most (and one frame more if it is larger).

        Each event's `id:` is the cursor of a client that has this event and all that were taken before it.
        """
        self.oldest_ms = None
        parts = [self._frames]
        size = len(self._frames)
        self._frames = b""
        backlog, progress = self._backlog, self._progress
        taken = 0
        for item in backlog:
            if size >= CHUNK_BYTES:
                break
            taken += 1
            if isinstance(item, bytes):
                parts.append(item)
                size += len(item)
                continue
            progress.move(item)
            if isinstance(item, Silent):
                continue
            event = item.event
            self._backlog_events -= 1
            self._backlog_bytes -= len(event.named)
            self.delivered += 1
            if self.oldest_ms is None:
                self.oldest_ms = item.received_ms
            if self._audience:
                tail = event.with_audience(named=self._named)
            else:
                tail = event.named if self._named else event.plain
            parts += (sse.encode_id(progress.text(self._now_ms)), tail)
            size += len(tail)
        del backlog[:taken]
        return b"".join(parts)

    def __repr__(self) -> str:
        return f"<Session {self.state.value} backlog={self._backlog_events} delivered={self.delivered}>"
