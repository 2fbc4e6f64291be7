"""What several unit files start from."""

from __future__ import annotations

import contextlib

import pytest

from bridge.service.broker.eventlog import EventLog
from bridge.service.settings import LogSettings


@pytest.fixture
def log() -> EventLog:
    """Never run, and with no broker: asked for whom it would begin a scan, or what it does without an answer."""
    return EventLog(
        ["amqp://nobody/"],
        log=LogSettings("events.log", "1h", 1_000),
        exchange="events",
        write_batch=contextlib.nullcontext(),
        entries_per_user=1_000_000,
    )
