"""The division of file descriptors among streams and guests."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.service.descriptors import LEAST_GUESTS, MOST_GUESTS, RESERVED, Plan, TooFewDescriptors, divide


def test_a_usual_limit_does_not_limit_streams() -> None:
    plan = divide(1_048_576, 20, streams=10_000)
    assert (plan.streams, plan.guests) == (10_000, MOST_GUESTS)


def test_containerds_soft_limit_allows_about_eight_hundred_streams() -> None:
    plan = divide(1024, 20, streams=10_000)
    assert plan.streams + plan.guests + 20 + RESERVED == 1024
    assert plan.streams > 800


@pytest.mark.contract("2.55", "2.57")
@given(st.integers(0, 100_000), st.integers(0, 500), st.integers(1, 100_000))
def test_reserved_descriptors_are_never_given_away(limit: int, used: int, streams: int) -> None:
    try:
        plan = divide(limit, used, streams=streams)
    except TooFewDescriptors:
        assert limit - used - RESERVED <= LEAST_GUESTS
        return
    assert 1 <= plan.streams <= streams
    assert LEAST_GUESTS <= plan.guests <= MOST_GUESTS
    assert used + RESERVED + plan.guests + plan.streams <= limit


def test_the_error_says_how_many_are_needed() -> None:
    with pytest.raises(TooFewDescriptors, match="at least 117 are needed"):
        divide(64, 20, streams=10)
    assert divide(117, 20, streams=10).streams == 1


def test_a_shortage_says_what_to_raise_and_what_happens_otherwise() -> None:
    plan = Plan(limit=1024, streams=800, guests=100)
    assert plan.shortage(800) == ""
    words = plan.shortage(1_000)
    assert words.startswith("the limit is 200 below what BRIDGE_MAX_CONNECTIONS needs.")
    assert "LimitNOFILE=" in words
    assert "above 800 streams" in words
