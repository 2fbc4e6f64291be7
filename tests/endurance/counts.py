"""Counts a bridge's resources: queues and bindings at RabbitMQ, file descriptors, tasks, objects and memory."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import inside
from tests.patience import PATIENCE
from tests.rabbit import Vhost
from tests.service import Service


@dataclass(frozen=True)
class Counts:
    queues: int
    bindings: int
    descriptors: int
    tasks: int
    objects: int
    rss_mb: float
    task_names: Counter[str]
    kinds: Counter[str]
    """Objects that the garbage collector tracks, by class."""

    @property
    def exact(self) -> tuple[int, int, int, int]:
        """The counts that must be as before. The others depend on caches, the allocator and the interpreter."""
        return (self.queues, self.bindings, self.descriptors, self.tasks)

    def differs(self, before: Counts) -> str:
        """Text for an error message: which counts are higher or lower."""
        return (
            f"before {before.exact}, after {self.exact} (queues, bindings, descriptors, tasks)\n"
            f"tasks: more {self.task_names - before.task_names}, fewer {before.task_names - self.task_names}\n"
            f"objects: more {(self.kinds - before.kinds).most_common(20)}"
        )


class CountedService(Service):
    """A bridge whose resources can be counted. Its log lines are counted and not kept: there may be a million."""

    def __init__(self, amqp_url: str, folder: Path, *, deadlines: dict[str, float] | None = None, **settings: str):
        super().__init__(amqp_url, deadlines=deadlines)
        for name, value in settings.items():
            self.set(name, value)
        self._path = folder / "counts.json"
        self.set_variable(inside.COUNTS, str(self._path))
        self._answers = 0
        self.events: Counter[str] = Counter()
        """How often each event was logged."""
        self.warnings: deque[str] = deque(maxlen=200)
        """The last lines that are not `info`."""

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            try:
                line = json.loads(raw)
            except ValueError:
                line = {"event": raw.decode(), "level": "unknown"}
            self.events[line["event"]] += 1
            if line.get("level") != "info":
                self.warnings.append(raw.decode())
            async with self._new_output:
                if line["event"] in ("serving", "broker connected") and len(self.lines) < 10:
                    self.lines.append(line)
                self._new_output.notify_all()
        async with self._new_output:
            self.lines.append({"event": "(end of output)"})
            self._new_output.notify_all()

    async def wait_until_logged(self, event: str, count: int) -> None:
        """Waits until the bridge has logged this event so many times."""
        async with asyncio.timeout(PATIENCE), self._new_output:
            await self._new_output.wait_for(lambda: self.events[event] >= count)

    async def count(self, vhost: Vhost) -> Counts:
        self._answers += 1
        self.signal(signal.SIGUSR2)
        async with asyncio.timeout(PATIENCE):
            while True:
                await asyncio.sleep(0.02)  # A file can only be polled.
                if self._path.exists() and (found := json.loads(self._path.read_text()))["answer"] >= self._answers:
                    break
        queues = await asyncio.to_thread(vhost.queues)
        bindings = await asyncio.to_thread(vhost.bindings)
        return Counts(
            queues=len(queues),
            bindings=len(bindings),
            descriptors=len(os.listdir(f"/proc/{self.pid}/fd")),
            tasks=len(found["tasks"]),
            objects=found["objects"],
            rss_mb=_rss_mb(self.pid),
            task_names=Counter(found["tasks"]),
            kinds=Counter(found["kinds"]),
        )

    async def stable_counts(self, vhost: Vhost, before: Counts | None = None) -> Counts:
        """Waits until the counts are as before, or the same twice, and returns them; after PATIENCE, any counts.

        RabbitMQ deletes queues a moment after their streams, and each watermark is a task for a moment.
        """
        deadline = time.monotonic() + PATIENCE
        last = await self.count(vhost)
        while True:
            await asyncio.sleep(0.5)  # Between two counts.
            now = await self.count(vhost)
            if now.exact == (before or last).exact or time.monotonic() > deadline:
                return now
            last = now


def _rss_mb(pid: int) -> float:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return round(int(status["VmRSS"].split()[0]) / 1024, 1)
