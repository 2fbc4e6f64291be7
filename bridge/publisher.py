"""The publishing SDK. Importable without the server's dependencies.

async with Publisher("amqp://...", source="/workers/reports") as publisher:
    await publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))

PublishError
├─ EventRefused         a page would not get what was passed: fix the event. Nothing was sent
├─ ExchangeMissing      the exchange does not exist: start the bridge once, or name the right one
├─ PublishForbidden     RabbitMQ refuses the user, or this user this audience or type
└─ PublishTimeout       not confirmed in time: publish again, with the same id
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
from bridge.sender import Message, Pipeline, Progress, Sender

if TYPE_CHECKING:
    from bridge.blocking import BlockingPublisher

RECOVERY_SECONDS = 5.0
"""On a connection as young as this, an event that no queue takes is published again: RabbitMQ 3.10 takes connections up
to half a second before it has recovered the log, confirms, and loses (measured). With the log there, every event has a
queue."""

TIMEOUT_SECONDS = 30.0
"""Default deadline for a confirm, reconnects included: a restart of the broker fits in."""

SETTLE_SECONDS = 5.0
"""A `publish_many` that is cancelled waits this long for the confirms of what it has sent."""

Id: TypeAlias = str | int | UUID
"""A user, a group or an event by its id. A number and a UUID are taken as their text."""

Attribute: TypeAlias = str | int | UUID | datetime | None
"""A CloudEvents attribute: `time` takes an aware datetime, `id` a UUID or a number. None counts as not given."""

Item: TypeAlias = tuple[Audience, EventData] | tuple[Audience, EventData, Mapping[str, Attribute]]
"""An event of `publish_many`: for whom, what, and its attributes by name (`{"id": f"{task_id}:completed"}`)."""

_log = logging.getLogger("bridge.publisher")

_NAMES = frozenset(ATTRIBUTES) - {"specversion", "type"}


class PublishError(Exception):
    """An event was not published, or not surely; one of the four below.

    Attributes:
        id: of the event that failed; empty when there is no event, as in `open`, or when the event has no valid id.
        index: in `publish_many`, its place in the iterable, counted from 0; otherwise None.
        confirmed: in `publish_many`, how many events are certainly confirmed: all before `index`.
        unconfirmed: in `publish_many`, index to id of those that were sent and not confirmed. They may arrive: publish
            each again under its id.
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
    """The event, its audience or its attributes are not as the contract says, or a page would get something else than
    was passed. Nothing was sent."""


class ExchangeMissing(PublishError):
    """The exchange does not exist."""


class PublishForbidden(PublishError):
    """RabbitMQ refuses the credentials, the virtual host, or publishing with this routing key."""


