"""How long the tests wait for a signal, and longer deadlines of the bridge, so that a slow machine fails no test.

`python -m tests.patience serve` is `bridge serve` with these deadlines.
"""

from __future__ import annotations

import importlib
import json
import os

from tests.chaos import inside

PATIENCE = 120.0
"""Seconds. Every wait for a signal has this limit. No test depends on how long a wait takes: milliseconds on an idle
machine, and up to a thousand times as long on a busy one."""

DEADLINES = {
    # If the log does not answer for this long, a stream gets a gap.
    "service.broker.eventlog.PATIENCE_SECONDS": 0.8 * PATIENCE,
    # If its queues are not bound for this long, a new stream ends as `busy`.
    "service.streams.hub.ATTACH_SECONDS": 0.9 * PATIENCE,
    "amqp.CONNECT_SECONDS": PATIENCE / 2,
    # If RabbitMQ does not answer about the quarantine for this long, streams start without it.
    "service.broker.feed.QUARANTINE_SECONDS": PATIENCE,
    # If the log does not continue for this long after a loss, all streams get a gap.
    "service.broker.tail.VERIFY_SECONDS": 0.8 * PATIENCE,
    # If a client is slow for this long, the bridge closes its connection.
    "service.http.entrance.HEADER_SECONDS": PATIENCE,
    "service.http.entrance.ANSWER_SECONDS": PATIENCE,
    "service.http.entrance.KEEP_ALIVE_SECONDS": 2 * PATIENCE,
    "service.http.http1.LINGER_SECONDS": PATIENCE,
    # A look-up of the console that takes longer is an error.
    "service.broker.lookup.LOOK_SECONDS": PATIENCE,
}
"""Constants of modules of `bridge`, for the bridge under test. A test may set other values."""

VARIABLE = "SUITE_DEADLINES"


def apply() -> None:
    """Sets the constants that the environment names, before the bridge starts."""
    for name, seconds in json.loads(os.environ.get(VARIABLE, "{}")).items():
        module, _, constant = name.rpartition(".")
        target = importlib.import_module(f"bridge.{module}")
        assert hasattr(target, constant), f"bridge.{name} does not exist any more"
        setattr(target, constant, seconds)
    if inside.wanted():
        inside.apply()


if __name__ == "__main__":
    apply()
    from bridge.cli import main

    main()
