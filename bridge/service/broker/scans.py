"""Which part of the log is read next, for whom, and at whose cost.

Pure: no clock and no I/O. `bridge.service.broker.eventlog` reads what is decided here.

A *want* is a range of the log that one stream has to read. A *scan* is one reading of the log for many wants. Reading
is the broker's work and the loop's, so it is shared fairly:

- Wants with the same entries ahead of them share a scan, those of one user as those of several.
- A scan is bounded. When it has cost `SCAN_COST` and other wants wait, it ends, and its wants go back into the queue.
- The user who was served least is next. Short reads and long ones have queues (lanes) of their own.
- Each user has a budget. A user without one waits, but may share the scans of others.

Worked example: an attacker's streams are 1,000,000 entries behind, an innocent one 60,000. One scan costs 20,000.

    scan 1  attacker, from 0        charged 20,000; the innocent's want arrives meanwhile
    scan 2  innocent, from 940,000  charged 20,000; both are served alike, within `SCAN_COST`
    scan 3  attacker, from 20,000   of the two, the one that is further behind
    scan 4  innocent, from 960,000  and so on: each has half of the reading
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from bridge.service.budgets import Budgets

NEAR_ENTRIES = 20_000
"""A want that is less far behind is near: one or two seconds of reading. Near wants never wait for far ones."""

SCAN_COST = 20_000
"""A scan ends after about this cost if others wait; RabbitMQ delivers 12,000 to 14,000 small entries a second."""

BYTES_OF_ONE = 1_024
"""An entry costs one, and one more for each of these bytes."""

OPEN_COST = 1_000
"""What a scan costs besides its entries: as many are on their way, by the prefetch, when it ends."""

FAR_SCANS = 1
NEAR_SCANS = 2
"""Scans at once in each lane, of which one user has at most one."""

JOIN_ENTRIES = 1_000
"""A want joins a scan that runs and has so few entries left to its start: about a tenth of a second."""

MOST_PASSED_OVER = 8
"""A user, or a want of the chosen users, that was passed over so often is next, whatever others come."""

MOST_SCANS_OWED = 3
"""A user may owe so many scans: those that were begun in both lanes. What is read along with others beyond that is not
charged, so that nobody is left out for long."""

REFILL_SECONDS = 600.0
"""A user's budget is full again after this long."""

USERS_KEPT = 20_000

WINDOW_SECONDS = 10.0
"""Far wants wait up to this long for others that will soon ask, too. A scan costs the broker time, of which it has none
to spare while thousands return; one scan for all is over sooner than the second of two."""

LONGEST_WINDOW_SECONDS = 15.0
"""The window grows to this if all will be there by then. Both are counted from the stream's opening: a stream without
`bridge.ready` after twenty seconds is told `busy`, and ready comes once a scan has found the client's position."""

WINDOW_LOOK_SECONDS = 0.1
"""Pause between two looks at a window, whose end depends on how fast streams come."""

WINDOW_SECONDS_PER_USER = 0.1
"""The window is never longer than this for each user who waits or is expected. So a hundred users may make a window of
ten seconds, and one user who always returns makes nobody wait."""


def cost(body_bytes: int) -> int:
    """What it costs to read an entry."""
    return 1 + body_bytes // BYTES_OF_ONE


def is_worth_waiting(waited: float, here: int, expected: int) -> bool:
    """Whether far wants wait for more, or the log is read for those that are here.

    Args:
        waited: how long the first of them has waited, in seconds.
        here: how many users wait; at least one.
        expected: how many users are expected.
    """
    if not expected or waited >= WINDOW_SECONDS_PER_USER * (here + expected):
        return False
    left = expected * waited / here  # At the pace at which they have come so far.
    return waited < WINDOW_SECONDS or waited + left < LONGEST_WINDOW_SECONDS


