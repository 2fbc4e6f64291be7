"""The publishing SDK. Importable without the server's dependencies.

async with Publisher("amqp://...", source="/workers/reports") as publisher:
    await publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))

PublishError
├─ EventRefused         a page would not get the event as it was passed: fix the event. Nothing was sent
├─ ExchangeMissing      the exchange does not exist: start the bridge once, or fix the exchange's name
├─ PublishForbidden     RabbitMQ refuses the user, or refuses this user the audience or the type
└─ PublishTimeout       not confirmed in time: publish again with the same source and id
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias
from uuid import UUID

from pamqp.commands import Basic
from pydantic import ValidationError

from bridge import amqp
from bridge.event import (
    ATTRIBUTES,
    CONTENT_TYPE,
    MAX_EVENT_BYTES,
    EventData,
    InvalidEvent,
    describe_faults,
    encode_data,
    read_event,
    read_trace_context,
    write_event,
)
from bridge.roundtrip import declaring_class, find_loss
from bridge.routing import Audience, RoutingError
from bridge.sender import Message, Pipeline, PipelineProgress, Sender

if TYPE_CHECKING:
    from bridge.blocking import BlockingPublisher

RECOVERY_SECONDS = 5.0
"""On a connection younger than this, an event that no queue takes is published again. RabbitMQ 3.10 accepts
connections up to 0.5 s before it has recovered the log; it confirms events and loses them (measured). Once the log is
recovered, every event has a queue."""

TIMEOUT_SECONDS = 30.0
"""Default limit for a confirm, reconnects included: long enough for a restart of RabbitMQ."""

SETTLE_SECONDS = 5.0
"""A `publish_many` that is cancelled waits at most this long for the confirms of the events that it has sent."""

Id: TypeAlias = str | int | UUID
"""The id of a user, a group or an event. A number or a UUID is converted to its text."""

Attribute: TypeAlias = str | int | UUID | datetime | None
"""A CloudEvents attribute: `time` takes an aware datetime, `id` a UUID or a number. None means not given."""

Item: TypeAlias = tuple[Audience, EventData] | tuple[Audience, EventData, Mapping[str, Attribute]]
"""An event of `publish_many`: audience, data, and attributes by name (`{"id": f"{task_id}:completed"}`)."""

_log = logging.getLogger("bridge.publisher")

_NAMES = frozenset(ATTRIBUTES) - {"specversion", "type"}


class PublishError(Exception):
    """An event was not published, or it is unknown whether it was: one of the four classes below.

    Attributes:
        id: the id of the failed event. Empty if there is no event, as in `open`, or if the event has no valid id.
        index: in `publish_many`, the failed event's place in the iterable, counted from 0. Otherwise None.
        confirmed: in `publish_many`, the number of events that are certainly confirmed: all before `index`.
        unconfirmed: in `publish_many`, index to id of the events that were sent and not confirmed. They may arrive:
            publish each again with its id.
    """

    def __init__(
        self,
        message: str,
        *,
        id: str = "",
        index: int | None = None,
        confirmed: int | None = None,
        unconfirmed: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.id = id
        self.index = index
        self.confirmed = confirmed
        self.unconfirmed = unconfirmed
        super().__init__(message)


class EventRefused(PublishError):
    """The event, its audience or its attributes break the contract, or a page would get other data than was passed.
    Nothing was sent."""


class ExchangeMissing(PublishError):
    """The exchange does not exist."""


class PublishForbidden(PublishError):
    """RabbitMQ refuses the credentials, the virtual host, or publishing with this routing key."""


class PublishTimeout(PublishError):
    """No confirm arrived in time, or the publisher was closed.

    Causes: RabbitMQ cannot be reached, an alarm blocks publishers, or RabbitMQ answers each try with a nack.

    The event may have arrived anyway. Publish it again with `id=error.id`: the same source and id are the same event,
    and a stream that has just shown it does not show it again.
    """


def new_id() -> str:
    """Makes a UUIDv7 (RFC 9562, section 5.7): 48 bits of ms since 1970, then 74 random bits. Sorts by creation time."""
    value = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


class Publisher:
    """Publishes events; RabbitMQ confirms each one. Any number of tasks of one event loop may share a publisher.

    It connects with the first event, with `open` or with `async with`, and reconnects by itself.

    Args:
        url: AMQP address. For a cluster, the addresses of several nodes, joined by commas.
        source: the publishing program, a URI reference such as `/workers/reports` (CloudEvents `source`).
        exchange: the topic exchange. The default is the bridge's default.
        timeout: seconds until a call without a confirm raises PublishTimeout. This includes the time to connect.
        max_event_bytes: the largest message in bytes. Use the bridge's value (`BRIDGE_MAX_EVENT_BYTES`).
        log: whether the exchange has an event log, which takes every event. Pass False for a bridge without a log
            (`BRIDGE_LOG` empty). There, an event for an absent user reaches no queue, and this is no fault.

    Raises:
        ValueError: the url is not an AMQP address, or the source is empty.
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
        self._writer = EventWriter(source=source, exchange=exchange, max_event_bytes=max_event_bytes, log=log)
        self._timeout = timeout
        self._warned = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._is_closed = False
        self._sender = Sender(amqp.parse_urls(url), name=f"publisher {source}", announce=True)

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
        """A publisher for programs without an event loop: scripts, Celery tasks, web workers with threads.

        Args and Raises:
            As `Publisher`.
        """
        from bridge.blocking import BlockingPublisher

        return BlockingPublisher(
            url, source=source, exchange=exchange, timeout=timeout, max_event_bytes=max_event_bytes, log=log
        )

    async def __aenter__(self) -> Self:
        """As `open`."""
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connects within the timeout. Optional: the first event connects too. After `close`, it opens again.

        Raises:
            PublishForbidden: RabbitMQ refuses the credentials or the virtual host. The message has RabbitMQ's text.
            PublishTimeout: no node can be reached in time. A later event tries again.
            RuntimeError: this publisher belongs to another event loop.
        """
        self._is_closed = False
        self.use_here()
        with _translated(""):
            await self._sender.open(self._timeout)

    async def close(self) -> None:
        """Closes the connection within 5 s. Calls that wait for a confirm raise PublishTimeout at once."""
        self._is_closed = True
        if self._loop is not None:
            self.use_here()
            await self._sender.close()
            self._loop = None

    async def to_user(self, user: Id, data: EventData, **attributes: Attribute) -> str:
        """Publishes an event for one user; see `publish`."""
        return await self.publish(Audience.user(as_text(user)), data, **attributes)

    async def to_group(self, group: Id, data: EventData, **attributes: Attribute) -> str:
        """Publishes an event for a group; see `publish`."""
        return await self.publish(Audience.group(as_text(group)), data, **attributes)

    async def to_all(self, data: EventData, **attributes: Attribute) -> str:
        """Publishes an event for everybody who is connected; see `publish`."""
        return await self.publish(Audience.everyone(), data, **attributes)

    async def publish(self, audience: Audience, data: EventData, **attributes: Attribute) -> str:
        """Publishes one event, and returns its id once RabbitMQ has confirmed it.

        Args:
            audience: the user or the group that may see the event, or everyone.
            data: an instance of a class of the event catalogue. The class determines the event type.
            attributes: CloudEvents attributes by name: `id` to publish an event again, `time`, `subject`, `source`,
                `dataschema`, `datacontenttype`, `traceparent`, `tracestate`. The defaults of `id` and `time` are a new
                id and the current time. The default of `traceparent` is the active OpenTelemetry span, if any.

        Raises:
            EventRefused: nothing was sent.
            ExchangeMissing, PublishForbidden, PublishTimeout
            RuntimeError: this publisher is closed, or belongs to another event loop.

        Await each call before the next to keep the order. Cancelling leaves the publisher usable. It is then unknown
        whether the event was published.
        """
        message = self._writer.message(audience, data, attributes)
        await self.publish_message(message)
        return message.id

    async def publish_message(self, message: Message) -> None:
        """As `publish`, for a message that `EventWriter` has made. Internal."""
        self.use_here()
        with _translated(message.id):
            try:
                await self._sender.deliver(message, self._timeout)
            except amqp.Unroutable as error:
                self._warn_unroutable(message, error)

    async def publish_many(self, events: Iterable[Item] | AsyncIterable[Item]) -> int:
        """Publishes many events in order, without waiting for each confirm before the next event.

        Takes events from the iterable as confirms arrive, at most 256 ahead of them. Returns the number of events once
        all are confirmed. An event is `(audience, data)` or `(audience, data, attributes)`. If the attributes give
        each event its `id`, it is safe to publish the whole batch again after a failure.

        After a lost connection, all unconfirmed events are sent again, in order and with the same ids: pages see the
        order of the iterable. Only an event that RabbitMQ nacks may arrive after up to 255 later events. RabbitMQ
        sends nacks when a queue or its node dies.

        Raises:
            As `publish`, for the first event that fails: `error.index` and `error.id` name it, and all events before
            it are confirmed (`error.confirmed`). Later events that were sent are in `error.unconfirmed`.
            An error of the iterable is raised unchanged, once all events before it are confirmed. So is a
            cancellation, which waits at most 5 s for confirms. Both carry the number as `error.confirmed` and in a
            note.
        """
        self.use_here()
        pipeline = self.pipeline()
        count = 0
        try:
            async with contextlib.aclosing(_each(events)) as items:
                async for item in items:
                    await pipeline.put(self._writer.item(item, count))
                    count += 1
            await pipeline.drain()
        except amqp.BrokerError as error:
            pipeline.abandon()
            raise batch_error(error, pipeline.progress()) from error
        except BaseException as error:
            # An event, the iterable or a cancellation raised this. Earlier events are not affected: wait for confirms.
            limit = SETTLE_SECONDS if isinstance(error, asyncio.CancelledError) else self._timeout
            failure = await settle(pipeline, limit)
            made = error_of_batch(error, failure, pipeline.progress())
            if made is error:
                raise
            raise made from made.__cause__
        return count

    def pipeline(self) -> Pipeline:
        """A pipeline for many events; see `publish_many`. Internal."""
        return Pipeline(self._sender, timeout=self._timeout, on_unroutable=self._warn_unroutable)

    def use_here(self) -> None:
        """Binds the publisher to the running loop and to this process, with the first call. Internal.

        Raises:
            RuntimeError: this publisher is closed, or belongs to another loop or another process.
        """
        if self._is_closed and self._loop is None:
            raise RuntimeError("this publisher is closed: call open() to use it again")
        # A process that was forked inside its loop has no running loop, so the process is checked first.
        if self._loop is not None and self._process != os.getpid():
            raise RuntimeError(
                "this publisher connected before the process was forked, and processes cannot share a connection: "
                "create it, or use it first, in the child (Publisher.blocking reconnects by itself)"
            )
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._process = loop, os.getpid()
        elif self._loop is not loop:
            raise RuntimeError(
                "this publisher belongs to another event loop, and so does its connection: create one publisher for "
                "each loop and close() it before its loop ends, or use Publisher.blocking, which any thread may call"
            )

    def _warn_unroutable(self, message: Message, _: amqp.Unroutable) -> None:
        # RabbitMQ has confirmed the event, and no queue took it: no client is connected, and there is no log.
        if not self._warned:
            self._warned = True
            text = "%s reached no queue: the exchange has no event log. If that is right, pass Publisher(log=False)"
            _log.warning(text, message.routing_key)


class EventWriter:
    """Makes a message of each event, and refuses events that a page would not get as passed. Needs no connection.

    Args:
        As `Publisher`.
    """

    def __init__(self, *, source: str, exchange: str, max_event_bytes: int, log: bool) -> None:
        if not isinstance(source, str) or not source:
            raise ValueError("source must be a str that is not empty: name the program, as in '/workers/reports'")
        self._source = source
        self._exchange = exchange
        self._max_event_bytes = max_event_bytes
        self._log = log
        self._app_id = source.encode()[:255].decode(errors="ignore")

    def message(self, audience: Audience, data: EventData, attributes: Mapping[str, Attribute]) -> Message:
        """Makes the message for one event.

        Raises:
            EventRefused: the message says what is wrong, and how to fix it.
        """
        if not isinstance(data, EventData) or not hasattr(data, "event_type"):
            raise EventRefused(
                f"{type(data).__name__} is not an event: publish an instance of a class of your catalogue"
            )
        event_type = data.event_type
        if not isinstance(audience, Audience):
            raise EventRefused(f"{event_type} for {audience!r:.80}: use Audience.user(...), .group(...) or .everyone()")
        try:
            envelope = {"id": new_id(), "source": self._source, "time": _rfc3339(datetime.now(UTC))}
            if "opentelemetry.trace" in sys.modules and attributes.get("traceparent") is None:
                envelope |= read_trace_context(_trace_context())
            envelope |= _read_attributes(attributes)
            _check_trace_context(envelope)
            key = audience.routing_key(event_type)
            text = encode_data(data).encode()
            body = write_event(envelope, event_type, text)
            # Read it as the bridge will, so that the bridge accepts every event that is accepted here.
            event = read_event(body, key, {event_type: declaring_class(type(data))}, max_bytes=self._max_event_bytes)
            loss = find_loss(data, text)
        except InvalidEvent as error:
            raise EventRefused(f"{event_type} for {audience}: {error}", id=str(envelope["id"])) from error
        except (RoutingError, _InvalidAttribute) as error:
            raise EventRefused(f"{event_type} for {audience}: {error}") from error
        except ValidationError as error:
            raise EventRefused(f"{event_type} for {audience}: {describe_faults(error)}") from error
        except (ValueError, TypeError) as error:
            raise EventRefused(f"{event_type} for {audience}: it cannot be written as JSON: {error}") from error
        if loss is not None:
            raise EventRefused(f"{event_type} for {audience}: {loss}", id=event.id)
        properties = Basic.Properties(
            content_type=CONTENT_TYPE,
            message_id=event.id,
            message_type=event_type,
            timestamp=datetime.now(UTC),
            delivery_mode=2,
            app_id=self._app_id,
        )
        # `mandatory` only with a log: there every event has a queue. Without a log, an event may rightly have none.
        return Message(event.id, body, self._exchange, key, properties, self._log, RECOVERY_SECONDS)

    def item(self, item: Item, index: int) -> Message:
        """The message of one event of `publish_many`.

        Raises:
            ItemRefused: contains an EventRefused that has the index.
        """
        try:
            if not isinstance(item, tuple) or len(item) not in (2, 3):
                raise EventRefused(f"{item!r:.80} is not (audience, data) or (audience, data, attributes)")
            return self.message(item[0], item[1], (item[2] or {}) if len(item) == 3 else {})
        except EventRefused as error:
            raise ItemRefused(EventRefused(f"event {index}: {error}", id=error.id, index=index)) from error


class ItemRefused(Exception):
    """Wraps an EventRefused of `publish_many`, because the iterable may raise an EventRefused too. Never leaves the
    SDK."""

    def __init__(self, error: EventRefused) -> None:
        self.error = error
        super().__init__(str(error))


class _InvalidAttribute(ValueError):
    """An attribute is invalid. The message names it and says how to fix it."""


def as_text(identity: Id) -> str:
    """The id of a user or a group as text.

    Raises:
        EventRefused: not a str, an int or a UUID.
    """
    if isinstance(identity, str):
        return identity
    if isinstance(identity, int | UUID) and not isinstance(identity, bool):
        return str(identity)
    raise EventRefused(f"{identity!r:.80} is not the id of a user or a group: pass a str, an int or a UUID")


def _read_attributes(attributes: Mapping[str, Attribute]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in attributes.items():
        if name not in _NAMES:
            hint = "its class gives the type" if name == "type" else "pages get only these; put it into the data"
            raise _InvalidAttribute(f"{name[:100]!r} is not an attribute to pass ({', '.join(sorted(_NAMES))}): {hint}")
        if value is None:
            continue
        if name == "time" and isinstance(value, datetime):
            if value.tzinfo is None:
                raise _InvalidAttribute(f"time is {value.isoformat()}, without a zone: pass datetime.now(UTC)")
            found[name] = _rfc3339(value)
        elif isinstance(value, str):
            found[name] = value
        elif name == "id" and isinstance(value, int | UUID) and not isinstance(value, bool):
            found[name] = str(value)
        else:
            takes = {"id": "a str, an int or a UUID", "time": "a datetime with a zone, or RFC 3339 text"}
            raise _InvalidAttribute(f"{name} must be {takes.get(name, 'a str')}, not {value!r:.80}")
    return found


def _rfc3339(time: datetime) -> str:
    time = time.astimezone(UTC)
    precision = "microseconds" if time.microsecond % 1000 else "milliseconds"
    return time.isoformat(timespec=precision).replace("+00:00", "Z")


def _check_trace_context(envelope: Mapping[str, str]) -> None:
    """
    Raises:
        _InvalidAttribute: the bridge would drop one of the two; see `read_trace_context`.
    """
    kept = read_trace_context(envelope)
    if "traceparent" in envelope.keys() - kept.keys():
        raise _InvalidAttribute(
            f"traceparent is {envelope['traceparent']!r:.80}, which is not valid in W3C Trace Context: leave it out, "
            "or pass it as in 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        )
    if "tracestate" in envelope.keys() - kept.keys():
        if not kept:
            raise _InvalidAttribute(
                "tracestate is given without a traceparent, and has no meaning alone: pass both, or leave it out"
            )
        raise _InvalidAttribute(
            f"tracestate is {envelope['tracestate']!r:.80}, which is not valid in W3C Trace Context: leave it out, "
            "or pass key=value pairs joined by commas"
        )


def _trace_context() -> dict[str, str]:
    """`traceparent` and `tracestate` of the active span. Only for programs that have imported OpenTelemetry."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return {name: value for name, value in found.items() if value}


