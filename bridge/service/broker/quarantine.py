"""The queue of refused messages: publishes them while the bridge serves, and reads and replays them for an operator.

Uses its own connections, because RabbitMQ blocks each publishing connection during a memory or disk alarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
from pamqp.commands import Basic
from pamqp.common import FieldTable

from bridge import amqp
from bridge.amqp import BrokerError, BrokerUnavailable, Unroutable
from bridge.event import CONTENT_TYPE, Cut, InvalidEvent, TooLarge
from bridge.sender import Sender
from bridge.service.broker import topology
from bridge.service.broker.properties import NO_PROPERTIES, MessageBody, Properties, Value, properties_of
from bridge.service.budgets import Budget
from bridge.service.forms import MessageReader
from bridge.service.logs import RareLine

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage

MAX_PENDING = 1_000
MAX_PENDING_BYTES = 33_554_432
"""Limits of the refused messages that wait to be published: their number, and the bytes of their bodies. The others are
dropped and counted. Other queues that the exchange routed them to, such as the log, still have them."""

BURST = 500
PER_SECOND = 100
"""Budget of each reason: messages quarantined at once, and then each second. The queue keeps 10,000 messages, so a
flood would remove older ones. Each burst is half of `MAX_PENDING`, so a flood of one reason does not hide another."""

SEND_SECONDS = 60.0
"""Limit of one publish, from the first attempt to the confirm."""

_log = structlog.get_logger("bridge.quarantine")


class Quarantine:
    """Publishes refused messages to the quarantine, where an operator can read them.

    Args:
        addresses: AMQP URLs of the cluster's nodes.
        queue: the quarantine's name; `Broker` declares the queue.
        on_dropped: called for each message that is not quarantined.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        queue: str,
        on_dropped: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._addresses = addresses
        self._sender = Sender(addresses, name="bridge quarantine")
        self._queue = queue
        self._pending: asyncio.Queue[tuple[bytes, str, str, str]] = asyncio.Queue(maxsize=MAX_PENDING)
        self._on_dropped = on_dropped
        self._pending_bytes = 0
        self._sending: tuple[str, str] | None = None
        """Routing key and reason of the message that is being published."""
        self._clock = clock
        self._budgets: defaultdict[str, Budget] = defaultdict(lambda: Budget(BURST, 1 / PER_SECOND))
        self._not_kept = RareLine("message not quarantined", _log.error, clock, by="reason")

    def put(self, body: bytes, *, routing_key: str, reason: str, detail: str) -> None:
        """Accepts a refused message and returns at once. The body is kept unchanged, with the properties of a
        `MessageBody`; of a `Cut`, the beginning."""
        if self._pending.full() or self._pending_bytes + len(body) > MAX_PENDING_BYTES:
            self._drop(routing_key, reason, f"{self._pending.qsize()} messages ({self._pending_bytes} bytes) wait")
        elif not self._budgets[reason].take(self._clock()):
            self._drop(routing_key, reason, f"more than {BURST} at once, or {PER_SECOND} a second, were refused")
        else:
            self._pending_bytes += len(body)
            self._pending.put_nowait((body, routing_key, reason, detail))

    def _drop(self, routing_key: str, reason: str, error: str) -> None:
        self._on_dropped()
        self._not_kept.log(reason=reason, routing_key=routing_key, error=error)

    async def run(self) -> None:
        """Publishes accepted messages until it is cancelled. Cancelling it leaves the others unpublished."""
        while True:
            body, routing_key, reason, detail = await self._pending.get()
            self._sending = (routing_key, reason)
            headers: FieldTable = {"x-reason": reason, "x-detail": detail, "x-routing-key": routing_key}
            if isinstance(body, Cut):
                headers["x-size"] = body.size
            properties = _write_properties(properties_of(body), headers)
            next_pause = amqp.pauses()
            while True:
                try:
                    await self._sender.send(
                        body,
                        exchange="",
                        routing_key=self._queue,
                        properties=properties,
                        mandatory=True,
                        timeout=SEND_SECONDS,
                    )
                    break
                except Unroutable:
                    _log.error("the quarantine is missing", queue=self._queue, pending=self._pending.qsize() + 1)
                    await self._restore_queue()
                    await asyncio.sleep(next_pause())
                except BrokerUnavailable as error:
                    _log.warning("quarantine waits for the broker", pending=self._pending.qsize() + 1, error=str(error))
                except BrokerError as error:
                    self._drop(routing_key, reason, str(error))
                    break
            self._sending = None
            self._pending_bytes -= len(body)
            self._pending.task_done()

    async def _restore_queue(self) -> None:
        """Makes the quarantine again after its deletion. If its node is down this fails, and `run` tries again."""
        try:
            connection = await amqp.connect(self._addresses, name="bridge quarantine maker")
            try:
                await topology.declare_quarantine(connection, self._queue)
            finally:
                await amqp.close(connection)
        except BrokerError as error:
            _log.error("the quarantine cannot be made", error=str(error))

    async def close(self) -> None:
        """Waits up to `CLOSE_SECONDS` until `run`, which must still run, has published all messages. Drops the rest."""
        try:
            async with asyncio.timeout(amqp.CLOSE_SECONDS):
                await self._pending.join()
        except TimeoutError:
            left = [] if self._sending is None else [self._sending]
            while not self._pending.empty():
                _, *keys = self._pending.get_nowait()
                left.append((keys[0], keys[1]))
            for routing_key, reason in left:
                self._drop(routing_key, reason, "the bridge ended before RabbitMQ confirmed it")
        await self._sender.close()


