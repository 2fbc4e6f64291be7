"""Publishes with confirms: one connection that reconnects by itself, and a window for many messages in order.

The SDK and the service use `Sender`. `Window` is the pure part of `Pipeline`: it knows which messages are sent, which
are confirmed, and which must be sent again after a loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from aio_pika.exceptions import ChannelClosed, DeliveryError, PublishError
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import ERRORS, BrokerError, BrokerUnavailable, Unroutable, is_rejection, translate

if TYPE_CHECKING:
    import aio_pika
    from aiormq.abc import AbstractChannel

PIPELINE_EVENTS = 256
"""The most messages of a `Pipeline` that wait for their confirms at once. A confirm takes about 1 ms, so 256 keep a
connection busy. A larger window only means more messages to send again after a loss."""

_log = logging.getLogger("bridge.publisher")


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A message to publish. `mandatory`: a queue must take it. `recovery`: seconds, see `Sender.send`."""

    id: str
    body: bytes
    exchange: str
    routing_key: str
    properties: Basic.Properties
    mandatory: bool = False
    recovery: float = 0.0

    @property
    def doing(self) -> str:
        return f"publishing {self.routing_key!r} to exchange {self.exchange!r}"


class _Unclear(Exception):
    """RabbitMQ refused one message and closed its channel, on which other messages may wait for confirms too."""

    def __init__(self, failure: BrokerError) -> None:
        self.failure = failure
        super().__init__(str(failure))


