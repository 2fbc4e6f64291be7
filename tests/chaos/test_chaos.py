"""The short version of `make chaos`: every fault at least once."""

import json

import pytest

from deploy.local.node import Installation
from tests.chaos.run import LEAST_EVENTS, LEAST_PAUSE, chaos


# Clients whose connection is cut leave sockets to the garbage collector.
@pytest.mark.contract("2.39")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_every_fault_under_load_loses_nothing(rabbitmq: Installation) -> None:
    report, verdict, run = await chaos(seed=7, seconds=25, rabbitmq=rabbitmq, longest=LEAST_PAUSE)
    logs = "\n".join(service.text[-4000:] for service in run.replicas)
    faults = "\n".join(verdict.faults[:40])
    assert verdict.good, f"{faults}\n{json.dumps(report)}\n{logs}"
    assert verdict.expected > LEAST_EVENTS
    assert report["empty_blocks"] == 0
    assert report["gaps"] == 0
    assert not run.crashes, run.crashes
    assert set(run.faults) == {fault.__name__ for _, fault in run.weights}
    assert run.shortages
