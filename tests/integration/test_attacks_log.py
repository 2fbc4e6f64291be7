"""Users who use the log and the broker too much, and what other users get meanwhile. With a real broker."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.bench.publish import close as close_publisher
from tests.bench.publish import connect as raw_publisher
from tests.bench.publish import message
from tests.client import Stream
from tests.conftest import OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

NEVER = 1000 * PATIENCE
"""A deadline that is longer than the test."""

DONE = "job.completed"


async def cursor_of(service: Service, connect: OpenStream, user: str) -> str:
    stream = await connect(service, user)
    cursor = stream.frames[0].id
    await stream.close()
    return cursor


async def fill(vhost: Vhost, count: int) -> None:
    """Puts so many entries for another user into the log."""

    def publish() -> None:
        broker = raw_publisher(vhost.port, vhost.name)
        for at in range(0, count, 1_000):
            broker.sendall(b"".join(message("user.other.job.progress", n) for n in range(at, at + 1_000)))
        close_publisher(broker)

    await asyncio.to_thread(publish)


async def come_back(service: Service, connect: OpenStream, user: str, cursor: str) -> Stream:
    return await connect(service, user, headers={"Last-Event-ID": cursor}, ready=False)


@pytest.mark.contract("2.45", "5.57")
async def test_a_token_that_connects_again_and_again_causes_no_work_at_the_broker(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    # The user's budget of openings does not refill during the test.
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
    # Each user has a separate budget of openings.
    innocent = await connect(service, "42")
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    assert await innocent.ids(1) == ["e1"]


@pytest.mark.contract("2.46", "2.48", "2.50")
async def test_a_user_without_budget_waits_with_heartbeats_while_others_are_served(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start(
        LOG_ENTRIES_PER_USER="10000", HEARTBEAT_SECONDS="0.2", deadlines={"service.broker.scans.REFILL_SECONDS": NEVER}
    )
    cursor = await cursor_of(service, connect, "attacker")
    await fill(vhost, 60_000)
    # With the feed log, a new stream's position is where this process has read to.
    reader = await connect(service, "reader")
    await vhost.publish(f"user.reader.{DONE}", cloudevent("read"))
    assert await reader.ids(1) == ["read"]
    near = await cursor_of(service, connect, "42")
    await vhost.publish_all([(f"user.{user}.{DONE}", cloudevent(f"for-{user}")) for user in ("attacker", "42")])
    first = await come_back(service, connect, "attacker", cursor)
    assert (await first.ready()).json["resumed"] is True
    further = [await come_back(service, connect, "attacker", cursor) for _ in range(9)]
    async with asyncio.timeout(PATIENCE):
        while await service.metric("bridge_log_waiting_for_budget") < 10:
            pass
    line = await service.logged("replay waits for its user's budget")
    assert line["user"] == "attacker"
    # The others' replays are read meanwhile, short and long ones.
    innocent = await come_back(service, connect, "42", near)
    assert await innocent.ids(1) == ["for-42"]
    returning = await come_back(service, connect, "43", cursor)
    assert (await returning.ready()).json["resumed"] is True
    # For the attacker, at most the budget and one scan that had begun were read; for the other user far behind, too.
    assert await service.metric("bridge_log_entries_read") <= 2 * (10_000 + 20_000) + 3_000
    # The attacker's streams wait, with heartbeats where they are ready, and nothing is skipped.
    await first.comments(first.decoder.comments + 2)
    assert [frame.event for frame in first.frames] == ["bridge.ready"]
    assert [stream.raw for stream in further if stream.raw and b'resumed":true' not in stream.raw] == []
    # The further streams may share the scan of the other user, who needs the same entries.
    assert await service.metric("bridge_log_waiting_for_budget") >= 1


@pytest.mark.contract("2.49")
async def test_replays_alternate_and_each_is_complete_and_in_order(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    """Meanwhile one user makes the bridge read the log from its beginning again and again, in short scans."""
    service = await start(
        OPENINGS_PER_USER="100000",
        MAX_CONNECTIONS_PER_USER="1000",
        deadlines={"service.broker.scans.SCAN_COST": 500, "service.broker.scans.NEAR_ENTRIES": 2_000},
    )
    users = [f"u{number}" for number in range(4)]
    cursors = {user: await cursor_of(service, connect, user) for user in ("attacker", *users)}
    expected: dict[str, list[str]] = {user: [] for user in users}
    for part in range(4):
        await fill(vhost, 2_000)
        for user in users:
            names = [f"{user}-{part}-{number}" for number in range(20)]
            await vhost.publish_all([(f"user.{user}.{DONE}", cloudevent(name)) for name in names])
            expected[user] += names
        # Each later user was away for a shorter time.
        for user in users[part + 1 :]:
            cursors[user] = await cursor_of(service, connect, user)
            expected[user] = []

    async def attack() -> None:
        while True:
            stream = await come_back(service, connect, "attacker", cursors["attacker"])
            with contextlib.suppress(EOFError, ConnectionError, asyncio.IncompleteReadError):
                await stream.ready()
            await stream.close()

    attacking = [asyncio.create_task(attack()) for _ in range(5)]
    returning = {user: await come_back(service, connect, user, cursors[user]) for user in users}
    for user, stream in returning.items():
        assert (await stream.ready()).json["resumed"] is True
        assert await stream.ids(len(expected[user])) == expected[user], user
        assert [frame.event for frame in stream.frames].count("bridge.gap") == 0
    assert not any(task.done() for task in attacking), "the attack ended too early"
    for task in attacking:
        task.cancel()
    await asyncio.gather(*attacking, return_exceptions=True)
    unfinished = [line for line in service.lines if line["event"] == "log read" and line["unfinished"]]
    assert unfinished, "no scan ended early to let another user's scan begin"
