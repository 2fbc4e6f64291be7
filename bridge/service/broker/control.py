"""The control exchange: who is connected, and the end of a user's streams, in every replica.

A message to the exchange goes into a stream that every replica reads from its beginning. So a replica that starts
later, or that was cut off, still learns which tokens were revoked. `Control` is the replica's side; `ControlClient`
asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import structlog
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, TopologyMismatch
from bridge.sender import Sender
from bridge.service.broker.consumer import Batch, ConsumingConnection
from bridge.service.broker.eventlog import LogConsumer
from bridge.service.broker.topology import declare_control
from bridge.service.revocations import Revocations

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage

ANSWER_SECONDS = 0.5
"""How long a question waits for the replicas' answers."""

CLOCK_SECONDS = 30.0
"""The clocks of two machines may differ by this much."""

START_SECONDS = 30.0
"""If the stream cannot be read for this long after the first connection, streams are opened without it."""

WAIT_SECONDS = 3.0
"""How long a request waits for the stream to be read. After that, it is answered `busy`."""

HELLO_SECONDS = 10.0
"""Limit of the wait for the message that a replica writes itself. After it, the stream is read from its beginning."""

MOST_USERS = 1_000
"""The most users in one answer."""

SEND_SECONDS = 10.0

_log = structlog.get_logger("bridge.control")

Kind = Literal["hello", "kick", "who", "users"]


@dataclass(frozen=True, slots=True)
class Order:
    """A message to all replicas.

    Args:
        kind: `hello` (a replica's own, to know that it has read everything), `kick`, `who` (one user's streams), or
            `users`.
        id: another one for each message.
        at: when it was written, in seconds since 1970.
        user: whose streams.
        session: only this stream, as `who` names it.
        reason, by: why, and who did it, for the log.
        until: tokens issued before this moment are refused, in seconds since 1970; None: none are.
        reply: the queue for answers.
        after, limit: of `users`: those after this one, at most so many.
    """

    kind: Kind
    id: str
    at: float
    user: str = ""
    session: str | None = None
    reason: str = ""
    by: str = ""
    until: float | None = None
    reply: str | None = None
    after: str = ""
    limit: int = 100

    def write(self) -> bytes:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}).encode()


def read_order(body: bytes) -> Order:
    """
    Raises:
        ValueError: it cannot be read as an order. The message says why.
    """
    try:
        value = json.loads(body)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    texts: dict[str, Any] = {name: value.get(name, default) for name, default in _TEXTS.items()}
    for name, text in texts.items():
        if not isinstance(text, str) and (text is not None or name not in ("session", "reply")):
            raise ValueError(f"{name!r} must be text")
    kind = value.get("kind")
    if kind not in ("hello", "kick", "who", "users"):
        raise ValueError(f"{str(kind)[:40]!r} is not a kind of order")
    if kind in ("kick", "who") and not texts["user"]:
        raise ValueError("'user' is missing")
    numbers = [value.get("at"), value.get("until")]
    if any(number is not None and not _is_number(number) for number in numbers) or numbers[0] is None:
        raise ValueError("'at' and 'until' must be numbers")
    limit = value.get("limit", 100)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MOST_USERS:
        raise ValueError(f"'limit' must be 1 to {MOST_USERS}")
    return Order(kind=kind, at=numbers[0], until=numbers[1], limit=limit, **texts)


_TEXTS: dict[str, str | None] = {
    "id": "", "user": "", "session": None, "reason": "", "by": "", "reply": None, "after": ""
}  # fmt: skip


def read_moment(text: str, now: float) -> float:
    """Reads `now`, seconds since 1970, or a time with a zone (RFC 3339). Returns seconds since 1970.

    Raises:
        ValueError: it is none of these, or it is more than a minute ahead.
    """
    try:
        moment = now if text == "now" else float(text)
    except ValueError:
        try:
            time = datetime.datetime.fromisoformat(text)
        except ValueError:
            time = datetime.datetime.min
        if time.tzinfo is None:
            raise ValueError(
                f"{text[:40]!r} is not a moment: write now, 2026-01-31T12:00:00Z, or seconds since 1970"
            ) from None
        moment = time.timestamp()
    if not moment <= now + 60:
        raise ValueError(f"{text[:40]!r} is in the future: tokens that do not exist yet cannot be revoked")
    return moment


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


