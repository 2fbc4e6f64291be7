"""Streams of an application's own sessions (BRIDGE_AUTH_URL): the examples of docs/login.md, as real programs."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client import Stream
from tests.conftest import StartService
from tests.integration.test_cli import run
from tests.node import find_node, link_packages
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import SECRET, mint

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "login"


def php() -> str:
    command = shutil.which("php")
    assert command, "PHP is not installed: run deploy/local/ensure php"
    return command


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "django": lambda port: [sys.executable, "app.py", port],
    "fastapi": lambda port: [sys.executable, "app.py", port],
    "express": lambda port: [find_node(), "app.mjs", port],
    "php": lambda port: [php(), "-d", "session.save_path=.", "-S", f"127.0.0.1:{port}", "index.php"],
}


def copy_example(example: str, folder: Path, changes: dict[str, str]) -> None:
    shutil.copytree(EXAMPLES / example, folder, dirs_exist_ok=True)
    for file in folder.iterdir():
        text = file.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)


def change_session(folder: Path, old: str, new: str) -> None:
    """Changes the sessions of the PHP example, which are files."""
    for file in folder.glob("sess_*"):
        file.write_text(file.read_text().replace(old, new))


@asynccontextmanager
async def running(example: str, folder: Path, **changes: str) -> AsyncIterator[httpx.AsyncClient]:
    """One of the examples.

    Args:
        changes: text of the program, old to new.
    """
    copy_example(example, folder, changes)
    if example == "express":
        link_packages(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *COMMANDS[example](str(port)), cwd=folder, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            async with asyncio.timeout(PATIENCE):
                while True:
                    assert process.returncode is None, "the application has ended"
                    try:
                        await client.get("/bridge-login")
                        break
                    except httpx.TransportError:
                        await asyncio.sleep(0.05)  # Between two tries.
            yield client
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def log_in(application: httpx.AsyncClient, user: str, *groups: str) -> dict[str, str]:
    """The headers of the user's browser."""
    application.cookies.clear()
    answer = await application.get("/login", params={"user": user, "group": list(groups)})
    answer.raise_for_status()
    return {"Cookie": "; ".join(f"{name}={value}" for name, value in application.cookies.items())}


def settings_for(application: httpx.AsyncClient) -> dict[str, Any]:
    return {"AUTH_URL": str(application.base_url.join("/bridge-login")), "JWT_SECRET": "", "AUTH_CACHE_SECONDS": "0"}


@pytest.mark.any_rabbitmq
@pytest.mark.contract("6.40", "6.41", "6.42")
@pytest.mark.parametrize("example", sorted(COMMANDS))
async def test_a_session_of_the_application_opens_a_stream(
    start: StartService, vhost: Vhost, tmp_path: Path, example: str
) -> None:
    async with running(example, tmp_path) as application:
        service = await start(**settings_for(application))
        async with Stream(service.public, None) as nobody:
            assert nobody.status == 401
            problem = await nobody.body()
            assert b"urn:bridge:problem:not-logged-in" in problem
            assert b"Please log in again" in problem
            assert "basic" not in nobody.headers["www-authenticate"].lower()
        session = await log_in(application, "ann", "ops")
        async with Stream(service.public, None, headers=session) as stream:
            ready = await stream.ready()
            assert ready.json["user"] == "ann"
            await vhost.publish_all(
                [
                    ("user.bob.job.completed", cloudevent("other")),
                    ("user.ann.job.completed", cloudevent("own")),
                ]
            )
            await vhost.publish("group.ops.job.completed", cloudevent("group"))
            assert set(await stream.ids(2)) == {"own", "group"}
        application.cookies.clear()
        (await application.get("/logout", headers=session)).raise_for_status()
        async with Stream(service.public, None, headers=session) as ended:
            assert ended.status == 401


