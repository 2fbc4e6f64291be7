"""The pause between two reads depends on the share of a processor that the process uses."""

from __future__ import annotations

import pytest

from bridge.service.broker.gathering import (
    FULL_SHARE,
    LEAST_SECONDS,
    MEASURE_SECONDS,
    MOST_SECONDS,
    OFF_SHARE,
    ON_SHARE,
    Gathering,
)

LITTLE = 0.001


def measured(*shares: float) -> float:
    """The pause after these shares, one after the other."""
    gathering, now, cpu = Gathering(1000.0, 5.0), 1000.0, 5.0
    for share in shares:
        now += MEASURE_SECONDS
        cpu += share * MEASURE_SECONDS
        gathering.measure(now, cpu)
    return gathering.seconds


def test_at_first_and_while_the_process_has_time_there_is_no_pause() -> None:
    assert measured() == 0
    assert measured(ON_SHARE - LITTLE) == 0


@pytest.mark.parametrize(
    ("share", "seconds"),
    [
        (ON_SHARE + LITTLE, LEAST_SECONDS),
        ((ON_SHARE + FULL_SHARE) / 2, (LEAST_SECONDS + MOST_SECONDS) / 2),
        (FULL_SHARE, MOST_SECONDS),
        (1.2, MOST_SECONDS),
    ],
)
def test_the_pause_grows_with_the_load(share: float, seconds: float) -> None:
    assert measured(share) == pytest.approx(seconds, rel=0.02)


def test_a_pause_does_not_end_because_it_saves_time() -> None:
    assert measured(ON_SHARE + LITTLE, OFF_SHARE + LITTLE) == LEAST_SECONDS
    assert measured(ON_SHARE + LITTLE, OFF_SHARE - LITTLE) == 0
    assert measured(ON_SHARE + LITTLE, OFF_SHARE - LITTLE, ON_SHARE - LITTLE) == 0


def test_each_share_is_of_the_time_since_the_measurement_before_it() -> None:
    gathering = Gathering(0.0, 0.0)
    assert (gathering.is_due(MEASURE_SECONDS - LITTLE), gathering.is_due(MEASURE_SECONDS)) == (False, True)
    gathering.measure(10.0, 9.0)
    assert gathering.seconds == MOST_SECONDS
    assert (gathering.is_due(10.0), gathering.is_due(10.0 + MEASURE_SECONDS)) == (False, True)
    gathering.measure(20.0, 9.0)
    assert gathering.seconds == 0
