"""Runs the image that `make image` has built, as the rendered Deployment does. It is not part of `make test`: the build
needs root and a minute. `make image` runs these tests with podman or Docker."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local.node import free_ports
from tests.client import Stream
from tests.deploy.manifests import bridge, render, settings
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import SECRET, mint

IMAGE = os.environ.get("IMAGE", "rabbitmq-sse-bridge:0.1.0")
MOST_BYTES = 250_000_000

# Podman is installed only if there is no Docker. Its own runtime, crun, needs a delegated cgroup; runc does not.
# Without `--read-only-tmpfs=false`, Podman adds file systems for /tmp and /run, which could hide a write.
PODMAN = shutil.which("podman") is not None
ENGINE = ["podman", "--cgroup-manager=cgroupfs", "--runtime=/usr/sbin/runc"] if PODMAN else ["docker"]
READ_ONLY = ["--read-only", *(["--read-only-tmpfs=false"] if PODMAN else [])]


def inspect() -> dict[str, Any]:
    done = subprocess.run([*ENGINE, "image", "inspect", IMAGE], capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found[0]


def test_the_images_metadata() -> None:
    image = inspect()
    assert image["Size"] < MOST_BYTES
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["bridge"]
    assert config["Cmd"] == ["serve"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == IMAGE.rpartition(":")[2]
    assert labels["org.opencontainers.image.revision"] not in ("", "unknown")
    names = {variable.partition("=")[0] for variable in config["Env"]}
    assert not [name for name in names if name.startswith(("PIP_", "SSL_", "REQUESTS_"))], "settings of the build"


@pytest.fixture
def container(vhost: Vhost, tmp_path: Path) -> Iterator[tuple[str, str, str]]:
    """Its name, and its public and internal address."""
    pod, wanted = bridge(render("base"))
    assert wanted["securityContext"]["readOnlyRootFilesystem"] is True
    public, internal = free_ports(2)
    catalogue = tmp_path / "schemas"
    shutil.copytree(Path(__file__).parents[2] / "deploy/kubernetes/base/catalogue", catalogue)
    tmp_path.chmod(0o755)
    given = settings(render("base")) | {
        "BRIDGE_BIND": f"127.0.0.1:{public}",
        "BRIDGE_INTERNAL_BIND": f"127.0.0.1:{internal}",
        "BRIDGE_AMQP_URL": vhost.url,
        "BRIDGE_JWT_SECRET": SECRET,
        "BRIDGE_DRAIN_SECONDS": "1",
        "PYTHONPATH": "/etc/bridge/catalogue",
    }
    name = f"bridge-test-{public}"
    command = [
        *ENGINE, "run", "--detach", "--name", name, "--network=host", *READ_ONLY, "--cap-drop=ALL",
        "--security-opt=no-new-privileges", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096",
        f"--user={pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}",
        f"--volume={catalogue}:/etc/bridge/catalogue/schemas:ro",
        *(f"--env={key}={value}" for key, value in given.items()), IMAGE,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    try:
        yield name, f"http://127.0.0.1:{public}", f"http://127.0.0.1:{internal}"
    finally:
        subprocess.run([*ENGINE, "rm", "--force", name], check=True, stdout=subprocess.DEVNULL)


async def test_it_streams_with_a_read_only_file_system_and_ends_properly(
    vhost: Vhost, container: tuple[str, str, str]
) -> None:
    name, public, internal = container
    await until_ready(internal)
    async with Stream(public, mint("42")) as stream:
        await stream.ready()
        await vhost.publish("user.42.parcel.shipped", cloudevent("e1", "parcel.shipped", parcel_id="p-1"))
        assert await stream.ids(1) == ["e1"]
        killed = await asyncio.create_subprocess_exec(
            *ENGINE, "kill", f"--signal={signal.SIGTERM.value}", name, stdout=asyncio.subprocess.DEVNULL
        )
        assert await killed.wait() == 0
        assert json.loads((await stream.until("bridge.bye")).data) == {"reason": "drain"}
    process = await asyncio.create_subprocess_exec(*ENGINE, "wait", name, stdout=asyncio.subprocess.PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), 30)
    assert printed.split() == [b"0"]


async def until_ready(internal: str) -> None:
    deadline = time.monotonic() + PATIENCE
    async with httpx.AsyncClient() as client:
        while True:
            try:
                if (await client.get(f"{internal}/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)  # Between two polls.
