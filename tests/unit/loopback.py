"""The service's HTTP side in this process, on loopback, with live queues that the test fills by hand. No RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
from quart import Quart

from bridge.catalogue.load import Catalogue, load_catalogue
from bridge.service.broker.quarantine import Quarantine
from bridge.service.forms import MessageReader
from bridge.service.http.auth import Authenticator
from bridge.service.http.entrance import Entrance, listen
from bridge.service.http.http1 import host
from bridge.service.http.web import create_app
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings
from bridge.service.streams.hub import Hub
from bridge.service.streams.reader import EventReader
from bridge.service.streams.writer import WriteBatch
from bridge.testing import FakePublisher
from tests.client import Stream
from tests.patience import PATIENCE
from tests.service import SECRET as SECRET
from tests.service import mint

CATALOGUE = load_catalogue("bridge.samples")
KEY = "user.42.job.completed"
BODY = (
    b'{"specversion":"1.0","id":"e1","source":"/t","type":"job.completed","time":"2026-01-31T12:00:00Z",'
    b'"datacontenttype":"application/json","data":{"job_id":"r-7","duration_seconds":3.2}}'
)


class LiveQueue:
    """A live queue, as the hub sees it."""

    bound = True

    def __init__(self, number: int, groups: Sequence[str], on_delivery: Callable[[str, bytes], None]) -> None:
        self.number = number
        self.queue = f"bridge.live.{number}"
        self.groups = groups
        self.on_delivery = on_delivery
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class LiveQueues:
    """The broker's side as the hub sees it: each live queue is bound in the loop's next iteration."""

    connected = True
    has_dropped = False
    shared_queue = None
    last_error = None
    overlaps = True
    reached = None

    def __init__(self) -> None:
        self.down_since: float | None = None
        self.binds = True
        self.made: list[LiveQueue] = []

    def subscribe(
        self,
        keys: Sequence[str],
        groups: Sequence[str],
        *,
        on_delivery: Callable[[str, bytes], None],
        on_bound: Callable[[], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[], None],
    ) -> LiveQueue:
        queue = LiveQueue(len(self.made) + 1, groups, on_delivery)
        self.made.append(queue)
        if self.binds:
            asyncio.get_running_loop().call_soon(on_bound)
        return queue


class Site:
    """One service on loopback."""

    def __init__(self, catalogue: Catalogue, tracing: Any, control: Any, login: Any, **settings: Any) -> None:
        self.settings = Settings(**{"jwt_secret": SECRET, "schemas": "bridge.samples", **settings})
        self.metrics = Metrics()
        self.queues = LiveQueues()
        broker: Any = self.queues
        self.write_batch = WriteBatch()
        quarantine = Quarantine([], queue="q", on_dropped=lambda: None)
        self.hub = Hub(
            reader=EventReader(MessageReader(catalogue, 65_536, "events"), metrics=self.metrics, quarantine=quarantine),
            limits=self.settings,
            metrics=self.metrics,
            make_feed=lambda _: broker,
            log=None,
        )
        secret = self.settings.jwt_secret
        self.authenticator = Authenticator(
            secret=None if secret is None else secret.get_secret_value(), jwks=self.settings.jwks
        )
        self.publisher = FakePublisher()
        self.app = create_app(
            hub=self.hub,
            authenticator=self.authenticator,
            settings=self.settings,
            catalogue=catalogue,
            metrics=self.metrics,
            write_batch=self.write_batch,
            tracing=tracing,
            control=control,
            login=login,
            publisher=self.publisher if self.settings.console == "development" else None,
        )
        self.ended: list[str] = []
        self.url = ""
        self.client: httpx.AsyncClient
        self.entrance: Entrance

    def stream(self, user: str = "42", *groups: str, **options: Any) -> Stream:
        return Stream(self.url, mint(user, *groups), **options)


@contextlib.asynccontextmanager
async def serving(app: Quart, *, guests: int = 100, ended: list[str]) -> AsyncIterator[tuple[str, Entrance]]:
    """Hosts an application. Yields its address and its entrance."""
    listener = listen("127.0.0.1:0", stall_seconds=30)
    end = asyncio.Event()
    opened: asyncio.Future[Entrance] = asyncio.get_running_loop().create_future()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    hosting = asyncio.create_task(
        host(
            app,
            listener,
            end,
            name="test",
            guests=guests,
            on_ended=ended.append,
            on_shortage=lambda: None,
            on_entrance=opened.set_result,
        )
    )
    try:
        yield url, await opened
    finally:
        end.set()
        await hosting


@contextlib.asynccontextmanager
async def site(
    catalogue: Catalogue = CATALOGUE,
    tracing_with: Any = None,
    control_with: Any = None,
    login_with: Any = None,
    **settings: Any,
) -> AsyncIterator[Site]:
    """
    Args:
        tracing_with, control_with, login_with: used instead of `Tracing`, `Control` and `ApplicationLogin`.
        settings: by their names in `Settings`.
    """
    made = Site(catalogue, tracing_with, control_with, login_with, **settings)
    async with (
        serving(made.app, ended=made.ended) as (made.url, made.entrance),
        httpx.AsyncClient(base_url=made.url, timeout=PATIENCE) as made.client,
    ):
        yield made


async def until(is_so: Callable[[], bool]) -> None:
    """Runs the loop until a condition is true. It is for conditions that no signal reports."""
    async with asyncio.timeout(PATIENCE):
        while not is_so():  # noqa: ASYNC110 - No event is set for it.
            await asyncio.sleep(0)
