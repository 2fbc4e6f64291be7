"""The publishing SDK. Importable without the server's dependencies.

async with Publisher("amqp://...", source="/workers/reports") as publisher:
    await publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))

PublishError
├─ EventRefused         the event is not one that the bridge would show: mend the event
├─ ExchangeMissing      nobody made the exchange: start the bridge once, or name the right one
├─ PublishForbidden     RabbitMQ refuses the user, or this user this audience or type
└─ PublishTimeout       not confirmed in time: publish again, with the same id
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, Coroutine, Iterable
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import UUID

from pamqp.commands import Basic

from bridge import amqp
from bridge.event import CONTENT_TYPE, MAX_EVENT_BYTES, EventData, InvalidEvent, read_event, write_event
from bridge.routing import Audience, RoutingError

PIPELINE_EVENTS = 256
"""Events of `publish_many` that may wait for their confirms at once. A confirm takes about a millisecond, so this many
keep a connection busy; more would only be more to send again after a loss."""

RECOVERY_SECONDS = 5.0
"""On a connection as young as this, an event that no queue takes is published again: RabbitMQ 3.10 takes connections up
to half a second before it has recovered the log, confirms, and loses (measured). With the log there, every event has a
queue."""

TIMEOUT_SECONDS = 30.0
"""Default deadline for a confirm, reconnects included: a restart of the broker fits in."""

_log = logging.getLogger("bridge.publisher")


class PublishError(Exception):
    """An event was not published, or not surely; one of the four below."""


class EventRefused(PublishError):
    """The event, its audience or its envelope is not as the contract says. Nothing was sent."""


class ExchangeMissing(PublishError):
    """The exchange does not exist."""


class PublishForbidden(PublishError):
    """RabbitMQ refuses the credentials, the virtual host, or publishing with this routing key."""


class PublishTimeout(PublishError):
    """No confirm within the deadline: the broker is away, blocked by an alarm, or keeps answering nack.

    The event may have arrived all the same. Publish it again with `id=error.id`: the same id is the same event, and a
    stream that has just shown it does not show it again.
    """

    def __init__(self, message: str, event_id: str) -> None:
        self.id = event_id
        super().__init__(message)


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of ms since 1970, then 74 of chance. Sorts by the time it was made."""
    value = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


