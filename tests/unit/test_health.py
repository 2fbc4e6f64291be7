"""A replica is ready when it can take new streams."""

from dataclasses import replace

import pytest

from bridge.service.health import Status, why_not_ready

GOOD = Status(started=True, draining=False, connections=5, max_connections=10, broker_away_seconds=None)


@pytest.mark.contract("2.75")
def test_ready() -> None:
    assert why_not_ready(GOOD, grace_seconds=30) is None
    assert why_not_ready(replace(GOOD, broker_away_seconds=29), grace_seconds=30) is None


@pytest.mark.contract("2.75")
@pytest.mark.parametrize(
    ("status", "word"),
    [
        (replace(GOOD, started=False, broker_away_seconds=1), "starting"),
        (replace(GOOD, draining=True), "draining"),
        (replace(GOOD, missing_keys="the key set https://issuer/keys cannot be used: 404"), "https://issuer/keys"),
        (replace(GOOD, connections=10), "cap"),
        (replace(GOOD, broker_away_seconds=31), "away"),
    ],
)
def test_not_ready(status: Status, word: str) -> None:
    reason = why_not_ready(status, grace_seconds=30)
    assert reason is not None
    assert word in reason


@pytest.mark.contract("2.75")
def test_an_excluded_check_does_not_count() -> None:
    full = replace(GOOD, connections=10, broker_away_seconds=31)
    assert why_not_ready(full, grace_seconds=30, exclude={"broker", "connections"}) is None
    assert "cap" in (why_not_ready(full, grace_seconds=30, exclude={"broker"}) or "")
    assert "away" in (why_not_ready(full, grace_seconds=30, exclude={"connections"}) or "")
    for status in [replace(full, started=False), replace(full, draining=True), replace(full, missing_keys="no answer")]:
        assert why_not_ready(status, grace_seconds=30, exclude={"broker", "connections"}) is not None
