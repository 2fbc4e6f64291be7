"""The short version of `make rollout`."""

from __future__ import annotations

import json

import pytest

from deploy.local.node import Node
from tests.deploy.rollout import LEAST_EVENTS, run_rollout

pytestmark = pytest.mark.any_rabbitmq


# Clients of a drained replica leave sockets to the garbage collector.
@pytest.mark.contract("2.39")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_rolling_update_loses_no_event(node: Node) -> None:
    report, verdict = await run_rollout(node, scale=0.05, replicas=2, clients=40)
    printed = f"{json.dumps(report)}\n{verdict}"
    assert verdict.good, printed
    assert verdict.expected > LEAST_EVENTS, printed
    assert verdict.duplicates == 0, printed
    assert report["gaps"] == 0, printed
    assert report["exits"] == [0], printed
    assert report["cut_without_bye"] == 0, printed
    # Each client of an old replica had to reconnect at least once.
    assert isinstance(report["reconnects"], int)
    assert report["reconnects"] >= 40, printed
