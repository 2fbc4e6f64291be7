"""File descriptors: how many the process may have, and how many connections that allows.

Every HTTP connection takes one. A process that runs out of them fails everywhere at once: new clients are reset, the
probes do not answer, and RabbitMQ cannot be connected again. So the public address gets a share that leaves enough for
everything else.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from dataclasses import dataclass

INTERNAL_CONNECTIONS = 16
"""At once on the internal address: probes, Prometheus, and a person with a port forward."""

OWN_DESCRIPTORS = 48
"""For the rest of the process: up to five connections to RabbitMQ and their successors, the key set, name look-ups,
exported spans, files in /proc. Of these, a bridge at rest uses three, for RabbitMQ."""

RESERVED = INTERNAL_CONNECTIONS + OWN_DESCRIPTORS

MOST_GUESTS = 1024
"""Public connections that are not streams, at some 20 KB each. The streams of a full bridge come back through them."""

LEAST_GUESTS = 32

GUEST_SHARE = 8
"""One of so many public connections is kept for guests, where descriptors are few."""


class TooFewDescriptors(Exception):
    """The limit leaves no room for streams."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How the descriptors of a process are divided.

    `guests`: public connections that are not streams, be it that they have not asked yet, that they are being answered,
    or that they wait for another request. `streams` is never more than the operator wants.
    """

    limit: int
    streams: int
    guests: int

    def shortage(self, wanted: int) -> str:
        """What to do when there is room for fewer streams than the operator wants. Empty when there is not."""
        if self.streams >= wanted:
            return ""
        return (
            f"the limit is {wanted - self.streams} below what BRIDGE_MAX_CONNECTIONS needs. Raise the hard limit of "
            f"open files (ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile in Docker), or lower the setting; "
            f"beyond {self.streams} streams the bridge answers `busy`"
        )


def divide(limit: int, used: int, *, streams: int) -> Plan:
    """
    Args:
        limit: of descriptors.
        used: open before the first connection.
        streams: as many as the operator wants.

    Raises:
        TooFewDescriptors: says how many are needed.
    """
    room = limit - used - RESERVED
    if room <= LEAST_GUESTS:
        raise TooFewDescriptors(
            f"the limit of file descriptors is {limit}, and {used} are in use: at least "
            f"{limit - room + LEAST_GUESTS + 1} are needed, and one more for each stream. Raise the hard limit "
            f"(ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile in Docker)"
        )
    guests = min(MOST_GUESTS, max(LEAST_GUESTS, room // GUEST_SHARE))
    return Plan(limit, min(streams, room - guests), guests)


def raise_limit() -> int:
    """Raises the soft limit to the hard one, as every process may, and returns the limit that holds then.

    The soft limit is 1,024 almost everywhere, for programs that use select(2). The bridge does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems (macOS) allow less than the hard limit says.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return current_limit()


def current_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def count_open() -> int:
    """Descriptors that the process has open now, one for this look included. -1 where the system does not say."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    return -1
