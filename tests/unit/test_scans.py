"""Which scan of the log is made next, one sentence at a time. The laws are in tests/property/test_scans.py."""

from __future__ import annotations

import pytest

from bridge.service.broker import scans
from bridge.service.broker.scans import (
    JOIN_ENTRIES,
    NEAR_ENTRIES,
    SCAN_COST,
    Scan,
    Schedule,
    Want,
    cost,
    is_worth_waiting,
)

FAR = 10 * NEAR_ENTRIES


def want(user: str = "42", first: int = 0, until: int = 10, **options: bool) -> Want:
    return Want(user, first, until, **options)


def read(scan: Scan, first: int, until: int) -> list[Want]:
    """Those that ended."""
    ended = []
    for offset in range(first, until + 1):
        scan.reach(offset, 1)
        ended += scan.ended(offset)
    return ended


def test_a_large_body_costs_more() -> None:
    assert cost(0) == 1
    assert cost(scans.BYTES_OF_ONE) == 2


@pytest.mark.parametrize(
    ("waited", "here", "expected", "waits"),
    [
        (0.0, 1, 0, False),  # Nobody else comes.
        (1.0, 50, 50, True),
        (10.0, 50, 50, False),  # A tenth of a second for each of the hundred.
        (0.1, 1, 1, True),
        (0.2, 1, 1, False),
        (10.0, 900, 100, True),  # The last hundred come within a second and a half, at the pace so far.
        (10.0, 100, 900, False),
        (16.0, 900, 100, False),
    ],
)
def test_a_window_is_open_while_others_will_come(waited: float, here: int, expected: int, waits: bool) -> None:
    assert is_worth_waiting(waited, here, expected) is waits


def test_one_scan_serves_all_whose_range_it_reads() -> None:
    schedule = Schedule(100_000)
    wants = [want("1", 0, 10), want("2", 5, 20), want("3", 8, 9)]
    for each in wants:
        assert schedule.add(each, 0.0) is None
    scan = schedule.choose(0.0)
    assert scan is not None
    assert (schedule.waiting, scan.start, scan.is_far) == (0, 0, False)
    assert read(scan, 0, 20) == [wants[2], wants[0], wants[1]]
    assert scan.is_done
    schedule.end(scan, 0.0)


def test_a_want_joins_a_scan_that_has_not_come_to_its_first_entry() -> None:
    schedule = Schedule(100_000)
    schedule.add(want(until=1000), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    read(scan, 0, 10)
    behind, beside, ahead = want("a", 5), want("b", 11, 12), want("c", 12 + JOIN_ENTRIES, 13 + JOIN_ENTRIES)
    assert [schedule.add(each, 0.0) for each in (behind, beside, ahead)] == [None, scan, None]
    assert schedule.waiting == 2
    schedule.discard(behind)
    schedule.discard(behind)
    assert schedule.waiting == 1


def test_the_cost_of_an_entry_is_shared_by_those_that_read_it() -> None:
    scan = Scan([want("1", 0, 3), want("2", 2, 3)], 0)
    read(scan, 0, 3)
    bills = {user: amount for user, amount, _ in scan.bills()}
    # Opening and the first two entries: the first user alone. Then half each.
    assert bills == {"1": scans.OPEN_COST + 2 + 1, "2": 1.0}
    assert scan.bills() == []


def test_a_want_that_costs_nothing_is_on_no_bill() -> None:
    free = want("3", 1, 2, free=True)
    scan = Scan([want("1", 2, 3)], 2)
    scan.carry(free)
    assert scan.start == 1
    read(scan, 1, 3)
    assert [user for user, _, _ in scan.bills()] == ["1"]


def test_one_that_leaves_pays_for_what_it_has_read() -> None:
    leaving, staying = want("1", 0, 9), want("2", 0, 9)
    scan = Scan([leaving, staying, want("3", 5, 9)], 0)
    read(scan, 0, 1)
    scan.leave(leaving)
    scan.leave(leaving)
    assert {user: amount for user, amount, _ in scan.bills()} == dict.fromkeys("12", (scans.OPEN_COST + 2) / 2)
    assert {each.user for each in scan.wants} == {"2", "3"}


@pytest.mark.contract("2.46")
def test_a_user_without_a_budget_waits_until_it_refills() -> None:
    schedule = Schedule(100)
    schedule.add(want(until=500), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    read(scan, 0, 500)
    schedule.end(scan, 0.0)
    schedule.add(want(), 0.0)
    assert schedule.choose(0.0) is None
    assert (schedule.without_budget, schedule.waiting_for_budget(0.0)) == ({"42"}, 1)
    pause = schedule.seconds_until_change(0.0)
    assert pause is not None
    assert schedule.choose(pause + 1e-6) is not None


@pytest.mark.contract("2.51")
def test_what_extends_a_read_that_was_paid_for_needs_no_budget() -> None:
    schedule = Schedule(1)
    schedule.add(want(until=50), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    read(scan, 0, 50)
    schedule.end(scan, 0.0)
    schedule.add(want(extends=True), 0.0)
    assert schedule.choose(0.0) is not None


def test_returning_clients_wait_for_others_that_are_expected() -> None:
    schedule = Schedule(1_000_000)
    schedule.add(Want("1", 0, FAR, since=0.0, returns=True), 0.0)
    assert schedule.choose(0.0, expected=99) is None
    assert schedule.seconds_until_change(0.0) == scans.WINDOW_LOOK_SECONDS
    schedule.add(Want("2", 5, FAR, since=1.0, returns=True), 1.0)
    scan = schedule.choose(1.0, expected=0)
    assert scan is not None
    assert (len(scan.wants), scan.is_far) == (2, True)
    assert schedule.seconds_until_change(1.0) is None


def test_a_scan_ends_after_its_cost_where_others_wait() -> None:
    schedule = Schedule(10_000_000)
    first = want("1", 0, 2 * SCAN_COST)
    schedule.add(first, 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    scan.reach(0, SCAN_COST)
    assert scan.is_over
    assert schedule.may_go_on(scan, 0.0), "nobody else wants to read"
    assert not scan.is_over
    scan.reach(1, SCAN_COST)
    schedule.add(want("2", 5 * SCAN_COST, 9 * SCAN_COST), 0.0)
    assert not schedule.may_go_on(scan, 0.0)


def test_a_scan_whose_users_have_no_budget_ends() -> None:
    schedule = Schedule(1)
    schedule.add(want("1", 0, 2 * SCAN_COST), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    scan.reach(0, SCAN_COST)
    assert not schedule.may_go_on(scan, 0.0)


def test_the_user_who_was_served_least_is_next() -> None:
    schedule = Schedule(10**9)
    schedule.add(want("often", 0, 10 * SCAN_COST), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    scan.reach(0, 3 * SCAN_COST)
    scan.leave(scan.wants[0])
    schedule.end(scan, 0.0)
    schedule.add(want("often", 0, 10 * SCAN_COST), 0.0)
    schedule.add(want("new", 50 * SCAN_COST, 60 * SCAN_COST), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    assert scan.sponsor == "new"
