"""One connection as a state machine: what arrives for it goes in, the bytes to write come out.

Pure: no clock, no I/O, no idea of RabbitMQ or HTTP. The state of a connection is here and nowhere else. Its shell (the
hub on one side, the stream on the other) does the waiting and calls in:

    offer(event)      the broker delivered an event for this connection, by its own queue or by the shared one
    bound(watermark)  its queues are bound; `watermark` is an entry of the log written after that
    lost()            its queues are gone (broker, network, an operator); `bound` follows when they are there again
    found, not_found  the log has, or has not, the entry from which `replay` wants to be read
    replayed(entry)   the next entry of the log for this connection
    unreadable()      an event for this connection, live or in the log, that this bridge's catalogue cannot read
    caught_up()       the log has been read to the watermark
    settle(event)     an entry from just behind the watermark, in case the live queue missed it
    settled()         no more of these
    watermark(anchor) the bridge has just written this entry to the log
    prove(anchor)     all that stands before that entry has come by both queues
    heartbeat, position  a deadline has passed
    end(reason)       it is over; what may still be said is said
    take()            the bytes to write now, empty when there is nothing to say

The join of log and live: events that come live while the log is read are held. The log gives everything behind the
client's anchor but for what the cursor names as sent. The watermark was written after the live queue was bound. At it
the held events follow, less those that the log has already given.

What a client has is known from its cursor only: bytes that were taken may sit in a dozen buffers. So nothing here
counts as arrived, and everything that ends a stream leaves the client a place to come back to.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum

from bridge.routing import TypeFilter
from bridge.service.streams import sse
from bridge.service.streams.cursor import (
    Anchor,
    Cursor,
    InvalidCursor,
)
from bridge.service.streams.progress import (
    OVERLAP_MS,
    Entry,
    Forget,
    Item,
    Live,
    Passed,
    Progress,
    Proof,
    Reset,
    Silent,
    Watermark,
)
from bridge.service.streams.recall import RECALL_BYTES, RECALL_EVENTS, Recall
from bridge.service.streams.sse import EndReason, GapReason
from bridge.service.streams.streamevent import StreamEvent

RECENT_IDS = 512
"""Ids remembered to drop an event that comes again. A publisher that had no confirm repeats within its deadline; the
window is in events, so it costs a quiet connection nothing."""

OVERLAP_IDS = 20_000
"""The same while log and live are both read for a client. Each event then comes by either way, one of which may be a
second or more behind the other; how many events that is depends on their rate alone."""

CHUNK_BYTES = 65_536
"""Most that one `take` gathers. What waits goes out in one write, but a slow client's bytes stay in its backlog, where
they are counted, and not in a socket's buffer, where they are not."""

REMEMBERED_IDS = 64
"""Ids from before a stream went live by its log. A publisher that had no confirm then may repeat one of them behind the
anchor, however much later the log is read again."""

UNREADABLE_MS = 5_000
"""A live stream is told `not-readable` at most this often, since its page fetches its state each time."""


