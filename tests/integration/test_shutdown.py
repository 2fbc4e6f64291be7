"""SIGTERM with open, idle, busy and stalled streams: each gets `bridge.bye`, then the process exits with 0."""

from __future__ import annotations

import asyncio
import signal
import socket
import time

import pytest

from tests.conftest import Eventually, OpenStream, StartService
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent

FOR_EVER = {"service.main.STOP_SECONDS": 10 * PATIENCE, "amqp.CLOSE_SECONDS": 10 * PATIENCE}
"""With these, a service that waits without a reason still runs when the test gives up, so the test fails."""


@pytest.mark.contract("2.12", "2.34", "2.54")
async def test_a_drain_ends_each_stream_at_its_own_time(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(DRAIN_SECONDS="2", RETRY_SECONDS="50")
    streams = [await connect(service, str(n)) for n in range(40)]
    began = time.monotonic()
    service.signal(signal.SIGTERM)

    async def read_bye(number: int) -> tuple[float, int]:
        (bye,) = await streams[number].rest()
        assert bye.json == {"reason": "drain"}
        assert streams[number].ended
        assert bye.retry is not None
        return time.monotonic() - began, bye.retry

    await service.logged("draining")
    assert (await service.get("/readyz", internal=True)).json()["reason"] == "draining"
    late = await connect(service, "late", ready=False)
    assert late.status == 200
    assert [frame.json for frame in await late.rest()] == [{"reason": "drain"}]

    byes = await asyncio.gather(*(read_bye(number) for number in range(40)))
    # On a slow machine streams may end later than planned, but never earlier.
    assert max(at for at, _ in byes) > 1.3
    retries = [retry for _, retry in byes]
    assert all(100 <= retry <= 2000 for retry in retries)
    assert len(set(retries)) > 30
    assert await service.ended() == 0
    assert "streams did not end" not in service.text, "it waited although all streams had ended"
    assert vhost.live_queues() == []


async def test_the_process_exits_once_all_streams_have_their_bye(start: StartService, connect: OpenStream) -> None:
    # Several services, because an earlier bug was a race that showed in one of three.
    services = [await start(DRAIN_SECONDS="0.2", deadlines=FOR_EVER) for _ in range(5)]
    # Streams that have just opened: the bridge still reads the log for them, and must close that connection, too.
    streams = [await connect(service, str(n)) for n in range(20) for service in services]
    for service in services:
        service.signal(signal.SIGTERM)
    await asyncio.gather(*(stream.rest() for stream in streams))
    assert [await service.ended() for service in services] == [0] * 5
    assert "streams did not end" not in "".join(service.text for service in services)


async def test_what_has_arrived_is_sent_before_the_bye(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start(DRAIN_SECONDS="0")
    stream = await connect(service, receive_buffer=4096)
    await vhost.publish_all([("user.42.job.completed", cloudevent(f"e{n}", result_url="x" * 1000)) for n in range(200)])
    async with asyncio.timeout(PATIENCE):
        while await service.metric("bridge_events_received_total") < 200:
            pass
    service.signal(signal.SIGTERM)
    frames = await stream.rest()
    assert [frame.json["id"] for frame in frames[:-1]] == [f"e{n}" for n in range(200)]
    assert frames[-1].json == {"reason": "drain"}
    assert await service.ended() == 0


async def test_a_stalled_client_does_not_keep_the_process_running(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    # The limit for stalled clients must not end the stream in this test.
    service = await start(
        DRAIN_SECONDS="0.5", BACKLOG_EVENTS="100000", BACKLOG_BYTES="100000000", STALL_SECONDS=str(10 * PATIENCE)
    )
    await connect(service, receive_buffer=4096)
    idle = await connect(service, "idle")
    await vhost.publish_all([("user.42.job.completed", cloudevent(f"e{n}", result_url="x" * 2000)) for n in range(500)])
    service.signal(signal.SIGTERM)
    assert [frame.json for frame in await idle.rest()] == [{"reason": "drain"}]
    assert await service.ended() == 0


async def test_without_streams_the_process_exits_at_once(start: StartService) -> None:
    service = await start(DRAIN_SECONDS=str(10 * PATIENCE), deadlines=FOR_EVER)
    service.signal(signal.SIGINT)
    assert await service.ended() == 0


async def test_a_drain_while_the_broker_is_away(
    start: StartService, vhost: Vhost, connect: OpenStream, proxy: Proxy
) -> None:
    service = await start(amqp_url=vhost.url_at(proxy.port), DRAIN_SECONDS="0.5")
    stream = await connect(service)
    await proxy.refuse()
    proxy.cut()
    await service.logged("broker unavailable")
    service.signal(signal.SIGTERM)
    assert (await stream.until("bridge.bye")).json == {"reason": "drain"}
    assert await service.ended() == 0


@pytest.mark.contract("1.16", "1.17", "1.18")
async def test_if_the_process_is_killed_its_queues_are_deleted(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually
) -> None:
    service = await start()
    for number in range(5):
        await connect(service, str(number))
    service.signal(signal.SIGKILL)
    await service.ended()
    await eventually(lambda: [name for name in vhost.queues() if name.startswith("bridge.")] == [])


async def test_an_address_in_use(start: StartService) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(AssertionError, match="Address already in use"):  # It never starts to serve.
            await start(ready=False, BIND=f"127.0.0.1:{taken.getsockname()[1]}")
