"""The short version of `make proxies`: each real proxy with its shipped configuration, and all checks at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.conftest import StartService
from tests.deploy import checks
from tests.deploy.proxies import EDGES, SHIPPED, Edge, shipped
from tests.rabbit import Vhost

pytestmark = pytest.mark.any_rabbitmq


# Clients whose connection is cut leave sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", EDGES, ids=lambda kind: kind.name)
async def test_streams_pass_through(kind: type[Edge], start: StartService, vhost: Vhost, tmp_path: Path) -> None:
    async with checks.proxy_with_bridges(kind, start, vhost, tmp_path, idle_seconds=4) as setup:
        async with asyncio.TaskGroup() as group:
            opened = asyncio.Event()
            group.create_task(checks.idle_limit(setup, opened))
            await asyncio.gather(
                checks.events_at_once(setup, 5),
                checks.resume(setup),
                checks.many_on_one_connection(setup, 8),
                checks.closed_pages(setup),
                checks.nothing_private(setup),
                opened.wait(),
            )
            # The quiet streams stay open meanwhile: a reload must not cut them either.
            await checks.reload(setup, readers=3, every=0.04)
        await checks.no_bridge(setup)


@pytest.mark.parametrize("kind", [kind for kind in EDGES if kind.limited], ids=lambda kind: kind.name)
async def test_the_rate_limit_of_one_token(kind: type[Edge], start: StartService, vhost: Vhost, tmp_path: Path) -> None:
    async with checks.proxy_with_bridges(kind, start, vhost, tmp_path, idle_seconds=60, limited=True) as setup:
        await checks.rate_limit(setup)


def test_a_text_that_a_test_replaces_must_be_in_the_file() -> None:
    for path in SHIPPED.iterdir():
        with pytest.raises(AssertionError, match="no 'not in any of them'"):
            shipped(path.name, {"not in any of them": ""})
