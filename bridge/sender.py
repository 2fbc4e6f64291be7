"""Publishing with confirms: one connection that comes back by itself, and a window for many messages in order.

`Sender` is used by the SDK and by the service. `Window` is the pure part of `Pipeline`: which of many messages are on
their way, which are confirmed, and which must be sent again after a loss.
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
"""Messages of a `Pipeline` that may wait for their confirms at once. A confirm takes about a millisecond, so this many
keep a connection busy; more would only be more to send again after a loss."""

_log = logging.getLogger("bridge.publisher")


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What is published. `mandatory`: a queue must take it. `recovery`: see `Sender.send`."""

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
    """RabbitMQ closed a channel on which several messages were on their way: one of them was refused."""

    def __init__(self, failure: BrokerError) -> None:
        self.failure = failure
        super().__init__(str(failure))


class Sender:
    """A connection for publishing that comes back by itself; every message is confirmed or an error is raised.

    Any number of tasks may send at once; their messages share one channel and go out in the order of the calls.

    Args:
        addresses: AMQP URLs of the cluster's nodes.
        name: shown in RabbitMQ's list of connections.
        announce: whether a lost connection and its return are logged, one line each.
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
        """The channel that all share, while it is open."""
        return None if self._channel is None or self._channel.is_closed else self._channel

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called. A connection that was lost comes back; it is not meant."""
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
        """Connects now rather than with the first message. Tries again until `timeout` (seconds) is over.

        Raises:
            BrokerUnavailable: no node could be reached in time; the text has the last reason.
            AccessRefused: the user or the virtual host is refused. Trying again would not help.
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
            reason = "this publisher was closed" if self._closed else f"last: {failure or 'no answer'}"
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
        """Returns once the broker has confirmed the message: every queue and stream it is routed to has taken it.

        A lost connection and a nack are answered by sending the same message again, until `timeout` (seconds) is over.
        RabbitMQ 4.3 nacks what was on its way to a queue that died, although the others have it.

        Args:
            recovery: on a connection younger than this (seconds), `mandatory` is taken as "not yet": RabbitMQ 3.10
                takes connections for up to half a second before it has recovered its streams, and would confirm what
                reaches none.

        Raises:
            BrokerUnavailable: not confirmed in time, or this sender was closed. The message may still have arrived, or
                arrive yet: send it again with the same id, never with a new one.
            NotFound: the exchange does not exist.
            AccessRefused: the user may not publish this.
            Unroutable: `mandatory`, and no queue takes it.

        Cancelling leaves the channel in order; whether the message was sent is then not known.
        """
        message = Message("", body, exchange, routing_key, properties, mandatory, recovery)
        await self.deliver(message, timeout)

    async def deliver(self, message: Message, timeout: float, *, alone: bool = False) -> None:
        """As `send`.

        Args:
            alone: begin on a channel of its own, on which a refusal is certainly about this message.
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
        # RabbitMQ closes the channel for one bad message, and all that wait on it get that error. On a channel of its
        # own the verdict is certainly about this one.
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
        """One try on this channel.

        Raises:
            BrokerUnavailable: it may be sent again.
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
            raise BrokerUnavailable(f"{doing}: the broker answered nack") from None
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
            return BrokerUnavailable(f"{message.doing}: this publisher was closed before the confirm came")
        if failure is not None:
            return BrokerUnavailable(f"not confirmed within {timeout:g} s; last: {failure}")
        if self.channel is None:
            return BrokerUnavailable(f"{message.doing}: no connection within {timeout:g} s; RabbitMQ does not answer")
        return BrokerUnavailable(
            f"{message.doing}: not confirmed within {timeout:g} s, though the connection is open. A memory or disk "
            "alarm blocks publishers until it is over (`rabbitmq-diagnostics alarms`)"
        )

    async def open_channel(self) -> AbstractChannel:
        """The channel that all share; opened if need be, in one try.

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
        # Shielded: one caller that gives up must not take the connection from the others.
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
        """Closes a channel in the background: a caller that waits for its message must not wait for this."""

        async def close() -> None:
            with contextlib.suppress(*ERRORS, TimeoutError):
                async with asyncio.timeout(amqp.CLOSE_SECONDS):
                    await channel.close()

        task = asyncio.create_task(close(), name="amqp-sender-channel-close")
        self._leftovers.add(task)
        task.add_done_callback(self._leftovers.discard)

    async def close(self) -> None:
        """Ends the connection, within five seconds. Callers that wait for a confirm get BrokerUnavailable at once."""
        self._closed = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            with contextlib.suppress(RuntimeError):  # It is expiring already.
                limit.reschedule(now)
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._connection is not None:
            await amqp.close(self._connection)
            self._connection = self._channel = None