@dataclass(frozen=True, slots=True)
class RefusedMessage:
    """A message in quarantine. `reason` and `detail` are empty if another program published it there.

    `body` is a `Cut` if only its beginning was kept.
    """

    body: bytes
    routing_key: str
    reason: str
    detail: str


async def peek(
    addresses: Sequence[str], *, queue: str, limit: int, max_bytes: int | None = None
) -> list[RefusedMessage]:
    """Reads the oldest messages, and leaves them in the queue.

    Args:
        limit: the largest number of messages.
        max_bytes: stops at the message with which the bodies reach this size, and includes it.

    Raises:
        BrokerError: cancelling, too, leaves all messages in the queue.
    """
    found: list[RefusedMessage] = []
    size = 0
    async with contextlib.aclosing(_get(addresses, queue, limit)) as messages:
        async for message, _ in messages:
            found.append(message)
            size += len(message.body)
            if max_bytes is not None and size >= max_bytes:
                break
    return found


async def replay(
    addresses: Sequence[str],
    *,
    queue: str,
    messages: MessageReader,
    limit: int,
) -> AsyncIterator[tuple[RefusedMessage, InvalidEvent | None]]:
    """Publishes messages again that the catalogue now accepts. Yields each message, with the error if it is refused.

    A message keeps its id, if it has one. It leaves the queue after RabbitMQ has confirmed it on the exchange. A
    message that is still refused stays in the queue.

    Raises:
        BrokerError: messages not yet replayed stay in the queue.
    """
    sender = Sender(addresses, name="bridge quarantine replay")
    try:
        async for message, take in _get(addresses, queue, limit):
            try:
                _check_is_whole(message.body)
                event = messages.read(message.body, message.routing_key, 0)  # Its entry will have another offset.
            except InvalidEvent as error:
                yield message, error
                continue
            found = properties_of(message.body)
            if found == NO_PROPERTIES:  # A structured event.
                found = Properties(content_type=CONTENT_TYPE, message_id=event.id, type=event.type)
            properties = _write_properties(found, {})
            await sender.send(
                message.body,
                exchange=messages.exchange,
                routing_key=message.routing_key,
                properties=properties,
                timeout=SEND_SECONDS,
            )
            await take()
            yield message, None
    finally:
        await sender.close()


def _check_is_whole(body: bytes) -> None:
    """
    Raises:
        TooLarge: the quarantine has only the beginning of the body.
    """
    if isinstance(body, Cut):
        raise TooLarge(
            f"the quarantine has only the first {len(body)} of {body.size} bytes, so it cannot replay the message; "
            "publish it again from its source"
        )


def _write_properties(found: Properties, headers: FieldTable) -> Basic.Properties:
    """The properties of a message that is published again.

    Args:
        headers: of the bridge's own, beside those of the message.
    """
    return Basic.Properties(
        content_type=found.content_type or None,
        content_encoding=found.content_encoding or None,
        message_id=found.message_id or None,
        # The library writes no time before 1970.
        timestamp=datetime.datetime.fromisoformat(found.time) if found.time and (found.timestamp or 0) >= 0 else None,
        message_type=found.type or None,
        app_id=found.app_id or None,
        delivery_mode=2,
        headers={**dict(found.headers), **headers},
    )


def _body(message: DeliveredMessage) -> bytes:
    """The body of a message from the quarantine, with the properties that the refused message had."""
    found = message.header.properties
    time = found.timestamp
    headers: list[tuple[str, Value]] = [
        (name, value)
        for name, value in (found.headers or {}).items()
        if isinstance(value, str | bool | int) and not name.startswith("x-")
    ]
    properties = Properties(
        content_type=found.content_type or "",
        content_encoding=found.content_encoding or "",
        message_id=found.message_id or "",
        timestamp=None if time is None else int(time.timestamp()),
        type=found.message_type or "",
        app_id=found.app_id or "",
        headers=tuple(sorted(headers)),
    )
    return message.body if properties == NO_PROPERTIES else MessageBody(message.body, properties)


async def _get(
    addresses: Sequence[str], queue: str, limit: int
) -> AsyncGenerator[tuple[RefusedMessage, Callable[[], Awaitable[None]]]]:
    """Yields messages, each with a call that removes it. The other messages return to their places at the end."""
    connection = await amqp.connect(addresses, name="bridge quarantine")
    try:
        channel = await amqp.open_channel(connection)
        async with amqp.translating(f"looking for queue {queue!r}"):
            declared = await channel.queue_declare(queue, passive=True)
        # At most the messages that are there now: a replayed message that a bridge refuses again returns to the end.
        for _ in range(min(limit, declared.message_count or 0)):
            async with amqp.translating(f"reading queue {queue!r}"):
                message = await channel.basic_get(queue)
            if isinstance(message.delivery, Basic.GetEmpty):
                return
            headers = message.header.properties.headers or {}
            tag = message.delivery_tag or 0
            size = headers.get("x-size")
            refused = RefusedMessage(
                Cut(message.body, size) if isinstance(size, int) else _body(message),
                str(headers.get("x-routing-key", message.routing_key or "")),
                str(headers.get("x-reason", "")),
                str(headers.get("x-detail", "")),
            )
            yield refused, partial(channel.basic_ack, tag)
    finally:
        # The close returns the unacknowledged messages to the queue, in order.
        await amqp.close(connection)
