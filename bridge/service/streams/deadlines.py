"""When a stream does what, and how far apart the streams of a process are kept.

Pure: `now` is an argument, and so is randomness, as a `draw` from [0, 1). Times are seconds of one monotonic
clock, a token's expiry too, which the caller has put on that clock; what a client reads as `retry:` is milliseconds.
"""

from __future__ import annotations

POSITION_SECONDS = 60.0
"""A client without events gets its place renewed this often, so that its cursor does not age out of the log."""

MIN_RETRY_MS = 100
"""Below this a browser whose server is gone would spin (Chrome takes `retry: 0` at its word)."""


def retry_ms(retry_seconds: float, draw: float) -> int:
    """The ordinary pause before a reconnect: the setting times 0.5 to 1.5. EventSource itself has no jitter."""
    return max(MIN_RETRY_MS, round(retry_seconds * (0.5 + draw) * 1000))


def busy_retry_ms(draw: float) -> int:
    """5 to 15 s: what is full now is not free in a moment."""
    return round((5 + 10 * draw) * 1000)


def drain_retry_ms(drain_seconds: float, draw: float) -> int:
    """Anywhere in the drain's length, so that the next replica gets them one by one."""
    return max(MIN_RETRY_MS, round(drain_seconds * draw * 1000))


def lifetime(max_age_seconds: float, draw: float) -> float:
    """0.8 to 1.0 of the setting: streams that began together must not end together."""
    return max_age_seconds * (0.8 + 0.2 * draw)


def drain_at(index: int, count: int, drain_seconds: float, draw: float) -> float:
    """How long after the signal stream `index` of `count` gets its goodbye: one in each equal part."""
    return drain_seconds * (index + draw) / count


class Deadlines:
    """The deadlines of one stream."""

    __slots__ = ("_ends_at", "_expires_at", "_last_byte", "_last_event", "heartbeat_seconds")

    def __init__(self, now: float, *, heartbeat_seconds: float, ends_at: float, expires_at: float) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self._ends_at = ends_at
        self._expires_at = expires_at
        self._last_byte = now
        self._last_event = now

    def wrote(self, now: float) -> None:
        """Bytes went out."""
        self._last_byte = now

    def moved(self, now: float) -> None:
        """The client's cursor moved, or could not move; it is checked again in a minute."""
        self._last_event = now

    def is_expired(self, now: float) -> bool:
        return now >= self._expires_at

    def is_rotated(self, now: float) -> bool:
        return now >= self._ends_at

    def position_due(self, now: float) -> bool:
        return now >= self._last_event + POSITION_SECONDS

    def heartbeat_due(self, now: float) -> bool:
        return now >= self._last_byte + self.heartbeat_seconds

    @property
    def end(self) -> float:
        """When the stream ends in any case."""
        return min(self._ends_at, self._expires_at)

    def deadline(self) -> float:
        """The first moment at which any of the four can be due."""
        return min(self._last_byte + self.heartbeat_seconds, self._last_event + POSITION_SECONDS, self.end)