def _look_at_failure(task: asyncio.Task[AbstractChannel]) -> None:
    # All callers may have given up by now; asyncio would then report an exception that was never retrieved.
    if not task.cancelled():
        task.exception()


# Many messages in order


class Entry:
    """A message of a `Window`: its place among all that were added, and until when it must be confirmed."""

    __slots__ = ("deadline", "index", "is_confirmed", "message")

    def __init__(self, index: int, message: Message, deadline: float) -> None:
        self.index = index
        self.message = message
        self.deadline = deadline
        self.is_confirmed = False


class Window:
    """Which messages are on their way, in the order in which they were added. Pure.

    Messages are sent in order. After a loss all that are unconfirmed are sent again, in order, from the first on
    ("go back N"). RabbitMQ reads a connection in order, so what arrived before the loss is a prefix of what was sent:
    a reader that drops repeated ids then sees the order of the calls.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: deque[Entry] = deque()
        self._unsent = 0
        """Entries at the right end that are not on their way."""
        self.added = 0
        self.confirmed = 0
        """Messages confirmed without one before them that is not."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_full(self) -> bool:
        return len(self._entries) >= self._size

    @property
    def head(self) -> Entry:
        """The first that is not confirmed. There must be one."""
        return self._entries[0]

    def add(self, message: Message, deadline: float) -> None:
        assert not self.is_full, "the caller waits for room"
        self._entries.append(Entry(self.added, message, deadline))
        self.added += 1
        self._unsent += 1

    def take_unsent(self) -> list[Entry]:
        """What to send now, in this order."""
        taken = [entry for entry in self._last(self._unsent) if not entry.is_confirmed]
        self._unsent = 0
        return taken

    def confirm(self, entry: Entry) -> None:
        entry.is_confirmed = True
        while self._entries and self._entries[0].is_confirmed:
            self._entries.popleft()
            self.confirmed += 1

    def go_back(self) -> None:
        """All that are unconfirmed have to be sent again."""
        self._unsent = len(self._entries)

    @property
    def unconfirmed(self) -> list[Entry]:
        return [entry for entry in self._entries if not entry.is_confirmed]

    def _last(self, count: int) -> Iterator[Entry]:
        return (self._entries[at] for at in range(len(self._entries) - count, len(self._entries)))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a `Pipeline` is.

    Attributes:
        confirmed: messages that are confirmed without a gap, counted from the first.
        unconfirmed: those that were put in and not confirmed, in order. The broker may have them nevertheless.
    """

    confirmed: int
    unconfirmed: list[Entry]


class Pipeline:
    """Sends messages in order without waiting for one confirm before the next. For one task at a time.

    Args:
        timeout: seconds until a message without a confirm fails, counted from when it is put in.
        on_unroutable: called with a message that the broker has confirmed and no queue has.
        size: most messages on their way.
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

    def progress(self) -> Progress:
        """How far it is now."""
        return Progress(self._window.confirmed, self._window.unconfirmed)

    async def put(self, message: Message) -> None:
        """Takes a message, once there is room.

        Raises:
            BrokerError: of the first message that fails. It is the first unconfirmed one; all before it are confirmed.
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
                await asyncio.sleep(0)  # A caller that never waits must not keep the tasks from sending.

    async def drain(self) -> None:
        """Returns once everything is confirmed. Raises as `put`."""
        while self._window:
            await self._advance()

    def abandon(self) -> None:
        """Stops waiting. What is on its way may arrive."""
        for task in self._tasks:
            task.cancel()

    def _send(self, channel: AbstractChannel) -> None:
        # All on one channel. A task that opened another would overtake those whose channel has just been closed.
        self._channel = channel
        for entry in self._window.take_unsent():
            # Tasks start in the order in which they were made, and each writes before it first waits for its confirm.
            task = asyncio.create_task(self._sender.publish_on(channel, entry.message), name="publish")
            self._tasks.add(task)
            task.add_done_callback(partial(self._settle, entry))

    def _settle(self, entry: Entry, task: asyncio.Task[None]) -> None:
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
        """Waits until a confirm or a failure has come, and answers a failure."""
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
        """Sends what is unconfirmed again, in order, as soon as the broker takes it."""
        while True:
            # The others on the same channel fail too, or are confirmed: after a nack only one has failed.
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
        """After a refusal: finds the message that it was about, and confirms all before it."""
        for entry in self._window.unconfirmed:
            remaining = entry.deadline - asyncio.get_running_loop().time()
            try:
                await self._sender.deliver(entry.message, remaining, alone=True)
            except Unroutable as error:
                self._on_unroutable(entry.message, error)
            self._window.confirm(entry)
