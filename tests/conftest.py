"""One RabbitMQ for the whole run; a new virtual host and a bridge for each test that needs them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import aio_pika
import hypothesis
import pytest
from hypothesis import HealthCheck

from deploy.local.node import MACHINES, Installation, Node
from tests.client import Stream
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import FURTHER, INSTALLATIONS, Vhost
from tests.service import FEEDS, Service, mint

# All property tests use this profile. None fails because the machine is slow, or because a random example was
# large. The health checks that stay on find mistakes in a test, the same ones in every run.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    derandomize=False,  # Also where CI is set. A failure prints what repeats it (print_blob).
    print_blob=True,
)
hypothesis.settings.load_profile("suite")
# For the mutants: it is enough to find a failing example. It is not made smaller.
hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.generate], print_blob=False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a broker runs on every RabbitMQ, and its id names the version."""
    if "rabbitmq" in metafunc.fixturenames:
        # A test of something else, which only uses a broker, runs on the newest one.
        once = metafunc.definition.get_closest_marker("any_rabbitmq") is not None
        chosen = INSTALLATIONS[-1:] if once else INSTALLATIONS
        ids = [f"rabbitmq-{each.version}" for each in chosen]
        # Scope "session" puts the tests of one version together, so that few workers need nodes of both.
        metafunc.parametrize("rabbitmq", chosen, ids=ids, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With the feed `log`, tests of the feed `queues` are left out."""
    if FEEDS[0] == "log":
        left_out = [item for item in items if item.get_closest_marker("queues") is not None]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_report_header() -> list[str]:
    return [
        f"feed: {FEEDS[0]}",
        "RabbitMQ: " + ", ".join(f"{each.version} ({each.root or each.home})" for each in INSTALLATIONS),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests passed and failed on each RabbitMQ, and what was not tested."""
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            version = report.nodeid.partition("rabbitmq-")[2].rstrip("]").partition("-")[0]
            counts[version, outcome] += 1
    if not counts:
        return
    terminalreporter.section("RabbitMQ")
    for version in sorted({version for version, _ in counts}):
        numbers = [f"{counts[version, outcome]} {outcome}" for outcome in ("passed", "failed", "error")]
        terminalreporter.line(f"{f'RabbitMQ {version}' if version else 'without RabbitMQ'}: {', '.join(numbers)}")
    if not FURTHER:
        terminalreporter.line(
            f"Not tested: any RabbitMQ but {MACHINES.version}. `make test` as root runs the tests on 4.3 too."
        )


@pytest.fixture(scope="session")
def nodes_by_version(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Installation], Node]]:
    """Starts one node of each RabbitMQ, when it is first needed, and keeps it for the whole run."""
    nodes: dict[Installation, Node] = {}

    def node_of(rabbitmq: Installation) -> Node:
        if rabbitmq not in nodes:
            # A missing package fails the suite with a message that says what to install; nothing is skipped.
            made = nodes[rabbitmq] = Node(tmp_path_factory.mktemp("rabbitmq"), management=True, rabbitmq=rabbitmq)
            made.start()
        return nodes[rabbitmq]

    try:
        yield node_of
    finally:
        for made in nodes.values():
            made.remove()


@pytest.fixture
def node(rabbitmq: Installation, nodes_by_version: Callable[[Installation], Node]) -> Node:
    """The run's node of the RabbitMQ that the test is for."""
    return nodes_by_version(rabbitmq)


@pytest.fixture
def vhost(node: Node) -> Iterator[Vhost]:
    made = Vhost(node)
    made.create()
    yield made
    made.delete()


class StartService(Protocol):
    async def __call__(
        self,
        *,
        amqp_url: str | None = None,
        ready: bool = True,
        deadlines: dict[str, float] | None = None,
        descriptors: tuple[int, int] | None = None,
        **settings: str,
    ) -> Service: ...


@pytest.fixture
async def start(vhost: Vhost) -> AsyncIterator[StartService]:
    """Starts a bridge with these settings; it is stopped after the test."""
    services: list[Service] = []

    async def start_service(
        *,
        amqp_url: str | None = None,
        ready: bool = True,
        deadlines: dict[str, float] | None = None,
        descriptors: tuple[int, int] | None = None,
        **settings: str,
    ) -> Service:
        service = Service(amqp_url or vhost.url, deadlines=deadlines, descriptors=descriptors, **settings)
        services.append(service)
        await service.start(ready=ready)
        return service

    yield start_service
    for service in services:
        await service.stop()


@pytest.fixture
async def service(start: StartService) -> Service:
    return await start()


@pytest.fixture
async def queue(vhost: Vhost) -> AsyncIterator[aio_pika.abc.AbstractQueue]:
    """A queue that gets every published event."""
    connection = await aio_pika.connect(vhost.url_at(vhost.node.port))
    async with connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("events", "topic", durable=True)
        made = await channel.declare_queue("all-of-it", durable=True)
        await made.bind(exchange, "#")
        yield made


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
    """Opens a stream for a user and waits for its `bridge.ready`; it is closed after the test."""
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
    async def __call__(self, condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None: ...


@pytest.fixture
def eventually() -> Eventually:
    """Waits for a condition that can only be polled, for example in RabbitMQ's management API."""

    async def wait(condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - RabbitMQ's API sends no signal.
                await asyncio.sleep(0.05)  # Between two polls.

    return wait
