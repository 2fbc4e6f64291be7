"""One RabbitMQ for the whole run, a fresh virtual host and a bridge of its own for each test that asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import hypothesis
import pytest

from deploy.local.node import Node
from tests.client import Stream
from tests.proxy import Proxy
from tests.rabbit import Vhost
from tests.service import Service, mint


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    # A missing package fails the suite with the words of what to install; nothing is skipped.
    made = Node(tmp_path_factory.mktemp("rabbitmq"), management=True)
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
def vhost(node: Node) -> Iterator[Vhost]:
    made = Vhost(node)
    made.create()
    yield made
    made.delete()


# For the zoo of bugs: that one is found is all that matters, not its smallest form.
hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate], print_blob=False)


class StartService(Protocol):
    async def __call__(self, *, amqp_url: str | None = None, ready: bool = True, **settings: str) -> Service: ...


@pytest.fixture
async def start(vhost: Vhost) -> AsyncIterator[StartService]:
    """Starts a bridge with these settings; ended with the test."""
    services: list[Service] = []

    async def start_service(*, amqp_url: str | None = None, ready: bool = True, **settings: str) -> Service:
        service = Service(amqp_url or vhost.url, **settings)
        services.append(service)
        await service.start(ready=ready)
        return service

    yield start_service
    for service in services:
        await service.stop()


@pytest.fixture
async def service(start: StartService) -> Service:
    return await start()


class OpenStream(Protocol):
    async def __call__(
        self,
        service: Service,
        user: str = "42",
        *groups: str,
        query: str = "",
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        ready: bool = True,
    ) -> Stream: ...


@pytest.fixture
async def connect() -> AsyncIterator[OpenStream]:
    """Opens a stream for a user and waits for its ready; closed with the test."""
    streams: list[Stream] = []

    async def open_stream(
        service: Service,
        user: str = "42",
        *groups: str,
        query: str = "",
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        ready: bool = True,
    ) -> Stream:
        stream = Stream(
            service.public, mint(user, *groups), query=query, headers=headers, receive_buffer=receive_buffer
        )
        streams.append(stream)
        await stream.open()
        if ready:
            await stream.ready()
        return stream

    yield open_stream
    for stream in streams:
        await stream.close()


@pytest.fixture
async def proxy(node: Node) -> AsyncIterator[Proxy]:
    async with Proxy(node.port) as made:
        yield made


class Eventually(Protocol):
    async def __call__(self, look: Callable[[], bool], *, seconds: float = 20) -> None: ...


@pytest.fixture
def eventually() -> Eventually:
    """Waits until what only an operator's view shows has come about."""

    async def wait(look: Callable[[], bool], *, seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not look():  # noqa: ASYNC110 - RabbitMQ's API has nothing to wait on.
                await asyncio.sleep(0.05)

    return wait
