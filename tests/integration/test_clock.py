"""The wall clock of a bridge jumps while streams are open."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from tests.chaos import inside
from tests.client import Stream
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

HOUR = 3_600.0


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
async def test_a_busy_stream_still_gets_a_gap_for_events_that_cannot_be_read(
    vhost: Vhost, tmp_path: Path, jump: float
) -> None:
    clock = inside.Clock(tmp_path / "clock")
    service = Service(vhost.url)
    service.set_variable(inside.CLOCK, str(clock.path))
    await service.start()
    stream = Stream(service.public, mint("42", ttl=86_400))
    try:
        await stream.open()
        await stream.ready()
        await vhost.publish("user.42.job.unheard_of", cloudevent("u1", "job.unheard_of"))
        assert (await stream.until("bridge.gap")).json["reason"] == "not-readable"
        clock.set(jump)
        await vhost.publish("user.42.job.unheard_of", cloudevent("u2", "job.unheard_of"))

        async def keep_busy() -> None:
            number = 0
            while True:
                await vhost.publish("user.42.job.completed", cloudevent(f"e{number}"))
                number += 1
                await asyncio.sleep(0.2)  # Often enough that no heartbeat is due.

        publishing = asyncio.create_task(keep_busy())
        try:
            assert (await stream.until("bridge.gap")).json["reason"] == "not-readable"
        finally:
            publishing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await publishing
    finally:
        await stream.close()
        await service.stop()