class PublishTimeout(PublishError):
    """No confirm within the deadline: the broker is away, blocked by an alarm, or keeps answering nack. Or the
    publisher was closed meanwhile.

    The event may have arrived nevertheless. Publish it again with `id=error.id`: the same id is the same event, and a
    stream that has just shown it does not show it again.
    """


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of ms since 1970, then 74 random bits. Sorts by creation time."""
    value = (time.time_ns() // 1_000_000 & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


class Publisher:
    """Publishes events, each confirmed by the broker. Connects with the first event, or with `open` or `async with`,
    and reconnects by itself; any number of tasks of one event loop may share one.

    Args:
        url: AMQP address; several, joined by commas, for the nodes of a cluster.
        source: who publishes, a URI reference such as `/workers/reports` (CloudEvents `source`).
        exchange: the topic exchange; the bridge's default.
        timeout: seconds until a call without a confirm raises PublishTimeout, connecting included.
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
        """The same for programs without an event loop: scripts, Celery tasks, web workers with threads."""
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
        """Connects, within the timeout. Not needed: the first event connects too. Also opens again after `close`.

        Raises:
            PublishForbidden: the credentials or the virtual host are refused, with RabbitMQ's own words.
            PublishTimeout: no node can be reached in time. A later event tries again.
            RuntimeError: this publisher belongs to another event loop.
        """
        self._is_closed = False
        self.use_here()
        with _translated(""):
            await self._sender.open(self._timeout)

    async def close(self) -> None:
        """Closes the connection, within five seconds. Publishes still waiting raise PublishTimeout at once."""
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
        """Publishes one event and returns its id once the broker has confirmed it.

        Args:
            audience: who may see it.
            data: an instance of a class of the event catalogue; its class is the type.
            attributes: of the CloudEvents envelope, by name: `id` to publish an event again, `time`, `subject`,
                `source`, `dataschema`, `traceparent`, `tracestate`. `id` and `time` are made when they are not given,
                `traceparent` is that of the active OpenTelemetry span, if there is one.

        Raises:
            EventRefused: before anything is sent.
            ExchangeMissing, PublishForbidden, PublishTimeout
            RuntimeError: this publisher is closed, or belongs to another event loop.

        Awaiting one after another keeps the order. Cancelling leaves the publisher in order; whether the event was
        published is then not known.
        """
        message = self._writer.message(audience, data, attributes)
        await self.publish_message(message)
        return message.id

    async def publish_message(self, message: Message) -> None:
        """As `publish`, of a message that `EventWriter` has made. Internal."""
        self.use_here()
        with _translated(message.id):
            try:
                await self._sender.deliver(message, self._timeout)
            except amqp.Unroutable as error:
                self._warn_unroutable(message, error)

    async def publish_many(self, events: Iterable[Item] | AsyncIterable[Item]) -> int:
        """Publishes many events, in order, without waiting for one confirm before sending the next.

        Events are taken from the iterable as confirms come in, at most 256 ahead. Returns their number once all are
        confirmed. Each is `(audience, data)` or `(audience, data, attributes)`; with an `id` of its own in the
        attributes, publishing the whole batch again after a failure is safe.

        After a lost connection, all that were unconfirmed are sent again in order, under the same ids: pages see the
        order of the iterable. An event that the broker nacks comes after up to 255 that followed it; RabbitMQ does so
        when a queue or its node dies.

        Raises:
            as `publish`, for the first event that fails: `error.index` and `error.id` name it, and all before it are
            confirmed (`error.confirmed`). Those after it that were on their way are in `error.unconfirmed`.
            What the iterable raises is raised as it is, once all before it are confirmed. So is a cancellation, which
            waits for confirms for five seconds at most. Both carry the number as `error.confirmed`, and in a note.
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
            # Of the event or the iterable, or a cancellation: nothing is wrong with what was taken before.
            limit = SETTLE_SECONDS if isinstance(error, asyncio.CancelledError) else self._timeout
            failure = await settle(pipeline, limit)
            if failure is not None and isinstance(error, Exception):
                raise batch_error(failure, pipeline.progress()) from failure
            reported = report_progress(error, pipeline.progress())
            if reported is error:
                raise
            raise reported from error.__cause__
        return count

    def pipeline(self) -> Pipeline:
        """For many events; see `publish_many`. Internal."""
        return Pipeline(self._sender, timeout=self._timeout, on_unroutable=self._warn_unroutable)

    def use_here(self) -> None:
        """Binds the publisher to the running loop of this process with the first call. Internal.

        Raises:
            RuntimeError: it is closed, or belongs to another loop or another process.
        """
        if self._is_closed and self._loop is None:
            raise RuntimeError("this publisher is closed: call open() to use it again")
        # A process that was forked inside of its loop has no running loop, so this is asked first.
        if self._loop is not None and self._process != os.getpid():
            raise RuntimeError(
                "this publisher connected before the process was forked, and a connection cannot be shared: "
                "make it, or use it first, in the child (Publisher.blocking reconnects by itself)"
            )
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._process = loop, os.getpid()
        elif self._loop is not loop:
            raise RuntimeError(
                "this publisher belongs to another event loop, and its connection with it: make one publisher for each "
                "loop, close() it at the end of its loop, or use Publisher.blocking, which any thread may call"
            )

    def _warn_unroutable(self, message: Message, _: amqp.Unroutable) -> None:
        # RabbitMQ has confirmed the event, and no queue has it: no client is connected, and there is no log.
        if not self._warned:
            self._warned = True
            _log.warning("%s reached no queue: is there no event log? (Publisher(log=False))", message.routing_key)


class EventWriter:
    """Makes messages of events, and refuses each that a page would not get as it was passed. Needs no connection.

    Args:
        as `Publisher`.
    """

    def __init__(self, *, source: str, exchange: str, max_event_bytes: int, log: bool) -> None:
        if not isinstance(source, str) or not source:
            raise ValueError("source must be a text that is not empty: name the program, as in '/workers/reports'")
        self._source = source
        self._exchange = exchange
        self._max_event_bytes = max_event_bytes
        self._log = log
        self._app_id = source.encode()[:255].decode(errors="ignore")

    def message(self, audience: Audience, data: EventData, attributes: Mapping[str, Attribute]) -> Message:
        """
        Raises:
            EventRefused: says what is wrong, and how to fix it.
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
            # Read as the bridge will read it, so that what is accepted here is shown there.
            event = read_event(body, key, {event_type: declaring_class(type(data))}, max_bytes=self._max_event_bytes)
            loss = find_loss(data, text)
        except InvalidEvent as error:
            raise EventRefused(f"{event_type} for {audience}: {error}", id=str(envelope["id"])) from error
        except (RoutingError, _Refused) as error:
            raise EventRefused(f"{event_type} for {audience}: {error}") from error
        except ValidationError as error:
            raise EventRefused(f"{event_type} for {audience}: {describe_faults(error)}") from error
        except (ValueError, TypeError) as error:
            raise EventRefused(f"{event_type} for {audience}: it has no JSON form: {error}") from error
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
        # Without a log, RabbitMQ confirms an event that no client waits for. With a log, every event has a queue.
        return Message(event.id, body, self._exchange, key, properties, self._log, RECOVERY_SECONDS)

    def item(self, item: Item, index: int) -> Message:
        """The message of one event of `publish_many`.

        Raises:
            ItemRefused: with an EventRefused that has its index.
        """
        try:
            if not isinstance(item, tuple) or len(item) not in (2, 3):
                raise EventRefused(f"{item!r:.80} is not (audience, data) or (audience, data, attributes)")
            return self.message(item[0], item[1], (item[2] or {}) if len(item) == 3 else {})
        except EventRefused as error:
            raise ItemRefused(EventRefused(f"event {index}: {error}", id=error.id, index=index)) from error


