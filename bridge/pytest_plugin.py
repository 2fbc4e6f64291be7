"""Fixtures for pytest. pytest loads them only if a program's conftest.py names this module:

pytest_plugins = ["bridge.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bridge.testing import FakeBlockingPublisher, FakePublisher


@pytest.fixture
def fake_publisher() -> FakePublisher:
    """A fake `Publisher`, new for each test."""
    return FakePublisher()


@pytest.fixture
def fake_blocking_publisher() -> Iterator[FakeBlockingPublisher]:
    """A fake `Publisher.blocking(...)`, new for each test and closed after it."""
    with FakePublisher.blocking() as fake:
        yield fake
