"""Divides the file descriptors of the process, which limit its connections.

Every HTTP connection uses one. A process without free descriptors fails everywhere at once: new clients are reset, the
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
"""The most connections to the internal address: probes, Prometheus, and a person with a port forward."""

OWN_DESCRIPTORS = 48
"""Reserved for the rest of the process: up to five connections to RabbitMQ and their successors, the key set, name
look-ups, exported spans, files in /proc. An idle bridge uses three of these, for RabbitMQ."""

RESERVED = INTERNAL_CONNECTIONS + OWN_DESCRIPTORS

MOST_GUESTS = 1024
"""The most public connections that are not streams, at about 20 KB each. When all streams of a full bridge reconnect,
each is such a guest first."""

LEAST_GUESTS = 32

GUEST_SHARE = 8
"""If descriptors are few, one public connection in eight is reserved for guests."""


class TooFewDescriptors(Exception):
    """The limit of file descriptors is too low for any stream."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The division of a process's descriptors.

    Attributes:
        limit: the process's limit of descriptors.
        streams: the most streams, at most as many as the operator wants.
        guests: the most public connections that are not streams: they wait for a request, or for its answer.
    """

    limit: int
    streams: int
    guests: int

    def shortage(self, wanted: int) -> str:
        """The warning that there is room for fewer streams than `wanted`, with the fix. Empty if there is room."""
        if self.streams >= wanted:
            return ""
        return (
            f"the limit is {wanted - self.streams} below what BRIDGE_MAX_CONNECTIONS needs. Raise the hard limit of "
            f"open files (ulimit -Hn, LimitNOFILE= in systemd, --ulimit nofile in Docker), or lower the setting; "
            f"above {self.streams} streams the bridge answers `busy`"
        )


def divide(limit: int, used: int, *, streams: int) -> Plan:
    """Divides the descriptors between streams, guests and the rest of the process.

    Args:
        limit: the process's limit of descriptors.
        used: the number of open descriptors before the first connection.
        streams: the number of streams that the operator wants.

    Raises:
        TooFewDescriptors: the message has the number that is needed.
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
    """Raises the soft limit to the hard limit, which every process may do, and returns the resulting limit.

    The usual soft limit is 1,024, for programs that use select(2). The bridge does not use it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems (macOS) allow less than their hard limit.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return current_limit()


def current_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def count_open() -> int:
    """The number of open descriptors, including one for this check. -1 if the system does not report it."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))
    return -1
