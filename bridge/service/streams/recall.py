"""Which entries of the log a client was sent behind its anchor, found from the count and the sum in its cursor.

Pure.
"""

from __future__ import annotations

from bridge.service.streams.cursor import VALUE_MASK, BySource
from bridge.service.streams.progress import MANY_BEHIND, Entry

RECALL_EVENTS = 2 * MANY_BEHIND
RECALL_BYTES = 4_194_304
"""Most entries, and bytes, that are kept back for a client while it is found out which of them it was sent. Of a client
that was sent more behind its anchor than this, all but the named ones are sent again."""

MAX_UNSENT = 2
"""Entries among those that were sent which a cursor's sum can show not to have been sent."""


class Recall:
    """Finds in the log what a cursor says was sent behind its anchor and does not name.

    Each queue alone is in the log's order, but for events of several publishers at the very end, which are named. So
    the first unnamed entries of a queue, as many as were sent, are the ones that were sent, if their sum is that of the
    cursor. With one or two entries among them that were not sent, the sum of one or two more is too large by just
    those. In every other case none is taken as sent. A publisher's retry is in the log twice, and counts once.
    """

    __slots__ = ("_ids", "_owed", "_sums", "_unsent", "_values", "entries", "is_sent", "size")

    def __init__(self, unnamed: BySource) -> None:
        known = [each if each is not None and each.count <= RECALL_EVENTS else None for each in unnamed]
        self._owed = known
        self._ids: set[str] = set()
        self._sums = [0, 0]
        self._values: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._unsent: tuple[set[int], set[int]] = (set(), set())
        self.is_sent: list[bool | None] = [
            False if each is None else True if not each.count else None for each in known
        ]
        """By queue: whether it is known which of its entries were sent; None while that is open."""
        self.entries: list[Entry] = []
        """Entries that wait for the answer, in the log's order."""
        self.size = 0

    @property
    def is_over(self) -> bool:
        return None not in self.is_sent

    def see(self, entry: Entry, *, named: bool) -> None:
        """The next entry. Those that are named are certain already."""
        self.entries.append(entry)
        self.size += len(entry.event.named)
        shared, event = entry.shared, entry.event
        owed, values = self._owed[shared], self._values[shared]
        if named or event.id in self._ids or self.is_sent[shared] is not None or owed is None:
            return
        self._ids.add(event.id)
        values[event.value] = None
        self._sums[shared] = (self._sums[shared] + event.value) & VALUE_MASK
        more = len(values) - owed.count
        if more < 0:
            return
        over = (self._sums[shared] - owed.total) & VALUE_MASK
        unsent = _parts(over, values, more)
        if unsent is not None:
            self._unsent[shared].update(unsent)
            self.is_sent[shared] = True
        elif more == MAX_UNSENT:
            self.is_sent[shared] = False

    def give_up(self) -> None:
        """What is not known by now is taken as not sent."""
        self.is_sent = [bool(each) for each in self.is_sent]

    def was_sent(self, entry: Entry) -> bool:
        value = entry.event.value
        return (
            bool(self.is_sent[entry.shared])
            and value in self._values[entry.shared]
            and value not in self._unsent[entry.shared]
        )


def _parts(total: int, values: dict[int, None], count: int) -> tuple[int, ...] | None:
    """So many of the values whose sum is the total, or None: none for 0, and at most two."""
    if count == 0:
        return () if total == 0 else None
    if count == 1:
        return (total,) if total in values else None
    for value in values:
        other = (total - value) & VALUE_MASK
        if other != value and other in values:
            return value, other
    return None
