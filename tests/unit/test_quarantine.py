"""A flood of refused messages takes a bounded part of memory and of the quarantine. The rest is counted and logged."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from bridge.service.broker.quarantine import BURST, MAX_PENDING, MAX_PENDING_BYTES, PER_SECOND, Quarantine


class Flooded:
    """A quarantine that publishes nothing. The test sets its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.dropped = 0
        self.quarantine = Quarantine([], queue="q", on_dropped=self._drop, clock=lambda: self.now)

    def _drop(self) -> None:
        self.dropped += 1

    def put(self, count: int, *, reason: str = "malformed", size: int = 10) -> int:
        """Returns how many of them were kept."""
        before = self.dropped
        for _ in range(count):
            self.quarantine.put(b"x" * size, routing_key="all.x", reason=reason, detail="why")
        return count - (self.dropped - before)

    def take_all(self) -> int:
        count = 0
        while not self.quarantine._pending.empty():
            body, *_ = self.quarantine._pending.get_nowait()
            self.quarantine._pending_bytes -= len(body)
            count += 1
        return count


@pytest.fixture
def flooded() -> Flooded:
    return Flooded()


@pytest.mark.contract("5.21", "5.22")
def test_a_flood_is_kept_in_part_and_the_rest_is_counted(flooded: Flooded) -> None:
    with capture_logs() as lines:
        assert flooded.put(100_000) == BURST < MAX_PENDING
        assert flooded.take_all() == BURST
        flooded.now += 3
        assert flooded.put(100_000) == 3 * PER_SECOND
        flooded.now += 10  # Long enough for the next line.
        assert flooded.put(100_000) == BURST
    assert flooded.dropped == 300_000 - 2 * BURST - 3 * PER_SECOND
    logged = [line for line in lines if line["event"] == "message not quarantined"]
    # The first line is written at once. The next one has the number of messages between them.
    assert len(logged) == 2
    assert logged[0]["left_out"] == 0
    between = (100_000 - BURST - 1) + (100_000 - 3 * PER_SECOND)
    assert logged[1]["left_out_by_reason"] == {"malformed": between}
    assert "100 a second" in logged[0]["error"]


def test_a_flood_of_one_reason_hides_no_other(flooded: Flooded) -> None:
    flooded.put(100_000)
    assert flooded.put(10, reason="schema") == 10


@pytest.mark.contract("5.21")
def test_waiting_messages_are_bounded_in_number_and_in_bytes(flooded: Flooded) -> None:
    kept = sum(flooded.put(100_000, reason=reason) for reason in ("malformed", "schema", "too-large"))
    assert kept == MAX_PENDING
    flooded.take_all()
    flooded.now += 1_000
    size = MAX_PENDING_BYTES // 10
    assert flooded.put(100, size=size) == 10
