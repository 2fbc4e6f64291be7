"""The short version of `make leaks`: what was opened, lost or expired leaves nothing behind."""

from pathlib import Path

import pytest

from tests.endurance.leaks import SCENARIOS, leaks
from tests.rabbit import Vhost

COUNTS = {"streams": 400, "losses": 40, "tokens": 200}


# Clients whose connection is cut leave sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", SCENARIOS)
async def test_nothing_is_left(vhost: Vhost, tmp_path: Path, name: str) -> None:
    before, after, test = await leaks(vhost, tmp_path, name, COUNTS[name])
    assert after.counts.exact == before.counts.exact, after.counts.differs(before.counts)
    assert not [line for line in test.service.warnings if "Traceback" in line]