class Want:
    """A range of the log that a stream has to read, up to and with `until`.

    Args:
        user: who pays.
        since: when the client began to wait, in seconds.
        extends: it follows a read that was paid for, with what has been published since then. It needs no budget:
            otherwise a budget that refills more slowly than the log grows would never let a client catch up.
        free: it reads nothing that others do not read at this moment.
        returns: its client has just come back, and others may, too.
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
        """The first entry that it has not read."""
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
    """A user on a scan."""

    __slots__ = ("paid", "pays", "wants")

    def __init__(self, paid: float) -> None:
        self.wants = 0
        self.paid = paid
        self.pays = False


class Scan:
    """One reading of the log: from `start` on, entry by entry."""

    def __init__(self, wants: Iterable[Want], start: int, *, is_far: bool = False, sponsor: str | None = None) -> None:
        self.start = self.position = start
        """`position` is the next entry."""
        self.is_far = is_far
        self.sponsor = sponsor
        self.spent = 0
        """Cost since the scan began, or was last allowed to go on."""
        self._pending = sorted(wants, key=lambda want: -want.next)
        self._reading: dict[Want, None] = {}
        self._by_until: list[tuple[int, int, Want]] = []
        self._seats: dict[str, _Seat] = {}
        self._share = 0.0
        """What a user who has been here from the beginning has to pay."""
        self._toll = float(OPEN_COST)
        self._bills: list[tuple[str, float, bool]] = []

    @property
    def wants(self) -> list[Want]:
        """Those that have not been read to their end."""
        return [*self._pending, *self._reading]

    @property
    def is_done(self) -> bool:
        return not self._pending and not self._reading

    def join(self, want: Want) -> None:
        assert want.next >= self.position, "its first entries have gone by"
        bisect.insort(self._pending, want, key=lambda each: -each.next)

    def carry(self, want: Want) -> None:
        """Before the scan begins: takes one that costs nothing along, also from a little before its start."""
        assert want.free, "others are chosen"
        self.start = self.position = min(self.start, want.next)
        self._pending.append(want)
        self._pending.sort(key=lambda each: -each.next)

    def reach(self, offset: int, entry_cost: int) -> Sequence[Want]:
        """The entry at `offset` has come. Returns the wants whose reading begins with it.

        `want.next` is below `offset` where the log no longer has what the want begins with.
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
        """The wants that end with this entry. They leave."""
        found = []
        while self._by_until and self._by_until[0][0] <= offset:
            want = self._by_until.pop(0)[2]
            if want in self._reading:
                self.leave(want)
                found.append(want)
        return found

    def leave(self, want: Want) -> None:
        """It reads no more; also one that has left already."""
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
        """What was read since the last call: for each user the cost, and whether it is to be paid from the budget."""
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
    """Wants that wait, and scans that run, of one kind."""

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
        """What each user was charged, on a scale on which a user who comes begins at `_floor`."""
        self._floor = 0.0
        self._far = _Lane(FAR_SCANS)
        self._near = _Lane(NEAR_SCANS)
        self._window_from: float | None = None
        """When the first client began to wait that returned after the last far scan began."""
        self.without_budget: set[str] = set()
        """Users whose wants were left waiting for that reason, when the schedule last chose."""

    @property
    def waiting(self) -> int:
        return len(self._far.waiting) + len(self._near.waiting)

    def waiting_for_budget(self, now: float) -> int:
        return sum(not self._may_read(want, now) for lane in (self._far, self._near) for want in lane.waiting)

    def add(self, want: Want, now: float) -> Scan | None:
        """Queues a want. Returns the scan that it has joined instead, if one is about to come to its start."""
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
        """Takes a want out of the queue, if it is there."""
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
            expected: users who will soon want to read.
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
        """Whose turn it is, and of those the want that is furthest behind."""
        served = {want.user: max(self._floor, self._served.get(want.user, 0.0)) for want in able}
        self._floor = least = min(served.values())
        longest = max(served, key=lambda user: lane.passed_over[user])
        if lane.passed_over[longest] >= MOST_PASSED_OVER:
            turn = {longest}
        else:
            # Users who were served about alike count as equal, so that thousands who return read together.
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
        """Whether a scan that is over goes on, because nobody else waits for its place."""
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
        """A scan is done, or was broken off. Wants that it still has are the caller's to add again."""
        self._charge(scan, now)
        (self._far if scan.is_far else self._near).scans.pop(scan, None)

    def _charge(self, scan: Scan, now: float) -> None:
        for user, amount, pays in scan.bills():
            self._served[user] = max(self._floor, self._served.get(user, 0.0)) + amount
            self._served.move_to_end(user)
            if pays:
                self._budgets.spend(user, amount, now, debt=MOST_SCANS_OWED * SCAN_COST)
        for _ in range(2):
            if self._served:
                oldest = next(iter(self._served))
                if self._served[oldest] <= self._floor or len(self._served) > USERS_KEPT:
                    del self._served[oldest]

    def seconds_until_change(self, now: float) -> float | None:
        """How long until a want may be read that may not now, if nothing else happens; None if there is none."""
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