def _as_publish_error(error: BaseException, event_id: str) -> PublishError:
    if isinstance(error, amqp.NotFound):
        hint = "Start the bridge, which declares the exchange, or fix the virtual host or the exchange's name"
        return ExchangeMissing(f"{error}. {hint}", id=event_id)
    if isinstance(error, amqp.BrokerUnavailable):
        return PublishTimeout(str(error), id=event_id)
    return PublishForbidden(str(error), id=event_id)


@contextlib.contextmanager
def _translated(event_id: str) -> Iterator[None]:
    try:
        yield
    except amqp.BrokerError as error:
        raise _as_publish_error(error, event_id) from error


async def _each(events: Iterable[Item] | AsyncIterable[Item]) -> AsyncGenerator[Item]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield event
    else:
        for event in events:
            yield event


async def settle(pipeline: Pipeline, limit: float) -> BaseException | None:
    """Waits at most `limit` seconds for the confirms of all messages. Returns the error, or None."""
    try:
        async with asyncio.timeout(limit):
            await pipeline.drain()
    except (amqp.BrokerError, TimeoutError, asyncio.CancelledError) as error:
        pipeline.abandon()
        return error
    return None


def error_of_batch(error: BaseException, failure: BaseException | None, progress: PipelineProgress) -> BaseException:
    """What `publish_many` raises, with its cause.

    Args:
        error: what ended the batch: of an event, of the iterable, or a cancellation.
        failure: why the earlier events were not all confirmed; None if they were.
    """
    if failure is not None and isinstance(error, Exception):
        made: BaseException = batch_error(failure, progress)
        made.__cause__ = failure
        return made
    made = report_progress(error, progress)
    if made is not error:
        made.__cause__ = error.__cause__
    return made