class ItemRefused(Exception):
    """Around an EventRefused of `publish_many` itself: the iterable may raise one of its own. Never leaves the SDK."""

    def __init__(self, error: EventRefused) -> None:
        self.error = error
        super().__init__(str(error))


class _Refused(ValueError):
    """An attribute or an id that cannot be taken; the text says which, and how to fix it."""


def as_text(identity: Id) -> str:
    """The id of a user or a group as text.

    Raises:
        EventRefused: not a text, a whole number or a UUID.
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
            hint = "its class says the type" if name == "type" else "pages get no others; put it into the data"
            raise _Refused(
                f"{name[:100]!r} is not an attribute that can be given ({', '.join(sorted(_NAMES))}): {hint}"
            )
        if value is None:
            continue
        if name == "time" and isinstance(value, datetime):
            if value.tzinfo is None:
                raise _Refused(f"time is {value.isoformat()}, without a zone: pass datetime.now(UTC)")
            found[name] = _rfc3339(value)
        elif isinstance(value, str):
            found[name] = value
        elif name == "id" and isinstance(value, int | UUID) and not isinstance(value, bool):
            found[name] = str(value)
        else:
            takes = {"id": "a str, an int or a UUID", "time": "a datetime with a zone, or RFC 3339 text"}
            raise _Refused(f"{name} must be {takes.get(name, 'a str')}, not {value!r:.80}")
    return found


def _rfc3339(time: datetime) -> str:
    time = time.astimezone(UTC)
    precision = "microseconds" if time.microsecond % 1000 else "milliseconds"
    return time.isoformat(timespec=precision).replace("+00:00", "Z")


def _check_trace_context(envelope: Mapping[str, str]) -> None:
    """
    Raises:
        _Refused: a page would not get it; see `read_trace_context`.
    """
    kept = read_trace_context(envelope)
    if "traceparent" in envelope.keys() - kept.keys():
        raise _Refused(
            f"traceparent is {envelope['traceparent']!r:.80}, which is not one of W3C Trace Context: leave it out, or "
            "pass it as in 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        )
    if "tracestate" in envelope.keys() - kept.keys():
        if not kept:
            raise _Refused(
                "tracestate is given without a traceparent, and means nothing alone: pass both, or leave it out"
            )
        raise _Refused(
            f"tracestate is {envelope['tracestate']!r:.80}, which is not one of W3C Trace Context: leave it out, or "
            "pass key=value pairs joined by commas"
        )


def _trace_context() -> dict[str, str]:
    """`traceparent` and `tracestate` of the active span. A program that has one has imported OpenTelemetry already."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return {name: value for name, value in found.items() if value}


def _as_publish_error(error: BaseException, event_id: str) -> PublishError:
    if isinstance(error, amqp.NotFound):
        hint = "The bridge makes its exchange when it starts; is this the right virtual host and exchange?"
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
    """Waits until all that was put in is confirmed, `limit` seconds at most, and returns what went wrong with it."""
    try:
        async with asyncio.timeout(limit):
            await pipeline.drain()
    except (amqp.BrokerError, TimeoutError, asyncio.CancelledError) as error:
        pipeline.abandon()
        return error
    return None


def batch_error(error: BaseException, progress: Progress) -> PublishError:
    """What went wrong with the first unconfirmed event of a batch."""
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


def report_progress(error: BaseException, progress: Progress) -> BaseException:
    """The error that ended a batch, with the number of events that are confirmed."""
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
    with contextlib.suppress(Exception):  # An exception class of the caller's own may have slots, or other rules.
        error.add_note(f"publish_many: {confirmed} events are confirmed{unclear}")
        error.confirmed = confirmed  # type: ignore[attr-defined]
        error.unconfirmed = rest  # type: ignore[attr-defined]
    return error
