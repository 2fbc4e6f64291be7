"""The clock of the streams does not change when the wall clock is set."""

import time

import pytest

from bridge.service import clock


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wall_clock_that_is_set_changes_nothing(monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    wall, before = time.time_ns, clock.now_ms()
    assert abs(before - wall() // 1_000_000) < 3_600_000
    monkeypatch.setattr(time, "time_ns", lambda: wall() + hours * 3_600_000_000_000)
    assert 0 <= clock.now_ms() - before < 3_000_000