def batch_error(error: BaseException, progress: PipelineProgress) -> PublishError:
    """The PublishError for a failed batch. It names the first unconfirmed event."""
    rest = {entry.index: entry.message.id for entry in progress.unconfirmed}
    if not progress.unconfirmed:
        made = _as_publish_error(error, "")
        return type(made)(f"{made} [{progress.confirmed} events are confirmed]", confirmed=progress.confirmed)
    failed = progress.unconfirmed[0]
    made = _as_publish_error(error, failed.message.id)
    return type(made)(
        f"event {failed.index} ({failed.message.routing_key}, id {failed.message.id}): {made} "
        f"[{progress.confirmed} before it are confirmed]",
        id=failed.message.id,
        index=failed.index,
        confirmed=progress.confirmed,
        unconfirmed=rest,
    )


def report_progress(error: BaseException, progress: PipelineProgress) -> BaseException:
    """Adds the number of confirmed events to the error that ended a batch, and returns the error to raise."""
    confirmed, rest = progress.confirmed, {entry.index: entry.message.id for entry in progress.unconfirmed}
    if isinstance(error, ItemRefused):
        refused = error.error
        return EventRefused(
            f"{refused} [{confirmed} before it are confirmed]",
            id=refused.id,
            index=refused.index,
            confirmed=confirmed,
            unconfirmed=rest,
        )
    unclear = f"; {len(rest)} more were sent and may arrive" if rest else ""
    with contextlib.suppress(Exception):  # The caller's exception class may not allow new attributes.
        error.add_note(f"publish_many: {confirmed} events are confirmed{unclear}")
        error.confirmed = confirmed  # type: ignore[attr-defined]
        error.unconfirmed = rest  # type: ignore[attr-defined]
    return error
