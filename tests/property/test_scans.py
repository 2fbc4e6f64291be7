"""The schedule of scans, with random users, streams and times. The test itself reads the log, entry by entry.

What must hold in every run:

- Each read reaches its end, in order, without a hole and nothing twice.
- The entries that are read are charged to users, and no user reads more than the budget allows.
- No read waits for ever. Reads of the same range share one scan.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bridge.service.broker import scans
from bridge.service.broker.scans import Scan, Schedule, Want

# Small limits, so that Hypothesis reaches each of them.
NEAR = 20
SCAN = 10
JOIN = 3
OPEN = 2
BUDGET = 60
REFILL = 600.0
RATE = BUDGET / REFILL


@pytest.fixture(autouse=True, scope="module")
def small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scans, "NEAR_ENTRIES", NEAR)
        patch.setattr(scans, "SCAN_COST", SCAN)
        patch.setattr(scans, "JOIN_ENTRIES", JOIN)
        patch.setattr(scans, "OPEN_COST", OPEN)
        patch.setattr(scans, "REFILL_SECONDS", REFILL)
        yield


class Log:
    """Reads what the schedule chooses, and checks what must be true of every schedule."""

    def __init__(self, end: int = 100, budget: int = BUDGET) -> None:
        self.schedule = Schedule(budget)
        self.now = 0.0
        self.end = end
        self.open: dict[Want, None] = {}
        """Reads that have not reached their end and were not given up."""
        self.queued: set[Want] = set()
        self.running: dict[Scan, None] = {}
        self.done: list[Want] = []
        self.entries = 0
        self.reads: Counter[int] = Counter()
        self.scans = 0
        self.paid: Counter[str] = Counter()
        """What each user was charged, budget or not."""
        self.carried: list[set[str]] = []
        """For each scan, the users whose reads it began with."""

    def want(self, user: str, behind: int, *, extends: bool = False) -> Want:
        want = Want(user, self.end - behind, self.end, since=self.now, extends=extends)
        self.open[want] = None
        self.add(want)
        return want

    def add(self, want: Want) -> None:
        if self.schedule.add(want, self.now) is None:
            self.queued.add(want)

    def give_up(self, want: Want) -> None:
        del self.open[want]
        if want in self.queued:
            self.queued.remove(want)
            self.schedule.discard(want)
        for scan in self.running:
            scan.leave(want)

    def begin(self) -> Scan | None:
        scan = self.schedule.choose(self.now)
        if scan is not None:
            self.scans += 1
            self.running[scan] = None
            self.carried.append({want.user for want in scan.wants})
            for want in scan.wants:
                self.queued.remove(want)
        return scan

    def step(self, scan: Scan) -> bool:
        """Reads one entry. False when the scan has ended."""
        offset = scan.position
        if scan.is_done:
            self.finish(scan)
            return False
        assert offset <= self.end
        self.entries += 1
        self.reads[offset] += 1
        for want in scan.reach(offset, 1):
            assert want.next == offset, "nothing is skipped"
        for want in self.open:
            if want in scan._reading:
                assert want.next == offset, "in order, and once"
                want.next = offset + 1
        for want in scan.ended(offset):
            assert want.next == want.until + 1
            del self.open[want]
            self.done.append(want)
        if scan.is_done or (scan.is_over and not self.may_go_on(scan)):
            self.finish(scan)
            return False
        return True

    def may_go_on(self, scan: Scan) -> bool:
        self.record_bills(scan)
        return self.schedule.may_go_on(scan, self.now)

    def record_bills(self, scan: Scan) -> None:
        bills = scan.bills()
        for user, amount, _ in bills:
            self.paid[user] += amount  # type: ignore[assignment]
        scan._bills = bills

    def finish(self, scan: Scan) -> None:
        self.record_bills(scan)
        del self.running[scan]
        self.schedule.end(scan, self.now)
        for want in scan.wants:
            self.add(want)

    def read_all(self, limit: int = 100_000) -> None:
        """Reads until nothing is left to read. Time passes where a budget has to refill."""
        for _ in range(limit):
            while self.begin() is not None:
                pass
            if not self.running:
                if not self.open:
                    return
                pause = self.schedule.seconds_until_change(self.now)
                assert pause is not None, "a read waits, and nothing would ever change that"
                self.now += pause + 0.001
            for scan in list(self.running):
                self.step(scan)
        raise AssertionError(f"still waiting after {limit} steps: {len(self.open)}")


class World(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.charged_at: list[tuple[float, str, float]] = []

    users = st.sampled_from("abcd")

    @rule(user=users, behind=st.integers(0, 70), extends=st.booleans())
    def ask(self, user: str, behind: int, *, extends: bool) -> None:
        self.log.want(user, behind, extends=extends)

    @rule(count=st.integers(1, 15))
    def publish(self, count: int) -> None:
        self.log.end += count

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.log.now += seconds

    @precondition(lambda self: self.log.open)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.log.give_up(data.draw(st.sampled_from(list(self.log.open))))

    @rule()
    def begin(self) -> None:
        scan = self.log.begin()
        if scan is not None:
            assert scan.sponsor in {want.user for want in scan.wants}
            for other in self.log.running:
                assert other is scan or other.is_far is not scan.is_far or other.sponsor != scan.sponsor

    @precondition(lambda self: self.log.running)
    @rule(data=st.data(), steps=st.integers(1, 30))
    def read(self, data: st.DataObject, steps: int) -> None:
        scan = data.draw(st.sampled_from(list(self.log.running)))
        for _ in range(steps):
            if not self.log.step(scan):
                break

    @invariant()
    def each_lane_keeps_its_limit_of_scans(self) -> None:
        assert sum(scan.is_far for scan in self.log.running) <= scans.FAR_SCANS
        assert sum(not scan.is_far for scan in self.log.running) <= scans.NEAR_SCANS

    @invariant()
    def the_schedule_counts_the_waiting_reads(self) -> None:
        assert self.log.schedule.waiting == len(self.log.queued)

    def teardown(self) -> None:
        self.log.read_all()
        assert self.log.schedule.waiting == 0
        # Users were charged for the entries that were read and for the opening of scans, and for no more.
        assert sum(self.log.paid.values()) <= self.log.entries + OPEN * self.log.scans + 1e-6


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40)


@pytest.mark.contract("2.48")
@given(st.integers(1, 20), st.integers(0, 90))
def test_reads_of_the_same_range_cost_one_scan(count: int, behind: int) -> None:
    log = Log()
    for number in range(count):
        log.want("attacker" if number % 2 else f"user {number}", behind)
    log.read_all()
    assert set(log.reads.values()) == {1}


@given(st.integers(2, 20), st.integers(30, 50))
def test_streams_that_arrive_one_after_another_soon_share_a_scan(count: int, behind: int) -> None:
    """Streams of one user with the same old cursor. They arrive after the scan of the first one has begun."""
    log = Log()
    log.want("attacker", behind)
    scan = log.begin()
    assert scan is not None
    for _ in range(5):
        log.step(scan)
    for _ in range(count - 1):
        log.want("attacker", behind)
    log.read_all()
    assert log.entries <= behind + 1 + SCAN + 1, "the first scan, and then one for all"


@pytest.mark.contract("2.49")
@given(st.integers(1, 20), st.integers(20, 90), st.integers(20, 90))
def test_an_innocent_user_is_next_however_many_streams_another_has(count: int, behind: int, own: int) -> None:
    log = Log(budget=10_000)
    draw = random.Random(count)
    for _ in range(count):
        log.want("attacker", draw.randint(behind, 90))
    scan = log.begin()
    assert scan is not None
    log.step(scan)
    innocent = log.want("innocent", own)
    while log.step(scan):
        pass
    del log.carried[:]
    while innocent in log.open:
        while log.begin() is not None:
            pass
        for running in list(log.running):
            log.step(running)
        # From then on both get about as many scans: the attacker is never more than two ahead.
        with_it = sum("innocent" in users for users in log.carried)
        assert len(log.carried) - with_it <= with_it + 2


@pytest.mark.contract("2.49")
@given(st.integers(1, 19), st.integers(1, 20))
def test_short_reads_never_wait_for_long_ones(own: int, count: int) -> None:
    log = Log()
    for number in range(count):
        log.want("attacker", 90 - number)
        log.want(f"user {number}", 90 - number)
    long = log.begin()
    assert long is not None
    innocent = log.want("innocent", own)
    while innocent in log.open:
        scan = log.begin()
        if scan is not None:
            assert not scan.is_far
        for scan in list(log.running):
            if scan is not long:
                log.step(scan)


@pytest.mark.contract("2.46")
@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 90)), min_size=1, max_size=40))
def test_no_user_reads_more_than_the_budget_allows(wants: list[tuple[float, int]]) -> None:
    log = Log()
    for pause, behind in wants:
        log.now += pause
        log.want("attacker", behind)
        while log.begin() is not None:
            pass
        while log.running:
            for scan in list(log.running):
                log.step(scan)
            while log.begin() is not None:
                pass
        # In each of the two lanes, a scan that has begun may end. Its opening costs, too.
        most = BUDGET + RATE * log.now + 2 * (SCAN + OPEN + 1)
        assert log.entries + OPEN * log.scans <= most
    log.read_all()


@pytest.mark.contract("2.51")
def test_a_user_without_budget_waits_and_others_do_not() -> None:
    log = Log(end=200)
    greedy = log.want("attacker", 190)
    while log.begin() is not None or log.running:
        for scan in list(log.running):
            log.step(scan)
    assert greedy in log.open
    assert (log.schedule.waiting, log.schedule.waiting_for_budget(log.now)) == (1, 1)
    assert log.schedule.without_budget == {"attacker"}
    innocent = log.want("innocent", 30)
    while innocent in log.open:
        log.begin()
        for scan in list(log.running):
            log.step(scan)
    extends = log.want("attacker", 30, extends=True)
    while extends in log.open:
        log.begin()
        for scan in list(log.running):
            log.step(scan)
    assert greedy in log.open
    log.read_all()
    assert log.now >= (190 - BUDGET - 60 - SCAN) / RATE


def test_a_constant_flow_of_new_users_starves_no_other_user() -> None:
    log = Log(budget=10_000)
    log.want("first", 90)
    for _ in range(3):
        scan = log.begin()
        assert scan is not None
        while log.step(scan):
            pass
        log.want("first", 90)
    waiting = set(log.queued)
    for number in range(200):
        log.want(f"user {number}", 90)
        scan = log.begin()
        assert scan is not None
        while log.step(scan):
            pass
        if not waiting & set(log.open):
            return
    raise AssertionError("the waiting reads never got a scan")


@pytest.mark.parametrize(
    ("waited", "here", "expected", "worth"),
    [
        (0.0, 1, 0, False),
        (0.0, 1, 9_999, True),
        (0.19, 1, 1, True),
        (0.2, 1, 1, False),  # For one user the window stays open only for a moment.
        (4.9, 25, 25, True),
        (5.1, 25, 25, False),
        (scans.WINDOW_SECONDS - 0.1, 1, 9_999, True),
        (scans.WINDOW_SECONDS, 2_000, 1_000, False),  # At this rate all have arrived after 15 s.
        (scans.WINDOW_SECONDS, 2_000, 999, True),
        (scans.LONGEST_WINDOW_SECONDS - 0.1, 2_000, 1, True),
        (scans.LONGEST_WINDOW_SECONDS, 2_000, 1, False),
    ],
)
def test_a_window_is_kept_open_while_users_come(waited: float, here: int, expected: int, *, worth: bool) -> None:
    assert scans.is_worth_waiting(waited, here, expected) is worth


def returning(user: str, *, since: float, behind: int = 50) -> Want:
    return Want(user, 100 - behind, 100, since=since, returns=True)


def test_a_window_is_counted_from_when_its_first_read_began_to_wait() -> None:
    schedule = Schedule(BUDGET)
    schedule.add(returning("first", since=100.0), 101.0)
    schedule.add(returning("last", since=109.9), 110.0)
    assert schedule.choose(100.0 + scans.WINDOW_SECONDS - 0.1, expected=1_000) is None
    assert schedule.seconds_until_change(105.0) == scans.WINDOW_LOOK_SECONDS
    scan = schedule.choose(100.0 + scans.WINDOW_SECONDS, expected=1_000)
    assert scan is not None
    assert len(scan.wants) == 2


def test_a_client_that_reads_slowly_opens_and_closes_no_window() -> None:
    schedule = Schedule(BUDGET)
    schedule.add(Want("slow", 20, 100, since=0.0), 100.0)
    schedule.add(returning("other", since=100.0), 100.0)
    assert schedule.choose(100.1, expected=1_000) is None, "the other's window is open"


def test_a_scan_goes_on_while_others_wait_in_a_window() -> None:
    log = Log()
    log.want("reader", 90)
    scan = log.begin()
    assert scan is not None
    while not scan.is_over:
        scan.reach(scan.position, 1)
    log.schedule.add(returning("other", since=0.0), 0.0)
    assert log.schedule.may_go_on(scan, 0.0, expected=1_000)
    scan.spent = SCAN
    assert not log.schedule.may_go_on(scan, 0.0, expected=0)
