"""Declares the exchange, the quarantine and the log in RabbitMQ, and checks existing ones.

Owns their properties, and the error messages for a mismatch.
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
"""Arguments of the quarantine: at most 10,000 messages, the oldest are dropped first; seven days (in ms). The type is
explicit, because a virtual host may have another default, and a stream accepts no `x-message-ttl`."""

_COMPARE_ONLY: FieldTable = {"x-queue-leader-locator": "bridge-asks"}
"""RabbitMQ makes no queue with this argument. So a declare that only compares arguments never makes a queue, even if
the queue was deleted a moment ago."""

_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<name>[^']+)' for .*?: received (?P<wanted>.*?) but current is (?P<current>.*)",
    re.DOTALL,
)
_TYPED = re.compile(r"the value '(?P<value>.*)' of type '(?P<type>[a-z]+)'", re.DOTALL)
_KINDS: dict[type, str] = {bool: "bool", int: "signedint"}
_MAX_DECLARES = 20
"""Limit of the declares that find differences; RabbitMQ compares fewer arguments."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An attribute of an existing exchange or queue that differs from the bridge's declaration.

    `current` is None if the existing one does not have the attribute.
    """

    name: str
    wanted: str
    current: str | None
    words: str
    """RabbitMQ's own text."""

    def __str__(self) -> str:
        return f"{self.name} is {self.current or 'not set'}, the bridge would set {self.wanted}"


@dataclass(frozen=True, slots=True)
class Declared:
    """The result of a declaration that succeeded, or that RabbitMQ refused for differences that fit.

    `may_declare` is False if the user may not declare it. Then its attributes are not known, and with RabbitMQ 4.3 not
    even whether it exists. The bridge can work with all `differences`.
    """

    may_declare: bool = True
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        return "; ".join(str(difference) for difference in self.differences)


Fits = Callable[[Difference], bool]


def fits_exchange(difference: Difference) -> bool:
    """Whether the bridge can work with this difference of the exchange.

    An alternate exchange gets only messages that no queue is bound for. An internal exchange gets its events from
    another exchange. Another type routes differently. An exchange that is not durable or is auto_delete can disappear
    with the log's binding.
    """
    return difference.name in ("alternate-exchange", "internal")


def fits_quarantine(difference: Difference) -> bool:
    """Whether the bridge can work with this difference of the quarantine.

    Any durable classic or quorum queue fits if it keeps messages, whatever its limits are.
    """
    if difference.name == "x-queue-type":
        # `bridge quarantine` removes single messages, which a stream does not allow.
        return difference.current in ("classic", "quorum")
    if difference.name in ("x-max-length", "x-max-length-bytes", "x-message-ttl"):
        return difference.current != "0"  # With 0 it keeps nothing.
    # With `x-expires` RabbitMQ deletes a queue without a reader. An operator reads the quarantine only now and then.
    return difference.name not in ("durable", "auto_delete", "x-expires")


def fits_log(difference: Difference) -> bool:
    """Whether the bridge can work with this difference of the log. Any durable stream fits, whatever its limits are."""
    if difference.name == "x-queue-type":
        return difference.current == "stream"
    return difference.name not in ("durable", "auto_delete")


def read_difference(words: str) -> Difference | None:
    """Reads the difference in RabbitMQ's refusal of a declaration. None if the text names no attribute."""
    found = _INEQUIVALENT.search(words)
    if found is None:
        return None
    wanted, current = (_value(found[side]) for side in ("wanted", "current"))
    if found["name"] == "x-max-age":  # RabbitMQ 4.3 prints it in ms without a unit, and accepts it only with a unit.
        wanted, current = (f"{int(age) // 1000}s" if age and age.isdecimal() else age for age in (wanted, current))
    return Difference(found["name"], wanted or "none", current, found[0])


def _value(words: str) -> str | None:
    if words == "none":
        return None
    typed = _TYPED.fullmatch(words)
    return typed["value"] if typed else words.strip("'")


