"""What must exist in RabbitMQ before anything flows: the exchange and the queue of refused messages.

Owns their properties and the words for what is wrong with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bridge import amqp
from bridge.amqp import AccessRefused, NotFound, TopologyMismatch
from bridge.routing import Audience
from bridge.service.settings import LogSettings

if TYPE_CHECKING:
    import aio_pika
    from aiormq.abc import AbstractChannel, DeliveredMessage
    from pamqp.common import FieldTable

QUARANTINE: FieldTable = {
    "x-queue-type": "classic",
    "x-max-length": 10_000,
    "x-message-ttl": 7 * 24 * 3600 * 1000,
}
"""Arguments of the quarantine: ten thousand messages, of which the oldest go first, and seven days (in ms). Its type is
named, since a virtual host may have another default: RabbitMQ takes no time limit of a message for a stream."""

_NEVER: FieldTable = {"x-queue-leader-locator": "bridge-asks"}
"""No queue can be made with this. So a declare that asks what a queue is makes none where it has just been deleted."""

_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<name>[^']+)' for .*?: received (?P<wanted>.*?) but current is (?P<current>.*)",
    re.DOTALL,
)
_TYPED = re.compile(r"the value '(?P<value>.*)' of type '(?P<type>[a-z]+)'", re.DOTALL)
_KINDS: dict[type, str] = {bool: "bool", int: "signedint"}
_MAX_QUESTIONS = 20
"""More than the arguments that RabbitMQ compares."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An attribute of an exchange or queue that is not as the bridge would make it. `current` is None: it has none."""

    name: str
    wanted: str
    current: str | None
    words: str
    """RabbitMQ's own."""

    def __str__(self) -> str:
        return f"{self.name} is {self.current or 'not set'}, the bridge would set {self.wanted}"


@dataclass(frozen=True, slots=True)
class Declared:
    """What is there now. `may_declare` is False where this user may not declare it, and only that it exists is known.

    `differences` do not matter to the bridge.
    """

    may_declare: bool = True
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        return "; ".join(str(difference) for difference in self.differences)


Fits = Callable[[Difference], bool]


def fits_exchange(difference: Difference) -> bool:
    """An alternate exchange gets what no queue wants, and an internal one gets its events from another exchange.

    Another type routes otherwise. One that is not durable, or deletes itself, takes the log's binding with it.
    """
    return difference.name in ("alternate-exchange", "internal")


def fits_quarantine(difference: Difference) -> bool:
    """Any durable queue that takes messages and keeps them until a person takes them out, whatever its limits are."""
    if difference.name == "x-queue-type":
        # A stream cannot be read by `bridge quarantine`, which takes single messages out.
        return difference.current in ("classic", "quorum")
    if difference.name in ("x-max-length", "x-max-length-bytes", "x-message-ttl"):
        return difference.current != "0"  # It would keep nothing.
    # With `x-expires` RabbitMQ deletes a queue without a reader, and a person reads this one now and then.
    return difference.name not in ("durable", "auto_delete", "x-expires")


def fits_log(difference: Difference) -> bool:
    """Any stream, however long it keeps its entries."""
    if difference.name == "x-queue-type":
        return difference.current == "stream"
    return difference.name not in ("durable", "auto_delete")


def read_difference(words: str) -> Difference | None:
    """The attribute that RabbitMQ names in its refusal to declare something that exists. None: it names none."""
    found = _INEQUIVALENT.search(words)
    if found is None:
        return None
    wanted, current = (_value(found[side]) for side in ("wanted", "current"))
    if found["name"] == "x-max-age":  # RabbitMQ 4.3 names it in ms, and takes it with a unit only.
        wanted, current = (f"{int(age) // 1000}s" if age and age.isdecimal() else age for age in (wanted, current))
    return Difference(found["name"], wanted or "none", current, found[0])


def _value(words: str) -> str | None:
    if words == "none":
        return None
    typed = _TYPED.fullmatch(words)
    return typed["value"] if typed else words.strip("'")


def ask_next(arguments: FieldTable, difference: Difference) -> FieldTable | None:
    """The arguments of a declare that names the next difference. None: the value cannot be written.

    RabbitMQ names one difference at a time, the first one.
    """
    arguments = dict(arguments)
    if difference.current is None:
        arguments.pop(difference.name, None)
        return arguments
    typed = _TYPED.search(difference.words.partition(" but current is ")[2])
    # Where both are set, RabbitMQ names no type: then it is that of the value that was asked.
    kind = typed["type"] if typed else _KINDS.get(type(arguments.get(difference.name)), "longstr")
    if kind == "longstr":
        arguments[difference.name] = difference.current
    elif kind == "bool":
        arguments[difference.name] = difference.current == "true"
    elif difference.current.lstrip("-").isdecimal():
        arguments[difference.name] = int(difference.current)
    else:
        return None
    return arguments


