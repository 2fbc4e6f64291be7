"""The OpenAPI document of a running bridge: the bridge does what the document says."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from tests.conftest import OpenStream, StartService
from tests.decoder import Frame
from tests.rabbit import Vhost, cloudevent
from tests.service import mint

PLAIN = {"Origin": "https://app.example"}


def check_frame(document: dict[str, Any], frame: Frame) -> None:
    """Validates the frame, and the JSON in its data."""
    block = {"event": frame.event, "data": frame.data, "id": frame.id, "retry": frame.retry}
    present = {name: value for name, value in block.items() if value not in ("", None)}
    schema = document["paths"]["/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(present)
    options = document["components"]["schemas"]["bridge-frame"]["anyOf"]
    [fitting] = [it for it in options if it["properties"]["event"]["const"] == frame.event]
    content = {**fitting["properties"]["data"]["contentSchema"], "components": document["components"]}
    jsonschema.Draft202012Validator(content).validate(json.loads(frame.data))


async def test_it_is_served_as_the_other_documents_are(start: StartService) -> None:
    service = await start(ALLOWED_ORIGINS="https://app.example")
    ours, theirs = [await service.get(path, headers=PLAIN) for path in ("/openapi.json", "/asyncapi.json")]
    assert ours.json()["openapi"] == "3.2.0"
    for name in ("content-type", "cache-control", "vary", "access-control-allow-origin"):
        assert ours.headers[name] == theirs.headers[name]
    assert (await service.get("/openapi.json", method="HEAD")).status_code == 200


@pytest.mark.contract("2.71")
async def test_frames_are_as_the_document_says(start: StartService, vhost: Vhost, connect: OpenStream) -> None:
    service = await start()
    document = (await service.get("/openapi.json")).json()
    stream = await connect(service, headers={"Last-Event-ID": "nothing-of-the-bridge"}, ready=False)
    frames = [await stream.next() for _ in range(2)]
    await vhost.publish("user.42.job.completed", cloudevent("e1"))
    frames.append(await stream.next())
    assert [frame.event for frame in frames] == ["bridge.ready", "bridge.gap", "job.completed"]
    for frame in frames:
        check_frame(document, frame)
    service.signal(signal.SIGTERM)
    check_frame(document, await stream.next())


async def test_schemathesis_finds_no_answer_that_the_document_does_not_have(
    start: StartService, tmp_path: Path
) -> None:
    # Schemathesis reads an answer to its end. So streams end after a short time.
    service = await start(MAX_AGE_SECONDS="0.2", QUERY_TOKEN="true", CONSOLE="development")
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).parent / "schemathesis",
        "run",
        f"{service.public}/openapi.json",
        "--header",
        f"Authorization: Bearer {mint('42')}",
        # The catalogue's models define what this path accepts. OPTIONS lists GET, which is `/console/{name}`.
        "--exclude-path=/console/publish",
        "--generation-deterministic",
        "--suppress-health-check=all",
        "--max-examples=10",
        "--no-color",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    text, _ = await process.communicate()
    assert process.returncode == 0, text.decode()
