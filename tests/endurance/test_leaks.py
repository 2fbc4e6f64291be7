"""The short version of `make leaks`: what was opened, lost or expired leaves nothing behind."""

from pathlib import Path

import pytest

from tests.endurance.leaks import SCENARIOS, leaks
from tests.rabbit import Vhost

COUNTS = {"streams": 400, "losses": 40, "tokens": 200}


# Clients that are cut leave sockets to the collector: that is what being cut is.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SCENARIOS)
async def test_nothing_is_left(vhost: Vhost, tmp_path: Path, name: str) -> None:
    before, after, bench = await leaks(vhost, tmp_path, name, COUNTS[name])
    assert after.counts.held == before.counts.held, after.counts.differs(before.counts)
    assert not [line for line in bench.service.complaints if "Traceback" in line]
