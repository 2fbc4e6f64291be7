"""The choice of the next scan of the log: one rule a test. The property tests are in tests/property/test_scans.py."""

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
    """Reads these entries, and returns the wants that ended."""
    ended = []
    for offset in range(first, until + 1):
        scan.reach(offset, 1)
        ended += scan.ended(offset)
    return ended


def test_a_large_body_costs_more() -> None:
    assert [cost(size) for size in (0, 1023, 1024, 2048)] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("waited", "here", "expected", "waits"),
    [
        (0.0, 1, 0, False),  # No other client is expected.
        (1.0, 50, 50, True),
        (10.0, 50, 50, False),  # The window is 0.1 s for each of the hundred.
        (0.1, 1, 1, True),
        (0.2, 1, 1, False),
        (10.0, 900, 100, True),  # At the rate so far, the last hundred arrive within 1.5 s.
        (10.0, 100, 900, False),
        (16.0, 900, 100, False),
        (9.9, 1, 9_999, True),
        (10.0, 2_000, 999, True),
        (10.0, 2_000, 1_000, False),  # At this rate the last ones would not arrive before 15 s.
    ],
)
def test_a_batch_window_is_open_while_others_will_arrive(waited: float, here: int, expected: int, waits: bool) -> None:
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


def test_a_want_joins_a_scan_that_has_not_reached_its_first_entry() -> None:
    schedule = Schedule(100_000)
    schedule.add(want(until=1000), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    read(scan, 0, 10)
    behind, beside, ahead = want("a", 10), want("b", 11, 12), want("c", 12 + JOIN_ENTRIES, 13 + JOIN_ENTRIES)
    last = want("d", 11 + JOIN_ENTRIES, 13 + JOIN_ENTRIES)
    assert [schedule.add(each, 0.0) for each in (behind, beside, ahead, last)] == [None, scan, None, scan]
    assert schedule.waiting == 2
    schedule.discard(behind)
    schedule.discard(behind)
    assert schedule.waiting == 1


def test_the_cost_of_an_entry_is_shared_by_those_that_read_it() -> None:
    scan = Scan([want("1", 0, 3), want("2", 2, 3)], 0)
    read(scan, 0, 3)
    bills = {user: amount for user, amount, _ in scan.bills()}
    # The first user pays alone for the opening and two entries. Then both pay half.
    assert bills == {"1": scans.OPEN_COST + 2 + 1, "2": 1.0}
    assert scan.bills() == []


def test_a_user_has_one_share_until_its_last_want_has_ended() -> None:
    scan = Scan([want("1", 0, 1), want("1", 0, 3), want("2", 0, 9)], 0)
    assert [each.until for each in read(scan, 0, 3)] == [1, 3]
    assert not scan.is_done
    half = (scans.OPEN_COST + 4) / 2
    assert sorted(scan.bills()) == [("1", half, True), ("2", half, True)]
    assert scan.bills() == [], "nothing was read since"
    read(scan, 4, 9)
    assert scan.bills() == [("2", 6.0, True)]
    assert scan.is_done


def test_the_budget_does_not_pay_for_a_want_that_extends_another() -> None:
    scan = Scan([want("1", 0, 9, extends=True), want("2", 0, 9, extends=True), want("2", 0, 9)], 0)
    read(scan, 0, 0)
    assert {user: pays for user, _, pays in scan.bills()} == {"1": False, "2": True}


def test_a_want_that_costs_nothing_is_on_no_bill() -> None:
    free = want("3", 1, 2, free=True)
    scan = Scan([want("1", 2, 3)], 2)
    scan.carry(free)
    assert scan.start == 1
    read(scan, 1, 3)
    assert [user for user, _, _ in scan.bills()] == ["1"]


def test_a_want_that_leaves_pays_for_the_entries_that_it_has_read() -> None:
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


def charged(schedule: Schedule, user: str, amount: int) -> None:
    """Makes one scan for this user alone. It costs this amount, with its opening."""
    first = want(user, 0, FAR)
    schedule.add(first, 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    assert scan.wants == [first]
    scan.reach(0, amount - scans.OPEN_COST)
    scan.leave(first)
    schedule.end(scan, 0.0)


@pytest.mark.contract("2.46")
@pytest.mark.parametrize(("left", "may_read"), [(1, True), (0, False), (-1, False)])
def test_a_user_may_read_while_any_budget_is_left(left: int, may_read: bool) -> None:
    schedule = Schedule(5_000)
    charged(schedule, "42", 5_000 - left)
    schedule.add(want(), 0.0)
    pause = schedule.seconds_until_change(0.0)
    assert pause == (None if may_read else pytest.approx((1 - left) * scans.REFILL_SECONDS / 5_000))
    assert (schedule.choose(0.0) is not None) is may_read


def test_a_user_owes_three_scans_at_most() -> None:
    schedule = Schedule(600_000)  # It refills by one in a millisecond.
    charged(schedule, "42", 10_000_000)
    schedule.add(want(), 0.0)
    assert schedule.seconds_until_change(0.0) == pytest.approx((3 * SCAN_COST + 1) / 1000, rel=1e-9)


def test_a_user_without_budget_is_forgotten_with_its_last_want() -> None:
    schedule = Schedule(100)
    charged(schedule, "42", 5_000)
    wants = [want(), want()]
    for each in wants:
        schedule.add(each, 0.0)
    schedule.discard(wants[0])
    assert schedule.seconds_until_change(0.0) is not None
    schedule.discard(wants[1])
    assert schedule.seconds_until_change(0.0) is None


@pytest.mark.contract("2.51")
def test_a_want_that_extends_a_paid_read_needs_no_budget() -> None:
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


def test_a_batch_window_counts_from_when_its_first_client_began_to_wait() -> None:
    schedule = Schedule(1_000_000)
    schedule.add(Want("1", 0, FAR, since=100.0, returns=True), 100.2)
    assert schedule.choose(109.0, expected=99) is None
    assert schedule.choose(110.0, expected=99) is not None


def test_only_far_wants_of_returning_clients_open_a_batch_window() -> None:
    for alone in (want("1", 0, FAR), want("1", 0, 10, returns=True)):
        schedule = Schedule(1_000_000)
        schedule.add(alone, 0.0)
        assert schedule.choose(0.0, expected=99) is not None


def test_a_batch_window_closes_with_its_last_want() -> None:
    schedule = Schedule(1_000_000)
    wants = [want("1", 0, FAR, returns=True), want("2", 0, FAR, returns=True)]
    for each in wants:
        schedule.add(each, 0.0)
    schedule.discard(wants[0])
    assert schedule.choose(0.0, expected=99) is None
    schedule.discard(wants[1])
    schedule.add(want("3", 0, FAR), 0.0)
    assert schedule.choose(0.0, expected=99) is not None


def test_a_want_keeps_the_time_when_it_was_first_queued() -> None:
    schedule, first = Schedule(1_000_000), want()
    schedule.add(first, 5.0)
    schedule.discard(first)
    schedule.add(first, 9.0)
    assert first.queued_at == 5.0


@pytest.mark.parametrize(
    ("first", "until", "is_far"),
    [(10**6, 10**6 + NEAR_ENTRIES - 1, False), (10**6, 10**6 + NEAR_ENTRIES, True), (10**6, 10**6 + 10, False)],
)
def test_a_want_is_far_by_the_number_of_its_entries(first: int, until: int, is_far: bool) -> None:
    schedule = Schedule(1_000_000)
    schedule.add(want("1", first, until), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    assert scan.is_far is is_far


@pytest.mark.parametrize(("length", "at_once"), [(10, 2), (FAR, 1)])
def test_few_scans_run_at_once(length: int, at_once: int) -> None:
    schedule = Schedule(1_000_000)
    for number in range(at_once + 1):
        first = number * 10 * SCAN_COST
        schedule.add(want(f"user {number}", first, first + length, returns=True), 0.0)
        scan = schedule.choose(0.0)
        assert (scan is not None) == (number < at_once)
    assert schedule.waiting == 1
    assert schedule.seconds_until_change(0.0) is None, "it waits for the end of a scan"


def test_nothing_changes_for_a_user_without_budget_while_all_scans_run() -> None:
    schedule = Schedule(100)
    charged(schedule, "poor", 5_000)
    schedule.add(want("other", 0, FAR), 0.0)
    assert schedule.choose(0.0) is not None
    schedule.add(want("poor", 5 * SCAN_COST, FAR), 0.0)
    assert schedule.seconds_until_change(0.0) is None


def test_a_scan_has_the_wants_that_begin_within_its_cost() -> None:
    schedule = Schedule(1_000_000)
    for user, first in (("1", SCAN_COST), ("2", SCAN_COST - 1), ("3", 0)):
        schedule.add(want(user, first, first + FAR), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    assert (scan.start, {each.user for each in scan.wants}, schedule.waiting) == (0, {"2", "3"}, 1)


def next_start(schedule: Schedule) -> int:
    """Where the next scan begins. It ends at once, and its wants leave."""
    scan = schedule.choose(0.0)
    assert scan is not None
    schedule.end(scan, 0.0)
    return scan.start


def test_a_want_that_was_passed_over_eight_times_is_next() -> None:
    schedule, patient = Schedule(1_000_000), 50 * SCAN_COST
    first = want("1", patient, patient + FAR)
    schedule.add(first, 0.0)
    for _ in range(2):
        for _ in range(8):
            schedule.add(want("1", 0, FAR), 0.0)
            assert next_start(schedule) == 0, "the one that is furthest behind"
        behind = want("1", 0, FAR)
        schedule.add(behind, 0.0)
        assert next_start(schedule) == patient
        schedule.discard(behind)
        schedule.add(first, 0.0)


def test_a_user_who_was_passed_over_eight_times_is_next() -> None:
    schedule, new = Schedule(10**9), 50 * SCAN_COST
    charged(schedule, "often", 3 * SCAN_COST)
    for first in (0, 100 * SCAN_COST):
        schedule.add(want("often", first, first + FAR), 0.0)
    for turn in (0, 100 * SCAN_COST):
        for number in range(8):
            schedule.add(want(f"new {number}", new, new + FAR), 0.0)
            assert next_start(schedule) == new, "the user who was served least"
        last = want("new", new, new + FAR)
        schedule.add(last, 0.0)
        assert next_start(schedule) == turn
        schedule.discard(last)


@pytest.mark.parametrize(("more", "start"), [(0, 0), (1, 50 * SCAN_COST)])
def test_users_whose_service_differs_by_one_scan_count_as_equal(more: int, start: int) -> None:
    schedule = Schedule(10**9)
    charged(schedule, "often", SCAN_COST + more)
    schedule.add(want("new", 50 * SCAN_COST, 60 * SCAN_COST), 0.0)
    schedule.add(want("often", 0, FAR), 0.0)
    assert next_start(schedule) == start


def test_the_served_amount_is_kept_for_few_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "USERS_KEPT", 3)
    schedule = Schedule(10**9)
    for number in range(10):
        charged(schedule, f"user {number}", 5_000)
        schedule.add(want("idle", 50 * SCAN_COST, 60 * SCAN_COST), 0.0)
        next_start(schedule)
    assert list(schedule._served) == ["user 7", "user 8", "user 9"]


def test_after_one_scan_of_many_users_the_served_amount_of_few_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "USERS_KEPT", 3)
    schedule = Schedule(10**9)
    for number in range(10):
        schedule.add(want(f"user {number}"), 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    read(scan, 0, 10)
    schedule.end(scan, 0.0)
    assert len(schedule._served) == 3


def test_a_user_who_equals_a_new_one_is_not_kept() -> None:
    schedule = Schedule(10**9)
    charged(schedule, "42", 5_000)
    schedule.add(want(), 0.0)
    next_start(schedule)  # No user was served less, so "42" counts as a new user.
    assert not schedule._served


def test_a_scan_ends_after_its_cost_where_others_wait() -> None:
    schedule = Schedule(10_000_000)
    first = want("1", 0, 2 * SCAN_COST)
    schedule.add(first, 0.0)
    scan = schedule.choose(0.0)
    assert scan is not None
    for offset in (0, 2):
        scan.reach(offset, SCAN_COST - 1)
        assert not scan.is_over
        scan.reach(offset + 1, 1)
        assert scan.is_over
        assert schedule.may_go_on(scan, 0.0), "no other want waits"
    scan.reach(4, SCAN_COST)
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
