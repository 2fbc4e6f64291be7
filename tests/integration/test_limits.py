"""Limits of the machine: file descriptors, and clients that keep connections open without a request."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

import pytest

from tests.client import Stream
from tests.conftest import Eventually, OpenStream, StartService
from tests.decoder import Frame
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

MANY_PER_USER = "100000"


class RawClient:
    """A client that opens a connection, and sends only what the test sends."""

    def __init__(self, service: Service) -> None:
        self._address = urlsplit(service.public)

    async def __aenter__(self) -> RawClient:
        self._reader, self._writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> bytes:
        """All bytes until the bridge closes."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def head(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self._reader.readuntil(b"\r\n\r\n")


@contextlib.asynccontextmanager
async def many_clients(service: Service, count: int, first_bytes: bytes = b"") -> AsyncIterator[list[RawClient]]:
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(await stack.enter_async_context(RawClient(service)))
            found[-1].send(first_bytes)
        yield found


Result = TypeVar("Result")


async def with_retries(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Tries again if the connection ends before an answer, as a browser does.

    At the limit of connections, the bridge closes a client that has sent nothing for a second. On a busy machine this
    may be the test's own connection.
    """
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(OSError, IndexError, asyncio.IncompleteReadError):
                return await attempt()


async def first_frame(service: Service) -> Frame:
    async with Stream(service.public, mint("42")) as refused:
        return await refused.next()


async def assert_probes_answer(service: Service) -> None:
    for path in ("/livez", "/readyz?exclude=connections", "/metrics"):
        assert (await service.get(path, internal=True)).status_code == 200, path


async def test_the_soft_limit_is_raised(start: StartService) -> None:
    service = await start(descriptors=(128, 4096), MAX_CONNECTIONS="2000")
    assert await service.metric("process_max_fds") == 4096
    assert await service.metric("bridge_connections_limit") == 2000
    assert "file descriptors limit streams" not in service.text


async def test_too_few_descriptors_stop_the_start(start: StartService) -> None:
    with pytest.raises(AssertionError, match="ended without logging"):
        await start(descriptors=(64, 64))


@pytest.mark.contract("2.40", "2.55", "2.56")
async def test_at_the_limit_of_descriptors_every_client_is_answered(
    start: StartService, connect: OpenStream, vhost: Vhost, eventually: Eventually
) -> None:
    """As many streams as the descriptors allow, and more silent connections than the bridge keeps."""
    service = await start(descriptors=(200, 256), MAX_CONNECTIONS_PER_USER=MANY_PER_USER)
    limited = await service.logged("file descriptors limit streams", limit=256, wanted=10_000)
    assert await service.metric("bridge_connections_limit") == limited["streams"] > 100
    guests = int(await service.metric("bridge_guests_limit"))
    async with asyncio.TaskGroup() as group:
        opened = [group.create_task(with_retries(partial(connect, service, "42"))) for _ in range(limited["streams"])]
    streams = [task.result() for task in opened]
    async with many_clients(service, 2 * guests):
        await assert_probes_answer(service)
        for _ in range(2 * guests):  # Often enough to show that refused streams leave nothing behind.
            bye = await with_retries(lambda: first_frame(service))
            assert (bye.event, bye.json["reason"]) == ("bridge.bye", "busy")
        # RabbitMQ can be connected again.
        await eventually(lambda: vhost.close_connections() > 0)
        await service.logged("broker connected", count=2)
        await assert_probes_answer(service)
        await vhost.publish("user.42.job.completed", cloudevent("e-1"))
        for stream in streams:
            assert (await stream.next_event())["id"] == "e-1"
    assert await service.metric('bridge_guests_ended_total{reason="room"}') > 0
    assert await service.metric("bridge_accept_failures_total") == 0
    assert "connections closed to make room" in service.text
    assert "Traceback" not in service.text


@pytest.mark.contract("2.57")
@pytest.mark.parametrize("first_bytes", [b"", b"G", b"GET /events HTTP/1.1\r\nHost: x\r\nX: "])
async def test_silent_clients_do_not_keep_others_out(
    start: StartService, connect: OpenStream, first_bytes: bytes
) -> None:
    service = await start(descriptors=(256, 256))
    guests = int(await service.metric("bridge_guests_limit"))
    innocent = await connect(service)
    async with many_clients(service, 3 * guests, first_bytes):
        for user in "abc":
            await with_retries(partial(connect, service, user))
        await assert_probes_answer(service)
        assert await service.metric("bridge_guests") <= guests
    assert not innocent.ended


@pytest.mark.contract("2.57")
async def test_idle_connections_do_not_keep_others_out(start: StartService, connect: OpenStream) -> None:
    service = await start(descriptors=(256, 256))
    guests = int(await service.metric("bridge_guests_limit"))
    async with many_clients(service, guests, b"GET /schemas HTTP/1.1\r\nHost: x\r\n\r\n") as idle:
        for each in idle:
            assert b" 200 " in await each.head()
        await with_retries(lambda: connect(service))


@pytest.mark.contract("2.58")
async def test_a_head_has_a_deadline(start: StartService, connect: OpenStream) -> None:
    service = await start(deadlines={"service.http.entrance.HEADER_SECONDS": 1.0})
    innocent = await connect(service)
    async with RawClient(service) as silent, RawClient(service) as slow, RawClient(service) as second:
        second.send(b"GET /schemas HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in await second.head()
        sending = asyncio.create_task(
            send_slowly(slow, b"GET /events HTTP/1.1\r\nHost: x\r\nX-Padding: " + 10_000 * b"a")
        )
        # A client that has sent nothing gets no answer: a browser may have connected in advance.
        assert await silent.answer() == b""
        answer = await slow.answer()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        sending.cancel()
        # The second request of a connection has the same deadline, from its first byte.
        second.send(b"GET /sch")
        assert b"HTTP/1.1 408 " in await second.answer()
    await service.logged("connections closed without a request")
    assert await service.metric('bridge_guests_ended_total{reason="header-timeout"}') == 3
    assert not innocent.ended
    assert "Traceback" not in service.text


async def send_slowly(client: RawClient, data: bytes) -> None:
    for at in range(len(data)):
        client.send(data[at : at + 1])
        await asyncio.sleep(0.05)  # The client under test is slow.


@pytest.mark.contract("2.62")
async def test_without_descriptors_clients_wait_and_a_log_line_says_so(
    start: StartService, connect: OpenStream, eventually: Eventually
) -> None:
    """An operator lowers the limit of a running process."""
    service = await start(descriptors=(1024, 1024))
    await connect(service)
    opened = int(await service.metric("process_open_fds"))
    # The descriptors of the two requests for metrics are free now, or soon.
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (opened - 2, 1024))
    try:
        async with many_clients(
            service, 10, b"GET /schemas HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ) as clients:
            line = await service.logged("cannot accept connections")
            assert line["address"] == "public"
            assert line["limit"] == opened - 2
            resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (1024, 1024))
            for client in clients:
                assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    finally:
        resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    assert await service.metric("bridge_accept_failures_total") > 0
