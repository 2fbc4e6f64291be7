"""Runs `bridge serve` as a process of its own, started and stopped as an operator does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from bridge.service.http import auth
from tests.patience import DEADLINES, PATIENCE, VARIABLE

SECRET = "a-secret-of-the-tests-0123456789abcdef"

BRIDGE = os.environ.get("SUITE_BRIDGE", "tests.patience")
"""The module that is run: `bridge` with longer deadlines. `tests.slow` is the other one."""

FEEDS = os.environ.get("SUITE_FEED", "queues").split(",")
"""The feeds to test, `queues` or `log`. Chaos gives each replica the next one; elsewhere the first one counts."""

ROOT = Path(__file__).parent.parent

SAMPLES = "bridge.samples"
"""The catalogue of the tests, unless a test has its own."""


def bare_environment() -> dict[str, str]:
    """The environment of this process, without settings of the bridge."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BRIDGE_")}


def mint(user: str, *groups: str, ttl: int = 86_400) -> str:
    """A token that outlives the slowest run of the suite: many tests make one when they are imported."""
    return auth.mint(SECRET, user=user, groups=groups, ttl_seconds=ttl, now=time.time())


class Service:
    """
    Args:
        amqp_url: where its RabbitMQ is.
        deadlines: constants of modules of `bridge`, in seconds, as in {"service.streams.hub.ATTACH_SECONDS": 5}.
        descriptors: its soft and hard limit of open files, as `ulimit -Sn` and `-Hn` set them.
        settings: environment variables, without their prefix.
    """

    def __init__(
        self,
        amqp_url: str,
        *,
        deadlines: dict[str, float] | None = None,
        descriptors: tuple[int, int] | None = None,
        **settings: str,
    ) -> None:
        self._descriptors = descriptors
        self._environment = {
            **bare_environment(),
            "BRIDGE_AMQP_URL": amqp_url,
            "BRIDGE_SCHEMAS": SAMPLES,
            "BRIDGE_JWT_SECRET": SECRET,
            "BRIDGE_BIND": "127.0.0.1:0",
            "BRIDGE_INTERNAL_BIND": "127.0.0.1:0",
            # A fast machine opens more streams of one user than any browser does. Tests of the limit set it.
            "BRIDGE_OPENINGS_PER_USER": "1000000",
            **({"BRIDGE_FEED": FEEDS[0]} if settings.get("LOG") != "" else {}),
            **{f"BRIDGE_{name}": value for name, value in settings.items()},
            VARIABLE: json.dumps(DEADLINES | (deadlines or {})),
        }
        self.lines: list[dict[str, Any]] = []
        self.text = ""
        self._new_output = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None
        self.public = ""
        self.internal = ""

    def set(self, name: str, value: str) -> None:
        """Changes a setting for the next start."""
        self._environment[f"BRIDGE_{name}"] = value

    def set_variable(self, name: str, value: str) -> None:
        """Changes any environment variable, by its whole name, for the next start."""
        self._environment[name] = value

    async def start(self, *, ready: bool = True) -> None:
        """Waits until it serves, and with `ready` until it is connected. Drops the log lines of an earlier run."""
        self.lines, self.text = [], ""
        # The shell sets the limits: a function that runs between fork and exec is not safe with threads.
        limits = self._descriptors
        shell = [] if limits is None else ["/bin/sh", "-c", 'ulimit -Sn "$0" && ulimit -Hn "$1" && shift && exec "$@"']
        self._process = await asyncio.create_subprocess_exec(
            *shell,
            *map(str, limits or ()),
            sys.executable,
            "-m",
            BRIDGE,
            "serve",
            env=self._environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read())
        line = await self.logged("serving")
        self.public = f"http://{line['public']}"
        self.internal = f"http://{line['internal']}"
        if ready:
            await self.logged("broker connected")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            self.text += raw.decode()
            async with self._new_output:
                try:
                    self.lines.append(json.loads(raw))
                except ValueError:
                    self.lines.append({"event": raw.decode()})
                self._new_output.notify_all()
        async with self._new_output:
            self.lines.append({"event": "(end of output)"})
            self._new_output.notify_all()

    async def logged(self, event: str, *, count: int = 1, seconds: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """Waits for the log line with this event and these fields, the `count`-th of them."""

        def find() -> dict[str, Any] | None:
            found = [
                line
                for line in self.lines
                if line.get("event") == event and all(line.get(name) == value for name, value in fields.items())
            ]
            return found[count - 1] if len(found) >= count else None

        async with self._new_output:
            try:
                async with asyncio.timeout(seconds):
                    while (line := find()) is None:
                        if self.lines and self.lines[-1]["event"] == "(end of output)":
                            raise AssertionError(f"ended without logging {event!r}:\n{self.text}")
                        await self._new_output.wait()
            except TimeoutError:
                raise AssertionError(f"did not log {event!r} within {seconds} s:\n{self.text}") from None
        return line

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self, *, seconds: float = PATIENCE) -> int:
        """The exit code."""
        async with asyncio.timeout(seconds):
            code = await self._process.wait()
            assert self._reader is not None
            await self._reader
        return code

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self.ended()

    async def get(self, path: str, *, internal: bool = False, method: str = "GET", **options: Any) -> httpx.Response:
        base = self.internal if internal else self.public
        async with httpx.AsyncClient(base_url=base, timeout=PATIENCE) as client:
            return await client.request(method, path, **options)

    async def metric(self, name: str) -> float:
        """The value of one series, by its name and labels, as in `bridge_streams_ended_total{reason="drain"}`."""
        text = (await self.get("/metrics", internal=True)).text
        for line in text.splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no series {name} in\n{text}")