def ask_next(arguments: FieldTable, difference: Difference) -> FieldTable | None:
    """The arguments of the next declare: the same, with the current value for `difference`.

    RabbitMQ names only the first difference, so the next declare returns the next one. None if the value cannot be
    written as an argument.
    """
    arguments = dict(arguments)
    if difference.current is None:
        arguments.pop(difference.name, None)
        return arguments
    typed = _TYPED.search(difference.words.partition(" but current is ")[2])
    # If both values are set, RabbitMQ names no type; then the type of the declared value applies.
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
    """Declares a durable topic exchange.

    Raises:
        BrokerError: it does not exist and cannot be made, or it does not fit.
    """

    async def declare(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.exchange_declare(name, exchange_type="topic", durable=True, passive=passive)

    what = f"exchange {name!r}"
    try:
        return await _declare(connection, declare, what, "a durable topic exchange")
    except TopologyMismatch as error:
        # RabbitMQ compares type, durable, auto_delete, internal and alternate-exchange, in this order. So if the first
        # difference fits, the later ones fit too.
        return _judge(
            what,
            [read_difference(str(error))],
            fits_exchange,
            error,
            "The bridge needs a durable topic exchange that is not auto_delete. Keep this exchange, and set another "
            "name in BRIDGE_EXCHANGE and in the publishers (`exchange=` in the SDK)",
        )


async def declare_quarantine(connection: aio_pika.abc.AbstractConnection, name: str) -> Declared:
    """Declares the queue of refused messages, with the arguments `QUARANTINE`.

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
            await _find_differences(connection, name, QUARANTINE),
            fits_quarantine,
            error,
            "The quarantine must be a durable classic or quorum queue that keeps its messages. Keep this queue, and "
            "set another name in BRIDGE_QUARANTINE; the bridge then makes that queue",
        )


async def declare_log(connection: aio_pika.abc.AbstractConnection, log: LogSettings, exchange: str) -> Declared:
    """Declares the log, a stream, and binds it to all events of the exchange.

    If `may_declare` is False, the binding may be missing.

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
            await _find_differences(connection, log.name, arguments),
            fits_log,
            error,
            "The log must be a durable stream. Keep this queue, and set another name in BRIDGE_LOG; the bridge then "
            "makes that stream. Each client that is connected now gets one gap",
        )
        await _on_new_channel(connection, bind, f"binding {what} to {exchange!r}")
        return declared


CONTROL_BYTES = 50_000_000
CONTROL_SEGMENT_BYTES = 1_000_000
"""Limits of the control stream. RabbitMQ removes old messages in whole segments."""


