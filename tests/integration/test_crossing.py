"""A client's two queues may be far apart: no cursor of a burst loses an event, and a pause loses none."""

from __future__ import annotations

import asyncio
import json
import signal

import aio_pika
import pytest

from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.decoder import Decoder, Frame
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

EVENTS = 600
PUBLISHERS = 4
TOGETHER = 40
"""Clients that return at the same time."""

END = "last"


async def publish_burst(vhost: Vhost, count: int, *, first: int = 0, step: int = 1) -> None:
    """One publisher on one channel, to one user and to everybody in turn, as fast as possible.

    Args:
        count: of all publishers together.
        first: the number of its first event; `step` is the number of publishers.
    """
    connection = await aio_pika.connect(vhost.url_at(vhost.node.port))
    # Closing the connection drops what is not yet written; so close the channel first, which waits for it.
    async with connection, connection.channel(publisher_confirms=False) as channel:
        target = await channel.get_exchange("events", ensure=False)
        for number in range(first, count, step):
            key = "user.42" if number // step % 2 == 0 else "all"
            body = json.dumps(cloudevent(f"e{number}")).encode()
            await target.publish(aio_pika.Message(body), f"{key}.job.completed", mandatory=False)


async def read_all(stream: Stream, *, until: str) -> list[Frame]:
    found: list[Frame] = []
    while not found or found[-1].json["id"] != until:
        frame = await stream.next()
        assert frame.event != "bridge.gap", frame
        if not frame.event.startswith("bridge."):
            found.append(frame)
    return found


