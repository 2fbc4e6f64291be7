"""The time at which events arrive and watermarks are written. It never jumps.

An operator or NTP may set the wall clock by an hour. Intervals measured by it would then be an hour too long or too
short: a stream would hear nothing of unreadable events for an hour, and a delivery would count as an hour late.
"""

from __future__ import annotations

import time

_OFFSET_MS = time.time_ns() // 1_000_000 - time.monotonic_ns() // 1_000_000


def now_ms() -> int:
    """Milliseconds since 1970, by the wall clock as it was when the process began."""
    return _OFFSET_MS + time.monotonic_ns() // 1_000_000
