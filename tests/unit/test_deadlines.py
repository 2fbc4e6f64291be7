"""The bounds of each random value, and the time at which each action is due."""

import pytest

from bridge.service.streams import deadlines
from bridge.service.streams.deadlines import Deadlines

DRAWS = [0.0, 0.25, 0.5, 0.999999]


@pytest.mark.contract("2.34", "2.53")
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_stay_in_their_bounds(draw: float) -> None:
    assert 1500 <= deadlines.retry_ms(3, draw) <= 4500
    assert 5000 <= deadlines.busy_retry_ms(draw) <= 15_000
    assert 100 <= deadlines.drain_retry_ms(10, draw) <= 10_000
    assert deadlines.drain_retry_ms(0, draw) == 100
    assert 2880 <= deadlines.lifetime(3600, draw) <= 3600


@pytest.mark.contract("2.54")
def test_goodbyes_are_spread_evenly_over_the_drain() -> None:
    times = [deadlines.drain_at(index, 100, 10, 0.5) for index in range(100)]
    assert times == sorted(times)
    assert all(0 <= at <= 10 for at in times)
    assert all(sum(second <= at < second + 1 for at in times) == 10 for second in range(10))


def due(**changes: float) -> Deadlines:
    values = {"heartbeat_seconds": 15.0, "ends_at": 3000.0, "expires_at": 5000.0, **changes}
    return Deadlines(100.0, **values)


@pytest.mark.contract("2.28")
def test_a_heartbeat_is_due_after_silence() -> None:
    stream = due()
    assert stream.deadline() == 115
    assert not stream.heartbeat_due(114.9)
    assert stream.heartbeat_due(115)
    stream.wrote(114)
    assert not stream.heartbeat_due(128.9)
    assert stream.deadline() == 129


@pytest.mark.contract("2.26")
def test_a_position_is_due_after_a_minute_without_an_event() -> None:
    stream = due()
    for now in range(110, 170, 10):
        stream.wrote(now)  # Heartbeats do not move a cursor.
    assert not stream.position_due(159.9)
    assert stream.position_due(160)
    stream.moved(160)
    assert not stream.position_due(219)


@pytest.mark.contract("2.53")
def test_a_stream_ends_with_its_token_or_with_its_age() -> None:
    assert due().is_rotated(3000)
    assert not due().is_rotated(2999)
    assert due(expires_at=200).is_expired(200)
    assert due(expires_at=110).deadline() == 110
    assert due(ends_at=105).deadline() == 105


def test_draws_in_the_middle_and_at_the_end() -> None:
    assert deadlines.busy_retry_ms(0.5) == 10_000
    assert deadlines.busy_retry_ms(1.0) == 15_000
    assert deadlines.drain_retry_ms(10, 0.5) == 5_000
    assert deadlines.retry_ms(3, 0.25) == 2_250
    assert deadlines.lifetime(3600, 0.5) == 3240


def test_a_login_is_renewed_in_the_last_part_of_its_time() -> None:
    assert [deadlines.renewal_at(100.0, 700.0, draw) for draw in (0.0, 1.0)] == [695.0, 690.0]
    assert [deadlines.renewal_at(100.0, 104.0, draw) for draw in (0.0, 1.0)] == [103.5, 103.0]


def test_a_renewal_is_due_once_and_again_after_a_pause() -> None:
    due = Deadlines(0.0, heartbeat_seconds=15.0, ends_at=100.0, expires_at=50.0, renew_at=5.0)
    assert due.deadline() == 5.0
    assert [due.is_renewal(now) for now in (4.9, 5.0, 5.9, 6.0)] == [False, True, False, True]
    due.renewed(expires_at=90.0, renew_at=80.0)
    assert (due.end, due.is_renewal(79.0)) == (90.0, False)


def test_a_token_is_never_renewed() -> None:
    due = Deadlines(0.0, heartbeat_seconds=15.0, ends_at=100.0, expires_at=50.0)
    assert not due.is_renewal(49.9)