class Sender:
    """A connection for publishing that reconnects by itself. Each send returns after the confirm, or raises an error.

    Any number of tasks may send at once. Their messages share one channel and are sent in the order of the calls.

    Args:
        addresses: AMQP URLs of the cluster's nodes.
        name: shown in RabbitMQ's list of connections.
        announce: whether the loss of the connection and the reconnect are logged, one line each.
    """

    def __init__(self, addresses: Sequence[str], *, name: str, announce: bool = False) -> None:
        self._addresses = addresses
        self._name = name
        self._announce = announce
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._opening: asyncio.Task[AbstractChannel] | None = None
        self._connected_at = 0.0
        self._lost_at: float | None = None
        self._closed = False
        self._limits: set[asyncio.Timeout] = set()
        self._leftovers: set[asyncio.Task[None]] = set()

    @property
    def channel(self) -> AbstractChannel | None:
        """The shared channel, or None while it is not open."""
        return None if self._channel is None or self._channel.is_closed else self._channel

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called. False after a lost connection, because the sender reconnects."""
        return self._closed

    @contextlib.asynccontextmanager
    async def limit(self, deadline: float) -> AsyncIterator[None]:
        """Raises TimeoutError at the deadline (the loop's time), or as soon as `close` is called."""
        async with asyncio.timeout_at(deadline) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    async def open(self, timeout: float) -> None:
        """Connects now rather than with the first message. Tries for at most `timeout` seconds.

        Raises:
            BrokerUnavailable: no node could be reached in time. The text has the last reason.
            AccessRefused: the user or the virtual host is refused. Another try would fail too.
        """
        self._closed = False
        next_pause = amqp.pauses()
        failure: BrokerError | None = None
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            async with self.limit(deadline):
                while True:
                    try:
                        await self.open_channel()
                        return
                    except BrokerUnavailable as error:
                        failure = error
                    await asyncio.sleep(next_pause())
        except TimeoutError:
            reason = "this publisher was closed" if self._closed else f"last error: {failure or 'no answer'}"
            raise BrokerUnavailable(f"no connection within {timeout:g} s; {reason}") from failure

    async def send(
        self,
        body: bytes,
        *,
        exchange: str,
        routing_key: str,
        properties: Basic.Properties,
        mandatory: bool = False,
        recovery: float = 0.0,
        timeout: float,
    ) -> None:
        """Returns once RabbitMQ has confirmed the message: every queue and stream that it is routed to has it.

        After a lost connection or a nack, the same message is sent again, for at most `timeout` seconds. RabbitMQ 4.3
        nacks a message on its way to a queue that died, although the other queues have it.

        Args:
            recovery: seconds. On a younger connection, a returned `mandatory` message is sent again. RabbitMQ 3.10
                accepts connections up to 0.5 s before it has recovered its streams. Without `mandatory` it would
                confirm a message that reaches none of them.

        Raises:
            BrokerUnavailable: not confirmed in time, or this sender was closed. The message may have arrived, or may
                still arrive: send it again with the same id, never with a new one.
            NotFound: the exchange does not exist.
            AccessRefused: the user may not publish this message.
            Unroutable: the message is `mandatory`, and no queue takes it.

        Cancelling leaves the channel usable. It is then unknown whether the message was sent.
        """
        message = Message("", body, exchange, routing_key, properties, mandatory, recovery)
        await self.deliver(message, timeout)

    async def deliver(self, message: Message, timeout: float, *, alone: bool = False) -> None:
        """As `send`.

        Args:
            alone: first try a separate channel, where a refusal certainly concerns this message.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        next_pause = amqp.pauses()
        failure: BrokerError | None = None
        try:
            async with self.limit(deadline):
                while True:
                    try:
                        if alone:
                            return await self._send_alone(message)
                        return await self.publish_on(await self.open_channel(), message)
                    except _Unclear as error:
                        failure, alone = error.failure, True
                        continue
                    except BrokerUnavailable as error:
                        if self._closed:
                            raise
                        failure = error
                    await asyncio.sleep(next_pause())
        except TimeoutError:
            raise self.overdue(message, timeout, failure) from failure

    async def _send_alone(self, message: Message) -> None:
        # RabbitMQ closes a channel for one refused message, and all messages that wait on it get the same error. On a
        # separate channel the error certainly concerns this message.
        await self.open_channel()
        assert self._connection is not None, "the shared channel is one of its channels"
        channel = await amqp.open_channel(self._connection, confirms=True)
        try:
            await self.publish_on(channel, message)
        except _Unclear as error:
            raise error.failure from None
        finally:
            self._give_up(channel)

    async def publish_on(self, channel: AbstractChannel, message: Message) -> None:
        """Sends the message once, on this channel, and returns after its confirm.

        Raises:
            BrokerUnavailable: the message may be sent again.
            _Unclear: RabbitMQ refused this message or another on the same channel.
            Unroutable
        """
        doing = message.doing
        try:
            await channel.basic_publish(
                message.body,
                exchange=message.exchange,
                routing_key=message.routing_key,
                properties=message.properties,
                mandatory=message.mandatory,
            )
        except PublishError as error:
            if time.monotonic() >= self._connected_at + message.recovery:
                raise Unroutable(f"{doing}: no queue takes it ({error})") from None
            raise BrokerUnavailable(f"{doing}: no queue takes it yet") from None
        except DeliveryError:
            raise BrokerUnavailable(f"{doing}: RabbitMQ answered with a nack") from None
        except ChannelClosed as error:
            failure = translate(error, doing)
            if isinstance(failure, BrokerUnavailable):
                raise failure from None
            raise _Unclear(failure) from None
        except (*ERRORS, BrokerError) as error:
            raise self._lost(translate(error, doing)) from None
        except (Exception, asyncio.CancelledError) as error:
            if not is_rejection(error):
                raise
            raise self._lost(BrokerUnavailable(f"{doing}: the connection was closed")) from None

    def overdue(self, message: Message, timeout: float, failure: BaseException | None) -> BrokerUnavailable:
        """The error for a message that was not confirmed within `timeout` seconds."""
        if self._closed:
            return BrokerUnavailable(f"{message.doing}: this publisher was closed before the confirm arrived")
        if failure is not None:
            return BrokerUnavailable(f"not confirmed within {timeout:g} s; last error: {failure}")
        if self.channel is None:
            return BrokerUnavailable(f"{message.doing}: no connection within {timeout:g} s; RabbitMQ does not answer")
        return BrokerUnavailable(
            f"{message.doing}: not confirmed within {timeout:g} s, though the connection is open. A memory or disk "
            "alarm may block publishers: see `rabbitmq-diagnostics alarms`"
        )

    async def open_channel(self) -> AbstractChannel:
        """The shared channel. Opens it if necessary, with one try.

        Raises:
            BrokerUnavailable, AccessRefused
        """
        if self._closed:
            raise BrokerUnavailable("this publisher is closed")
        channel = self._channel
        if channel is not None and not channel.is_closed:
            return channel
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open(), name="amqp-sender-open")
            self._opening.add_done_callback(_look_at_failure)
        # Shielded: a caller that is cancelled must not cancel the opening for the other callers.
        return await asyncio.shield(self._opening)

    async def _open(self) -> AbstractChannel:
        try:
            if self._connection is None or not self._connection.connected.is_set():
                if self._connection is not None:
                    await amqp.close(self._connection)
                    self._connection = None
                self._connection = await amqp.connect(self._addresses, name=self._name)
                self._connected_at = time.monotonic()
            self._channel = await amqp.open_channel(self._connection, confirms=True)
        except BrokerError as error:
            raise self._lost(error) from None
        if self._lost_at is not None:
            if self._announce:
                _log.warning("%s: connected to RabbitMQ after %.1f s", self._name, time.monotonic() - self._lost_at)
            self._lost_at = None
        return self._channel

    def _lost(self, failure: BrokerError) -> BrokerError:
        """Logs the first failure of an outage, and none of the others."""
        if self._lost_at is None and not self._closed:
            self._lost_at = time.monotonic()
            if self._announce:
                _log.warning("%s: no connection to RabbitMQ, trying again: %s", self._name, failure)
        return failure

    def _give_up(self, channel: AbstractChannel) -> None:
        """Closes a channel in the background: the caller has its confirm and must not wait for the close."""

        async def close() -> None:
            with contextlib.suppress(*ERRORS, TimeoutError):
                async with asyncio.timeout(amqp.CLOSE_SECONDS):
                    await channel.close()

        task = asyncio.create_task(close(), name="amqp-sender-channel-close")
        self._leftovers.add(task)
        task.add_done_callback(self._leftovers.discard)

    async def close(self) -> None:
        """Closes the connection within 5 s. Callers that wait for a confirm get BrokerUnavailable at once."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            with contextlib.suppress(RuntimeError):  # The timeout is already expiring.
                limit.reschedule(now)
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._connection is not None:
            await amqp.close(self._connection)
            self._connection = self._channel = None


def _look_at_failure(task: asyncio.Task[AbstractChannel]) -> None:
    # If all callers were cancelled, asyncio would report that the exception was never retrieved.
    if not task.cancelled():
        task.exception()


# Many messages in order


class WindowEntry:
    """A message of a `Window`.

    `index` counts the added messages from 0. `deadline` is the loop's time, in seconds, until which it must be
    confirmed.
    """

    __slots__ = ("deadline", "index", "is_confirmed", "message")

    def __init__(self, index: int, message: Message, deadline: float) -> None:
        self.index = index
        self.message = message
        self.deadline = deadline
        self.is_confirmed = False


class Window:
    """The unconfirmed messages, in the order in which they were added. Pure.

    Messages are sent in order. After a loss all unconfirmed messages are sent again, in order ("go back N"). RabbitMQ
    reads a connection in order, so the messages that arrived before the loss are a prefix of the sent ones. A reader
    that drops repeated ids then sees the order of the calls.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: deque[WindowEntry] = deque()
        self._unsent = 0
        """The number of entries at the right end that must be sent."""
        self.added = 0
        self.confirmed = 0
        """The number of messages before the first unconfirmed one."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        return len(self._entries) >= self._size

    @property
    def head(self) -> WindowEntry:
        """The first unconfirmed entry. The window must not be empty."""
        return self._entries[0]

    def add(self, message: Message, deadline: float) -> None:
        assert not self.is_full, "the caller waits for room"
        self._entries.append(WindowEntry(self.added, message, deadline))
        self.added += 1
        self._unsent += 1

    def take_unsent(self) -> list[WindowEntry]:
        """Returns the entries to send now, in this order, and counts them as sent."""
        taken = [entry for entry in self._last(self._unsent) if not entry.is_confirmed]
        self._unsent = 0
        return taken

    def confirm(self, entry: WindowEntry) -> None:
        entry.is_confirmed = True
        while self._entries and self._entries[0].is_confirmed:
            self._entries.popleft()
            self.confirmed += 1

    def go_back(self) -> None:
        """Marks all unconfirmed entries to be sent again."""
        self._unsent = len(self._entries)

    @property
    def unconfirmed(self) -> list[WindowEntry]:
        return [entry for entry in self._entries if not entry.is_confirmed]

    def _last(self, count: int) -> Iterator[WindowEntry]:
        return (self._entries[at] for at in range(len(self._entries) - count, len(self._entries)))


@dataclass(frozen=True, slots=True)
class PipelineProgress:
    """The progress of a `Pipeline`.

    Attributes:
        confirmed: the number of messages before the first unconfirmed one.
        unconfirmed: the messages that were put in and are not confirmed, in order. RabbitMQ may have them anyway.
    """

    confirmed: int
    unconfirmed: list[WindowEntry]


class Pipeline:
    """Sends messages in order, without waiting for each confirm before the next message. For one task at a time.

    Args:
        timeout: seconds from `put` until a message without a confirm fails.
        on_unroutable: called with a `mandatory` message that no queue takes. The message counts as confirmed.
        size: the most unconfirmed messages.
    """

    def __init__(
        self,
        sender: Sender,
        *,
        timeout: float,
        on_unroutable: Callable[[Message, Unroutable], None],
        size: int = PIPELINE_EVENTS,
    ) -> None:
        self._sender = sender
        self._timeout = timeout
        self._on_unroutable = on_unroutable
        self._window = Window(size)
        self._channel: AbstractChannel | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self._next_pause = amqp.pauses()

    def progress(self) -> PipelineProgress:
        """The progress at this moment."""
        return PipelineProgress(self._window.confirmed, self._window.unconfirmed)

    async def put(self, message: Message) -> None:
        """Takes a message once the window has room.

        Raises:
            BrokerError: of the first message that fails. It is the first unconfirmed one: all before it are confirmed.
        """
        while self._window.is_full or self._failure is not None:
            await self._advance()
        self._window.add(message, asyncio.get_running_loop().time() + self._timeout)
        channel = self._sender.channel
        if channel is None or channel is not self._channel:
            await self._recover(None)
        else:
            self._send(channel)
            if self._window.added % 16 == 0:
                await asyncio.sleep(0)  # Lets the tasks send, even if the caller itself never waits.

    async def drain(self) -> None:
        """Returns once all messages are confirmed. Raises as `put`."""
        while self._window:
            await self._advance()

    def abandon(self) -> None:
        """Stops waiting. Messages that were sent may still arrive."""
        for task in self._tasks:
            task.cancel()

    def _send(self, channel: AbstractChannel) -> None:
        # All tasks use this channel. A task that opened a new one would overtake tasks whose channel was just closed.
        self._channel = channel
        for entry in self._window.take_unsent():
            # Tasks start in the order of their creation, and each writes its message before it first waits.
            task = asyncio.create_task(self._sender.publish_on(channel, entry.message), name="publish")
            self._tasks.add(task)
            task.add_done_callback(partial(self._settle, entry))

    def _settle(self, entry: WindowEntry, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if task.cancelled():
            return
        failure = task.exception()
        if isinstance(failure, Unroutable):
            self._on_unroutable(entry.message, failure)
            failure = None
        if failure is None:
            self._window.confirm(entry)
            self._next_pause = amqp.pauses()
        elif self._failure is None:
            self._failure = failure

    async def _advance(self) -> None:
        """Waits for a confirm or a failure. After a failure, it sends again."""
        if self._failure is None:
            head = self._window.head
            self._changed.clear()
            try:
                async with self._sender.limit(head.deadline):
                    await self._changed.wait()
            except TimeoutError:
                raise self._sender.overdue(head.message, self._timeout, None) from None
        if self._failure is not None:
            await self._recover(self._failure)

    async def _recover(self, failure: BaseException | None) -> None:
        """Sends all unconfirmed messages again, in order, once a channel is open."""
        while True:
            # Wait for the other messages of the channel: after a nack only one fails, and the others are confirmed.
            await self._wait_for_tasks()
            self._failure = None
            if not self._window:
                return
            self._window.go_back()
            if failure is not None and not isinstance(failure, BrokerUnavailable):
                await self._send_one_by_one()
                return
            head = self._window.head
            try:
                async with self._sender.limit(head.deadline):
                    if failure is not None:
                        await asyncio.sleep(self._next_pause())
                    self._send(await self._sender.open_channel())
                    return
            except TimeoutError:
                raise self._sender.overdue(head.message, self._timeout, failure) from failure
            except BrokerUnavailable as error:
                if self._sender.is_closed:
                    raise
                failure = error
            except BrokerError as error:
                failure = error

    async def _wait_for_tasks(self) -> None:
        if not self._tasks:
            return
        loop = asyncio.get_running_loop()
        await asyncio.wait(self._tasks, timeout=max(0.0, self._window.head.deadline - loop.time()))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _send_one_by_one(self) -> None:
        """After a refusal, sends each message on a separate channel, until the refused one raises its error."""
        for entry in self._window.unconfirmed:
            remaining = entry.deadline - asyncio.get_running_loop().time()
            try:
                await self._sender.deliver(entry.message, remaining, alone=True)
            except Unroutable as error:
                self._on_unroutable(entry.message, error)
            self._window.confirm(entry)
