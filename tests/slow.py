"""The bridge with aiormq's own deliveries instead of `bridge.service.broker.deliveries`: `make test-slow`.

    SUITE_BRIDGE=tests.slow python -m pytest tests/integration

The results of the tests must not depend on which of the two delivers the messages.
"""

from __future__ import annotations

from typing import Self

import aio_pika
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.common import FieldTable

from bridge import amqp
from bridge.cli import main
from bridge.event import Cut
from bridge.service.broker import eventlog, live
from bridge.service.broker.consumer import ConsumingConnection
from bridge.service.broker.deliveries import KEPT_BYTES, Sink
from tests import patience


class LibraryConsumer:
    """Has the methods of `Consumer`, and uses the library's own deliveries."""

    def __init__(self, channel: AbstractChannel, on_message: Sink, max_body: int) -> None:
        self.channel = channel
        self._on_message = on_message
        self._max_body = max_body
        self._stopped = False

    @classmethod
    async def open(cls, connection: aio_pika.abc.AbstractConnection, on_message: Sink, *, prefetch: int) -> Self:
        channel = await amqp.open_channel(connection)
        async with amqp.translating("setting the prefetch"):
            await channel.basic_qos(prefetch_count=prefetch)
        assert isinstance(connection, ConsumingConnection)
        return cls(channel, on_message, connection.deliveries.max_body)

    async def consume(self, queue: str, tag: str, *, arguments: FieldTable | None = None) -> None:
        async with amqp.translating(f"consuming {queue!r}"):
            await self.channel.basic_consume(queue, self._deliver, consumer_tag=tag, arguments=arguments)

    async def _deliver(self, message: DeliveredMessage) -> None:
        if self._stopped:
            return
        offset = (message.header.properties.headers or {}).get("x-stream-offset")
        assert offset is None or isinstance(offset, int)
        size = len(message.body)
        body = message.body if size <= self._max_body else Cut(message.body[:KEPT_BYTES], size)
        # aiormq runs this as one task per message, started in order of arrival. Until the first await, the order stays.
        self._on_message((message.consumer_tag or "").encode(), message.routing_key or "", body, offset)
        if not self._stopped and not self.channel.is_closed:
            await self.channel.basic_ack(message.delivery_tag or 0, wait=False)

    def stop(self) -> None:
        self._stopped = True


if __name__ == "__main__":
    patience.apply()
    for user in (live, eventlog):
        setattr(user, "Consumer", LibraryConsumer)  # noqa: B010 - The type is another one on purpose.
    main()
