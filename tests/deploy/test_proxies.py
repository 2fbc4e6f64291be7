"""The short version of `make proxies`: each real proxy, as it is shipped, with every check at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.conftest import StartService
from tests.deploy import checks
from tests.deploy.proxies import EDGES, SHIPPED, Edge, shipped
from tests.rabbit import Vhost

pytestmark = pytest.mark.any_rabbitmq


# Clients that are cut leave sockets to the collector: that is what being cut is.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", EDGES, ids=lambda kind: kind.name)
async def test_streams_pass_through(kind: type[Edge], start: StartService, vhost: Vhost, tmp_path: Path) -> None:
    async with checks.behind(kind, start, vhost, tmp_path, idle_seconds=4) as place:
        async with asyncio.TaskGroup() as group:
            opened = asyncio.Event()
            group.create_task(checks.idle_limit(place, opened))
            await asyncio.gather(
                checks.each_at_once(place, 5),
                checks.resume(place),
                checks.many_on_one_connection(place, 8),
                checks.leaves(place),
                checks.nothing_private(place),
                opened.wait(),
            )
            # The quiet streams stay open meanwhile: a reload is no reason to cut them either.
            await checks.reload(place, readers=3, every=0.04)
        await checks.away(place)


@pytest.mark.parametrize("kind", [kind for kind in EDGES if kind.limited], ids=lambda kind: kind.name)
async def test_one_token_opens_so_many_streams(
    kind: type[Edge], start: StartService, vhost: Vhost, tmp_path: Path
) -> None:
    async with checks.behind(kind, start, vhost, tmp_path, idle_seconds=60, limited=True) as place:
        await checks.rate_limit(place)


def test_what_a_test_changes_has_to_be_there() -> None:
    for path in SHIPPED.iterdir():
        with pytest.raises(AssertionError, match="no 'not in any of them'"):
            shipped(path.name, {"not in any of them": ""})
