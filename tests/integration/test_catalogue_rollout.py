"""A rolling deploy of the catalogue: workers are newer or older than replicas, and clients are online or away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.client import Stream
from tests.conftest import OpenStream, StartService
from tests.decoder import Frame
from tests.rabbit import Vhost, cloudevent
from tests.service import Service

NEW = '''
from typing import Annotated

from pydantic import Field

from bridge.event import EventData

class JobCompleted(EventData, type="job.completed"):
    job_id: str
    duration_seconds: Annotated[float, Field(ge=1)]

class JobArchived(EventData, type="job.archived"):
    """The type that only the new catalogue has."""
    job_id: str
'''
"""One more type than the sample catalogue, and one stricter model: it refuses jobs of less than a second."""

GAP = {"reason": "not-readable"}


class Fleet:
    """Two replicas with the old catalogue, and one with the new."""

    def __init__(self, old: Service, other_old: Service, new: Service, vhost: Vhost) -> None:
        self.old, self.other_old, self.new = old, other_old, new
        self._vhost = vhost

    async def publish(self, key: str, event_id: str, *, seconds: float = 5) -> None:
        """Publishes like a worker that knows both catalogues, or neither."""
        event_type = ".".join(key.rsplit(".", 2)[1:])
        data = {"job_id": event_id} | ({"duration_seconds": seconds} if event_type == "job.completed" else {})
        await self._vhost.publish(key, {**cloudevent(event_id, event_type), "data": data})


@pytest.fixture
async def fleet(
    start: StartService, vhost: Vhost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Awaitable[Fleet]]:
    async def start_fleet() -> Fleet:
        (tmp_path / "new_catalogue.py").write_text(NEW)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        old, other_old = await start(), await start()
        return Fleet(old, other_old, await start(SCHEMAS="new_catalogue"), vhost)

    return start_fleet


async def frames_to(stream: Stream, event_id: str) -> list[Frame]:
    """The frames up to this event, without the bridge's own frames except `bridge.gap`."""
    frames: list[Frame] = []
    while not (frames and not frames[-1].event.startswith("bridge.") and frames[-1].json["id"] == event_id):
        frame = await stream.next()
        if frame.event == "bridge.gap" or not frame.event.startswith("bridge."):
            frames.append(frame)
    return frames


async def come_back(
    connect: OpenStream, service: Service, last_event_id: str, to: str = "last"
) -> tuple[list[object], str]:
    """What a client gets that returns with this id, and the id of its `ready`."""
    stream = await connect(service, "42", "ops", headers={"Last-Event-ID": last_event_id})
    ready = stream.frames[0]
    assert ready.json["resumed"]
    return ids_and_gaps(await frames_to(stream, to)), ready.id


def ids_and_gaps(frames: list[Frame]) -> list[object]:
    return [frame.json if frame.event == "bridge.gap" else frame.json["id"] for frame in frames]


@pytest.mark.contract("5.58", "5.60")
@pytest.mark.parametrize("key", ["user.42", "group.ops", "all"])
async def test_a_worker_is_newer_than_the_replica(
    fleet: Callable[[], Awaitable[Fleet]], connect: OpenStream, key: str
) -> None:
    """The client is online at an old replica, and then away."""
    replicas = await fleet()
    online = await connect(replicas.old, "42", "ops")
    other_types = await connect(replicas.old, "42", "ops", query="types=job.completed")
    await replicas.publish(f"{key}.job.completed", "first")
    before = (await frames_to(online, "first"))[-1].id
    await replicas.publish(f"{key}.job.archived", "ahead")
    await replicas.publish(f"{key}.job.completed", "last")
    assert ids_and_gaps(await frames_to(online, "last")) == [GAP, "last"]
    assert ids_and_gaps(await frames_to(other_types, "last")) == ["first", "last"], "it did not ask for this type"

    for service, expected in (
        (replicas.new, ["ahead", "last"]),
        (replicas.other_old, [GAP, "last"]),
    ):
        frames_back, ready_id = await come_back(connect, service, before)
        assert frames_back == expected
        # Cut off before the gap arrived, the client has the id of `ready`, and a newer replica has the event.
        assert (await come_back(connect, replicas.new, ready_id))[0] == ["ahead", "last"]

    for service in (replicas.old, replicas.other_old):
        line = await service.logged("message refused", count=1)
        assert line["reason"] == "unknown-type"
    assert await replicas.other_old.metric('bridge_gaps_total{reason="not-readable"}') >= 1
    assert await replicas.new.metric('bridge_gaps_total{reason="not-readable"}') == 0


@pytest.mark.contract("5.25", "5.59")
async def test_a_model_became_stricter_and_a_worker_is_older(
    fleet: Callable[[], Awaitable[Fleet]], connect: OpenStream, vhost: Vhost
) -> None:
    """The log holds events that the new replica cannot read, and the old one can."""
    replicas = await fleet()
    online = await connect(replicas.old, "42")
    start_id = online.frames[0].id
    await online.close()
    for number in range(20):
        await replicas.publish("user.42.job.completed", f"short{number}", seconds=0.5)
    await replicas.publish("user.42.job.completed", "last")
    returns = await asyncio.gather(*(come_back(connect, replicas.new, start_id) for _ in range(5)))
    assert [frames for frames, _ in returns] == [[GAP, "last"]] * 5
    expected = [*(f"short{number}" for number in range(20)), "last"]
    assert (await come_back(connect, replicas.old, start_id))[0] == expected
    # Each was quarantined once, though many clients read the log.
    await replicas.new.logged("message refused", count=20)
    assert await replicas.new.metric('bridge_events_invalid_total{reason="schema"}') == 20
    assert await replicas.new.metric('bridge_log_unreadable_total{reason="schema"}') >= 20


@pytest.mark.contract("5.62")
async def test_a_message_that_no_catalogue_can_read_causes_no_gap(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    service = await start()
    online = await connect(service, "42")
    start_id = online.frames[0].id
    await vhost.publish("user.42.job.completed", b"{")
    await vhost.publish("user.42.job.completed", {**cloudevent("x"), "specversion": "2.0"})
    await vhost.publish("user.42.job.completed", {**cloudevent("x"), "type": "job.failed"})
    await vhost.publish("user.42.job.completed", cloudevent("last"))
    assert ids_and_gaps(await frames_to(online, "last")) == ["last"]
    assert (await come_back(connect, service, start_id))[0] == ["last"]


@pytest.mark.contract("5.58")
async def test_an_event_over_the_limit_of_this_replica_is_a_gap(
    start: StartService, vhost: Vhost, connect: OpenStream
) -> None:
    small, large = await start(MAX_EVENT_BYTES="1024"), await start()
    streams = [await connect(small, "42"), await connect(large, "42")]
    await vhost.publish("user.42.job.completed", cloudevent("long", result_url="x" * 1500))
    await vhost.publish("user.42.job.completed", cloudevent("last"))
    assert ids_and_gaps(await frames_to(streams[0], "last")) == [GAP, "last"]
    assert ids_and_gaps(await frames_to(streams[1], "last")) == ["long", "last"]
