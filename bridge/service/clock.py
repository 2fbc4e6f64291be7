"""The clock for the arrival of events and for watermarks. It never jumps.

An operator or NTP may move the wall clock by an hour. Intervals measured by it would then be an hour too long or too
short: a stream would get no report of unreadable events for an hour, and a delivery would count as an hour late.
"""

from __future__ import annotations

import time

_OFFSET_MS = time.time_ns() // 1_000_000 - time.monotonic_ns() // 1_000_000


def now_ms() -> int:
    """Milliseconds since 1970: the wall clock's time at the start of the process, plus the time since then."""
    return _OFFSET_MS + time.monotonic_ns() // 1_000_000
