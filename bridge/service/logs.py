"""Writes log lines to standard error: JSON for machines, colours for a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import structlog

from bridge.service.budgets import Budget

REPEATED_LINE_SECONDS = 10.0
"""Any client can cause some log lines at any rate. Each such line is written at most once in this time."""

_QUIET = {
    # They report each lost connection at several levels, with tracebacks. bridge.broker logs it once, with its cause.
    "aiormq": logging.CRITICAL,
    "aio_pika": logging.CRITICAL,
    "hypercorn": logging.WARNING,
    "quart": logging.ERROR,
    "httpx": logging.WARNING,
    "opentelemetry.trace": logging.ERROR,  # It warns about publishers' attributes. Export failures have another logger.
    "httpcore": logging.WARNING,
    "asyncio": logging.WARNING,
}


def configure() -> None:
    """Routes structlog and the standard library's logging through one formatter."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
        tail: list[Any] = []
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
        tail = [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)


class RareLine:
    """A log line that clients can cause at any rate. It is written at most once in `REPEATED_LINE_SECONDS`.

    Other occurrences are left out and counted; the next line has their number. In a running event loop, that line
    follows at most `REPEATED_LINE_SECONDS` after the first one left out. If nothing new occurs, it has only the counts.

    Args:
        event: the event of the line.
        write: a method of a logger, such as `_log.error`.
        by: a fact by which lines left out are also counted. It must have few different values.
        burst: the number of lines that may be written at once before the limit applies.
    """

    def __init__(
        self,
        event: str,
        write: Callable[..., object],
        clock: Callable[[], float] = time.monotonic,
        *,
        by: str = "",
        burst: int = 1,
    ) -> None:
        self._event = event
        self._write = write
        self._clock = clock
        self._by = by
        self._budget = Budget(burst, REPEATED_LINE_SECONDS)
        self._left_out: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        _rare_lines.add(self)

    def log(self, **facts: object) -> None:
        """Writes a line with these facts, or counts it as left out."""
        if self._budget.take(self._clock()):
            self._write_line(facts)
            return
        self._left_out[str(facts.get(self._by, ""))] += 1
        if self._timer is None:
            with contextlib.suppress(RuntimeError):  # Without an event loop, the next line has their number.
                self._timer = asyncio.get_running_loop().call_later(REPEATED_LINE_SECONDS, self.summarise)

    def summarise(self) -> None:
        """Writes a line with the number of lines left out, if there are any."""
        if self._left_out:
            self._budget.take(self._clock())
            self._write_line({})

    def _write_line(self, facts: dict[str, object]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counts, self._left_out = self._left_out, Counter()
        if self._by and counts:
            facts |= {"left_out_by_" + self._by: dict(counts)}
        self._write(self._event, **facts, left_out=counts.total())


_rare_lines: WeakSet[RareLine] = WeakSet()


def summarise_rare_lines() -> None:
    """Writes the counts of all lines left out so far. Call it at the end of the process, or these counts are lost."""
    for line in list(_rare_lines):
        line.summarise()
