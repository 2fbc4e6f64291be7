"""docs/examples/acme-events, installed as workers and bridges in other repositories install it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost
from tests.service import ROOT

pytestmark = pytest.mark.any_rabbitmq

EXAMPLE = ROOT / "docs" / "examples" / "acme-events"


def install(source: Path, target: Path) -> None:
    # No index: the build packages are installed here, and its dependency is this tree.
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--no-deps", "--target", str(target), str(source)],
        check=True,
        timeout=PATIENCE,
    )


def work(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "worker.py")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE)


@pytest.mark.contract("4.2")
async def test_workers_and_bridge_install_one_catalogue(
    vhost: Vhost, start: StartService, connect: OpenStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(EXAMPLE, tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    service = await start(SCHEMAS="acme_events")
    stream = await connect(service, "42")
    monkeypatch.setenv("AMQP_URL", vhost.url)
    worker = await asyncio.to_thread(work, tmp_path)
    assert worker.returncode == 0, worker.stderr
    event = await stream.next_event()
    assert (event["id"], event["type"]) == (worker.stdout.strip(), "parcel.shipped")
    assert event["data"] == {"parcel_id": "p-1", "carrier": "DHL"}
    # The sample types of the bridge's own package are not served beside it.
    await vhost.publish("user.42.job.completed", b"{}")
    await service.logged("message refused")
    assert (await service.get("/schemas")).json().keys() == {"parcel.shipped"}