class Publisher:
    """Publishes events, each confirmed by the broker. Reconnects by itself; any number of tasks may share one.

    Args:
        url: AMQP address; several, joined by commas, for the nodes of a cluster.
        source: who publishes, a URI reference such as `/workers/reports` (CloudEvents `source`).
        exchange: the topic exchange; the bridge's default.
        timeout: seconds until a publish without a confirm raises PublishTimeout, reconnects included.
        max_event_bytes: largest message, as the bridge is set.
        log: whether the exchange has an event log, which takes every event. False for a bridge without one
            (`BRIDGE_LOG` empty), where an event for somebody who is away reaches no queue, as it should.

    Raises:
        ValueError: the url is no AMQP address, or the source is empty.
    """

    def __init__(
        self,
        url: str,
        *,
        source: str,
        exchange: str = "events",
        timeout: float = TIMEOUT_SECONDS,
        max_event_bytes: int = MAX_EVENT_BYTES,
        log: bool = True,
    ) -> None:
        if not source:
            raise ValueError("source must not be empty: name the program, as in '/workers/reports'")
        self._source = source
        self._exchange = exchange
        self._timeout = timeout
        self._max_event_bytes = max_event_bytes
        self._log = log
        self._warned = False
        self._sender = amqp.Sender(amqp.parse_urls(url), name=f"publisher {source}")

    @staticmethod
    def blocking(
        url: str,
        *,
        source: str,
        exchange: str = "events",
        timeout: float = TIMEOUT_SECONDS,
        max_event_bytes: int = MAX_EVENT_BYTES,
        log: bool = True,
    ) -> BlockingPublisher:
        """The same for programs without an event loop: scripts, Celery tasks, web workers with threads."""
        return BlockingPublisher(
            url, source=source, exchange=exchange, timeout=timeout, max_event_bytes=max_event_bytes, log=log
        )

    async def __aenter__(self) -> Self:
        """Connects, within the timeout.

        Raises:
            PublishForbidden: the credentials or the virtual host are refused.
            PublishTimeout: no node can be reached.
        """
        await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _connect(self) -> None:
        next_pause = amqp.pauses()
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return await self._sender.open()
            except amqp.BrokerUnavailable as error:
                pause = next_pause()
                if time.monotonic() + pause >= deadline:
                    raise PublishTimeout(f"no connection within {self._timeout:g} s; last: {error}", "") from error
                _log.debug("not connected yet: %s", error)
                await asyncio.sleep(pause)
            except amqp.BrokerError as error:
                raise PublishForbidden(str(error)) from error

    async def close(self) -> None:
        """Closes the connection, within five seconds. Publishes still waiting raise PublishTimeout."""
        await self._sender.close()

    async def to_user(self, user: str, data: EventData, **attributes: str) -> str:
        """Publishes an event for one user; see `publish`."""
        return await self.publish(Audience.user(user), data, **attributes)

    async def to_group(self, group: str, data: EventData, **attributes: str) -> str:
        """Publishes an event for a group; see `publish`."""
        return await self.publish(Audience.group(group), data, **attributes)

    async def to_all(self, data: EventData, **attributes: str) -> str:
        """Publishes an event for everybody who is connected; see `publish`."""
        return await self.publish(Audience.everyone(), data, **attributes)

    async def publish(self, audience: Audience, data: EventData, **attributes: str) -> str:
        """Publishes one event and returns its id once the broker has confirmed it.

        Args:
            audience: who may see it.
            data: an instance of a class of the event catalogue; its class is the type.
            attributes: of the CloudEvents envelope, by name: `id` to publish an event again, `time`, `subject`,
                `dataschema`, `traceparent`, or an extension. `id` and `time` are made when they are not given.

        Raises:
            EventRefused: before anything is sent.
            ExchangeMissing, PublishForbidden, PublishTimeout

        Awaiting one after another keeps the order. Cancelling leaves the publisher in order; whether the event was
        published is then not known.
        """
        message = self._prepare(audience, data, attributes)
        await self._send(message)
        return message.id

    async def publish_many(
        self, events: Iterable[tuple[Audience, EventData]] | AsyncIterable[tuple[Audience, EventData]]
    ) -> int:
        """Publishes many events, in order, without waiting for one confirm before sending the next.

        Events are taken from the iterable as confirms come in, at most 256 ahead. Returns their number once all are
        confirmed. When the broker nacks one or the connection breaks, what was unconfirmed is sent again with the same
        ids; a reader may then see the order change at that place, never an event lost.

        Raises:
            as `publish`, for the first event that fails. All before it are confirmed; those after it that were on
            their way may be.
        """
        count = 0
        pending: deque[asyncio.Task[None]] = deque()
        try:
            async for audience, data in _aiter(events):
                message = self._prepare(audience, data, {})
                # Tasks start in the order they were made, and each sends before it first waits for its confirm.
                pending.append(asyncio.create_task(self._send(message), name="publish"))
                count += 1
                if len(pending) >= PIPELINE_EVENTS:
                    await pending[0]
                    pending.popleft()
                elif count % 16 == 0:
                    await asyncio.sleep(0)  # An iterable without a pause must not keep the tasks from sending.
            while pending:
                await pending[0]
                pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return count

    def _prepare(self, audience: Audience, data: EventData, attributes: dict[str, str]) -> _Message:
        if not isinstance(data, EventData) or not hasattr(data, "event_type"):
            raise EventRefused(f"{type(data).__name__} is no event: publish an instance of a class of your catalogue")
        event_type = data.event_type
        envelope = {"id": new_id(), "source": self._source, "time": _rfc3339_now(), **attributes}
        try:
            key = audience.routing_key(event_type)
            body = write_event(envelope, data)
            # Read as the bridge will read it, so that what is accepted here is shown there.
            event = read_event(body, key, {event_type: type(data)}, max_bytes=self._max_event_bytes)
        except InvalidEvent as error:
            raise EventRefused(f"{event_type} for {audience}: {error}") from error
        except RoutingError as error:
            raise EventRefused(f"{event_type} for {audience}: {error}") from error
        except (ValueError, TypeError) as error:
            raise EventRefused(f"{event_type} for {audience}: it has no JSON form: {error}") from error
        properties = Basic.Properties(
            content_type=CONTENT_TYPE,
            message_id=event.id,
            message_type=event_type,
            timestamp=datetime.now(UTC),
            delivery_mode=2,
            app_id=self._source.encode()[:255].decode(errors="ignore"),
        )
        return _Message(event.id, key, body, properties)

    async def _send(self, message: _Message) -> None:
        try:
            await self._sender.send(
                message.body,
                exchange=self._exchange,
                routing_key=message.routing_key,
                properties=message.properties,
                mandatory=self._log,
                recovery=RECOVERY_SECONDS,
                timeout=self._timeout,
            )
        except amqp.Unroutable:
            # The broker has confirmed it, and no queue has it: nobody is connected, and there is no log.
            if not self._warned:
                self._warned = True
                _log.warning("%s reached no queue: is there no event log? (Publisher(log=False))", message.routing_key)
        except amqp.NotFound as error:
            raise ExchangeMissing(
                f"{error}. The bridge makes its exchange when it starts; is this the right virtual host and exchange?"
            ) from error
        except amqp.BrokerUnavailable as error:
            raise PublishTimeout(str(error), message.id) from error
        except amqp.BrokerError as error:
            raise PublishForbidden(str(error)) from error


