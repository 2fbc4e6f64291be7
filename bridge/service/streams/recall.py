"""Finds the entries of the log that a client was sent after its position, from the count and the sum in its cursor.

Pure.
"""

from __future__ import annotations

from bridge.service.streams.cursor import VALUE_MASK, BySource
from bridge.service.streams.progress import MANY_BEHIND, Entry

RECALL_EVENTS = 2 * MANY_BEHIND
RECALL_BYTES = 4_194_304
"""Most entries, and bytes, that are kept back for a client until the bridge knows which of them were sent. A client
that was sent more after its position is sent all of them again, except the named ones."""

MAX_UNSENT = 2
"""How many unsent entries among the sent ones a cursor's sum can identify."""


class Recall:
    """Finds the unnamed events of a cursor in the log.

    Each queue delivers in the log's order, except events of several publishers at the very end, and these are named. So
    the first unnamed entries of a queue, as many as the cursor counts, were sent if their sum is the cursor's.

    One or two entries among them may not have been sent. Then the sum of one or two entries more is too large by
    exactly those. Example: the cursor has count 3 and sum 60, and the log has the values 10, 20, 5, 30. The first three
    have the sum 35. All four have 65, which is 5 too large, and one entry has the value 5: it was not sent.

    In every other case the bridge treats none as sent. A publisher's retry is in the log twice and counts once.
    """

    __slots__ = ("_keys", "_owed", "_sums", "_unsent", "_values", "entries", "is_sent", "size")

    def __init__(self, unnamed: BySource) -> None:
        known = [each if each is not None and each.count <= RECALL_EVENTS else None for each in unnamed]
        self._owed = known
        self._keys: set[bytes] = set()
        self._sums = [0, 0]
        self._values: tuple[dict[int, None], dict[int, None]] = ({}, {})
        self._unsent: tuple[set[int], set[int]] = (set(), set())
        self.is_sent: list[bool | None] = [
            False if each is None else True if not each.count else None for each in known
        ]
        """By queue: whether the bridge knows which of its entries were sent; None while it does not know yet."""
        self.entries: list[Entry] = []
        """Entries that wait until that is known, in the log's order."""
        self.size = 0

    @property
    def is_over(self) -> bool:
        return None not in self.is_sent

    def see(self, entry: Entry, *, named: bool) -> None:
        """Takes the next entry. A named entry is known to have been sent."""
        self.entries.append(entry)
        self.size += len(entry.event.named)
        shared, event = entry.shared, entry.event
        owed, values = self._owed[shared], self._values[shared]
        if named or event.key in self._keys or self.is_sent[shared] is not None or owed is None:
            return
        self._keys.add(event.key)
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
        """Ends the search: where nothing is known by now, no entry counts as sent."""
        self.is_sent = [bool(each) for each in self.is_sent]

    def was_sent(self, entry: Entry) -> bool:
        value = entry.event.value
        return (
            bool(self.is_sent[entry.shared])
            and value in self._values[entry.shared]
            and value not in self._unsent[entry.shared]
        )


def _parts(total: int, values: dict[int, None], count: int) -> tuple[int, ...] | None:
    """`count` of the values (0, 1 or 2) whose sum is the total; None if there are no such values."""
    if count == 0:
        return () if total == 0 else None
    if count == 1:
        return (total,) if total in values else None
    for value in values:
        other = (total - value) & VALUE_MASK
        if other != value and other in values:
            return value, other
    return None
