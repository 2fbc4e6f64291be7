"""The queue of refused messages: what goes in while serving, and how a person looks at it and sends things again.

On connections of its own, because a memory or disk alarm blocks every connection that publishes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
from pamqp.commands import Basic
from pamqp.common import FieldTable

from bridge import amqp
from bridge.amqp import BrokerError, BrokerUnavailable, Unroutable
from bridge.event import Cut, InvalidEvent, Models, TooLarge, read_event
from bridge.sender import Sender
from bridge.service.broker import topology
from bridge.service.budgets import Budget
from bridge.service.logs import RareLine

MAX_PENDING = 1_000
MAX_PENDING_BYTES = 33_554_432
"""Refused messages that wait to be published. More are counted and not kept. They are still wherever else the exchange
led them, such as the log."""

BURST = 500
PER_SECOND = 100
"""Messages of one reason that are put aside at once, and then each second. The queue holds 10,000 messages: more of a
flood would only push out what a person may still want to see. Each reason has a budget of its own, half of those that
may wait, so that a flood of one reason hides no other."""

SEND_SECONDS = 60.0

_log = structlog.get_logger("bridge.quarantine")


class Quarantine:
    """Publishes refused messages to a queue where a person can look at them.

    Args:
        addresses: AMQP URLs.
        queue: its name; `Broker` declares it.
        on_dropped: called when a message could not be kept.
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
        """Takes a refused message and returns at once. The body is kept as it came, or as much of it as is there."""
        if self._pending.full() or self._pending_bytes + len(body) > MAX_PENDING_BYTES:
            self._drop(routing_key, reason, f"{self._pending.qsize()} messages wait, {self._pending_bytes} bytes")
        elif not self._budgets[reason].take(self._clock()):
            self._drop(routing_key, reason, f"more than {BURST} at once, or {PER_SECOND} a second, were refused")
        else:
            self._pending_bytes += len(body)
            self._pending.put_nowait((body, routing_key, reason, detail))

    def _drop(self, routing_key: str, reason: str, error: str) -> None:
        self._on_dropped()
        self._not_kept.log(reason=reason, routing_key=routing_key, error=error)

    async def run(self) -> None:
        """Publishes what is put in, for ever. Cancelling it leaves the rest unpublished."""
        while True:
            body, routing_key, reason, detail = await self._pending.get()
            self._sending = (routing_key, reason)
            headers: FieldTable = {"x-reason": reason, "x-detail": detail, "x-routing-key": routing_key}
            if isinstance(body, Cut):
                headers["x-size"] = body.size
            properties = Basic.Properties(delivery_mode=2, headers=headers)
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
                    await self._make_anew()
                    await asyncio.sleep(next_pause())
                except BrokerUnavailable as error:
                    _log.warning("quarantine waits for the broker", pending=self._pending.qsize() + 1, error=str(error))
                except BrokerError as error:
                    self._drop(routing_key, reason, str(error))
                    break
            self._sending = None
            self._pending_bytes -= len(body)
            self._pending.task_done()

    async def _make_anew(self) -> None:
        """Somebody deleted it; or its node is down, and then it is waited for."""
        try:
            connection = await amqp.connect(self._addresses, name="bridge quarantine maker")
            try:
                await topology.declare_quarantine(connection, self._queue)
            finally:
                await amqp.close(connection)
        except BrokerError as error:
            _log.error("the quarantine cannot be made", error=str(error))

    async def close(self) -> None:
        """Gives what is pending, which `run` must still be publishing, five seconds to leave."""
        try:
            async with asyncio.timeout(amqp.CLOSE_SECONDS):
                await self._pending.join()
        except TimeoutError:
            left = [] if self._sending is None else [self._sending]
            while not self._pending.empty():
                _, *keys = self._pending.get_nowait()
                left.append((keys[0], keys[1]))
            for routing_key, reason in left:
                self._drop(routing_key, reason, "the bridge ended before RabbitMQ had confirmed it")
        await self._sender.close()


@dataclass(frozen=True, slots=True)
class Refused:
    """A message in quarantine. `reason` and `detail` are empty when something else put it there.

    `body` is a `Cut` when only its beginning was kept.
    """

    body: bytes
    routing_key: str
    reason: str
    detail: str


async def peek(addresses: Sequence[str], *, queue: str, limit: int, max_bytes: int | None = None) -> list[Refused]:
    """The oldest messages, left where they are.

    Args:
        max_bytes: the message with which their bodies reach it is the last.

    Raises:
        BrokerError
    """
    found: list[Refused] = []
    size = 0
    async with contextlib.aclosing(_get(addresses, queue, limit)) as messages:
        async for message, _ in messages:
            found.append(message)
            size += len(message.body)
            if max_bytes is not None and size >= max_bytes:
                break
    return found


async def replay(
    addresses: Sequence[str], *, queue: str, exchange: str, models: Models, max_bytes: int, limit: int
) -> AsyncIterator[tuple[Refused, InvalidEvent | None]]:
    """Publishes messages again that the catalogue would take by now, and yields each with what became of it.

    A message leaves the queue once the broker has confirmed it on the exchange, under the id that it has. One that is
    still refused stays, and is yielded with the reason.

    Raises:
        BrokerError: what was not yet replayed stays in the queue.
    """
    sender = Sender(addresses, name="bridge quarantine replay")
    try:
        async for message, take in _get(addresses, queue, limit):
            try:
                _check_is_whole(message.body)
                event = read_event(message.body, message.routing_key, models, max_bytes=max_bytes)
            except InvalidEvent as error:
                yield message, error
                continue
            properties = Basic.Properties(
                content_type="application/cloudevents+json",
                message_id=event.id,
                message_type=event.type,
                delivery_mode=2,
            )
            await sender.send(
                message.body,
                exchange=exchange,
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
        TooLarge: the rest of it was not kept.
    """
    if isinstance(body, Cut):
        raise TooLarge(
            f"only the first {len(body)} of {body.size} bytes were kept, so it cannot be published from here; its "
            "publisher has to send it again"
        )


async def _get(
    addresses: Sequence[str], queue: str, limit: int
) -> AsyncGenerator[tuple[Refused, Callable[[], Awaitable[None]]]]:
    """Messages one by one, each with the call that takes it out. What is not taken out goes back to its place."""
    connection = await amqp.connect(addresses, name="bridge quarantine")
    try:
        channel = await amqp.open_channel(connection)
        async with amqp.translating(f"looking for queue {queue!r}"):
            declared = await channel.queue_declare(queue, passive=True)
        # Not more than there are now: what is replayed, and refused once more by a bridge, comes in again at the end.
        for _ in range(min(limit, declared.message_count or 0)):
            async with amqp.translating(f"reading queue {queue!r}"):
                message = await channel.basic_get(queue)
            if isinstance(message.delivery, Basic.GetEmpty):
                return
            headers = message.header.properties.headers or {}
            tag = message.delivery_tag or 0
            size = headers.get("x-size")
            refused = Refused(
                Cut(message.body, size) if isinstance(size, int) else message.body,
                str(headers.get("x-routing-key", message.routing_key or "")),
                str(headers.get("x-reason", "")),
                str(headers.get("x-detail", "")),
            )
            yield refused, partial(channel.basic_ack, tag)
    finally:
        # Closing it gives back, in order, whatever was not acked.
        await amqp.close(connection)
