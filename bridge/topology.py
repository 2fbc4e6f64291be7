"""What must exist in RabbitMQ before anything flows: the exchange and the queue of refused messages.

Owns their properties and the words for what is wrong with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bridge import amqp
from bridge.amqp import AccessRefused, NotFound, TopologyMismatch
from bridge.routing import Audience

if TYPE_CHECKING:
    import aio_pika
    from aiormq.abc import AbstractChannel, DeliveredMessage
    from pamqp.common import FieldTable

QUARANTINE: FieldTable = {"x-max-length": 10_000, "x-message-ttl": 7 * 24 * 3600 * 1000}
"""Arguments of the quarantine: ten thousand messages, of which the oldest go first, and seven days (in ms)."""


@dataclass(frozen=True, slots=True)
class Log:
    """The stream that clients resume from. `max_age` is in RabbitMQ's words, as in 1h."""

    name: str
    max_age: str
    max_bytes: int


class _Declare(Protocol):
    def __call__(self, channel: AbstractChannel, *, passive: bool) -> Awaitable[object]: ...


async def declare_exchange(connection: aio_pika.abc.AbstractConnection, name: str) -> None:
    def declare(channel: AbstractChannel, *, passive: bool) -> Awaitable[object]:
        return channel.exchange_declare(name, exchange_type="topic", durable=True, passive=passive)

    await _declare(connection, declare, f"exchange {name!r}", "a durable topic exchange", "BRIDGE_EXCHANGE")


async def declare_quarantine(connection: aio_pika.abc.AbstractConnection, name: str) -> None:

    def declare(channel: AbstractChannel, *, passive: bool) -> Awaitable[object]:
        return channel.queue_declare(name, durable=True, arguments=QUARANTINE, passive=passive)

    await _declare(connection, declare, f"queue {name!r}", f"a durable queue with {QUARANTINE}", "BRIDGE_QUARANTINE")


async def declare_log(connection: aio_pika.abc.AbstractConnection, log: Log, exchange: str) -> bool:
    """The stream, bound to everything on the exchange. False: it is there, and whether it is bound we may not say."""
    arguments: FieldTable = {"x-queue-type": "stream", "x-max-age": log.max_age, "x-max-length-bytes": log.max_bytes}

    async def declare(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.queue_declare(log.name, durable=True, arguments=arguments, passive=passive)
        if not passive:
            await channel.queue_bind(log.name, exchange, "#")

    return await _declare(
        connection,
        declare,
        f"log {log.name!r}",
        f"a stream with {arguments}, bound to {exchange!r} with '#'",
        "BRIDGE_LOG (with BRIDGE_LOG_MAX_AGE and BRIDGE_LOG_MAX_BYTES as it was made)",
    )


async def _declare(
    connection: aio_pika.abc.AbstractConnection, declare: _Declare, what: str, wanted: str, setting: str
) -> bool:
    async def attempt(doing: str, *, passive: bool) -> None:
        # Each on a channel of its own: a declare that is refused closes it.
        channel = await amqp.open_channel(connection)
        async with amqp.translating(doing):
            await declare(channel, passive=passive)
            await channel.close()

    try:
        await attempt(f"declaring {what}", passive=False)
        return True
    except TopologyMismatch as error:
        raise TopologyMismatch(
            f"{what} exists, but is not {wanted}. {error}. Delete it if nothing needs it, or name another: {setting}"
        ) from None
    except AccessRefused as refused:
        # A bridge with few rights may not declare. That it is there is enough; RabbitMQ 4.3 does not even let it look.
        # Then its use will show.
        try:
            with contextlib.suppress(AccessRefused):
                await attempt(f"looking for {what}", passive=True)
            return False
        except NotFound:
            raise AccessRefused(
                f"{what} does not exist, and this user may not make it. {refused}. Make it ({wanted}), or grant the "
                "user the right to configure it"
            ) from None


async def _ignore(_: DeliveredMessage) -> None:
    pass


async def rehearse(addresses: Sequence[str], *, exchange: str, quarantine: str, log: Log | None) -> AsyncIterator[str]:
    """Does once what the bridge will do all day, leaves what it would leave, and yields the name of each good step.

    Raises:
        BrokerError: the step that did not, with what is missing. Cancelling leaves nothing behind.
    """
    connection = await amqp.connect(addresses, name="bridge check")
    try:
        yield "connected to RabbitMQ"
        await declare_exchange(connection, exchange)
        yield f"exchange {exchange!r} is a topic exchange, or at least exists"
        await declare_quarantine(connection, quarantine)
        yield f"queue {quarantine!r} for refused messages"
        if log is None:
            yield "no log (BRIDGE_LOG is empty): clients that come back are told a gap"
        else:
            await declare_log(connection, log, exchange)
            channel = await amqp.open_channel(connection)
            async with amqp.translating(f"reading the log {log.name!r} (right to read it)"):
                await channel.basic_qos(prefetch_count=1)
                answer = await channel.basic_consume(log.name, _ignore, arguments={"x-stream-offset": "next"})
                await channel.basic_cancel(answer.consumer_tag or "")
            yield f"log {log.name!r}: a stream that can be read"
        channel = await amqp.open_channel(connection, confirms=True)
        queue = f"bridge.check.{secrets.token_hex(4)}"
        async with amqp.translating("making an exclusive queue (right to configure queues named bridge.*)"):
            await channel.queue_declare(queue, exclusive=True, auto_delete=True)
        key = Audience.user("bridge check").binding_key()
        async with amqp.translating(f"binding it to {exchange!r} (right to read the exchange and write the queue)"):
            await channel.queue_bind(queue, exchange, key)
        got = asyncio.Event()

        async def on_message(_: DeliveredMessage) -> None:
            got.set()

        async with amqp.translating("consuming from it (right to read queues named bridge.*)"):
            await channel.basic_consume(queue, on_message, no_ack=True)
        yield "a live queue can be made, bound and consumed"
        async with amqp.translating(f"publishing to {quarantine!r} (right to write to amq.default)"):
            # To the live queue and not to quarantine, where it would lie about; the right that it needs is the same.
            await channel.basic_publish(b"{}", exchange="", routing_key=queue)
            async with asyncio.timeout(amqp.CLOSE_SECONDS):
                await got.wait()
        yield "refused messages can be put aside"
    finally:
        await amqp.close(connection)
