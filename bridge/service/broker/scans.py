"""Decides which part of the log is read next, for which streams, and which user pays.

Pure: no clock and no I/O. `bridge.service.broker.eventlog` does the reading.

A *want* is a range of the log that one stream has to read. A *scan* is one read of the log for many wants. Reading
costs RabbitMQ and the event loop time, so it is shared fairly:

- Wants with the same entries ahead of them share a scan, whether they are of one user or of several.
- A scan is bounded. When it has cost `SCAN_COST` and other wants wait, it ends, and its wants go back into the queue.
- The least served user is next. Short reads and long reads have separate queues (lanes).
- Each user has a budget. A user with an empty budget waits, but may share the scans of others.

Worked example: an attacker's streams are 1,000,000 entries behind, an innocent one 60,000. One scan costs 20,000.

    scan 1  attacker, from 0        charged 20,000; the innocent stream's want arrives meanwhile
    scan 2  innocent, from 940,000  charged 20,000; both are served alike, within `SCAN_COST`
    scan 3  attacker, from 20,000   the one of the two that is further behind
    scan 4  innocent, from 960,000  and so on: each has half of the reading
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from bridge.service.budgets import Budgets

NEAR_ENTRIES = 20_000
"""A want with fewer entries to read is near: one or two seconds. Near wants never wait for far ones."""

SCAN_COST = 20_000
"""A scan ends after about this cost if others wait; RabbitMQ delivers 12,000 to 14,000 small entries a second."""

BYTES_OF_ONE = 1_024
"""An entry costs 1, and 1 more for each of this many bytes."""

OPEN_COST = 1_000
"""Cost of a scan besides its entries. When it ends, this many entries are on their way, by the prefetch."""

FAR_SCANS = 1
NEAR_SCANS = 2
"""Scans at once in each lane. One user has at most one of them."""

JOIN_ENTRIES = 1_000
"""A want joins a running scan that is this close before its start: about a tenth of a second."""

MOST_PASSED_OVER = 8
"""A user, or a want, that was passed over this often is next, whatever other wants arrive."""

MOST_SCANS_OWED = 3
"""A user may owe this many scans. What is read along with others beyond that is not charged, so that no user is left
out for long."""

REFILL_SECONDS = 600.0
"""A user's budget is full again after this long."""

USERS_KEPT = 20_000

WINDOW_SECONDS = 10.0
"""Batch window: far wants wait up to this long for clients that will soon ask too. While thousands return, RabbitMQ is
busy, and one scan for all ends sooner than the second of two."""

LONGEST_WINDOW_SECONDS = 15.0
"""The window grows to this if all expected clients should arrive by then. Both times count from the stream's opening.
A stream is ready once a scan has found its position, and ends as `busy` if it is not ready after twenty seconds."""

WINDOW_LOOK_SECONDS = 0.1
"""Pause between two checks of a window. Its end depends on how fast streams arrive."""

WINDOW_SECONDS_PER_USER = 0.1
"""The window is never longer than this for each waiting or expected user. So a hundred users may cause a window of ten
seconds, and a single user that always returns lets no other client wait."""


def cost(body_bytes: int) -> int:
    """The cost of reading an entry."""
    return 1 + body_bytes // BYTES_OF_ONE


def is_worth_waiting(waited: float, here: int, expected: int) -> bool:
    """Whether far wants wait for more clients, or the log is read for the waiting ones now.

    Args:
        waited: how long the first want has waited, in seconds.
        here: users that wait; at least one.
        expected: users that are expected.
    """
    if not expected or waited >= WINDOW_SECONDS_PER_USER * (here + expected):
        return False
    left = expected * waited / here  # If they arrive as fast as the others did.
    return waited < WINDOW_SECONDS or waited + left < LONGEST_WINDOW_SECONDS


