"""How far one client is: what its cursor says while a backlog is written, item by item.

Pure. The session appends items to its backlog; `Progress.move` goes past each one when it is written.
"""

from __future__ import annotations

from collections import deque
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
"""An event may reach its live queue so much earlier than the log: what came in this long before a watermark was written
may stand behind it, and stays among the names. If it came earlier still, it is sent again; nothing is lost."""

NEAR_MS = 50
"""An event that came so near to a watermark may stand on either side of it. A stream that cannot name all that followed
would rather take the next one."""

MANY_BEHIND = 10_000
"""A client that was sent this many events behind its anchor takes a watermark although events came near it. Without a
newer anchor, the bridge could soon not find out which of them the client was sent (`recall.RECALL_EVENTS`)."""

MAX_WATERMARKS = 4
"""Watermarks that may wait for their proof. The next but one proves it, so a fifth means that no proof comes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the log that is an event for this connection."""

    offset: int
    check: str
    event: StreamEvent
    shared: bool = False
    """Whether its audience is one of the shared queue's: a group, or everybody."""


@dataclass(frozen=True, slots=True)
class Reset:
    """A place in the backlog from which the anchor is this one, and nothing behind it has been sent."""

    anchor: Anchor | None


@dataclass(frozen=True, slots=True)
class Watermark:
    """A place in the backlog at which this entry had just been written to the log."""

    anchor: Anchor
    seen_ms: int


@dataclass(frozen=True, slots=True)
class Proof:
    """A place in the backlog at which all that stands before this entry has come."""

    anchor: Anchor


@dataclass(frozen=True, slots=True)
class Passed:
    """A place in the backlog at which the log's reading passed an event that had been sent."""

    event: StreamEvent
    shared: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """A place in the backlog from which events of one queue are sent again: not all that were sent are known."""

    shared: bool


class Live(NamedTuple):
    event: StreamEvent
    received_ms: int
    shared: bool


Item = Entry | Live | Reset | Watermark | Proof | Passed | Forget | bytes

Silent = Reset | Watermark | Proof | Passed | Forget


class _Sent(NamedTuple):
    """A named event. `counted`: it was sent behind the anchor, and is added up when its name falls out."""

    received_ms: int
    shared: bool
    value: int
    counted: bool


@dataclass(slots=True)
class _Pending:
    """A watermark that waits for its proof: what had been sent by then, by queue, and what was sent around it."""

    anchor: Anchor
    seen_ms: int
    sent: int
    counts: tuple[int, int]
    totals: tuple[int, int]
    before_ms: int
    after_ms: int | None = None


