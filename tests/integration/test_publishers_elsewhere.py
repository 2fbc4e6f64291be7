"""The examples of docs/publishing.md for programs without the SDK do what the page says, also if the broker dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.local.node import Node
from tests.conftest import OpenStream
from tests.node import find_node, link_packages
from tests.patience import PATIENCE
from tests.rabbit import Vhost
from tests.service import Service

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"

# Publishes for as long as its input is open, and prints the id of each confirmed event.
DRIVERS = {
    "publish.mjs": """
import { Events, word } from "./publish.mjs";
const events = new Events(process.env.AMQP_URL, { source: "/test/node" });
let open = true;
process.stdin.on("end", () => (open = false)).resume();
for (let number = 0; open; number++) {
  const data = { job_id: `r-${number}`, duration_seconds: 1 };
  console.log(await events.publish(`user.${word("42")}`, "job.completed", data));
  await new Promise((resolve) => setTimeout(resolve, 5));
}
await events.close();
""",
    "publish.py": """
import itertools, os, select, sys, time
from publish import Events, word
events = Events(os.environ["AMQP_URL"], source="/test/pika")
for number in itertools.count():
    if select.select([sys.stdin], [], [], 0.005)[0]:
        break
    data = {"job_id": f"r-{number}", "duration_seconds": 1}
    print(events.publish(f"user.{word('42')}", "job.completed", data), flush=True)
events.close()
""",
}

TIMEOUTS = {"publish.mjs": "PATIENCE_MS = 30_000", "publish.py": "PATIENCE_SECONDS = 30.0"}


@pytest.fixture(params=sorted(DRIVERS))
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One of the examples, in a folder where it finds its library."""
    path = tmp_path / str(request.param)
    shutil.copy(EXAMPLES / path.name, path)
    link_packages(tmp_path)
    return path


def shorten_timeout(example: Path) -> None:
    text = example.read_text()
    timeout = TIMEOUTS[example.name]
    assert timeout in text
    example.write_text(text.replace(timeout, timeout.replace("30", "3")))


def lengthen_timeout(example: Path) -> None:
    """RabbitMQ's restart takes longer than half a minute on a slow machine."""
    text = example.read_text()
    assert TIMEOUTS[example.name] in text
    example.write_text(text.replace(TIMEOUTS[example.name], TIMEOUTS[example.name].replace("30", "300")))


@asynccontextmanager
async def running(script: Path, url: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        find_node() if script.suffix == ".mjs" else sys.executable,
        script,
        *arguments,
        cwd=script.parent,
        env=os.environ | {"AMQP_URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> list[str]:
    """Waits until it ends by itself, and returns what it has printed."""
    async with asyncio.timeout(PATIENCE):
        printed, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return printed.decode().split()


async def test_an_event_for_a_user_with_a_difficult_id(
    service: Service, vhost: Vhost, connect: OpenStream, example: Path
) -> None:
    user = "Ann.O'Neil+(test)!*~#%/ü😀@example.com"
    stream = await connect(service, user)
    async with running(example, vhost.url, user) as process:
        (event_id,) = await ended(process)
    event = await stream.next_event()
    assert (event["id"], event["type"]) == (event_id, "job.completed")
    assert event["data"] == {"job_id": "r-7", "duration_seconds": 3.2, "result_url": None}


async def test_an_error_that_waiting_does_not_fix_is_raised_at_once(vhost: Vhost, example: Path) -> None:
    """No bridge has made the exchange."""
    async with running(example, vhost.url, "42") as process:
        async with asyncio.timeout(PATIENCE):
            _, errors = await process.communicate()
        assert process.returncode == 1
        assert "no exchange 'events'" in errors.decode()


async def test_an_alarm_is_reported_and_the_call_ends(service: Service, vhost: Vhost, example: Path) -> None:
    """During an alarm RabbitMQ reads nothing from publishers. So it answers nothing: no confirm, and no close."""
    shorten_timeout(example)
    vhost.node.ctl("set_vm_memory_high_watermark", "0.00000001")
    try:
        async with running(example, vhost.url, "42") as process:
            async with asyncio.timeout(PATIENCE):
                _, errors = await process.communicate()
            assert process.returncode == 1
            assert "alarm" in errors.decode() or "ConnectionBlockedTimeout" in errors.decode()
    finally:
        vhost.node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")


async def test_a_broker_that_dies_loses_no_confirmed_event(
    service: Service, vhost: Vhost, node: Node, connect: OpenStream, example: Path
) -> None:
    lengthen_timeout(example)
    stream = await connect(service, "42")
    driver = example.with_stem("driver")
    driver.write_text(DRIVERS[example.name])
    node.flush()
    async with running(driver, vhost.url) as process, stream.read_on():
        assert process.stdout is not None
        assert process.stdin is not None
        confirmed = [(await process.stdout.readline()).decode().strip() for _ in range(50)]
        await asyncio.to_thread(node.kill)
        await asyncio.to_thread(node.start)
        confirmed += [(await process.stdout.readline()).decode().strip() for _ in range(100)]
        process.stdin.close()
        confirmed += await ended(process)
    assert await stream.ids(len(confirmed)) == confirmed
    assert [frame.event for frame in stream.frames].count("bridge.gap") == 0
