"""The processes of a benchmark, and their CPU time and memory from Linux."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of these processes since their start, all threads, user and system, to the nanosecond."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident_bytes(pids: list[int]) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE")


def with_children(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


class Child:
    """A process that prints a line when it serves, and is killed at the end.

    Args:
        ready_text: part of that line; None for a process that prints none.
        log: a file for its output, if there is much of it; without it, the output is read from a pipe.
    """

    def __init__(
        self,
        command: list[str],
        *,
        ready_text: str | None,
        folder: Path = ROOT,
        environment: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            output = subprocess.PIPE if log is None else stack.enter_context(log.open("w"))
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=sys.stderr if log is None else subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        if log is not None:
            while ready_text is not None and ready_text not in log.read_text():
                if self.process.poll() is not None:
                    raise RuntimeError(f"{command!r} ended without printing {ready_text!r}:\n{log.read_text()}")
                time.sleep(0.05)
        elif ready_text is not None:
            self.line_with(ready_text)

    @property
    def pids(self) -> list[int]:
        return with_children(self.process.pid)

    def line_with(self, text: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return line
        raise RuntimeError(f"{self.process.args!r} ended without printing {text!r}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Load:
    """The process of `tests.bench.load`."""

    def __init__(self) -> None:
        self._child = Child([sys.executable, "-m", "tests.bench.load"], ready_text=None)

    def send(self, do: str, **arguments: Any) -> None:
        pipe = self._child.process.stdin
        assert pipe is not None
        pipe.write(json.dumps({"do": do, **arguments}) + "\n")
        pipe.flush()

    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._child.line_with("{"))
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.answer()

    def end(self) -> None:
        self._child.end()


class Source:
    """The process of `tests.bench.publish`."""

    def __init__(self, port: int, vhost: str, *, rate: float, seconds: float, keys: list[str]) -> None:
        arguments = [str(port), vhost, str(rate), str(seconds), *keys]
        self._child = Child([sys.executable, "-m", "tests.bench.publish", *arguments], ready_text=None)

    def done(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._child.line_with("{"))
        self._child.end()
        return answer
