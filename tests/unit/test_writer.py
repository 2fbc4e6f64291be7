"""Why a stream ended, as it is logged and counted."""

from __future__ import annotations

import asyncio
import errno
import time
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.service.metrics import Metrics
from bridge.service.streams.writer import Streams, WriteBatch, _Stream

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
    """Keeps what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self.calls.append("abort")


def test_a_stream_with_a_fault_is_aborted_without_a_further_byte() -> None:
    """Its client resumes by its cursor; a byte more might move the cursor past what the fault swallowed."""
    anything: Any = None
    transport = Transport()
    stream = _Stream(Streams(anything, Metrics(), WriteBatch(), stall_seconds=STALL_SECONDS), transport, chunked=True)
    connection: Any = SimpleNamespace(fault=RuntimeError("x"), subscription=SimpleNamespace(number=1), session=anything)
    stream._connection = connection
    stream.serve(0.0)
    assert transport.calls == ["abort"]
    assert stream._why(connection, None) == "error"