class _Message:
    __slots__ = ("body", "id", "properties", "routing_key")

    def __init__(self, event_id: str, routing_key: str, body: bytes, properties: Basic.Properties) -> None:
        self.id = event_id
        self.routing_key = routing_key
        self.body = body
        self.properties = properties


Result = TypeVar("Result")


class BlockingPublisher:
    """`Publisher` for programs without an event loop. Made by `Publisher.blocking`; threads may share one.

    An event loop runs in a thread of its own. Make it after a fork (Celery's prefork: in the task or in
    `worker_process_init`), not before.
    """

    def __init__(
        self, url: str, *, source: str, exchange: str, timeout: float, max_event_bytes: int, log: bool
    ) -> None:
        amqp.parse_urls(url)
        self._make = partial(
            Publisher,
            url,
            source=source,
            exchange=exchange,
            timeout=timeout,
            max_event_bytes=max_event_bytes,
            log=log,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._publisher: Publisher | None = None

    def __enter__(self) -> Self:
        """Connects; raises as `Publisher.__aenter__` does."""
        started = threading.Event()

        def run() -> None:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                self._loop.call_soon(started.set)
                runner.run(self._until_stopped())

        self._thread = threading.Thread(target=run, name="bridge-publisher", daemon=True)
        self._thread.start()
        started.wait()

        async def make() -> Publisher:
            return await self._make().__aenter__()

        try:
            self._publisher = self._call(make())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def _until_stopped(self) -> None:
        self._stopped = asyncio.Event()
        await self._stopped.wait()

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        assert self._loop is not None, "only called while the thread runs"
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in the caller must not leave the publish running behind its back.
            raise

    def _open(self) -> Publisher:
        if self._publisher is None:
            raise RuntimeError("not connected: use it as `with Publisher.blocking(...) as publisher:`")
        return self._publisher

    def _stop(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
            self._loop = self._thread = None

    def close(self) -> None:
        """Closes the connection, within five seconds."""
        if self._publisher is not None:
            self._call(self._publisher.close())
            self._publisher = None
        self._stop()

    def to_user(self, user: str, data: EventData, **attributes: str) -> str:
        """As `Publisher.to_user`; returns when confirmed."""
        return self.publish(Audience.user(user), data, **attributes)

    def to_group(self, group: str, data: EventData, **attributes: str) -> str:
        """As `Publisher.to_group`; returns when confirmed."""
        return self.publish(Audience.group(group), data, **attributes)

    def to_all(self, data: EventData, **attributes: str) -> str:
        """As `Publisher.to_all`; returns when confirmed."""
        return self.publish(Audience.everyone(), data, **attributes)

    def publish(self, audience: Audience, data: EventData, **attributes: str) -> str:
        """As `Publisher.publish`; returns when confirmed."""
        return self._call(self._open().publish(audience, data, **attributes))

    def publish_many(self, events: Iterable[tuple[Audience, EventData]]) -> int:
        """As `Publisher.publish_many`, when all are confirmed. Reads the iterable in the publisher's thread."""
        return self._call(self._open().publish_many(events))


async def _aiter(
    events: Iterable[tuple[Audience, EventData]] | AsyncIterable[tuple[Audience, EventData]],
) -> AsyncIterable[tuple[Audience, EventData]]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield event
    else:
        for event in events:
            yield event


def _rfc3339_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
