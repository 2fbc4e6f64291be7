"""The order of start and stop, without RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from bridge.amqp import BrokerError
from bridge.service import descriptors, main
from bridge.service.descriptors import TooFewDescriptors
from bridge.service.http.entrance import listen
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings
from deploy.local.node import free_ports
from tests.patience import PATIENCE
from tests.service import SECRET, mint
from tests.unit.loopback import CATALOGUE, until


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """The service freezes the objects of the garbage collector. The test process continues, so they are unfrozen."""
    yield
    gc.unfreeze()


def settings(**changes: Any) -> Settings:
    (port,) = free_ports(1)
    values: dict[str, Any] = {
        "amqp_url": f"amqp://127.0.0.1:{port}/",
        "jwt_secret": SECRET,
        "schemas": "bridge.samples",
        "bind": "127.0.0.1:0",
        "internal_bind": "127.0.0.1:0",
        "max_connections": 10,
        "drain_seconds": 0.01,
        **changes,
    }
    return Settings(**values)


def service(**changes: Any) -> main._Service:
    made = settings(**changes)
    plan = descriptors.divide(10_000, 100, streams=made.max_connections)
    return main._Service(made, CATALOGUE, plan)


def sockets() -> tuple[socket.socket, socket.socket]:
    return listen("127.0.0.1:0", stall_seconds=30), listen("127.0.0.1:0", stall_seconds=30)


@pytest.mark.parametrize("changes", [{}, {"log": ""}, {"console": "development"}])
async def test_a_stop_drains_and_ends_with_code_0(changes: dict[str, str]) -> None:
    made = service(**changes)
    public, internal = sockets()
    addresses = [f"http://{main._address(each)}" for each in (public, internal)]
    stop = asyncio.Event()
    running = asyncio.create_task(made.run(public, internal, stop))
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        ready = await client.get(f"{addresses[1]}/readyz")
        assert ready.status_code == 503, "there is no RabbitMQ"
        assert "bridge_ready 0.0" in (await client.get(f"{addresses[1]}/metrics")).text
        schemas = await client.get(f"{addresses[0]}/schemas")
        assert schemas.status_code == 200
    stop.set()
    assert await running == 0
    assert made.hub.draining
    for address in addresses:
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(address)


async def test_a_part_that_fails_ends_the_service_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    made = service(log="")

    async def fail() -> None:
        raise RuntimeError("made by the test")

    monkeypatch.setattr(made.hub.feed, "run", fail)
    with capture_logs() as lines:
        assert await made.run(*sockets(), asyncio.Event()) == 1
    assert [line["part"] for line in lines if line["event"] == "failed"] == ["broker"]


async def test_a_broker_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = service(log="")

    async def refuse() -> None:
        raise BrokerError("the user may not")

    monkeypatch.setattr(made.hub.feed, "run", refuse)
    with capture_logs() as lines:
        assert await made.run(*sockets(), asyncio.Event()) == 1
    assert [line["error"] for line in lines if line["event"] == "cannot start"] == ["the user may not"]


async def test_a_stream_without_rabbitmq_gets_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.service.streams.hub.BROKER_MOMENT_SECONDS", 0.01)
    made = service()
    public, internal = sockets()
    stop = asyncio.Event()
    running = asyncio.create_task(made.run(public, internal, stop))
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        answer = await client.get(
            f"http://{main._address(public)}/events", headers={"Authorization": f"Bearer {mint('42')}"}
        )
        assert '"reason":"busy"' in answer.text.replace(" ", "")
    stop.set()
    assert await running == 0


async def serve(**changes: Any) -> tuple[int, list[Any]]:
    with capture_logs() as lines:
        code = await main._serve(settings(**changes), CATALOGUE)
    return code, [line for line in lines if line["log_level"] == "error"]


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps the signal handlers of the test runner. Closes the sockets that the end of a process would close."""
    made: list[socket.socket] = []

    def record(bind: str, *, stall_seconds: float) -> socket.socket:
        made.append(listen(bind, stall_seconds=stall_seconds))
        return made[-1]

    monkeypatch.setattr(main, "listen", record)
    monkeypatch.setattr(main, "_on_signals", asyncio.Event)
    yield
    for each in made:
        each.close()


@pytest.mark.usefixtures("handled")
async def test_an_address_in_use_ends_with_code_1() -> None:
    with listen("127.0.0.1:0", stall_seconds=30) as taken:
        address = main._address(taken)
        code, (line,) = await serve(bind=address)
    assert (code, line["event"]) == (1, "cannot listen")
    assert address in line["error"]


@pytest.mark.usefixtures("handled")
async def test_too_few_descriptors_end_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_few(*_: Any, **__: Any) -> Any:
        raise TooFewDescriptors("made by the test")

    monkeypatch.setattr(descriptors, "divide", too_few)
    code, (line,) = await serve()
    assert (code, line["event"], line["error"]) == (1, "cannot start", "made by the test")


@pytest.mark.usefixtures("handled")
async def test_an_invalid_key_set_ends_with_code_1(tmp_path: Any) -> None:
    (tmp_path / "keys.json").write_text("{}")
    code, lines = await serve(jwt_secret=None, jwks=str(tmp_path / "keys.json"))
    assert code == 1
    assert lines[-1]["event"] == "cannot start"


async def test_the_service_runs_until_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = asyncio.Event()
    stop.set()
    monkeypatch.setattr(main, "_on_signals", lambda: stop)
    monkeypatch.setenv("BRIDGE_UNKNOWN_OF_THIS_TEST", "1")
    with capture_logs() as lines:
        assert await main._serve(settings(max_connections=100_000_000), CATALOGUE) == 0
    events = [line["event"] for line in lines]
    assert "unknown setting" in events
    assert "file descriptors limit streams" in events
    assert events[-1] == "stopped"


async def test_a_signal_stops_and_a_second_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    loop = asyncio.get_running_loop()
    stop = main._on_signals()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: bool(codes))
        assert codes == [128 + signal.SIGINT]
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def test_run_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*_: Any) -> int:
        return 7

    monkeypatch.setattr(main, "_serve", serve)
    assert main.run(settings(), CATALOGUE) == 7


async def test_a_server_that_does_not_end_in_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "STOP_SECONDS", 0.0)
    hanging: asyncio.Task[None] = asyncio.create_task(asyncio.Event().wait(), name="hangs")  # type: ignore[arg-type]

    async def fail() -> None:
        raise RuntimeError("made by the test")

    failed = asyncio.create_task(fail(), name="fails")
    await asyncio.wait({failed})
    with capture_logs() as lines:
        await main._finish(hanging)
        await main._finish(failed)
    assert [(line["event"], line["part"]) for line in lines] == [
        ("connections not closed in time", "hangs"),
        ("failed", "fails"),
    ]
    with contextlib.suppress(asyncio.CancelledError):
        await hanging


def test_an_address_of_ipv6_is_in_brackets() -> None:
    class Listener:
        def getsockname(self) -> tuple[str, int, int, int]:
            return "::1", 8080, 0, 0

    listener: Any = Listener()
    assert main._address(listener) == "[::1]:8080"


def test_metrics_ask_the_service() -> None:
    made = service()
    assert isinstance(made.metrics, Metrics)
    assert made.metrics.connections_limit._value.get() == made.plan.streams
    assert made._why_not_ready() is not None