class LocalStreams(Protocol):
    """What a replica does with its streams."""

    def end_streams(self, user: str, session: str | None, opened_before: float | None) -> int:
        """Ends a user's streams, or the one of this session. Returns how many.

        Args:
            opened_before: only streams that were opened before this moment (seconds since 1970).
        """

    def describe_streams(self, user: str) -> list[dict[str, Any]]: ...
    def list_users(self, after: str, limit: int) -> list[dict[str, Any]]: ...


class Control:
    """
    Args:
        addresses: AMQP URLs of the cluster's nodes.
        exchange: the control exchange. The stream has the same name.
        max_age: how long RabbitMQ keeps a message, as in `30D`.
        instance: this replica's name in answers.
        streams: the replica's streams.
        on_kick: called with the user of each kick, and how many streams it has ended here.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        exchange: str,
        max_age: str,
        instance: str,
        streams: LocalStreams,
        on_kick: Callable[[str, int], object] = lambda *_: None,
    ) -> None:
        self._addresses = addresses
        self._exchange = exchange
        self._max_age = max_age
        self._instance = instance
        self._streams = streams
        self._on_kick = on_kick
        self._sender = Sender(addresses, name="bridge control")
        self._answers: set[asyncio.Task[None]] = set()
        self._next = 0
        self._hello = ""
        self._changed = asyncio.Event()
        """Set when the replica's own message arrives, and when the consumer is lost."""
        self._outage = ""
        """The last cause of the outage; empty while orders arrive."""
        self._reached_at: float | None = None
        """When RabbitMQ was reached for the first time (monotonic)."""
        self.revocations = Revocations()
        self._known = asyncio.Event()
        """Set once it is known which tokens were revoked, or that it cannot be known."""
        self.connected = False
        """Whether orders arrive, and all that were given before have been read."""

    async def wait_until_known(self) -> bool:
        """Waits until it is known which tokens were revoked, `WAIT_SECONDS` at most. False: it is not known yet."""
        if not self._known.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._known.wait()
        return self._known.is_set()

    async def run(self) -> None:
        """Reads until it is cancelled. Cancelling it closes the connections."""
        next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
        try:
            while True:
                try:
                    await self._read()
                except (AccessRefused, TopologyMismatch) as error:
                    if self._is_new_cause(error):
                        _log.error("no control", error=str(error), detail="the bridge serves without orders, and "
                                   "knows no revocation")  # fmt: skip
                    self._known.set()  # Waiting does not help, and streams do not need it.
                except BrokerError as error:
                    if self._is_new_cause(error):
                        _log.warning("control interrupted", error=str(error))
                    late = self._reached_at is not None and time.monotonic() > self._reached_at + START_SECONDS
                    if late and not self._known.is_set():
                        _log.error("no control", error=str(error), detail="streams are opened all the same; a "
                                   "revoked token may be accepted")  # fmt: skip
                        self._known.set()
                await asyncio.sleep(next_pause())
        finally:
            for task in self._answers:
                task.cancel()
            await asyncio.gather(*self._answers, return_exceptions=True)
            await self._sender.close()

    def _is_new_cause(self, error: BrokerError) -> bool:
        """Whether the outage has another cause than at the attempt before: each cause has one log line."""
        is_new, self._outage = str(error) != self._outage, str(error)
        return is_new

    async def _read(self) -> None:
        """
        Raises:
            BrokerError: the connection is lost, or the stream cannot be declared or read.
        """
        connection = await ConsumingConnection.open(
            self._addresses, name="bridge control reader", write_batch=_NO_BATCH, max_body=MAX_ORDER_BYTES
        )
        try:
            self._reached_at = self._reached_at or time.monotonic()
            await declare_control(connection, self._exchange, self._max_age)
            self._changed.clear()
            self._hello = secrets.token_hex(8)
            start: int | str = self._next - 1 if self._next else "first"
            async with LogConsumer(connection, self._exchange, start, self._on_entry, self._changed.set) as consumer:
                await self._send(Order("hello", self._hello, time.time(), by=self._instance))
                await self._wait_for_hello(consumer)
                if not self._known.is_set():
                    _log.info("control stream read", revocations=len(self.revocations))
                elif self._outage:
                    _log.info("control restored")
                self._known.set()
                self._outage = ""
                while True:
                    self._changed.clear()
                    await consumer.idle(HELLO_SECONDS, self._changed)
        finally:
            self.connected = False
            await amqp.close(connection)

    async def _wait_for_hello(self, consumer: LogConsumer) -> None:
        """
        Raises:
            BrokerUnavailable: it did not come. The stream may have been made again, and have lower offsets.
        """
        await consumer.idle(HELLO_SECONDS, self._changed)
        if not self._changed.is_set():
            self._next = 0
            raise BrokerUnavailable(f"the control stream gave nothing within {HELLO_SECONDS:g} s")

    async def _send(self, order: Order) -> None:
        await self._sender.send(
            order.write(),
            exchange=self._exchange,
            routing_key=order.kind,
            properties=Basic.Properties(delivery_mode=2, content_type="application/json"),
            mandatory=True,
            timeout=SEND_SECONDS,
        )

    def _on_entry(self, offset: int, routing_key: str, body: bytes) -> None:
        if offset < self._next:
            return
        self._next = offset + 1
        try:
            order = read_order(body)
        except ValueError as error:
            _log.warning("order not read", routing_key=routing_key, error=str(error)[:200])
            return
        if order.kind == "hello":
            if order.id == self._hello:
                self.connected = True
                self._changed.set()
        elif order.kind == "kick":
            self._kick(order)
        elif self.connected:  # The programs that asked earlier have ended.
            if order.kind == "who":
                self._answer(order, streams=self._streams.describe_streams(order.user))
            else:
                self._answer(order, users=self._streams.list_users(order.after, order.limit))

    def _kick(self, order: Order) -> None:
        if order.until is not None and not self.revocations.revoke(order.user, order.until):
            _log.error("a revocation was forgotten", users=len(self.revocations))
        # An order may be read again, or late. Then it means the streams of its time, and not those of today.
        opened_before = None if self.connected else order.at + CLOCK_SECONDS
        ended = self._streams.end_streams(order.user, order.session, opened_before)
        self._on_kick(order.user, ended)
        if self.connected or ended:
            _log.warning(
                "kicked",
                user=order.user,
                session=order.session,
                streams=ended,
                until=order.until,
                reason=order.reason[:200],
                by=order.by[:200],
            )
        if self.connected:
            self._answer(order, ended=ended)

    def _answer(self, order: Order, **answer: Any) -> None:
        if order.reply is None:
            return
        body = json.dumps({"id": order.id, "replica": self._instance, **answer}).encode()
        task = asyncio.create_task(self._reply(order.reply, body), name="control-answer")
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _reply(self, queue: str, body: bytes) -> None:
        with contextlib.suppress(BrokerError):  # The program that asked may have ended.
            await self._sender.send(
                body, exchange="", routing_key=queue, properties=Basic.Properties(), timeout=SEND_SECONDS
            )