class Want:
    """A range of the log that a stream has to read, up to and with `until`.

    Args:
        user: the user that pays.
        since: when the client began to wait, in seconds.
        extends: it continues a read that was paid for, with the events published since then. It needs no budget:
            otherwise, with a budget that refills more slowly than the log grows, a client would never catch up.
        free: it costs nothing, because other wants read the same entries at this moment.
        returns: its client has just returned, and others may return too.
    """

    __slots__ = (
        "extends",
        "free",
        "is_far",
        "next",
        "passed_over",
        "queued_at",
        "returns",
        "since",
        "until",
        "user",
    )

    def __init__(
        self,
        user: str,
        first: int,
        until: int,
        *,
        since: float = 0.0,
        extends: bool = False,
        free: bool = False,
        returns: bool = False,
    ) -> None:
        self.user = user
        self.next = first
        """The first entry that has not been read for it."""
        self.until = until
        self.since = since
        self.extends = extends
        self.free = free
        self.returns = returns
        self.is_far = False
        self.passed_over = 0
        self.queued_at: float | None = None
        """When it was first queued."""


class _Seat:
    """One user's share of a scan."""

    __slots__ = ("paid", "pays", "wants")

    def __init__(self, paid: float) -> None:
        self.wants = 0
        self.paid = paid
        self.pays = False


class Scan:
    """One read of the log: from `start` on, entry by entry."""

    def __init__(self, wants: Iterable[Want], start: int, *, is_far: bool = False, sponsor: str | None = None) -> None:
        self.start = self.position = start
        """`position` is the next entry."""
        self.is_far = is_far
        self.sponsor = sponsor
        self.spent = 0
        """Cost since the scan began, or since it was last allowed to go on."""
        self._pending = sorted(wants, key=lambda want: -want.next)
        self._reading: dict[Want, None] = {}
        self._by_until: list[tuple[int, int, Want]] = []
        self._seats: dict[str, _Seat] = {}
        self._share = 0.0
        """What a user pays whose wants were read from the beginning."""
        self._toll = float(OPEN_COST)
        self._bills: list[tuple[str, float, bool]] = []

    @property
    def wants(self) -> list[Want]:
        """The wants that have not reached their end."""
        return [*self._pending, *self._reading]

    @property
    def is_done(self) -> bool:
        return not self._pending and not self._reading

    def join(self, want: Want) -> None:
        assert want.next >= self.position, "its first entries have gone by"
        bisect.insort(self._pending, want, key=lambda each: -each.next)

    def carry(self, want: Want) -> None:
        """Before the scan begins: adds a free want, which may begin a little before the scan's start."""
        assert want.free, "others are chosen"
        self.start = self.position = min(self.start, want.next)
        self._pending.append(want)
        self._pending.sort(key=lambda each: -each.next)

    def reach(self, offset: int, entry_cost: int) -> Sequence[Want]:
        """The entry at `offset` has arrived. Returns the wants whose read begins with it.

        `want.next` is below `offset` if the log no longer has the entries that the want begins with.
        """
        self.position = offset + 1
        begun: Sequence[Want] = ()
        if self._pending and self._pending[-1].next <= offset:
            begun = []
            while self._pending and self._pending[-1].next <= offset:
                begun.append(self._begin(self._pending.pop()))
        self.spent += entry_cost
        if self._seats:
            self._share += (entry_cost + self._toll) / len(self._seats)
            self._toll = 0.0
        return begun

    def _begin(self, want: Want) -> Want:
        self._reading[want] = None
        bisect.insort(self._by_until, (want.until, id(want), want))
        if not want.free:
            seat = self._seats.setdefault(want.user, _Seat(self._share))
            seat.wants += 1
            seat.pays |= not want.extends
        return want

    def ended(self, offset: int) -> list[Want]:
        """Removes and returns the wants that end with this entry."""
        found = []
        while self._by_until and self._by_until[0][0] <= offset:
            want = self._by_until.pop(0)[2]
            if want in self._reading:
                self.leave(want)
                found.append(want)
        return found

    def leave(self, want: Want) -> None:
        """Removes a want, if it is still there."""
        if want in self._reading:
            del self._reading[want]
            if not want.free:
                seat = self._seats[want.user]
                seat.wants -= 1
                if not seat.wants:
                    self._bill(want.user, seat)
                    del self._seats[want.user]
        elif want in self._pending:
            self._pending.remove(want)

    def _bill(self, user: str, seat: _Seat) -> None:
        if self._share > seat.paid:
            self._bills.append((user, self._share - seat.paid, seat.pays))
            seat.paid = self._share

    def bills(self) -> list[tuple[str, float, bool]]:
        """By user, the cost of what was read since the last call, and whether the budget pays it."""
        for user, seat in self._seats.items():
            self._bill(user, seat)
        bills, self._bills = self._bills, []
        return bills

    def go_on(self) -> None:
        self.spent = 0

    @property
    def is_over(self) -> bool:
        return self.spent >= SCAN_COST


