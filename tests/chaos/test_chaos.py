"""The short version of `make chaos`: every fault at least once."""

import json

import pytest

from deploy.local.node import Installation
from tests.chaos.run import LEAST_EVENTS, LEAST_PAUSE, chaos


# Clients that are cut leave sockets to the collector: that is what being cut is.
@pytest.mark.contract("2.39")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_minute_of_everything_loses_nothing(rabbitmq: Installation) -> None:
    report, verdict, storm = await chaos(seed=7, seconds=25, rabbitmq=rabbitmq, longest=LEAST_PAUSE)
    logs = "\n".join(service.text[-4000:] for service in storm.replicas)
    faults = "\n".join(verdict.faults[:40])
    assert verdict.good, f"{faults}\n{json.dumps(report)}\n{logs}"
    assert verdict.owed > LEAST_EVENTS
    assert report["empty_blocks"] == 0
    assert report["gaps_told"] == 0
    assert not storm.crashes, storm.crashes
    assert set(storm.faults) == {fault.__name__ for _, fault in storm.weights}
    assert storm.shortages
