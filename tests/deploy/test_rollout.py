"""The short version of `make rollout`."""

from __future__ import annotations

import json

import pytest

from deploy.local.node import Node
from tests.deploy.rollout import LEAST_EVENTS, rehearse

pytestmark = pytest.mark.any_rabbitmq


# What a drained replica closes leaves its clients' sockets to the collector.
@pytest.mark.contract("2.39")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_rolling_update_costs_nobody_an_event(node: Node) -> None:
    report, verdict = await rehearse(node, scale=0.05, replicas=2, clients=40)
    said = f"{json.dumps(report)}\n{verdict}"
    assert verdict.good, said
    assert verdict.expected > LEAST_EVENTS, said
    assert verdict.duplicates == 0, said
    assert report["gaps"] == 0, said
    assert report["exits"] == [0], said
    assert report["cut_without_goodbye"] == 0, said
    # Whoever was on an old replica had to go at least once.
    assert isinstance(report["reconnects"], int)
    assert report["reconnects"] >= 40, said
