"""Fixtures that several unit files use."""

from __future__ import annotations

import contextlib

import pytest

from bridge.service.broker.eventlog import EventLog
from bridge.service.settings import LogSettings


@pytest.fixture
def log() -> EventLog:
    """A log without a broker; `run` is never called. Tests call its parts, and replace the broker's answers."""
    return EventLog(
        ["amqp://nobody/"],
        log=LogSettings("events.log", "1h", 1_000),
        exchange="events",
        write_batch=contextlib.nullcontext(),
        entries_per_user=1_000_000,
    )
