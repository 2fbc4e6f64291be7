"""Users who cost the log and the broker more than their share, and what others get meanwhile. A real broker."""

from __future__ import annotations

from tests.client import Stream
from tests.conftest import OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import mint


async def test_a_token_that_connects_again_and_again_costs_the_broker_nothing(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    # No opening comes back before the test is over.
    service = await start(OPENINGS_PER_USER="5", deadlines={"service.streams.hub.OPENINGS_SECONDS": 1000 * PATIENCE})
    token = mint("attacker")
    cursor = ""
    for number in range(50):
        async with Stream(service.public, token, headers={"Last-Event-ID": cursor}) as stream:
            frame = await stream.next()
            assert stream.status == 200, "an EventSource gives up for good on any other"
            if number < 5:
                assert frame.event == "bridge.ready"
                cursor = cursor or frame.id
            else:
                assert (frame.event, frame.json) == ("bridge.bye", {"reason": "busy"})
                assert 5_000 <= (frame.retry or 0) <= 15_000
                assert frame.id == cursor, "it comes back to where it was"
    assert await service.metric('bridge_streams_refused_total{cause="openings-per-user"}') == 45
    assert await service.metric("bridge_streams_opened_total") == 5
    refusals = [line for line in service.lines if line["event"] == "stream refused"]
    assert len(refusals) + refusals[-1]["left_out"] <= 45
    assert (refusals[0]["user"], refusals[0]["cause"]) == ("attacker", "openings-per-user")
    # Each user has openings of its own.
    innocent = await connect(service, "42")
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    assert await innocent.ids(1) == ["e1"]