@pytest.mark.any_rabbitmq
@pytest.mark.contract("6.46")
async def test_a_stream_stays_open_while_its_session_is_valid(
    start: StartService, vhost: Vhost, tmp_path: Path
) -> None:
    async with running("fastapi", tmp_path, **{'"expires_in": 60': '"expires_in": 4'}) as application:
        service = await start(**settings_for(application))
        session = await log_in(application, "ann")
        async with Stream(service.public, None, headers=session) as stream:
            await stream.ready()
            while await service.metric('bridge_logins_total{outcome="accepted"}') < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # Between two looks.
            await vhost.publish("user.ann.job.completed", cloudevent("later"))
            assert await stream.ids(1) == ["later"]
            await application.get("/logout", headers=session)
            bye = await stream.until("bridge.bye")
            assert bye.json["reason"] == "expired"


@pytest.mark.any_rabbitmq
@pytest.mark.contract("6.46")
async def test_other_groups_are_another_stream(start: StartService, tmp_path: Path) -> None:
    async with running("php", tmp_path, **{"'expires_in' => 60": "'expires_in' => 4"}) as application:
        service = await start(**settings_for(application))
        session = await log_in(application, "ann", "ops")
        async with Stream(service.public, None, headers=session) as stream:
            await stream.ready()
            change_session(tmp_path, "ops", "dev")
            assert (await stream.until("bridge.bye")).json["reason"] == "expired"


@pytest.mark.any_rabbitmq
@pytest.mark.contract("6.43", "6.46")
async def test_an_application_that_is_away_ends_no_stream_early_and_opens_none(
    start: StartService, tmp_path: Path
) -> None:
    async with running("express", tmp_path, **{"expires_in: 60": "expires_in: 6"}) as application:
        service = await start(**settings_for(application))
        session = await log_in(application, "ann")
        stream = Stream(service.public, None, headers=session)
        await stream.open()
        await stream.ready()
    # It has ended. The stream ends with its login, and not before.
    assert (await stream.until("bridge.bye")).json["reason"] == "expired"
    assert "cannot be asked" in (await service.logged("login not renewed"))["error"]
    await stream.close()
    async with Stream(service.public, None, headers=session) as late:
        assert (late.status, (await late.next()).json) == (200, {"reason": "busy"})
        assert late.headers["bridge-identity"] == "unknown"
    assert "cannot be asked" in (await service.logged("token not judged"))["error"]


@pytest.mark.any_rabbitmq
@pytest.mark.contract("6.44")
async def test_a_token_counts_alone_where_the_bridge_reads_tokens(start: StartService, tmp_path: Path) -> None:
    async with running("fastapi", tmp_path) as application:
        service = await start(**{**settings_for(application), "JWT_SECRET": SECRET})
        session = await log_in(application, "ann")
        async with Stream(service.public, mint("bob"), headers=session) as stream:
            assert (await stream.ready()).json["user"] == "bob"
        async with Stream(service.public, "no token", headers=session) as stream:
            assert stream.status == 401
        async with Stream(service.public, None, headers=session) as stream:
            assert (await stream.ready()).json["user"] == "ann"


@pytest.mark.any_rabbitmq
@pytest.mark.contract("6.47")
async def test_a_page_of_another_origin_asks_nothing(start: StartService, tmp_path: Path) -> None:
    async with running("fastapi", tmp_path) as application:
        service = await start(**settings_for(application))
        session = await log_in(application, "ann")
        async with Stream(service.public, None, headers={**session, "Origin": "https://evil.example"}) as stream:
            assert stream.status == 403
        assert await service.metric('bridge_logins_total{outcome="accepted"}') == 0


@pytest.mark.any_rabbitmq
async def test_check_says_what_is_wrong_with_the_application(vhost: Vhost, tmp_path: Path) -> None:
    async with running("express", tmp_path) as application:
        given = {key: value for key, value in settings_for(application).items() if key == "AUTH_URL"}
        done = await run("check", amqp_url=vhost.url, **given)
        assert "ok the application refuses a request without a login: Your session has ended" in done.out
        assert done.code == 0
        done = await run("check", amqp_url=vhost.url, AUTH_URL=str(application.base_url.join("/nothing")))
        assert (done.code, "!! BRIDGE_AUTH_URL: " in done.out, "answers 404" in done.out) == (1, True, True)
        done = await run("check", amqp_url=vhost.url, AUTH_URL=str(application.base_url.join("/login?user=x")))
        assert (done.code, "!! BRIDGE_AUTH_URL: " in done.out) == (1, True)
