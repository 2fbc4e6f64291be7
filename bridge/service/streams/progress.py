"""The progress of one client: its cursor, while its backlog is written item by item.

Pure. The session appends items to its backlog; `Progress.move` goes past each one when it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from bridge.service.streams.cursor import (
    DIGEST_CHARS,
    MAX_DIGESTS,
    NONE,
    VALUE_MASK,
    Anchor,
    Cursor,
    Unnamed,
    encode,
    encode_unnamed,
    split,
)
from bridge.service.streams.streamevent import StreamEvent

OVERLAP_MS = 1_000
"""An event may reach its live queue this much earlier than the log. An event that arrived this long before a watermark
was written may be after it in the log, so its name is kept. An event that was even earlier is sent again, not lost."""

NEAR_MS = 50
"""An event that arrived this close to a watermark may be on either side of it in the log. A stream that cannot name all
events since then waits for the next watermark."""

MANY_BEHIND = 10_000
"""A client that was sent this many events after its position takes a watermark although events arrived close to it.
Without a newer position, the bridge could soon not find out which events were sent (`recall.RECALL_EVENTS`)."""

MAX_WATERMARKS = 4
"""Watermarks that may wait for their proof. The second one after it proves it, so a fifth means that no proof comes."""


class Entry(NamedTuple):
    """An entry of the log that is an event for this connection."""

    offset: int
    check: str
    event: StreamEvent
    shared: bool = False
    """Whether its audience is a group or everybody, which the shared queue serves."""
    received_ms: int | None = None
    """When it was received live; None if it was read for this client."""


@dataclass(frozen=True, slots=True)
class Reset:
    """In the backlog: from here on this is the position, and nothing after it has been sent."""

    anchor: Anchor | None


@dataclass(frozen=True, slots=True)
class Reached:
    """In the backlog: everything up to this entry of the log has been sent, or is not for this client."""

    anchor: Anchor


@dataclass(frozen=True, slots=True)
class Watermark:
    """In the backlog: this entry was written to the log at this point."""

    anchor: Anchor
    seen_ms: int


@dataclass(frozen=True, slots=True)
class Proof:
    """In the backlog: everything before this entry of the log has arrived by here."""

    anchor: Anchor


@dataclass(frozen=True, slots=True)
class Passed:
    """In the backlog: the read of the log passed an event that had been sent."""

    event: StreamEvent
    shared: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """In the backlog: from here on events of one queue are sent again. The bridge does not know which were sent."""

    shared: bool


class Live(NamedTuple):
    event: StreamEvent
    received_ms: int
    shared: bool


Item = Entry | Live | Reset | Reached | Watermark | Proof | Passed | Forget | bytes

Silent = Reset | Reached | Watermark | Proof | Passed | Forget


class _Sent(NamedTuple):
    """A named event. `counted`: it was sent after the position, so it is counted when its name is dropped."""

    received_ms: int
    shared: bool
    value: int
    counted: bool


@dataclass(slots=True)
class _Pending:
    """A watermark that waits for its proof: the events sent before it, by queue, and when the nearest ones arrived."""

    anchor: Anchor
    seen_ms: int
    sent: int
    counts: tuple[int, int]
    totals: tuple[int, int]
    before_ms: int
    after_ms: int | None = None


class Progress:
    """A client's position, and the events that were sent after it."""

    __slots__ = ("_before_ms", "_counts", "_digests", "_named", "_passed", "_pending", "_sent", "_totals",
                 "_unnamed", "anchor")  # fmt: skip

    def __init__(self, anchor: Anchor | None, cursor: Cursor | None = None, now_ms: int = 0) -> None:
        self.anchor = anchor
        # The named events that were sent after the position, oldest first. The names are one text, because every event
        # is sent with them.
        self._digests = ""
        self._named: list[_Sent] = []
        # The unnamed events, by queue: how many, and their sum. None: the bridge does not know which.
        self._unnamed: list[Unnamed | None] = [NONE, NONE]
        # All events that were ever sent live, by queue. The difference of two moments is what was sent between them.
        self._sent = 0
        self._counts = self._totals = (0, 0)
        self._before_ms = 0
        self._pending: list[_Pending] = []
        # Names of events up to the position, oldest first: a publisher's retry may be after it again. One text, too.
        self._passed = ""
        if cursor is not None:
            # Which queue delivered these is unknown, and not needed: they are only compared by name.
            for digest in cursor.digests[-MAX_DIGESTS:]:
                self._digests += digest
                self._named.append(_Sent(now_ms, False, 0, False))
            self._unnamed = list(cursor.unnamed)
            self._passed = "".join(cursor.passed)

    def copy(self) -> Progress:
        progress = Progress(self.anchor)
        progress._digests = self._digests
        progress._named.extend(self._named)
        progress._unnamed = self._unnamed.copy()
        progress._sent = self._sent
        progress._counts = self._counts
        progress._totals = self._totals
        progress._before_ms = self._before_ms
        progress._pending.extend(replace(each) for each in self._pending)
        progress._passed = self._passed
        return progress

    def move(self, item: Item) -> None:
        """Goes past an item of the backlog, which is written at this moment."""
        if isinstance(item, Live):
            self._send(item)
        elif isinstance(item, Entry):
            # Everything up to here has been sent. Live events that were sent from after it stay as they are.
            self.anchor = Anchor(item.offset, item.check)
            self._passed = (self._passed + item.event.digest)[-MAX_DIGESTS * DIGEST_CHARS :]
            if item.received_ms is not None:
                self._forget_sent()  # It is newer than all events before it.
        elif isinstance(item, Reached):
            self.anchor = item.anchor
            self._forget_sent()
        elif isinstance(item, Passed):
            self._pass(item)
        elif isinstance(item, Watermark):
            del self._pending[: 1 - MAX_WATERMARKS]
            self._pending.append(
                _Pending(
                    item.anchor,
                    item.seen_ms,
                    self._sent,
                    self._counts,
                    self._totals,
                    self._before_ms,
                )
            )
        elif isinstance(item, Proof):
            self._adopt(item.anchor)
        elif isinstance(item, Forget):
            self._unnamed[item.shared] = NONE
        elif isinstance(item, Reset):
            self.anchor = item.anchor
            self._forget_sent()
            self._pending.clear()
            self._passed = ""

    def _forget_sent(self) -> None:
        """Nothing has been sent after the position."""
        if self._named:
            self._digests = ""
            self._named.clear()
        self._unnamed = [NONE, NONE]

    def _send(self, item: Live) -> None:
        event, received_ms, shared = item
        if len(self._named) == MAX_DIGESTS:
            oldest = self._named.pop(0)
            self._digests = self._digests[DIGEST_CHARS:]
            unnamed = self._unnamed[oldest.shared]
            if oldest.counted and unnamed is not None:
                total = (unnamed.total + oldest.value) & VALUE_MASK
                self._unnamed[oldest.shared] = Unnamed(unnamed.count + 1, total)
        self._digests += event.digest
        self._named.append(_Sent(received_ms, shared, event.value, True))
        self._sent += 1
        (own, of_shared), (own_total, shared_total) = self._counts, self._totals
        if shared:
            self._counts = own, of_shared + 1
            self._totals = own_total, (shared_total + event.value) & VALUE_MASK
        else:
            self._counts = own + 1, of_shared
            self._totals = (own_total + event.value) & VALUE_MASK, shared_total
        self._before_ms = received_ms
        for each in self._pending:
            if each.after_ms is None:
                each.after_ms = received_ms

    def _pass(self, item: Passed) -> None:
        digest, shared = item.event.digest, item.shared
        names = split(self._digests)
        if digest in names:
            at = names.index(digest)
            self._digests = "".join(names[:at] + names[at + 1 :])
            del self._named[at]
        elif (unnamed := self._unnamed[shared]) is not None and unnamed.count:
            total = (unnamed.total - item.event.value) & VALUE_MASK
            self._unnamed[shared] = Unnamed(unnamed.count - 1, total)
        self._passed = (self._passed + digest)[-MAX_DIGESTS * DIGEST_CHARS :]

    def _adopt(self, anchor: Anchor) -> None:
        if all(each.anchor != anchor for each in self._pending):
            return
        while (since := self._pending.pop(0)).anchor != anchor:
            pass  # A newer proof replaces an older watermark.
        count = self._sent - since.sent
        is_near = since.seen_ms - since.before_ms < NEAR_MS or (
            since.after_ms is not None and since.after_ms - since.seen_ms < NEAR_MS
        )
        # Named events are known. Of the others only their number since the watermark is known.
        if is_near and count > MAX_DIGESTS and self.sent_behind < MANY_BEHIND:
            return
        self.anchor = anchor
        self._passed = ""
        since_ms = since.seen_ms - OVERLAP_MS
        named = list(zip(split(self._digests), self._named, strict=True))
        first = len(named) - count
        kept = [
            (digest, each._replace(counted=each.counted and at >= first))
            for at, (digest, each) in enumerate(named)
            if at >= first or each.received_ms >= since_ms
        ]
        self._digests = "".join([digest for digest, _ in kept])
        self._named = [each for _, each in kept]
        for shared in (False, True):
            of_queue = [each for _, each in kept if each.shared is shared and each.counted]
            left = self._counts[shared] - since.counts[shared] - len(of_queue)
            total = self._totals[shared] - since.totals[shared] - sum(each.value for each in of_queue)
            self._unnamed[shared] = Unnamed(left, total & VALUE_MASK)

    def _last_passed(self) -> str:
        # Names of events after the position are needed. The others fill the room that is left.
        room = MAX_DIGESTS - len(self._named)
        return self._passed[-room * DIGEST_CHARS :] if room else ""

    @property
    def sent_behind(self) -> int:
        """Events that were sent after the position, as far as they are known."""
        return len(self._named) + sum(each.count for each in self._unnamed if each is not None)

    def cursor(self, now_ms: int) -> Cursor:
        if self.anchor is None:
            return Cursor(None, time_ms=now_ms)
        own, shared = self._unnamed
        return Cursor(self.anchor, split(self._digests), (own, shared), split(self._last_passed()))

    def text(self, now_ms: int) -> str:
        """The cursor's text."""
        if self.anchor is None:
            return str(self.cursor(now_ms))
        own, shared = self._unnamed
        return encode(
            self.anchor,
            self._digests,
            "" if own is NONE else encode_unnamed(own),
            "" if shared is NONE else encode_unnamed(shared),
            self._last_passed() if self._passed else "",
        )
