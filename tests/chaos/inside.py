"""Faults inside the bridge's own process: its clock jumps, and it has few file descriptors.

`tests.patience` applies them before the bridge starts. The product has no hook for them.
"""

from __future__ import annotations

import mmap
import os
import resource
import struct
import time
from pathlib import Path

CLOCK = "SUITE_CLOCK"
"""Names a file that holds an offset in seconds as a double. The wall clock of the process is ahead by that much."""

DESCRIPTORS = "SUITE_DESCRIPTORS"
"""The soft and the hard limit of file descriptors."""


class Clock:
    """The side of the tests: sets the wall clock of a process that was started with `CLOCK`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0.0)

    def set(self, offset: float) -> None:
        # Eight bytes at the start of a page: the process maps the file, so it must not be replaced.
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.write(struct.pack("=d", offset))


def wanted() -> bool:
    return bool(os.environ.get(CLOCK) or os.environ.get(DESCRIPTORS))


def apply() -> None:
    if os.environ.get(DESCRIPTORS):
        count = int(os.environ[DESCRIPTORS])
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    if os.environ.get(CLOCK):
        _shift_clock(Path(os.environ[CLOCK]))


def _shift_clock(path: Path) -> None:
    """Adds the offset to `time.time` and `time.time_ns`, by which the bridge tells the time; not to the monotonic
    clock, which does not jump on a real machine either."""
    with open(path, "rb") as file:
        shared = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    real, real_ns = time.time, time.time_ns

    def offset() -> float:
        value: float = struct.unpack_from("=d", shared)[0]
        return value

    time.time = lambda: real() + offset()
    time.time_ns = lambda: real_ns() + round(offset() * 1e9)