async def declare_exchange(connection: aio_pika.abc.AbstractConnection, name: str) -> Declared:
    """
    Raises:
        BrokerError: it does not exist and cannot be made, or it does not fit.
    """

    async def declare(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.exchange_declare(name, exchange_type="topic", durable=True, passive=passive)

    what = f"exchange {name!r}"
    try:
        return await _declare(connection, declare, what, "a durable topic exchange")
    except TopologyMismatch as error:
        # RabbitMQ compares type, durable, auto_delete, internal and alternate-exchange, in this order. So behind one
        # that fits there is none that does not.
        return _judge(
            what,
            [read_difference(str(error))],
            fits_exchange,
            error,
            "The bridge needs a durable topic exchange that is not auto_delete. Leave this one as it is, and name "
            "another one by BRIDGE_EXCHANGE and in what publishes (`exchange=` in the SDK)",
        )


async def declare_quarantine(connection: aio_pika.abc.AbstractConnection, name: str) -> Declared:
    """
    Raises:
        BrokerError: it does not exist and cannot be made, or it does not fit.
    """

    async def declare(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.queue_declare(name, durable=True, arguments=QUARANTINE, passive=passive)

    what = f"queue {name!r}"
    try:
        return await _declare(connection, declare, what, f"a durable queue with {QUARANTINE}")
    except TopologyMismatch as error:
        return _judge(
            what,
            await _ask(connection, name, QUARANTINE, fits_quarantine),
            fits_quarantine,
            error,
            "The bridge puts refused messages into a durable classic or quorum queue that keeps them. Leave this one "
            "as it is, and name another one by BRIDGE_QUARANTINE, which the bridge then makes",
        )


async def declare_log(connection: aio_pika.abc.AbstractConnection, log: LogSettings, exchange: str) -> Declared:
    """The stream, bound to everything on the exchange. Where `may_declare` is False, whether it is bound is not known.

    Raises:
        BrokerError: it does not exist and cannot be made, or it does not fit.
    """
    arguments: FieldTable = {"x-queue-type": "stream", "x-max-age": log.max_age, "x-max-length-bytes": log.max_bytes}

    async def declare(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.queue_declare(log.name, durable=True, arguments=arguments, passive=passive)
        if not passive:
            await channel.queue_bind(log.name, exchange, "#")

    async def bind(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.queue_bind(log.name, exchange, "#")

    what = f"log {log.name!r}"
    wanted = f"a stream with {arguments}, bound to {exchange!r} with '#'"
    try:
        return await _declare(connection, declare, what, wanted)
    except TopologyMismatch as error:
        declared = _judge(
            what,
            await _ask(connection, log.name, arguments, fits_log),
            fits_log,
            error,
            "The log must be a stream. Leave this queue as it is, and name another one by BRIDGE_LOG, which the bridge "
            "then makes; the clients that are connected now are notified of a gap, once",
        )
        await _on_a_channel(connection, bind, f"binding {what} to {exchange!r}")
        return declared


def _judge(what: str, found: list[Difference | None], fits: Fits, error: TopologyMismatch, advice: str) -> Declared:
    """
    Raises:
        TopologyMismatch: in RabbitMQ's own words, and with what to do.
    """
    differences = [difference for difference in found if difference is not None]
    unfit = [difference.words for difference in differences if not fits(difference)]
    if unfit or len(differences) != len(found) or not found:
        raise TopologyMismatch(f"{what} exists, but does not fit. {'. '.join(unfit) or error}. {advice}")
    return Declared(differences=tuple(differences))


async def _ask(
    connection: aio_pika.abc.AbstractConnection, name: str, wanted: FieldTable, fits: Fits
) -> list[Difference | None]:
    """What is different with a queue, up to a difference of the queue itself that does not fit; then it is the last.

    Ends with None where RabbitMQ refuses for another reason, and its type, so whether it fits, is not known.
    """
    found: dict[str, Difference] = {}
    arguments: FieldTable | None = {**wanted, **_NEVER}
    for _ in range(_MAX_QUESTIONS):
        asked = arguments

        async def ask(channel: AbstractChannel, *, passive: bool, asked: FieldTable | None = asked) -> None:
            await channel.queue_declare(name, durable=True, arguments=asked, passive=passive)

        try:
            await _on_a_channel(connection, ask, f"asking what queue {name!r} is")
            break  # RabbitMQ 3.10 does not compare what a classic queue has no use for.
        except TopologyMismatch as error:
            difference = read_difference(str(error))
            if difference is None:
                return [*found.values(), None]
        if difference.name in _NEVER:
            break
        again = difference.name in found
        found.setdefault(difference.name, difference)
        arguments = ask_next(asked or {}, difference)
        if difference.name in ("durable", "auto_delete"):
            break
        if arguments is None or again:
            age = found.get("x-max-age")  # Only a stream has one.
            is_known = "x-queue-type" in found or (age is not None and age.current is not None)
            return [*found.values(), *([] if is_known else [None])]
    return list(found.values())


async def _on_a_channel(
    connection: aio_pika.abc.AbstractConnection, use: _Declare, doing: str, *, passive: bool = False
) -> None:
    # Each on a channel of its own: a declare that is refused closes it.
    channel = await amqp.open_channel(connection)
    async with amqp.translating(doing):
        await use(channel, passive=passive)
        await channel.close()


class _Declare(Protocol):
    def __call__(self, channel: AbstractChannel, *, passive: bool) -> Awaitable[None]: ...


async def _declare(connection: aio_pika.abc.AbstractConnection, declare: _Declare, what: str, wanted: str) -> Declared:
    try:
        await _on_a_channel(connection, declare, f"declaring {what}")
        return Declared()
    except AccessRefused as refused:
        # A bridge with few rights may not declare. That it is there is enough; RabbitMQ 4.3 does not even let it look.
        # Then its use will show.
        try:
            with contextlib.suppress(AccessRefused):
                await _on_a_channel(connection, declare, f"looking for {what}", passive=True)
            return Declared(may_declare=False)
        except NotFound:
            raise AccessRefused(
                f"{what} does not exist, and this user may not make it. {refused}. Make it ({wanted}), or grant the "
                "user the right to configure it"
            ) from None


def _fitting(what: str, declared: Declared) -> str:
    if not declared.may_declare:
        return f"{what}, or at least exists: this user may not ask"
    return f"{what}. It fits, and differs: {declared}" if declared.differences else what


async def _ignore(_: DeliveredMessage) -> None:
    pass


async def rehearse(
    addresses: Sequence[str],
    *,
    exchange: str,
    quarantine: str,
    log: LogSettings | None,
    describe_channels: Callable[[int], str],
) -> AsyncIterator[str]:
    """Does once what the bridge will do all day, leaves what it would leave, and yields the name of each good step.

    Args:
        describe_channels: says what so many channels in a connection are good for, or raises a BrokerError.

    Raises:
        BrokerError: the step that did not, with what is missing. Cancelling leaves nothing behind.
    """
    connection = await amqp.connect(addresses, name="bridge check")
    try:
        yield "connected to RabbitMQ"
        yield describe_channels(amqp.most_channels(connection))
        yield _fitting(f"exchange {exchange!r} is a topic exchange", await declare_exchange(connection, exchange))
        declared = await declare_quarantine(connection, quarantine)
        yield _fitting(f"queue {quarantine!r} for refused messages", declared)
        if log is None:
            yield "no log (BRIDGE_LOG is empty): clients that come back get bridge.gap"
        else:
            declared = await declare_log(connection, log, exchange)
            channel = await amqp.open_channel(connection)
            async with amqp.translating(f"reading the log {log.name!r} (right to read it)"):
                await channel.basic_qos(prefetch_count=1)
                answer = await channel.basic_consume(log.name, _ignore, arguments={"x-stream-offset": "next"})
                await channel.basic_cancel(answer.consumer_tag or "")
            yield _fitting(f"log {log.name!r}: a stream that can be read", declared)
        channel = await amqp.open_channel(connection, confirms=True)
        queue = f"bridge.check.{secrets.token_hex(4)}"
        async with amqp.translating("making an exclusive queue (right to configure queues named bridge.*)"):
            arguments: FieldTable = {"x-queue-type": "classic"}  # No other type can be exclusive.
            await channel.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments)
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
        yield "refused messages can be quarantined"
    finally:
        await amqp.close(connection)
