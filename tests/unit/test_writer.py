"""Streams write to their clients, and end. The bridge logs and counts the reason."""

from __future__ import annotations

import asyncio
import errno
import time
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.service.metrics import Metrics
from bridge.service.streams.session import Session
from bridge.service.streams.writer import Streams, WriteBatch, _Stream
from tests.unit.loopback import BODY, KEY, site, until

STALL_SECONDS = 30.0
TIMED_OUT = OSError(errno.ETIMEDOUT, "the kernel's TCP_USER_TIMEOUT")
RESET = OSError(errno.ECONNRESET, "the client's kernel")


def why(*, blocked_for: float | None, error: Exception | None, said: str | None = None, failed: bool = False) -> str:
    anything: Any = None
    stream = _Stream(Streams(anything, Metrics(), WriteBatch(), stall_seconds=STALL_SECONDS), anything, chunked=True)
    stream._blocked_since = None if blocked_for is None else time.monotonic() - blocked_for
    stream._failed = failed
    connection: Any = SimpleNamespace(session=SimpleNamespace(end_reason=said))
    return stream._why(connection, error)


@pytest.mark.parametrize(
    ("reason", "case"),
    [
        ("client", {"blocked_for": None, "error": None}),
        ("client", {"blocked_for": None, "error": RESET}),
        ("client", {"blocked_for": 1, "error": RESET}),
        ("client", {"blocked_for": None, "error": TIMED_OUT}),  # Keepalive: an idle client vanished.
        ("stalled", {"blocked_for": STALL_SECONDS, "error": None}),
        ("stalled", {"blocked_for": 0, "error": TIMED_OUT}),
        ("drain", {"blocked_for": None, "error": None, "said": "drain"}),
        ("error", {"blocked_for": STALL_SECONDS, "error": TIMED_OUT, "failed": True}),
    ],
)
def test_the_reason_of_an_end(reason: str, case: dict[str, Any]) -> None:
    assert why(**case) == reason


class Transport(asyncio.Transport):
    """Records whether it was aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.calls.append("abort")


def test_a_stream_with_a_fault_is_aborted_without_a_further_byte() -> None:
    """The client resumes with its cursor. One more byte could move the cursor past the event that the fault lost."""
    anything: Any = None
    transport = Transport()
    stream = _Stream(Streams(anything, Metrics(), WriteBatch(), stall_seconds=STALL_SECONDS), transport, chunked=True)
    connection: Any = SimpleNamespace(fault=RuntimeError("x"), subscription=SimpleNamespace(number=1), session=anything)
    stream._connection = connection
    stream.serve(0.0)
    assert transport.calls == ["abort"]
    assert stream._why(connection, None) == "error"


# Real sockets, in this process.


async def test_events_that_arrive_in_one_packet_leave_in_one_write() -> None:
    async with site() as here, here.stream() as stream:
        await stream.ready()
        (connection,) = here.hub._connections
        written = connection.wake.__self__._transport  # type: ignore[attr-defined]
        writes: list[bytes] = []

        def write(data: bytes) -> None:
            writes.append(data)
            written.write(data)

        stream_of = connection.wake.__self__  # type: ignore[attr-defined]
        stream_of._transport = SimpleNamespace(write=write, is_closing=written.is_closing)
        with here.write_batch:
            for number in range(10):
                here.queues.made[0].on_delivery(KEY, BODY.replace(b'"e1"', b'"e%d"' % number))
            assert writes == []
        assert len(writes) == 1
        stream_of._transport = written
        assert await stream.ids(10) == [f"e{number}" for number in range(10)]


async def test_a_stream_that_has_expired_ends_with_a_bye() -> None:
    async with site() as here, here.stream() as stream:
        await stream.ready()
        (connection,) = here.hub._connections
        connection.deadlines._expires_at = 0.0
        connection.wake.__self__._timer.cancel()  # type: ignore[attr-defined]
        connection.wake.__self__._on_time()  # type: ignore[attr-defined]
        (bye,) = await stream.rest()
        assert (bye.event, bye.json["reason"]) == ("bridge.bye", "expired")
        await until(lambda: len(here.hub) == 0)
        assert here.metrics.streams_ended.labels("expired")._value.get() == 1


async def test_a_quiet_stream_gets_heartbeats() -> None:
    async with site(heartbeat_seconds=0.02) as here, here.stream() as stream:
        await stream.ready()
        await stream.comments(2)


async def test_a_fault_of_one_stream_ends_only_that_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Session.take

    def fail(session: Session) -> bytes:
        if session.user == "42" and session.is_ready:
            raise ValueError("made by the test")
        return take(session)

    async with site() as here, here.stream() as failing, here.stream("43") as stream:
        await failing.ready()
        await stream.ready()
        monkeypatch.setattr(Session, "take", fail)
        here.queues.made[0].on_delivery(KEY, BODY)
        with pytest.raises((ConnectionError, EOFError)):
            await failing.next()
        await until(lambda: len(here.hub) == 1)
        assert here.metrics.streams_ended.labels("error")._value.get() == 1
        here.queues.made[1].on_delivery(KEY.replace("42", "43"), BODY)
        assert (await stream.next_event())["id"] == "e1"


async def test_nothing_is_written_to_a_peer_that_does_not_read() -> None:
    async with site() as here, here.stream() as stream:
        await stream.ready()
        (connection,) = here.hub._connections
        written = connection.wake.__self__  # type: ignore[attr-defined]
        written.pause_writing()
        here.queues.made[0].on_delivery(KEY, BODY)
        written.serve(time.monotonic())
        assert connection.session.has_output
        written._timer.cancel()
        written._on_time()  # It writes nothing while the peer does not read.
        written.resume_writing()
        assert (await stream.next_event())["id"] == "e1"


async def test_a_stream_over_the_limit_gets_busy_and_opens_no_queue() -> None:
    async with site(max_connections_per_user=1) as here, here.stream() as stream:
        await stream.ready()
        async with here.stream() as second:
            (bye,) = await second.rest()
            assert bye.json["reason"] == "busy"
        assert len(here.queues.made) == 1


async def test_a_drain_says_goodbye_to_each_stream() -> None:
    async with site(drain_seconds=0.01) as here, here.stream() as one, here.stream("43") as other:
        await one.ready()
        await other.ready()
        await here.hub.drain()
        for stream in (one, other):
            assert [frame.json["reason"] for frame in await stream.rest()] == ["drain"]
        async with here.stream() as late:
            assert [frame.json["reason"] for frame in await late.rest()] == ["drain"]


async def test_bytes_from_a_client_are_ignored_and_its_close_ends_the_stream() -> None:
    async with site() as here:
        async with here.stream() as stream:
            await stream.ready()
            assert stream._writer is not None
            stream._writer.write(b"GET / HTTP/1.1\r\n\r\n")
            here.queues.made[0].on_delivery(KEY, BODY)
            assert (await stream.next_event())["id"] == "e1"
        await until(lambda: len(here.hub) == 0)
        assert here.metrics.streams_ended.labels("client")._value.get() == 1


async def test_a_traced_stream_reports_what_it_has_written() -> None:
    spans: list[Any] = []
    tracing: Any = SimpleNamespace(delivered=lambda events, number: spans.append((events, number)))
    async with site(tracing_with=tracing) as here, here.stream() as stream:
        await stream.ready()
        here.queues.made[0].on_delivery(KEY, BODY)
        await stream.next_event()
    reported = [(event.id, number) for events, number in spans for event, _ in events]
    assert reported == [("e1", 1)]