class _Lane:
    """The waiting wants and the running scans of one kind: near or far."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: dict[Want, None] = {}
        self.scans: dict[Scan, None] = {}
        self.users: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()

    def add(self, want: Want) -> None:
        self.waiting[want] = None
        self.users[want.user] += 1

    def remove(self, want: Want) -> None:
        del self.waiting[want]
        self.users[want.user] -= 1
        if not self.users[want.user]:
            del self.users[want.user]
            del self.passed_over[want.user]


class Schedule:
    """
    Args:
        entries_per_user: the budget of each user, in cost; it is full again after `REFILL_SECONDS`.
    """

    def __init__(self, entries_per_user: int) -> None:
        self._budgets = Budgets(entries_per_user, REFILL_SECONDS / entries_per_user, most=USERS_KEPT)
        self._served: OrderedDict[str, float] = OrderedDict()
        """What each user was charged. A user that is not in it begins at `_floor`."""
        self._floor = 0.0
        self._far = _Lane(FAR_SCANS)
        self._near = _Lane(NEAR_SCANS)
        self._window_from: float | None = None
        """Start of the batch window: when the first client returned after the last far scan began."""
        self.without_budget: set[str] = set()
        """Users whose wants waited for budget when the schedule last chose."""

    @property
    def waiting(self) -> int:
        return len(self._far.waiting) + len(self._near.waiting)

    def waiting_for_budget(self, now: float) -> int:
        return sum(not self._may_read(want, now) for lane in (self._far, self._near) for want in lane.waiting)

    def add(self, want: Want, now: float) -> Scan | None:
        """Queues a want. Returns the scan that it has joined instead, if one is close before its start."""
        is_new = want.queued_at is None
        if is_new:
            want.queued_at = now
        for lane in (self._far, self._near):
            for scan in lane.scans:
                if scan.position <= want.next <= scan.position + JOIN_ENTRIES and not scan.is_over:
                    scan.join(want)
                    return scan
        want.is_far = want.until - want.next >= NEAR_ENTRIES
        self._lane(want).add(want)
        if want.is_far and is_new and want.returns and self._window_from is None:
            self._window_from = want.since
        return None

    def discard(self, want: Want) -> None:
        """Removes a want from the queue, if it is there."""
        lane = self._lane(want)
        if want in lane.waiting:
            lane.remove(want)
            if not self._far.waiting:
                self._window_from = None

    def _lane(self, want: Want) -> _Lane:
        return self._far if want.is_far else self._near

    def choose(self, now: float, *, expected: int = 0) -> Scan | None:
        """The scan that begins now, if one does. Its wants are no longer in the queue.

        Args:
            expected: users that will soon ask to read.
        """
        self.without_budget = set()
        far = self._far
        if len(far.scans) < far.slots and far.waiting and not self._window_is_open(now, expected):
            scan = self._choose(far, now)
            if scan is not None:
                self._window_from = None
                return scan
        near = self._near
        return self._choose(near, now) if len(near.scans) < near.slots and near.waiting else None

    def _window_is_open(self, now: float, expected: int) -> bool:
        if self._window_from is None:
            return False
        return is_worth_waiting(now - self._window_from, len(self._far.users), expected)

    def _choose(self, lane: _Lane, now: float) -> Scan | None:
        reading = {scan.sponsor for scan in lane.scans}
        able = [want for want in lane.waiting if want.user not in reading and self._may_read(want, now)]
        if not able:
            return None
        first = self._first(lane, able)
        last = first.next + SCAN_COST
        chosen = [want for want in lane.waiting if first.next <= want.next < last]
        for want in chosen:
            lane.remove(want)
        served = {want.user for want in chosen}
        for user in served:
            lane.passed_over.pop(user, None)
        for user in {want.user for want in able} - served:
            lane.passed_over[user] += 1
        for want in able:
            want.passed_over += 1
        for want in chosen:
            want.passed_over = 0
        scan = Scan(chosen, first.next, is_far=lane is self._far, sponsor=first.user)
        lane.scans[scan] = None
        return scan

    def _first(self, lane: _Lane, able: list[Want]) -> Want:
        """Of the users whose turn it is, the want that is furthest behind."""
        served = {want.user: max(self._floor, self._served.get(want.user, 0.0)) for want in able}
        self._floor = least = min(served.values())
        longest = max(served, key=lambda user: lane.passed_over[user])
        if lane.passed_over[longest] >= MOST_PASSED_OVER:
            turn = {longest}
        else:
            # Users that were served about alike count as equal, so that thousands that return read together.
            turn = {user for user, amount in served.items() if amount <= least + SCAN_COST}
        wants = [want for want in able if want.user in turn]
        first = max(wants, key=lambda want: want.passed_over)
        return first if first.passed_over >= MOST_PASSED_OVER else min(wants, key=lambda want: want.next)

    def _may_read(self, want: Want, now: float) -> bool:
        if want.extends or self._budgets.left(want.user, now) > 0:
            return True
        self.without_budget.add(want.user)
        return False

    def may_go_on(self, scan: Scan, now: float, *, expected: int = 0) -> bool:
        """Whether a scan at its cost limit goes on, because no other want waits for its slot."""
        self._charge(scan, now)
        lane = self._far if scan.is_far else self._near
        window_is_open = scan.is_far and self._window_is_open(now, expected)
        if not window_is_open and any(self._may_read(want, now) for want in lane.waiting):
            return False
        if not any(self._may_read(want, now) for want in scan.wants):
            return False
        scan.go_on()
        return True

    def end(self, scan: Scan, now: float) -> None:
        """A scan has ended or was interrupted. The caller adds its remaining wants again."""
        self._charge(scan, now)
        (self._far if scan.is_far else self._near).scans.pop(scan, None)

    def _charge(self, scan: Scan, now: float) -> None:
        bills = scan.bills()
        for user, amount, pays in bills:
            self._served[user] = max(self._floor, self._served.get(user, 0.0)) + amount
            self._served.move_to_end(user)
            if pays:
                self._budgets.spend(user, amount, now, debt=MOST_SCANS_OWED * SCAN_COST)
        # One more than were added, so that the table keeps its bound however many users share a scan.
        for _ in range(len(bills) + 1):
            if self._served:
                oldest = next(iter(self._served))
                if self._served[oldest] <= self._floor or len(self._served) > USERS_KEPT:
                    del self._served[oldest]

    def seconds_until_change(self, now: float) -> float | None:
        """Seconds until a want may be read that may not be read now, if nothing else happens; None if there is none."""
        waits = [
            self._budgets.seconds_until(user, 1.0, now)
            for lane in (self._far, self._near)
            if len(lane.scans) < lane.slots
            for user in lane.users
            if self._budgets.left(user, now) <= 0
        ]
        if self._window_from is not None and len(self._far.scans) < self._far.slots:
            waits.append(WINDOW_LOOK_SECONDS)
        return min(waits, default=None)
