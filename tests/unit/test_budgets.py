"""A budget limits how much is taken in a time. Many budgets need a bounded amount of memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.service.budgets import Budget, Budgets


def test_a_burst_is_allowed_and_then_one_in_each_interval() -> None:
    budget = Budget(2, 10)
    assert [budget.take(now) for now in (0, 0, 0, 9, 10, 10, 5, 15, 24, 1000, 1000, 1000)] == [
        True, True, False, False, True, False, False, True, False, True, True, False,
    ]  # fmt: skip


def test_use_beyond_the_budget_is_a_debt_with_a_bound() -> None:
    budget = Budget(100, 0.5)
    budget.spend(130, 0, debt=50)
    assert budget.left(0) == -30
    assert budget.seconds_until(1, 0) == 15.5
    budget.spend(130, 0, debt=50)
    assert budget.left(0) == -50
    assert budget.left(20) == -10


def test_a_smaller_bound_does_not_reduce_an_old_debt() -> None:
    budget = Budget(100, 0.5)
    budget.spend(200, 0, debt=100)
    budget.spend(1, 0, debt=0)
    assert budget.left(0) == -100


def test_each_key_has_a_budget_of_its_own() -> None:
    budgets = Budgets(1, 10, most=10)
    assert budgets.take("a", 0)
    assert budgets.take("b", 0)
    assert not budgets.take("a", 0)
    assert budgets.seconds_until("a", 1, 4) == 6
    assert budgets.seconds_until("c", 1, 4) == 0
    assert (budgets.left("b", 5), budgets.left("c", 5)) == (0.5, 1)


@pytest.mark.parametrize("later", [0, 1_000])
def test_memory_is_bounded_and_full_budgets_are_forgotten(later: float) -> None:
    budgets = Budgets(1, 10, most=100)
    for number in range(1_000):
        budgets.take(f"user {number}", 0)
    assert len(budgets) == 100
    for number in range(200):
        budgets.take(f"another {number}", later)
    assert len(budgets) == 100


def test_a_budget_that_is_still_used_is_kept() -> None:
    budgets = Budgets(1, 1e9, most=2)
    for number in range(100):
        budgets.take("attacker", number)
        budgets.take(f"user {number}", number)
    assert not budgets.take("attacker", 100)


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=50),
    st.integers(1, 40),
    st.sampled_from([0.25, 0.5, 2.0, 10.0]),
)
def test_no_more_is_taken_in_any_time_than_the_budget_allows(
    pauses: list[tuple[float, int]], burst: int, every: float
) -> None:
    budget = Budget(burst, every)
    now = taken = 0.0
    for pause, tries in pauses:
        now += pause
        taken += sum(budget.take(now) for _ in range(tries))
        assert taken <= burst + now / every + 1e-6


def test_for_each_new_key_two_full_budgets_are_forgotten() -> None:
    budgets = Budgets(1, 10, most=10)
    for key in "abcd":
        budgets.take(key, 0)
    budgets.take("e", 10)
    assert len(budgets) == 3
    budgets.take("f", 20)
    assert len(budgets) == 2, "two are forgotten for the new one, and the last two are kept"


def test_the_only_full_budget_is_kept() -> None:
    budgets = Budgets(2, 10, most=1)
    budgets.take("a", 0)
    budgets.take("b", 1_000)
    assert len(budgets) == 1
    assert budgets.left("b", 1_000) == 1


def test_a_budget_that_is_left_needs_no_wait() -> None:
    budget = Budget(5, 0.5)
    assert budget.seconds_until(1, 0) == 0
    budget.spend(5, 0, debt=0)
    assert budget.seconds_until(1, 0) == 0.5


def test_budgets_need_room_for_one_key() -> None:
    with pytest.raises(AssertionError):
        Budgets(1, 1, most=0)


def test_a_full_budget_is_forgotten_for_the_second_key() -> None:
    budgets = Budgets(1, 10, most=10)
    budgets.take("a", 0)
    budgets.take("b", 10)
    assert len(budgets) == 1