class Progress:
    """Where a client is: the anchor, and what was sent of the entries behind it."""

    __slots__ = ("_before_ms", "_counts", "_digests", "_named", "_pending", "_sent", "_totals", "_unnamed",
                 "anchor", "passed")  # fmt: skip

    def __init__(self, anchor: Anchor | None, cursor: Cursor | None = None, now_ms: int = 0) -> None:
        self.anchor = anchor
        # What was sent from behind the anchor and is named, oldest first. Side by side, and the names as one text,
        # because they are told with every event.
        self._digests = ""
        self._named: deque[_Sent] = deque(maxlen=MAX_DIGESTS)
        # And what is not named, by queue: how many and their sum, and whether it is unknown which.
        self._unnamed: list[Unnamed | None] = [NONE, NONE]
        # All that was ever sent live, by queue, to know what was sent between two moments.
        self._sent = 0
        self._counts = [0, 0]
        self._totals = [0, 0]
        self._before_ms = 0
        self._pending: deque[_Pending] = deque(maxlen=MAX_WATERMARKS)
        self.passed: deque[str] = deque(maxlen=MAX_DIGESTS)
        """What was sent from the log, up to the anchor: a publisher's retry may stand behind it once more."""
        if cursor is not None:
            # The queues that brought these are not known, and need not be: they are only ever met by name.
            for digest in cursor.digests[-MAX_DIGESTS:]:
                self._digests += digest
                self._named.append(_Sent(now_ms, False, 0, False))
            self._unnamed = list(cursor.unnamed)
            self.passed.extend(cursor.passed)

    def copy(self) -> Progress:
        progress = Progress(self.anchor)
        progress._digests = self._digests
        progress._named.extend(self._named)
        progress._unnamed = self._unnamed.copy()
        progress._sent = self._sent
        progress._counts = self._counts.copy()
        progress._totals = self._totals.copy()
        progress._before_ms = self._before_ms
        progress._pending.extend(replace(each) for each in self._pending)
        progress.passed.extend(self.passed)
        return progress

    def move(self, item: Item) -> None:
        """Past an item of the backlog."""
        if isinstance(item, Live):
            self._send(item)
        elif isinstance(item, Entry):
            # Everything up to here has been sent. What was sent live from further behind stays as it is.
            self.anchor = Anchor(item.offset, item.check)
            self.passed.append(item.event.digest)
        elif isinstance(item, Passed):
            self._pass(item)
        elif isinstance(item, Watermark):
            self._pending.append(
                _Pending(
                    item.anchor,
                    item.seen_ms,
                    self._sent,
                    (self._counts[0], self._counts[1]),
                    (self._totals[0], self._totals[1]),
                    self._before_ms,
                )
            )
        elif isinstance(item, Proof):
            self._adopt(item.anchor)
        elif isinstance(item, Forget):
            self._unnamed[item.shared] = NONE
        elif isinstance(item, Reset):
            self.anchor = item.anchor
            self._digests = ""
            self._named.clear()
            self._unnamed = [NONE, NONE]
            self._pending.clear()
            self.passed.clear()

    def _send(self, item: Live) -> None:
        event, received_ms, shared = item
        if len(self._named) == MAX_DIGESTS:
            oldest = self._named[0]
            self._digests = self._digests[DIGEST_CHARS:]
            unnamed = self._unnamed[oldest.shared]
            if oldest.counted and unnamed is not None:
                total = (unnamed.total + oldest.value) & VALUE_MASK
                self._unnamed[oldest.shared] = Unnamed(unnamed.count + 1, total)
        self._digests += event.digest
        self._named.append(_Sent(received_ms, shared, event.value, True))
        self._sent += 1
        self._counts[shared] += 1
        self._totals[shared] = (self._totals[shared] + event.value) & VALUE_MASK
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
        self.passed.append(digest)

    def _adopt(self, anchor: Anchor) -> None:
        if all(each.anchor != anchor for each in self._pending):
            return
        while (since := self._pending.popleft()).anchor != anchor:
            pass  # An older one is of no use any more.
        count = self._sent - since.sent
        is_near = since.seen_ms - since.before_ms < NEAR_MS or (
            since.after_ms is not None and since.after_ms - since.seen_ms < NEAR_MS
        )
        # What is named is known for certain. Of the others it is known only how many there were after the watermark.
        if is_near and count > MAX_DIGESTS and self.sent_behind < MANY_BEHIND:
            return
        self.anchor = anchor
        self.passed.clear()
        since_ms = since.seen_ms - OVERLAP_MS
        named = list(zip(split(self._digests), self._named, strict=True))
        first = len(named) - count
        kept = [
            (digest, each._replace(counted=each.counted and at >= first))
            for at, (digest, each) in enumerate(named)
            if at >= first or each.received_ms >= since_ms
        ]
        self._digests = "".join([digest for digest, _ in kept])
        self._named.clear()
        self._named.extend([each for _, each in kept])
        for shared in (False, True):
            of_queue = [each for _, each in kept if each.shared is shared and each.counted]
            left = self._counts[shared] - since.counts[shared] - len(of_queue)
            total = self._totals[shared] - since.totals[shared] - sum(each.value for each in of_queue)
            self._unnamed[shared] = Unnamed(left, total & VALUE_MASK)

    def _passed(self) -> tuple[str, ...]:
        # Those that were sent from behind the anchor are needed; of the others as many as there is room for.
        room = MAX_DIGESTS - len(self._named)
        return tuple(self.passed)[-room:] if room else ()

    @property
    def sent_behind(self) -> int:
        """Events that were sent behind the anchor, as far as they are known."""
        return len(self._named) + sum(each.count for each in self._unnamed if each is not None)

    def cursor(self, now_ms: int) -> Cursor:
        if self.anchor is None:
            return Cursor(None, time_ms=now_ms)
        return Cursor(self.anchor, split(self._digests), (self._unnamed[0], self._unnamed[1]), self._passed())

    def text(self, now_ms: int) -> str:
        """Of the cursor."""
        if self.anchor is None:
            return str(self.cursor(now_ms))
        own, shared = self._unnamed
        return encode(
            self.anchor,
            self._digests,
            "" if own is NONE else encode_unnamed(own),
            "" if shared is NONE else encode_unnamed(shared),
            self._passed() if self.passed else (),
        )