class _NoBatch(contextlib.AbstractContextManager[object]):
    def __exit__(self, *_: object) -> None: ...


_NO_BATCH: Batch = _NoBatch()

MAX_ORDER_BYTES = 131_072


@dataclass(frozen=True, slots=True)
class Kicked:
    """How many streams each replica has ended, by its name."""

    replicas: dict[str, int]


@dataclass(frozen=True, slots=True)
class UserStreams:
    """Which replicas have answered, and a user's streams."""

    replicas: list[str]
    streams: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Users:
    """Which replicas have answered, and the users with streams, in the order of their ids. `further`: ask again with
    `after`, the id of the last one, for the next."""

    replicas: list[str]
    users: list[dict[str, Any]]
    further: bool


class ControlClient:
    """Asks all replicas. Each call has its own connection, and waits `ANSWER_SECONDS` for the answers.

    Args:
        addresses: AMQP URLs of the cluster's nodes.
        exchange: the control exchange.
    """

    def __init__(self, addresses: Sequence[str], *, exchange: str) -> None:
        self._addresses = addresses
        self._exchange = exchange

    async def kick(
        self, user: str, *, by: str, session: str | None = None, reason: str = "", until: float | None = None
    ) -> Kicked:
        """Ends a user's streams on every replica. With `until`, tokens issued before it are refused from now on.

        Raises:
            ValueError: the replicas would not read the order. The message says why.
            BrokerError: the order was not given, or perhaps not.
        """
        answers = await self._ask("kick", user=user, by=by, session=session, reason=reason, until=until)
        return Kicked({str(answer.get("replica")): _count(answer.get("ended")) for answer in answers})

    async def streams(self, user: str) -> UserStreams:
        """
        Raises:
            BrokerError
        """
        answers = await self._ask("who", user=user)
        streams = [
            {**stream, "replica": answer.get("replica")} for answer in answers for stream in _list(answer, "streams")
        ]
        return UserStreams(_names(answers), streams)

    async def users(self, *, after: str = "", limit: int = 100) -> Users:
        """
        Raises:
            BrokerError
        """
        answers = await self._ask("users", after=after, limit=limit)
        counts: dict[str, int] = {}
        for answer in answers:
            for found in _list(answer, "users"):
                user = str(found.get("user"))
                counts[user] = counts.get(user, 0) + _count(found.get("streams"))
        full = any(len(_list(answer, "users")) >= limit for answer in answers)
        users = [{"user": user, "streams": counts[user]} for user in sorted(counts)]
        return Users(_names(answers), users[:limit], further=full or len(users) > limit)

    async def _ask(self, kind: Kind, **order: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        asked = Order(kind, secrets.token_hex(8), time.time(), reply=f"bridge.reply.{secrets.token_hex(8)}", **order)

        async def on_answer(message: DeliveredMessage) -> None:
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(message.body)
                if isinstance(answer, dict) and answer.get("id") == asked.id:
                    answers.append(answer)

        body = asked.write()
        read_order(body)  # A replica could only log what is wrong with it.
        if len(body) > MAX_ORDER_BYTES:
            raise ValueError(f"the order has {len(body)} bytes, the limit is {MAX_ORDER_BYTES}: shorten the reason")
        connection = await amqp.connect(self._addresses, name="bridge control client")
        try:
            channel = await amqp.open_channel(connection, confirms=True)
            async with amqp.translating(f"asking the replicas by the exchange {self._exchange!r}"):
                assert asked.reply is not None, "a question has one"
                await channel.queue_declare(
                    asked.reply, exclusive=True, auto_delete=True, arguments={"x-queue-type": "classic"}
                )
                await channel.basic_consume(asked.reply, on_answer, no_ack=True)
                # Mandatory: if no replica has made the stream yet, nobody would get it.
                await channel.basic_publish(
                    body,
                    exchange=self._exchange,
                    routing_key=kind,
                    properties=Basic.Properties(delivery_mode=2, content_type="application/json"),
                    mandatory=True,
                )
                await asyncio.sleep(ANSWER_SECONDS)
        finally:
            await amqp.close(connection)
        return answers


def _list(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = answer.get(name)
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _names(answers: list[dict[str, Any]]) -> list[str]:
    return sorted(str(answer.get("replica")) for answer in answers)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
