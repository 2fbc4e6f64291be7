"""Where log lines go and how they look: JSON for machines, colours for a terminal, always to standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog

REPEATED_LINE_SECONDS = 10.0
"""Any client can cause some log lines at any rate; each is written at most once in this time."""

_QUIET = {
    # They report each broken connection at several levels, with tracebacks; bridge.broker says it once, with its cause.
    "aiormq": logging.CRITICAL,
    "aio_pika": logging.CRITICAL,
    "hypercorn": logging.WARNING,
    "quart": logging.ERROR,
    "httpx": logging.WARNING,
    "opentelemetry.trace": logging.ERROR,  # It warns of what publishers write; that it cannot send is told elsewhere.
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
    """One log line, at most once in `REPEATED_LINE_SECONDS`, with the number of those left out before it.

    Args:
        write: a method of a logger, as in `_log.error`.
    """

    def __init__(self, event: str, write: Callable[..., object], clock: Callable[[], float] = time.monotonic) -> None:
        self._event = event
        self._write = write
        self._clock = clock
        self._due = float("-inf")
        self._left_out = 0

    def log(self, **facts: object) -> None:
        now = self._clock()
        if now < self._due:
            self._left_out += 1
            return
        self._write(self._event, **facts, left_out=self._left_out)
        self._due, self._left_out = now + REPEATED_LINE_SECONDS, 0