async def declare_control(connection: aio_pika.abc.AbstractConnection, name: str, max_age: str) -> Declared:
    """Declares the control exchange and the stream of the same name, and binds them.

    A stream with other limits fits, as after a change of `BRIDGE_CONTROL_MAX_AGE`: RabbitMQ keeps a stream's arguments.

    Raises:
        BrokerError: one of them does not exist and cannot be made, or does not fit.
    """
    arguments: FieldTable = {
        "x-queue-type": "stream",
        "x-max-age": max_age,
        "x-max-length-bytes": CONTROL_BYTES,
        "x-stream-max-segment-size-bytes": CONTROL_SEGMENT_BYTES,
    }

    async def declare(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.exchange_declare(name, exchange_type="topic", durable=True, passive=passive)
        await channel.queue_declare(name, durable=True, arguments=arguments, passive=passive)
        if not passive:
            await channel.queue_bind(name, name, "#")

    async def bind(channel: AbstractChannel, *, passive: bool) -> None:
        await channel.queue_bind(name, name, "#")

    what = f"control exchange and stream {name!r}"
    try:
        return await _declare(connection, declare, what, "a durable topic exchange, bound to a stream with '#'")
    except TopologyMismatch as error:
        declared = _judge(
            what,
            await _find_differences(connection, name, arguments),
            fits_log,
            error,
            "They must be a durable topic exchange and a durable stream. Keep them, and set another name in "
            "BRIDGE_CONTROL",
        )
        await _on_new_channel(connection, bind, f"binding {what}")
        return declared


def _judge(what: str, found: list[Difference | None], fits: Fits, error: TopologyMismatch, advice: str) -> Declared:
    """Decides whether the bridge can work with the differences.

    Raises:
        TopologyMismatch: it cannot, or not all differences are known. The message has RabbitMQ's text and `advice`.
    """
    differences = [difference for difference in found if difference is not None]
    unfit = [difference.words for difference in differences if not fits(difference)]
    if unfit or len(differences) != len(found) or not found:
        raise TopologyMismatch(f"{what} exists, and does not fit. {'. '.join(unfit) or error}. {advice}")
    return Declared(differences=tuple(differences))


async def _find_differences(
    connection: aio_pika.abc.AbstractConnection, name: str, wanted: FieldTable
) -> list[Difference | None]:
    """Finds the differences of an existing queue, with one declare for each.

    A difference in `durable` or `auto_delete` is the last, because no argument can match it. The list ends with None if
    RabbitMQ gives another reason, or if the queue's type is not known.
    """
    found: dict[str, Difference] = {}
    arguments: FieldTable | None = {**wanted, **_COMPARE_ONLY}
    for _ in range(_MAX_DECLARES):
        asked = arguments

        async def ask(channel: AbstractChannel, *, passive: bool, asked: FieldTable | None = asked) -> None:
            await channel.queue_declare(name, durable=True, arguments=asked, passive=passive)

        try:
            await _on_new_channel(connection, ask, f"comparing queue {name!r}")
            break  # RabbitMQ 3.10 ignores arguments that a classic queue does not support.
        except TopologyMismatch as error:
            difference = read_difference(str(error))
            if difference is None:
                return [*found.values(), None]
        if difference.name in _COMPARE_ONLY:
            break
        is_repeated = difference.name in found
        found.setdefault(difference.name, difference)
        arguments = ask_next(asked or {}, difference)
        if difference.name in ("durable", "auto_delete"):
            break
        if arguments is None or is_repeated:
            age = found.get("x-max-age")  # Only a stream has one.
            is_known = "x-queue-type" in found or (age is not None and age.current is not None)
            return [*found.values(), *([] if is_known else [None])]
    return list(found.values())


async def _on_new_channel(
    connection: aio_pika.abc.AbstractConnection, use: _Declare, doing: str, *, passive: bool = False
) -> None:
    # Each declare has its own channel, because a refusal closes the channel.
    channel = await amqp.open_channel(connection)
    async with amqp.translating(doing):
        await use(channel, passive=passive)
        await channel.close()


class _Declare(Protocol):
    def __call__(self, channel: AbstractChannel, *, passive: bool) -> Awaitable[None]: ...


async def _declare(connection: aio_pika.abc.AbstractConnection, declare: _Declare, what: str, wanted: str) -> Declared:
    """
    Raises:
        TopologyMismatch: it exists with other attributes.
        BrokerError: it does not exist and cannot be made, or the connection failed.
    """
    try:
        await _on_new_channel(connection, declare, f"declaring {what}")
        return Declared()
    except AccessRefused as refused:
        # Without the right to declare, it is enough that it exists. RabbitMQ 4.3 also refuses the passive declare; then
        # the first use shows whether it exists.
        try:
            with contextlib.suppress(AccessRefused):
                await _on_new_channel(connection, declare, f"looking for {what}", passive=True)
            return Declared(may_declare=False)
        except NotFound:
            raise AccessRefused(
                f"{what} does not exist, and the bridge's user may not make it. {refused}. Make it ({wanted}), or "
                "grant the user the right to configure it"
            ) from None


def _describe(what: str, declared: Declared) -> str:
    if not declared.may_declare:
        return f"{what} (not checked: the bridge's user may not declare it)"
    return f"{what}. It fits, and differs: {declared}" if declared.differences else what


async def _ignore(_: DeliveredMessage) -> None:
    pass


async def rehearse(
    addresses: Sequence[str],
    *,
    exchange: str,
    quarantine: str,
    log: LogSettings | None,
    control: tuple[str, str] | None = None,
    makes_queues: bool = True,
    describe_channels: Callable[[int], str],
) -> AsyncIterator[str]:
    """Tries each step of the bridge's work with RabbitMQ once, and yields a line for each step that succeeds.

    Exchange, quarantine, log and control remain, as after a start of the bridge. Cancelling closes the connection.

    Args:
        control: name and maximal age of the control stream; None without one.
        makes_queues: whether the feed declares a queue for each stream (`BRIDGE_FEED=queues`).
        describe_channels: describes a number of channels in one line, or raises a BrokerError if it is too small.

    Raises:
        BrokerError: names the step that failed, and the cause.
    """
    connection = await amqp.connect(addresses, name="bridge check")
    try:
        yield "connected to RabbitMQ"
        if makes_queues:
            yield describe_channels(amqp.most_channels(connection))
        yield _describe(f"exchange {exchange!r} is a topic exchange", await declare_exchange(connection, exchange))
        declared = await declare_quarantine(connection, quarantine)
        yield _describe(f"queue {quarantine!r} for refused messages", declared)
        if log is None:
            yield "no log (BRIDGE_LOG is empty): clients that return get bridge.gap"
        else:
            declared = await declare_log(connection, log, exchange)
            channel = await amqp.open_channel(connection)
            async with amqp.translating(f"reading the log {log.name!r} (right to read it)"):
                await channel.basic_qos(prefetch_count=1)
                answer = await channel.basic_consume(log.name, _ignore, arguments={"x-stream-offset": "next"})
                await channel.basic_cancel(answer.consumer_tag or "")
            yield _describe(f"log {log.name!r}: a stream that can be read", declared)
        if control is not None:
            yield _describe(f"control stream {control[0]!r}", await declare_control(connection, *control))
        if not makes_queues:
            channel = await amqp.open_channel(connection, confirms=True)
            async with amqp.translating(f"publishing to {quarantine!r} (right to write to amq.default)"):
                # To no queue, so that no message remains in the quarantine. It needs the same right.
                await channel.basic_publish(b"{}", exchange="", routing_key=f"bridge.check.{secrets.token_hex(4)}")
            yield "refused messages can be quarantined"
            yield "the feed 'log' fits: it needs no queue for a stream"
            return
        channel = await amqp.open_channel(connection, confirms=True)
        queue = f"bridge.check.{secrets.token_hex(4)}"
        alternative = "" if log is None else "; or set BRIDGE_FEED=log, which needs no queues"
        making = f"making an exclusive queue (right to configure queues named bridge.*{alternative})"
        async with amqp.translating(making):
            arguments: FieldTable = {"x-queue-type": "classic"}  # Only a classic queue can be exclusive.
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
            # Published to the live queue, so that no message remains in the quarantine. It needs the same right.
            await channel.basic_publish(b"{}", exchange="", routing_key=queue)
            async with asyncio.timeout(amqp.CLOSE_SECONDS):
                await got.wait()
        yield "refused messages can be quarantined"
    finally:
        await amqp.close(connection)
