"""The consuming side of a connection: passes deliveries from the socket to callbacks, without the AMQP library.

`deliveries.Deliveries` cuts deliveries out of a `ConsumingConnection` before the library reads it. A `Consumer` is one
channel of such a connection. This file knows nothing of events and streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, SupportsIndex, cast

import aio_pika
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.connection import TransportFactory
from pamqp.common import FieldTable
from yarl import URL

from bridge import amqp
from bridge.service.broker.deliveries import HEARTBEAT, Deliveries, Sink
from bridge.service.broker.gathering import Gathering

SUCCESSION_SECONDS = 0.032
"""Deliveries that follow others within this time may be followed by a pause in reading. A single event is not
delayed."""

TALK_SECONDS = 0.1
"""Reading does not pause for this long after an answer of RabbitMQ: more answers may be awaited."""

ACK_SECONDS = 0.025
"""Acknowledgements wait up to this long for others, so that one write contains them."""

MANY = 100
"""This many deliveries are acknowledged at once: half of a live queue's prefetch, so that its deliveries never stop. A
packet with this many is large enough, and no pause in reading follows it."""

LARGE_BYTES = 65_536
"""No pause in reading follows a packet of this many bytes: it contains few large events, and RabbitMQ has more."""

QUIET_SECONDS = 1.0
"""While a connection receives only deliveries, the library gets a heartbeat frame this often."""

_log = logging.getLogger("bridge.consumer")

Batch = AbstractContextManager[object]
"""Entered and left around the callbacks of all deliveries of one packet."""


class Consumer:
    """A channel that consumes. Passes each delivery from the socket to a callback, and acknowledges it afterwards.

    A live queue may lose events after the acknowledgement; the log keeps them.

    Made by `open`.
    """

    def __init__(self, deliveries: Deliveries, channel: AbstractChannel, on_message: Sink) -> None:
        self._deliveries = deliveries
        self._on_message = on_message
        self.channel = channel
        deliveries.take(channel.number, on_message)

    @classmethod
    async def open(cls, connection: aio_pika.abc.AbstractConnection, on_message: Sink, *, prefetch: int) -> Self:
        """Opens a channel, and sets its prefetch.

        Args:
            connection: a `ConsumingConnection`.
            on_message: called with the consumer's tag, the routing key, the body, and the offset if the queue is a
                stream. An exception that it raises is logged, and the next message follows.
            prefetch: limit of unacknowledged deliveries for each consumer.

        Raises:
            amqp.BrokerError
        """
        assert isinstance(connection, ConsumingConnection), "only a ConsumingConnection cuts out deliveries"
        channel = await amqp.open_channel(connection)
        async with amqp.translating("setting the prefetch"):
            await channel.basic_qos(prefetch_count=prefetch)
        return cls(connection.deliveries, channel, on_message)

    async def consume(self, queue: str, tag: str, *, arguments: FieldTable | None = None) -> None:
        """Starts to consume the queue. Cancelling it closes the channel.

        Raises:
            amqp.BrokerError: RabbitMQ or the library has closed the channel.
        """
        try:
            async with amqp.translating(f"consuming {queue!r}"):
                await self.channel.basic_consume(queue, _unexpected, consumer_tag=tag, arguments=arguments)
        except BaseException:
            self.stop()  # Also after a cancel: the library has closed the channel.
            raise

    def stop(self) -> None:
        """Ends deliveries and acknowledgements. Call it before you close the channel."""
        self._deliveries.drop(self.channel.number, self._on_message)


async def _unexpected(message: DeliveredMessage) -> None:
    raise AssertionError(f"a delivery arrived through the library: {message.delivery!r}")


class _LibraryReader(asyncio.StreamReader):
    """The library's view of a connection: everything except deliveries.

    While the process is busy, reading pauses after deliveries in quick succession, so that the next read returns more
    of them (`gathering`).
    """

    def __init__(self, deliveries: Deliveries, write_batch: Batch, *, pauses: bool) -> None:
        super().__init__()
        self._pauses = pauses
        self._deliveries = deliveries
        self._write_batch = write_batch
        self._clock = asyncio.get_running_loop()
        self._passed_at = self._answered_at = self._delivered_at = self._acked_at = 0.0
        self._gathering = Gathering(self._clock.time(), time.thread_time())
        self._paused = False
        self._ack_timer: asyncio.TimerHandle | None = None
        self.writer: asyncio.StreamWriter

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        deliveries = self._deliveries
        before = deliveries.unacked
        packet = bytes(data)
        with self._write_batch:
            passed = deliveries.feed(packet)
        now = self._clock.time()
        if deliveries.faults:
            self._log_faults()
        if passed:
            self._answered_at = self._passed_at = now
        elif deliveries.takes and now - self._passed_at > QUIET_SECONDS:
            # The library closes a connection on which it reads nothing, and RabbitMQ sends no heartbeat on a busy one.
            passed = HEARTBEAT
            self._passed_at = now
        if deliveries.unacked != before:
            self._on_delivered(now, deliveries.unacked - before, len(packet))
        if passed:
            super().feed_data(passed)

    def _on_delivered(self, now: float, count: int, size: int) -> None:
        if self._pauses and self._gathering.is_due(now):
            self._gathering.measure(now, time.thread_time())
        in_succession = now - self._delivered_at < SUCCESSION_SECONDS
        # While queues are made, each command waits for the answer to the one before it. A pause would delay them all.
        awaits_answers = now - self._answered_at < TALK_SECONDS
        is_small = count < MANY and size < LARGE_BYTES
        seconds = self._gathering.seconds
        if seconds and in_succession and not awaits_answers and is_small and not self._paused:
            self._paused = True
            cast("asyncio.Transport", self.writer.transport).pause_reading()
            self._clock.call_later(seconds, self._resume_reading)
        self._delivered_at = now
        if self._deliveries.unacked >= MANY or now - self._acked_at >= ACK_SECONDS:
            self._ack()
        elif self._ack_timer is None:
            self._ack_timer = self._clock.call_later(ACK_SECONDS, self._ack)

    def _resume_reading(self) -> None:
        self._paused = False
        if not self.writer.is_closing():
            cast("asyncio.Transport", self.writer.transport).resume_reading()

    def _ack(self) -> None:
        """Acknowledges all deliveries since the last call, on all channels, in one write."""
        self._acked_at = self._clock.time()
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        acks = self._deliveries.take_acks()
        if acks and not self.writer.is_closing():
            self.writer.write(acks)

    def _log_faults(self) -> None:
        for fault in self._deliveries.faults:
            _log.error("a delivery was not taken", exc_info=fault)
        self._deliveries.faults.clear()


class _Transport(TransportFactory):
    def __init__(self, write_batch: Batch, max_body: int, *, pauses: bool) -> None:
        self._write_batch = write_batch
        self._pauses = pauses
        self.deliveries = Deliveries(max_body=max_body)

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = await kwargs.pop("ssl_context_provider").get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = _LibraryReader(self.deliveries, self._write_batch, pauses=self._pauses)
        protocol = asyncio.StreamReaderProtocol(reader)
        assert url.host is not None, "parse_urls requires a host"
        port = url.port or (5671 if context else 5672)
        transport, _ = await loop.create_connection(lambda: protocol, url.host, port, ssl=context)
        reader.writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        return reader, reader.writer


class ConsumingConnection(amqp.BrokerConnection):
    """A connection whose deliveries are cut out before the library reads them, so that no delivery can break it."""

    @classmethod
    async def open(
        cls, addresses: Sequence[str], *, name: str, write_batch: Batch, max_body: int, pauses: bool = False
    ) -> Self:
        """Connects like `amqp.connect`. Message properties are not read, so no publisher can break the connection.

        Args:
            write_batch: entered and left around the callbacks of all deliveries of one packet.
            max_body: limit of a body in bytes; callbacks get a `Cut` of a larger one.
            pauses: whether reading pauses while the process is busy (`gathering`). It saves nothing for a stream, which
                RabbitMQ delivers in chunks.

        Raises:
            amqp.BrokerError: as `amqp.connect` raises it.
        """
        connection = await amqp.connect(addresses, name=name, make=lambda url: cls(url, write_batch, max_body, pauses))
        assert isinstance(connection, cls), "`make` returns this class"
        return connection

    def __init__(self, url: URL, write_batch: Batch, max_body: int, pauses: bool) -> None:
        super().__init__(url)
        transport = _Transport(write_batch, max_body, pauses=pauses)
        self.deliveries = transport.deliveries
        # aio_pika passes only the arguments that a URL can contain, and this one is aiormq's.
        self.kwargs["transport_factory"] = transport
