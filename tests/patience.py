"""How long the tests wait for a signal, and the bridge's own deadlines that a slow machine must not trip.

`python -m tests.patience serve` is `bridge serve` with those deadlines raised.
"""

from __future__ import annotations

import importlib
import json
import os

from tests.chaos import inside

PATIENCE = 120.0
"""Seconds. Every wait for a signal has this limit, and nothing in a test depends on how much of it
is used: in a quiet hour a wait takes milliseconds, on a busy machine it may take a thousand times
as long."""

DEADLINES = {
    # Without an answer of the log for so long, the bridge tells a gap.
    "service.broker.eventlog.PATIENCE_SECONDS": 0.8 * PATIENCE,
    # Without its queues for so long, a new stream is told `busy`.
    "service.streams.hub.ATTACH_SECONDS": 0.9 * PATIENCE,
    "amqp.CONNECT_SECONDS": PATIENCE / 2,
    # Without an answer about the quarantine for so long, streams are made without it.
    "service.broker.live.QUARANTINE_SECONDS": PATIENCE,
    # A client that is slow for so long is sent away.
    "service.http.entrance.HEADER_SECONDS": PATIENCE,
    "service.http.entrance.ANSWER_SECONDS": PATIENCE,
    "service.http.entrance.KEEP_ALIVE_SECONDS": 2 * PATIENCE,
    "service.http.http1.LINGER_SECONDS": PATIENCE,
    # A look-up of the console that takes longer is an error.
    "service.broker.lookup.LOOK_SECONDS": PATIENCE,
}
"""Of the bridge under test, unless a test sets them itself: constants of modules of `bridge`."""

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
