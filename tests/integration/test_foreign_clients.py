"""Clients from npm and PyPI get the same events from a stream as the independent decoder, and nothing else.

The npm packages are those of tests/node.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import httpx_sse
import pytest
import sseclient

from tests.conftest import OpenStream, StartService
from tests.node import copy_script, find_node
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

NAMES = "bridge.ready,job.completed,notification"
TEXTS = ["plain", "a\r\nb\n\nc", "data: x\n\nevent: evil\ndata: y\n\n", "\u2028\u2029\x85", "😀" * 900, ": comment", ""]

Dispatched = tuple[str, str | None, str]
Reader = Callable[[Service], AsyncIterator[Dispatched]]


def npm(client: str) -> Reader:
    async def read(service: Service) -> AsyncIterator[Dispatched]:
        folder = tempfile.TemporaryDirectory()
        process = await asyncio.create_subprocess_exec(
            find_node(),
            copy_script("read.mjs", Path(folder.name)),
            client,
            f"{service.public}/events",
            mint("42"),
            NAMES,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=2**20,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while line := await process.stdout.readline():
                name, event_id, data = json.loads(line)
                yield name, event_id, data
            raise AssertionError((await process.stderr.read()).decode())
        finally:
            process.kill()
            await process.communicate()
            folder.cleanup()

    return read


async def read_httpx_sse(service: Service) -> AsyncIterator[Dispatched]:
    headers = {"Authorization": f"Bearer {mint('42')}"}
    async with (
        httpx.AsyncClient() as client,
        httpx_sse.aconnect_sse(client, "GET", f"{service.public}/events", headers=headers) as source,
    ):
        async for event in source.aiter_sse():
            yield event.event, event.id, event.data


async def read_sseclient(service: Service) -> AsyncIterator[Dispatched]:
    found: asyncio.Queue[Dispatched] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def run() -> None:
        headers = {"Authorization": f"Bearer {mint('42')}"}
        with httpx.Client() as client, client.stream("GET", f"{service.public}/events", headers=headers) as response:
            for event in sseclient.SSEClient(response.iter_bytes()).events():
                loop.call_soon_threadsafe(found.put_nowait, (event.event, event.id, event.data))

    reading = asyncio.create_task(asyncio.to_thread(run))
    try:
        while True:
            yield await found.get()
    finally:
        await service.stop()  # Only this ends the thread that reads.
        await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize(
    "read",
    [
        npm("eventsource"),
        npm("eventsource-parser"),
        npm("event-source-polyfill"),
        npm("@microsoft/fetch-event-source"),
        read_httpx_sse,
        read_sseclient,
    ],
    ids=[
        "eventsource",
        "eventsource-parser",
        "event-source-polyfill",
        "fetch-event-source",
        "httpx-sse",
        "sseclient-py",
    ],
)
async def test_each_gets_the_same_events_and_no_empty_event(
    start: StartService, vhost: Vhost, connect: OpenStream, read: Reader
) -> None:
    service = await start(HEARTBEAT_SECONDS="0.1")
    ours = await connect(service)
    theirs = read(service)
    async with asyncio.timeout(PATIENCE):
        name, _, data = await anext(theirs)
        assert (name, json.loads(data)["user"]) == ("bridge.ready", "42")
        for number, text in enumerate(TEXTS):
            await vhost.publish("user.42.notification", cloudevent(f"e{number}", "notification", title="x", body=text))
            # Heartbeats in between: a client must report nothing for these comments.
            await ours.comments(ours.decoder.comments + 2)
        await vhost.publish("all.job.completed", cloudevent("last"))
        expected = [await ours.next() for _ in range(len(TEXTS) + 1)]
        found = [await anext(theirs) for _ in expected]
    await theirs.aclose()  # type: ignore[attr-defined]
    assert [(name, data) for name, _, data in found] == [(frame.event, frame.data) for frame in expected]
    assert all(event_id for _, event_id, _ in found)
