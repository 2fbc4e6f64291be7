"""How long reading pauses after deliveries, so that the next read returns more of them.

Pure. While the event loop's thread has time, an event leaves at once. A pause saves CPU time only if it is long: after
a short one the caches are cold, and one wake-up costs as much as it saves (figures in docs/decisions/07). So there is
no pause, or one of at least `LEAST_SECONDS`. It begins at `ON_SHARE` of a processor and ends at `OFF_SHARE`, which are
far apart: the pause itself reduces the thread's share, and must not end because of that.

For example, at 6,000 events a second the thread uses 0.41 of a processor without a pause. The pause begins. Now the
thread uses 0.27, which is above `OFF_SHARE`, so the pause stays. At 2,000 events a second it uses 0.17 without a pause,
and no pause begins.
"""

from __future__ import annotations

LEAST_SECONDS = 0.008
MOST_SECONDS = 0.016
"""One frame of a screen."""

ON_SHARE = 0.30
OFF_SHARE = 0.12
"""Shares of one processor that the event loop's thread uses."""

FULL_SHARE = 0.60
"""From this share on the pause has `MOST_SECONDS`."""

MEASURE_SECONDS = 0.25
"""The share is measured over at least this long."""


class Gathering:
    """
    Args:
        now: monotonic seconds.
        cpu: CPU seconds that the loop's thread has used so far.
    """

    __slots__ = ("_cpu", "_since", "seconds")

    def __init__(self, now: float, cpu: float) -> None:
        self._since = now
        self._cpu = cpu
        self.seconds = 0.0
        """The pause after deliveries; 0 while the process has time."""

    def is_due(self, now: float) -> bool:
        """Whether `measure` should be called: reading the CPU time for each packet would cost too much."""
        return now >= self._since + MEASURE_SECONDS

    def measure(self, now: float, cpu: float) -> None:
        """Sets the pause by the share of a processor that was used since the last call. `now` is after that call."""
        share = (cpu - self._cpu) / (now - self._since)
        self._since, self._cpu = now, cpu
        if share < (OFF_SHARE if self.seconds else ON_SHARE):
            self.seconds = 0.0
        else:
            part = (share - ON_SHARE) / (FULL_SHARE - ON_SHARE)
            self.seconds = LEAST_SECONDS + (MOST_SECONDS - LEAST_SECONDS) * min(1.0, max(0.0, part))
