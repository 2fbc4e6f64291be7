"""Fixtures for pytest. A program's conftest.py names this file; nothing loads it unasked.

pytest_plugins = ["bridge.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.testing import FakeBlockingPublisher, FakePublisher


@pytest.fixture
def fake_publisher() -> FakePublisher:
    """A fake of `Publisher`, a new one for each test."""
    return FakePublisher()


@pytest.fixture
def fake_blocking_publisher() -> Iterator[FakeBlockingPublisher]:
    """A fake of `Publisher.blocking(...)`, a new one for each test; closed with the test."""
    with FakePublisher.blocking() as fake:
        yield fake
