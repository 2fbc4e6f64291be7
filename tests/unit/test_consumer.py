"""The reader of a connection: when it reads bytes, and when it acknowledges deliveries. The test sets its clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from bridge.service.broker import consumer
from bridge.service.broker.consumer import (
    ACK_SECONDS,
    LARGE_BYTES,
    MANY,
    QUIET_SECONDS,
    SUCCESSION_SECONDS,
    TALK_SECONDS,
)
from bridge.service.broker.deliveries import HEARTBEAT, Deliveries
from bridge.service.broker.gathering import MEASURE_SECONDS, MOST_SECONDS
from tests.raw_amqp import frame
from tests.unit.test_deliveries import CHANNEL, message

PAUSE_SECONDS = 0.01


class Timer:
    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due = due
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def go(self, seconds: float) -> None:
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.due <= self.now]:
            self.timers.remove(timer)
            if not timer.is_cancelled:
                timer.call()


class Transport:
    """Records how the reader uses its socket: writes and pauses."""

    def __init__(self) -> None:
        self.transport = self
        self.written: list[bytes] = []
        self.is_paused = False
        self.closing = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def is_closing(self) -> bool:
        return self.closing


class Connection:
    def __init__(self) -> None:
        self.deliveries = Deliveries(max_body=1_000_000)
        self.bodies: list[bytes] = []
        self.deliveries.take(CHANNEL, lambda tag, key, body, offset: self.bodies.append(body))
        self.reader = consumer._LibraryReader(self.deliveries, contextlib.nullcontext(), pauses=True)
        self.clock = Clock()
        self.socket = Transport()
        self.reader._clock = self.clock  # type: ignore[assignment]
        self.reader.writer = self.socket  # type: ignore[assignment]
        self.reader._gathering._since = self.clock.now  # Nothing is measured in the first `MEASURE_SECONDS`.
        self.reader._gathering.seconds = PAUSE_SECONDS  # As on a busy process.
        self.tag = 0

    def deliver(self, count: int = 1, size: int = 1) -> None:
        packet = b""
        for _ in range(count):
            self.tag += 1
            packet += message(self.tag, b"x" * size)
        self.reader.feed_data(packet)

    @property
    def passed(self) -> bytes:
        """The bytes that the library has not read yet."""
        buffer: Any = self.reader._buffer  # type: ignore[attr-defined]
        return bytes(buffer)


@pytest.fixture
async def to() -> Connection:
    return Connection()


def test_a_single_delivery_is_not_delayed(to: Connection) -> None:
    to.deliver()
    assert (to.bodies, to.socket.is_paused) == ([b"x"], False)
    to.clock.go(SUCCESSION_SECONDS)
    to.deliver()
    assert not to.socket.is_paused


def test_after_a_burst_reading_pauses_for_a_moment(to: Connection) -> None:
    to.deliver()
    to.clock.go(SUCCESSION_SECONDS / 2)
    to.deliver()
    assert to.socket.is_paused
    to.clock.go(PAUSE_SECONDS)
    assert not to.socket.is_paused


def test_while_the_process_has_time_reading_does_not_pause(to: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = to.reader._gathering._cpu
    monkeypatch.setattr(time, "thread_time", lambda: cpu)
    for busy, is_paused in ((0.0, False), (1.0, True), (0.0, False)):
        cpu += busy * MEASURE_SECONDS
        to.clock.go(MEASURE_SECONDS)
        to.deliver()
        to.deliver()
        assert to.socket.is_paused is is_paused
        to.clock.go(MOST_SECONDS)


@pytest.mark.parametrize(("count", "size"), [(MANY, 1), (1, LARGE_BYTES)])
def test_after_a_large_packet_reading_does_not_pause(to: Connection, count: int, size: int) -> None:
    to.deliver()
    to.deliver(count, size)
    assert not to.socket.is_paused


def test_while_an_answer_is_awaited_nothing_is_delayed(to: Connection) -> None:
    to.reader.feed_data(frame(1, 1, b"\x00\x32\x00\x0b"))
    to.deliver()
    to.deliver()
    assert not to.socket.is_paused
    to.clock.go(TALK_SECONDS)
    to.deliver()
    to.deliver()
    assert to.socket.is_paused


def test_a_connection_that_closes_during_a_pause_is_left_alone(to: Connection) -> None:
    to.deliver()
    to.deliver()
    to.socket.closing = True
    to.clock.go(1.0)
    assert to.socket.is_paused
    assert to.socket.written == [to.socket.written[0]], "and no ack is written"


def test_acks_wait_for_others_of_their_channel(to: Connection) -> None:
    to.deliver()
    assert len(to.socket.written) == 1, "the first ack for a while"
    to.deliver()
    to.deliver()
    assert len(to.socket.written) == 1
    to.clock.go(ACK_SECONDS)
    assert len(to.socket.written) == 2
    to.clock.go(ACK_SECONDS)
    assert len(to.socket.written) == 2, "nothing to acknowledge"


def test_many_deliveries_are_acknowledged_at_once(to: Connection) -> None:
    to.deliver()
    to.deliver(MANY - 1)
    assert len(to.socket.written) == 1
    to.deliver()
    assert len(to.socket.written) == 2
    assert to.deliveries.unacked == 0


def test_a_busy_connection_shows_the_library_a_heartbeat(to: Connection) -> None:
    to.deliver()
    assert to.passed == HEARTBEAT, "the first packet for a while"
    to.deliver()
    to.clock.go(QUIET_SECONDS)
    to.deliver()
    assert to.passed == HEARTBEAT
    to.clock.go(0.01)
    to.deliver()
    assert to.passed == HEARTBEAT * 2


def test_a_fault_of_a_callback_is_logged_and_forgotten(to: Connection, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise ValueError("made by the test")

    to.deliveries.take(CHANNEL, fail)
    with capture_logs():
        to.deliver()
    assert "a delivery was not taken" in caplog.text
    assert to.deliveries.faults == []


async def test_a_delivery_through_the_library_would_be_a_bug() -> None:
    nothing: Any = type("Message", (), {"delivery": None})
    with pytest.raises(AssertionError, match="through the library"):
        await consumer._unexpected(nothing)