class State(Enum):
    OPENING = "opening"
    """Not a byte has been sent: the queues are being made, or the log is looked up."""
    REPLAYING = "replaying"
    """The log is read; what comes live is held."""
    LIVE = "live"
    DETACHED = "detached"
    """The stream is open, its queues are not: nothing arrives, and something may be missed."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Replay:
    """What has to be read: from `start` up to and with `until`. With `check`, the entry at `start` must have it."""

    start: int
    until: int
    check: str | None


class Session:
    """
    Args:
        user: the user id, told to the page in `bridge.ready`.
        identity: a name of what the user may see, told there too.
        types: the types asked for; the shell offers only what matches.
        named: whether events carry their `event:` line.
        last_event_id: what the client sent as Last-Event-ID; None or empty when it did not come back from anywhere.
        has_log: whether there is a log to resume from.
        heartbeat_seconds: told in `bridge.ready`, so that a page knows when silence means a dead stream.
        max_events, max_bytes: the backlog's limits; a client further behind than either is ended as `slow`, or, while
            the log is read for it, gets the rest from there.
    """

    __slots__ = (
        "_audience",
        "_backlog",
        "_backlog_bytes",
        "_backlog_events",
        "_before",
        "_cursor",
        "_frames",
        "_gap",
        "_has_log",
        "_heartbeat_seconds",
        "_held",
        "_held_bytes",
        "_held_lost",
        "_identity",
        "_interrupted",
        "_late",
        "_max_bytes",
        "_max_events",
        "_named",
        "_now_ms",
        "_overlapping",
        "_progress",
        "_recall",
        "_recent",
        "_retry_ms",
        "_sent_before",
        "_unreadable_told_ms",
        "_unreadable_waits",
        "delivered",
        "duplicates",
        "end_reason",
        "greeted",
        "live_from",
        "oldest_ms",
        "replay",
        "state",
        "types",
        "unreadable_told",
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
        self._identity = identity
        self.types = types
        self.state = State.OPENING
        self.replay: Replay | None = None
        """What the shell has to read from the log, while the state is REPLAYING."""
        self.end_reason: EndReason | None = None
        self.delivered = 0
        """Events handed out by `take`."""
        self.duplicates = 0
        """Events not sent because their id had just been sent."""
        self.unreadable_told = 0
        """Gaps `not-readable` since the shell last set this to 0."""
        self._unreadable_told_ms: int | None = None
        """When the last was told: since then in a live stream, or in this reading of the log."""
        self._unreadable_waits = False
        """Whether one is still to be told. Until then no cursor moves past the event that it is for."""
        self.oldest_ms: int | None = None
        """When the oldest live event of the last `take` was received; None if it had none."""
        self._named = named
        self._audience = audience
        self._has_log = has_log
        self._retry_ms = retry_ms
        self._heartbeat_seconds = heartbeat_seconds
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._frames = b""  # The bridge's own frames; they stand before the backlog.
        self._backlog: deque[Item] = deque()
        self._backlog_events = 0
        self._backlog_bytes = 0
        self._held: OrderedDict[str, Live] = OrderedDict()  # By event id.
        self._held_bytes = 0
        self._held_lost = False
        self._interrupted = False
        """Whether the client was told that nothing can arrive, since the queues are lost."""
        self._late: dict[str, Live] | None = None  # By event id.
        self._progress = Progress(None)
        self._recent: dict[str, None] = {}
        self._before: frozenset[str] = frozenset()
        self._now_ms = 0
        self.greeted = False
        """Whether `bridge.ready` has been said."""
        self._recall: Recall | None = None
        self._overlapping = False
        self._sent_before: frozenset[str] = frozenset()
        self.live_from: Anchor | None = None
        """The entry of the log behind which live events follow; None without a log."""
        self._cursor: Cursor | None = None
        self._gap: GapReason | None = None
        if last_event_id:
            try:
                self._cursor = Cursor.parse(last_event_id)
            except InvalidCursor:
                self._gap = "unknown"

    @property
    def has_output(self) -> bool:
        return bool(self._frames) or bool(self._backlog)

    @property
    def sent_behind_anchor(self) -> int:
        """Events that the client's cursor has to account for one by one; a newer anchor makes it few again."""
        return self._progress.sent_behind

    @property
    def wants_more(self) -> bool:
        """Whether a replay that was stopped, because the client reads slowly, should go on."""
        return self._backlog_events * 2 <= self._max_events and self._backlog_bytes * 2 <= self._max_bytes

    # Queues come and go.

    def bound(self, now_ms: int, watermark: Anchor | None) -> GapReason | None:
        """The queues are bound. Now it is `bridge.ready`, or reading the log (`replay` says what), or telling the hole.

        Args:
            now_ms: the bridge's clock, in ms since 1970.
            watermark: an entry of the log that was written after the queues were bound; None without a log.

        Returns:
            The gap that the client is told of at once, if any.
        """
        if self.state is State.ENDED:
            return None
        assert self.state in (State.OPENING, State.DETACHED), self.state
        if self._interrupted:
            self._interrupted = False
            self._frames += sse.encode_status(receiving=True)
        self._now_ms = max(self._now_ms, now_ms)
        self.live_from = watermark
        self._unreadable_told_ms = None
        if self.greeted:
            progress = self._progress_behind_backlog()
            come_from = progress.cursor(now_ms)
        elif self._cursor is not None:
            come_from = self._cursor
        elif self._gap is not None:
            return self._go_live(self._gap)
        else:
            return self._go_live(None)
        if watermark is None:
            return self._go_live("no-log")  # There is none, or it does not answer.
        if come_from.anchor is None:
            return self._go_live("unknown")
        if come_from.anchor.offset > watermark.offset:
            return self._go_live("unknown")  # Of a log that is no more, or an invention.
        self.state = State.REPLAYING
        self.replay = Replay(come_from.anchor.offset, watermark.offset, come_from.anchor.check)
        self._sent_before = frozenset(come_from.digests + come_from.passed)
        self._recall = Recall(come_from.unnamed)
        return None

    def _progress_behind_backlog(self) -> Progress:
        progress = self._progress.copy()
        for item in self._backlog:
            progress.move(item)
        return progress

    def _go_live(self, gap: GapReason | None) -> GapReason | None:
        """From the watermark on, with what was held; everything before it is told as a gap or was never promised."""
        self._held_lost = False
        self._recall = None
        # The page fetches its state after this ready or gap, and finds in it whatever was not readable before.
        self._unreadable_waits = False
        if not self.greeted:
            self._progress = Progress(self.live_from)
            self._greet(self._progress.cursor(self._now_ms), resumed=False)
            if gap is not None:
                self._backlog.append(sse.encode_gap(gap))
        else:
            assert gap is not None, "a stream that is open goes live again by its log, or with a gap"
            self._tell_gap(gap)
            self._reset()
        self._release_held()
        # The log was not read up to the watermark, so events from before it may still be on their way here. What stands
        # behind it is not given out before them: the live queue, where it is not missing, brings all in order.
        self._late = {}
        return gap

    def _tell_gap(self, gap: GapReason) -> None:
        # In the middle of a stream it is told only once the queues are bound again, not when they were lost: a page
        # fetches its state when it reads this, and what it fetches must not be older than the new queue.
        frame = sse.encode_gap(gap)
        told = next((item for item in reversed(self._backlog) if not isinstance(item, Silent)), None)
        if told != frame:  # A client that reads slowly needs to be told once.
            self._backlog.append(frame)

    def _release_held(self) -> None:
        self.state = State.LIVE
        self.replay = None
        self._overlapping = self.live_from is not None
        held, self._held, self._held_bytes = self._held, OrderedDict(), 0
        for item in held.values():
            self._admit(item.event, item)

    def _greet(self, cursor: Cursor, *, resumed: bool) -> None:
        self.greeted = True
        self._frames = sse.encode_ready(
            user=self.user,
            identity=self._identity,
            resumed=resumed,
            heartbeat_seconds=self._heartbeat_seconds,
            cursor=str(cursor),
            retry_ms=self._retry_ms,
        )

    def lost(self) -> None:
        """The queues are gone. What has arrived is still sent; the stream stays open."""
        if self.state is State.ENDED:
            return
        self.state = State.DETACHED if self.greeted else State.OPENING
        self.replay = None
        # The log has them too, and will be read from before them.
        self._drop_held()
        self._held_lost = self._overlapping = False
        self._late = self._recall = None
        self._unreadable_waits = False  # The log is read again from before it, or a gap is told.

    # The log is read.

    def found(self) -> None:
        """The entry at the start of `replay` is the one that it should be: the log reaches back to the client."""
        if self.state is State.REPLAYING and not self.greeted:
            assert self._cursor is not None, "only who came with a cursor is replayed before ready"
            # The place it came with, not a later one: cut off in the middle it must come back to where it really was.
            self._progress = Progress(self._cursor.anchor, self._cursor, self._now_ms)
            self._greet(self._cursor, resumed=True)

    def not_found(self, reason: GapReason) -> GapReason | None:
        """The log does not reach back to the client, or is another. Returns the gap that is told."""
        if self.state is not State.REPLAYING:
            return None
        return self._go_live(reason)

    def replayed(self, entry: Entry) -> bool:
        """Takes an entry of the log that is for this connection, in the log's order.

        Returns False when the client does not keep up: nothing was taken, and reading goes on with this very entry once
        `wants_more` says so.
        """
        if self.state is not State.REPLAYING or self.replay is None:
            return True
        event = entry.event
        recall = self._recall
        if recall is None:
            return self._replay(entry, was_sent=event.digest in self._sent_before)
        recall.see(entry, named=event.digest in self._sent_before)
        if len(recall.entries) > RECALL_EVENTS or recall.size > RECALL_BYTES:
            recall.give_up()
        if recall.is_over:
            self._end_recall()
        return True

    def _end_recall(self) -> None:
        """It is known by now which of the entries read so far were sent. They follow, each as what it is."""
        recall, self._recall = self._recall, None
        if recall is None:
            return
        recall.give_up()
        for shared in (False, True):
            if not recall.is_sent[shared]:
                self._append(Forget(shared))
        for entry in recall.entries:
            named = entry.event.digest in self._sent_before
            self._replay(entry, was_sent=named or recall.was_sent(entry), fits=True)

    def _replay(self, entry: Entry, *, was_sent: bool, fits: bool = False) -> bool:
        event = entry.event
        # What the log gives is not given again from what is held, however many come between the two.
        self._unhold(event.id)
        if was_sent or event.id in self._before:
            self.duplicates += 1
            self._recent[event.id] = None  # A publisher's retry may yet come live.
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
            if isinstance(item, Reset) and isinstance(self._backlog[-1], Reset):
                self._backlog.pop()  # Nothing was sent between the two: losses must not pile up.
            self._backlog.append(item)
        else:
            self._progress.move(item)

    def read_on(self, offset: int) -> None:
        """Reading was stopped, and goes on with the entry at `offset`."""
        if self.replay is not None:
            self.replay = Replay(offset, self.replay.until, None)

    def caught_up(self, now_ms: int) -> bool:
        """The log has been read up to the watermark.

        Returns False when what came live meanwhile was more than could be held: then `extend` has to follow, with a
        watermark of this moment.
        """
        if self.state is not State.REPLAYING:
            return True
        self._end_recall()
        if self._held_lost:
            # The watermark that is asked for now is behind all that came until now, but for events on their way to the
            # log. From here on events are held, not only from the answer on: it may come by another
            # connection, later than events that stand behind the watermark.
            while self._held and (
                next(iter(self._held.values())).received_ms < now_ms - OVERLAP_MS
                or self._is_over(2 * len(self._held), 2 * self._held_bytes)
            ):
                self._unhold(next(iter(self._held)))
            self._held_lost = False
            return False
        assert self.live_from is not None, "there is no replay without one"
        self._now_ms = max(self._now_ms, now_ms)
        if self._unreadable_waits:
            self._tell_unreadable()  # Before the anchor becomes the watermark, which may stand behind it.
        self._reset()
        self._release_held()
        return True

    def extend(self, watermark: Anchor) -> None:
        """Held events had to be dropped: the log is read on, to a later watermark."""
        if self.state is State.REPLAYING and self.replay is not None:
            self.replay = Replay(self.replay.until + 1, watermark.offset, None)
            self.live_from = watermark
            self._overlapping = True
            self._unreadable_told_ms = None  # What this part of the log holds may be newer than the page's state.

    def settle(self, event: StreamEvent, now_ms: int, *, shared: bool = False) -> None:
        """Takes an event that stands in the log just behind the watermark. Nearly always it has come live, or will."""
        if self.state is not State.LIVE or not self._overlapping:
            return
        if self._late is None:
            self.offer(event, now_ms, shared=shared)
        elif event.id not in self._recent:
            self._late[event.id] = Live(event, now_ms, shared)
            if len(self._late) > self._max_events:
                item = self._late.pop(next(iter(self._late)))
                self.offer(item.event, item.received_ms, shared=item.shared)

    def settled(self) -> None:
        """What follows comes live, and only live."""
        late, self._late = self._late, None
        for item in (late or {}).values():
            self.offer(item.event, item.received_ms, shared=item.shared)
        self._overlapping = False

    def unreadable(self, now_ms: int, *, logged: bool = False) -> None:
        """Takes notice of an event for this connection that another bridge might show, and this one cannot.

        The page is told `bridge.gap`, `not-readable`, and fetches its state, in which it finds what the event said. One
        gap is for all that came before it was told. So a reading of the log tells one, and a live stream one in five
        seconds; until the next is told, the client's cursor stays before the event.

        Args:
            logged: it stands in the log before the watermark.
        """
        if self.state in (State.ENDED, State.DETACHED):
            return
        self._now_ms = max(self._now_ms, now_ms)
        told_ms = self._unreadable_told_ms
        if logged and told_ms is not None and self.state is State.REPLAYING:
            return  # It was published before the watermark, and the page has been told to fetch its state since then.
        self._unreadable_waits = True
        if self.greeted and (told_ms is None or self._now_ms >= told_ms + UNREADABLE_MS):
            self._tell_unreadable()

    def _tell_unreadable(self) -> None:
        self._unreadable_waits = False
        self._unreadable_told_ms = self._now_ms
        self.unreadable_told += 1
        self._tell_gap("not-readable")

    # Events.

    def offer(self, event: StreamEvent, now_ms: int, *, shared: bool = False) -> None:
        """Takes an event that the broker delivered, by the client's own queue or by the shared one.

        An event whose id was offered a short while ago is the same event (a publisher's retry, or one that came by two
        of the connection's audiences) and is dropped. A backlog over its limit ends the stream as `slow`.
        """
        if self.state is State.ENDED:
            return
        if now_ms > self._now_ms:
            self._now_ms = now_ms
        item = Live(event, now_ms, shared)
        if self.state is State.LIVE:
            if self._unreadable_waits and now_ms >= (self._unreadable_told_ms or 0) + UNREADABLE_MS:
                self._tell_unreadable()
            self._admit(event, item)
            if self._is_over(self._backlog_events, self._backlog_bytes):
                self.end("slow", self._retry_ms)
        elif event.id not in self._held:
            self._held[event.id] = item
            self._held_bytes += len(event.named)
            # Together with what waits from the log, which it will follow: else it would end the stream when it does.
            while self._held and self._is_over(
                self._backlog_events + len(self._held), self._backlog_bytes + self._held_bytes
            ):
                if not self._has_log or not (self.greeted or self._cursor is not None):
                    self.end("slow", self._retry_ms)
                    return
                self._held_lost = True  # The log has it, and will be read past it.
                self._unhold(next(iter(self._held)))

    def _unhold(self, event_id: str) -> None:
        if (item := self._held.pop(event_id, None)) is not None:
            self._held_bytes -= len(item.event.named)

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _is_over(self, events: int, size: int) -> bool:
        # One event alone always fits, however small the limit: a client could never get past it otherwise.
        return events > self._max_events or (size > self._max_bytes and events > 1)

    def _admit(self, event: StreamEvent, item: Entry | Live) -> None:
        if event.id in self._recent:
            self.duplicates += 1
            return
        self._recent[event.id] = None
        # One by one, so that after an overlap those are forgotten last that may still be on their way.
        excess = len(self._recent) - (OVERLAP_IDS if self._overlapping else RECENT_IDS)
        for _ in range(min(2, excess)) if excess > 0 else ():
            del self._recent[next(iter(self._recent))]
        self._backlog.append(item)
        self._backlog_events += 1
        self._backlog_bytes += len(event.named)

    # Deadlines.

    def heartbeat(self) -> None:
        """Nothing was sent for a while: a heartbeat."""
        if not self.greeted or self.has_output or self.state is State.ENDED:
            return
        if self._unreadable_waits:
            self._tell_unreadable()
        elif self.state is State.DETACHED and not self._interrupted:
            # Also a heartbeat: it is a byte. Said once, since a client that comes later gets `ready` or `busy`.
            self._interrupted = True
            self._frames = sse.encode_status(receiving=False)
        else:
            self._frames = sse.HEARTBEAT

    def watermark(self, anchor: Anchor, seen_ms: int) -> None:
        """The bridge has just written this entry to the log, and nothing has come since then. It may become the
        client's anchor when `prove` says so."""
        if self.state is State.LIVE:
            self._append(Watermark(anchor, seen_ms))

    def prove(self, anchor: Anchor) -> None:
        """All that stands before this watermark in the log has come by both queues: it may be the client's anchor."""
        if self.state is State.LIVE and not self._unreadable_waits:
            self._append(Proof(anchor))

    def _reset(self) -> None:
        """From here on the watermark is the anchor, and nothing behind it has been sent."""
        self._append(Reset(self.live_from))
        self._before = frozenset(list(self._recent)[-REMEMBERED_IDS:])

    def position(self, now_ms: int) -> None:
        """No event for a while: the client is sent its position again, if it is certain that nothing is missing."""
        if self.state is State.LIVE and not self._backlog:
            self._now_ms = max(self._now_ms, now_ms)
            if self._unreadable_waits:
                self._tell_unreadable()
            self._frames += sse.encode_position(self._progress.text(self._now_ms))

    # The end.

    def end(self, reason: EndReason, retry_ms: int) -> None:
        """Ends the stream with `bridge.bye`. The first reason counts.

        `rotate` and `drain` send what has already arrived first. The others drop it, and the client finds it again
        by its cursor: a slow client because it would take for ever, an expired or revoked one because it may not see
        it any more.
        """
        if self.state is State.ENDED:
            return
        if reason not in ("rotate", "drain"):
            self._backlog.clear()
            self._backlog_events = self._backlog_bytes = 0
        self._drop_held()
        self.state = State.ENDED
        self.replay = None
        self.end_reason = reason
        keeps = str(self._cursor) if self._cursor is not None and not self.greeted else None
        self._backlog.append(sse.encode_bye(reason, retry_ms, cursor=keeps))

    def waiting(self) -> list[tuple[StreamEvent, int | None]]:
        """The events that the next `take`s hand out, in their order, each with when it was received live, in ms.

        None for what came from the log.
        """
        return [
            (item.event, item.received_ms if isinstance(item, Live) else None)
            for item in self._backlog
            if isinstance(item, Entry | Live)
        ]

    def take(self) -> bytes:
        """Bytes to write now, whole frames, about 64 KiB at most (one frame more than that if it is larger).

        Each event's `id:` is the cursor of a client that has this event and all that were taken before it.
        """
        self.oldest_ms = None
        parts = [self._frames]
        size = len(self._frames)
        self._frames = b""
        backlog, progress = self._backlog, self._progress
        while backlog and size < CHUNK_BYTES:
            item = backlog.popleft()
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
            if self.oldest_ms is None and isinstance(item, Live):
                self.oldest_ms = item.received_ms
            if self._audience:
                tail = event.with_audience(named=self._named)
            else:
                tail = event.named if self._named else event.plain
            parts += (sse.encode_id(progress.text(self._now_ms)), tail)
            size += len(tail)
        return b"".join(parts)

    def __repr__(self) -> str:
        return f"<Session {self.state.value} backlog={self._backlog_events} delivered={self.delivered}>"
