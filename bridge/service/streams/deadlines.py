"""The deadlines of a stream, and the random pauses that keep the streams of a process apart.

Pure: `now` is an argument, and so is randomness, as a `draw` from [0, 1). Times are seconds of one monotonic clock. The
caller converts a token's expiry to that clock. A `retry:` is in milliseconds.
"""

from __future__ import annotations

import math

POSITION_SECONDS = 60.0
"""A client without events is sent its position this often, so that its cursor does not age out of the log."""

MIN_RETRY_MS = 100
"""With a smaller value a browser without a server would retry without a pause (Chrome obeys `retry: 0`)."""


def retry_ms(retry_seconds: float, draw: float) -> int:
    """The ordinary pause before a reconnect: the setting times 0.5 to 1.5. EventSource itself has no jitter."""
    return max(MIN_RETRY_MS, round(retry_seconds * (0.5 + draw) * 1000))


def busy_retry_ms(draw: float) -> int:
    """5 to 15 s: a limit that is reached now stays reached for a while."""
    return round((5 + 10 * draw) * 1000)


def drain_retry_ms(drain_seconds: float, draw: float) -> int:
    """A moment within the drain's length, so that the next replica gets the clients one by one."""
    return max(MIN_RETRY_MS, round(drain_seconds * draw * 1000))


def lifetime(max_age_seconds: float, draw: float) -> float:
    """0.8 to 1.0 of the setting, so that streams that began together do not end together."""
    return max_age_seconds * (0.8 + 0.2 * draw)


def drain_at(index: int, count: int, drain_seconds: float, draw: float) -> float:
    """Seconds after the signal at which stream `index` of `count` gets its goodbye: one in each equal part."""
    return drain_seconds * (index + draw) / count


RENEWAL_SECONDS = 10.0
RENEWAL_SHARE = 0.25
"""Before a login expires, the application is asked again: at most this long before, and this share of its time."""

RENEWAL_PAUSE_SECONDS = 1.0
"""Pause between two questions, until the login expires."""


def renewal_at(now: float, expires_at: float, draw: float) -> float:
    """When a login is renewed: in the last part of its time, and not at the same moment as others."""
    before = min(RENEWAL_SECONDS, RENEWAL_SHARE * (expires_at - now))
    return expires_at - before * (0.5 + 0.5 * draw)


class Deadlines:
    """The deadlines of one stream."""

    __slots__ = ("_ends_at", "_expires_at", "_last_byte", "_last_event", "_renew_at", "heartbeat_seconds")

    def __init__(
        self, now: float, *, heartbeat_seconds: float, ends_at: float, expires_at: float, renew_at: float = math.inf
    ) -> None:
        """
        Args:
            renew_at: when to ask whether the login is still valid.
        """
        self.heartbeat_seconds = heartbeat_seconds
        self._ends_at = ends_at
        self._expires_at = expires_at
        self._renew_at = renew_at
        self._last_byte = now
        self._last_event = now

    def wrote(self, now: float) -> None:
        """Bytes were written."""
        self._last_byte = now

    def moved(self, now: float) -> None:
        """The client's cursor moved, or could not move. It is checked again after `POSITION_SECONDS`."""
        self._last_event = now

    def renewed(self, *, expires_at: float, renew_at: float) -> None:
        """The login is still valid."""
        self._expires_at = expires_at
        self._renew_at = renew_at

    def is_renewal(self, now: float) -> bool:
        """Whether to ask now whether the login is still valid. It is True once, and again after a pause."""
        if now < self._renew_at:
            return False
        self._renew_at = now + RENEWAL_PAUSE_SECONDS
        return True

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
        """When the stream ends at the latest."""
        return min(self._ends_at, self._expires_at)

    def deadline(self) -> float:
        """The first moment at which any of the five can be due."""
        return min(
            self._last_byte + self.heartbeat_seconds, self._last_event + POSITION_SECONDS, self.end, self._renew_at
        )
