"""Changes inside the bridge's own process: its clock jumps, it has few file descriptors, and it counts its objects.

`tests.patience` applies them before the bridge starts. The bridge itself has no hook for them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import resource
import signal
import struct
import time
from collections import Counter
from pathlib import Path

CLOCK = "SUITE_CLOCK"
"""Names a file that holds an offset in seconds as a double. The wall clock of the process is ahead by that much."""

DESCRIPTORS = "SUITE_DESCRIPTORS"
"""The soft and the hard limit of file descriptors."""

COUNTS = "SUITE_COUNTS"
"""Names a file. At each SIGUSR2 the process writes to it how many tasks and objects it holds, as JSON."""


class Clock:
    """For the tests: sets the wall clock of a process that was started with `CLOCK`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0.0)

    def set(self, offset: float) -> None:
        # Eight bytes at the start of a page: the process maps the file, so it must not be replaced.
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.write(struct.pack("=d", offset))


def wanted() -> bool:
    return any(os.environ.get(name) for name in (CLOCK, DESCRIPTORS, COUNTS))


def apply() -> None:
    if os.environ.get(DESCRIPTORS):
        count = int(os.environ[DESCRIPTORS])
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    if os.environ.get(CLOCK):
        _shift_clock(Path(os.environ[CLOCK]))
    if os.environ.get(COUNTS):
        _count_on_signal(Path(os.environ[COUNTS]))


def _shift_clock(path: Path) -> None:
    """Adds the offset to `time.time` and `time.time_ns`, the wall clock of the bridge. The monotonic clock stays: on a
    real machine it does not jump either."""
    with open(path, "rb") as file:
        shared = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    real, real_ns = time.time, time.time_ns

    def offset() -> float:
        value: float = struct.unpack_from("=d", shared)[0]
        return value

    time.time = lambda: real() + offset()
    time.time_ns = lambda: real_ns() + round(offset() * 1e9)


def _name(task: asyncio.Task[object]) -> str:
    """The task's name, or the name of its coroutine if it has none."""
    name = task.get_name()
    return name if not name.startswith("Task-") else getattr(task.get_coro(), "__qualname__", name)


def _count_on_signal(path: Path) -> None:
    answers = 0

    def count(*_: object) -> None:
        nonlocal answers
        answers += 1
        gc.collect()
        # Without the objects that the bridge excluded from collection at its start (`gc.freeze`).
        objects = gc.get_objects()
        kinds = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in objects)
        counts = {
            "answer": answers,
            "tasks": sorted(_name(task) for task in asyncio.all_tasks()),
            "objects": len(objects),
            "kinds": dict(kinds.most_common(200)),
        }
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(counts))
        draft.replace(path)

    signal.signal(signal.SIGUSR2, count)