class Ids(Decoder):
    """A decoder that only splits frames: fast enough for a thousand streams of a thousand events."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = b""

    def feed(self, chunk: bytes) -> list[Frame]:
        *blocks, self._rest = (self._rest + chunk).split(b"\n\n")
        return [self._read(block.decode()) for block in blocks]

    @staticmethod
    def _read(block: str) -> Frame:
        members = dict(line.partition(": ")[::2] for line in block.split("\n"))
        return Frame(members["event"], members["data"], members.get("id", ""), None)


async def resumed(service: Service, cursor: str) -> list[str]:
    """The ids that a client gets that returns with this cursor, up to the end."""
    stream = Stream(service.public, mint("42"), headers={"Last-Event-ID": cursor})
    stream.decoder = Ids()
    await stream.open()
    ready = await stream.next()
    assert (ready.event, ready.json["resumed"]) == ("bridge.ready", True)
    ids = [""]
    while ids[-1] != END:
        frame = await stream.next()
        assert frame.event != "bridge.gap", frame
        if not frame.event.startswith("bridge."):
            ids.append(frame.json["id"])
    stream.abort()
    return ids[1:]


@pytest.mark.contract("2.39", "5.49")
@pytest.mark.parametrize("process", ["running", "stopped"])
async def test_every_cursor_of_a_burst_resumes_with_all_later_events(
    start: StartService, vhost: Vhost, connect: OpenStream, process: str
) -> None:
    """A client returns with each id that was sent. Nothing may be missing. `-s` shows how much was sent twice.

    Events of several publishers may be in the log in another order than in a queue.
    """
    service = await start(BACKLOG_EVENTS="10000", BACKLOG_BYTES="10000000", MAX_CONNECTIONS_PER_USER="100")
    stream = await connect(service)
    if process == "stopped":  # Both queues are full when it goes on: they are as far apart as they can be.
        service.signal(signal.SIGSTOP)
    bursts = [publish_burst(vhost, EVENTS, first=first, step=PUBLISHERS) for first in range(PUBLISHERS)]
    publishing = asyncio.gather(*bursts)
    if process == "stopped":
        await publishing
        service.signal(signal.SIGCONT)
    frames: list[Frame] = stream.frames[:1]
    while sum(frame.event == "job.completed" for frame in frames) < EVENTS:
        frames.append(await stream.next())
        assert frames[-1].event in ("job.completed", "bridge.position"), frames[-1]
    await publishing
    await vhost.publish("user.42.job.completed", cloudevent(END))
    await read_all(stream, until=END)
    live = [frame.json["id"] if frame.event == "job.completed" else None for frame in frames]
    assert sorted(filter(None, live)) == sorted(f"e{number}" for number in range(EVENTS))
    twice: list[int] = []
    read_before = await service.metric("bridge_log_entries_read")
    for at in range(0, len(frames), TOGETHER):
        some = range(at, min(at + TOGETHER, len(frames)))
        results = await asyncio.gather(*(resumed(service, frames[index].id) for index in some))
        for index, ids in zip(some, results, strict=True):
            missing = set(filter(None, live[index + 1 :])) - set(ids)
            assert not missing, f"the cursor of frame {index} loses {len(missing)}: {sorted(missing)[:5]}"
            twice.append(len(set(ids) & set(live[: index + 1])) + len(ids) - len(set(ids)))
    read = await service.metric("bridge_log_entries_read") - read_before
    print(
        f"{process}, {PUBLISHERS} publishers: {len(frames)} ids; "
        f"sent twice: mean {sum(twice) / len(twice):.2f}, worst {max(twice)}; "
        f"entries of the log read: {read / len(frames):.0f} per client; {TOGETHER} clients share a scan"
    )


async def cut_off_while_it_catches_up(service: Service, streams: list[Stream]) -> list[list[Frame]]:
    """What each client had read when its connection was cut, somewhere in the middle of the backlog."""
    found = []
    for number, stream in enumerate(streams):
        frames: list[Frame] = []
        while len(frames) < 100 + 50 * number:
            frame = await stream.next()
            assert frame.event != "bridge.gap"
            if not frame.event.startswith("bridge."):
                frames.append(frame)
        stream.abort()
        found.append(frames)
    return found


@pytest.mark.contract("5.49")
@pytest.mark.parametrize("connection", ["open", "closed"])
async def test_a_pause_of_the_process_loses_nothing(
    start: StartService, vhost: Vhost, connect: OpenStream, eventually: Eventually, connection: str
) -> None:
    """A pause as by throttling, a move of the machine or garbage collection. The broker fills both queues meanwhile."""
    service = await start(BACKLOG_EVENTS="10000", BACKLOG_BYTES="10000000", MAX_CONNECTIONS_PER_USER="100")
    streams = [await connect(service) for _ in range(6)]
    count = 2_000
    service.signal(signal.SIGSTOP)
    try:
        await publish_burst(vhost, count)
        if connection == "closed":
            # RabbitMQ lists a connection some seconds after it was made.
            await eventually(lambda: vhost.close_connections() > 0)
        await vhost.publish("user.42.job.completed", cloudevent(END))
    finally:
        service.signal(signal.SIGCONT)
    everything = {f"e{number}" for number in range(count)} | {END}
    if connection == "closed":
        for stream in streams:
            ids: list[str] = []
            while set(ids) != everything:
                frame = await stream.next()
                assert frame.event != "bridge.gap", frame
                if not frame.event.startswith("bridge."):
                    ids.append(frame.json["id"])
        return
    twice = 0
    for frames in await cut_off_while_it_catches_up(service, streams):
        seen = [frame.json["id"] for frame in frames]
        ids = await resumed(service, frames[-1].id)
        missing = everything - set(seen) - set(ids)
        assert not missing, f"{len(missing)} lost: {sorted(missing)[:5]}"
        twice += len(seen) + len(ids) - len(everything)
    print(f"sent twice: {twice}")


@pytest.mark.contract("2.37")
async def test_a_cursor_of_another_user_discloses_nothing(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "42")
    await publish_burst(vhost, 40)
    frame = (await read_all(stream, until="e39"))[-1]
    other = Stream(service.public, mint("43"), headers={"Last-Event-ID": frame.id})
    await other.open()
    assert (await other.next()).event == "bridge.ready"
    await vhost.publish("user.43.job.completed", cloudevent("mine"))
    ids = [frame.json["id"] for frame in await read_all(other, until="mine")]
    assert set(ids) <= {f"e{number}" for number in range(1, 40, 2)} | {"mine"}
    other.abort()
