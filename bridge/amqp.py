"""A connection to RabbitMQ and what can go wrong with it, in words of our own.

Only this file and `sender.py` know errors of aio-pika. The SDK and the quarantine publish through `sender.Sender`; the
service consumes through `consumer.py`. Needs aio-pika and nothing of the service.

    BrokerError
    ├─ BrokerUnavailable    cannot be reached, went away, or did not answer in time: trying again may help
    │  └─ LimitReached      a limit of connections, channels or queues
    ├─ AccessRefused        credentials, virtual host or a permission: an operator has to change something
    ├─ TopologyMismatch     an exchange or queue exists with other properties
    ├─ NotFound             an exchange or queue does not exist
    └─ Unroutable           the broker has no queue for a message that must have one
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from typing import Any

import aio_pika
import aiormq.connection
import pamqp.frame
from aio_pika.abc import UnderlayConnection
from aio_pika.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    ProbableAuthenticationError,
)
from aiormq.abc import AbstractChannel
from aiormq.connection import FrameReceiver, exception_by_code
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource, ConnectionNotAllowed, InvalidFrameError
from pamqp import commands
from pamqp.exceptions import PAMQPException
from yarl import URL

CONNECT_SECONDS = 10.0
"""aiormq has no limit of its own for connecting: a listener that never answers would hold us for ever."""

HEARTBEAT_SECONDS = 10
"""With aiormq's default of 60 a dead broker is noticed after (60 + 1) * 3 = 183 s; with this after 33."""

CLOSE_SECONDS = 5.0
"""A broker that is blocked or gone never answers a close."""

_ACCESS_REFUSED = 403
"""AMQP 0-9-1, section 1.2, "access-refused": at the start of a connection these are its credentials."""

_LIMIT = re.compile(r"limit .*reached|reached the maximum")
"""In RabbitMQ's words for a limit of connections, channels or queues, which may pass."""

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0

_log = logging.getLogger("bridge.amqp")

ERRORS = (
    AMQPError,
    ChannelInvalidStateError,
    ConnectionError,
    OSError,
    asyncio.IncompleteReadError,
    PAMQPException,
    StopAsyncIteration,  # A connection that ends in the middle of its handshake.
)


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
"""True in all tasks of a connection that `connect` made."""


class _Quiet(logging.Filter):
    """Keeps what the library says about our connections out of the log of the program that we are part of.

    It reports each lost connection several times, with tracebacks; whoever called `connect` reports it once, with its
    cause. Connections that the program made by itself keep their log lines.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not _quiet.get() or record.levelno < logging.WARNING:
            return True
        _log.debug("%s: %s", record.name, record.getMessage())
        return False


for _name in ("aiormq.connection", "aiormq.channel", "aio_pika.connection", "aio_pika.channel"):
    logging.getLogger(_name).addFilter(_Quiet())


class BrokerError(Exception):
    """Something between us and RabbitMQ; one of the five below."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached, the connection broke, or no answer came in time."""


class LimitReached(BrokerUnavailable):
    """RabbitMQ has a limit of connections, channels or queues, and it is reached. It may pass."""


class AccessRefused(BrokerError):
    """RabbitMQ refuses the user, the virtual host or the operation."""


class TopologyMismatch(BrokerError):
    """An exchange or queue of this name exists with other properties."""


class NotFound(BrokerError):
    """An exchange or queue of this name does not exist."""


class Unroutable(BrokerError):
    """The broker has no queue for the message."""


def parse_urls(text: str) -> tuple[str, ...]:
    """Reads one or several AMQP addresses, joined by commas (the nodes of a cluster).

    Raises:
        ValueError: not an `amqp://` or `amqps://` address with a host; the password does not stand in the message.
    """
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise ValueError("no address; write amqp://user:password@host:5672/")
    for address in addresses:
        try:
            url = URL(address)
            good = url.scheme in ("amqp", "amqps") and bool(url.host)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{redact(address)!r} is no AMQP address; write amqp://user:password@host:5672/vhost")
    return addresses


def credentials(address: str) -> str:
    """The user and the password of an address."""
    url = URL(address)
    return f"{url.user or 'guest'}:{url.password or 'guest'}"


def redact(address: str) -> str:
    """The address without its password, for logs and messages."""
    head, at, tail = address.rpartition("@")
    if not at:
        return address
    scheme, slashes, userinfo = head.rpartition("://")
    return f"{scheme}{slashes}{userinfo.partition(':')[0]}:***@{tail}"


def address(connection: aio_pika.abc.AbstractConnection) -> str:
    """Where a connection leads, without its password and its options."""
    assert isinstance(connection, aio_pika.Connection)
    return redact(str(connection.url.with_query(None)))


def translate(error: BaseException, doing: str) -> BrokerError:
    """A foreign error as one of ours; `doing` says what was tried, for the message."""
    if isinstance(error, BrokerError):
        return error
    text = f"{doing}: {_text(error)}"
    if isinstance(error, ConnectionNotAllowed | ChannelPreconditionFailed) and _LIMIT.search(_text(error)):
        return LimitReached(text)
    if isinstance(
        error, AuthenticationError | ProbableAuthenticationError | ChannelAccessRefused | ConnectionNotAllowed
    ):
        return AccessRefused(text)
    if isinstance(error, ChannelNotFoundEntity):
        return NotFound(text)
    if isinstance(error, ChannelPreconditionFailed | ChannelLockedResource):
        return TopologyMismatch(text)
    return BrokerUnavailable(text)


def _text(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, AMQPError) and error.args and not isinstance(error, DeliveryError):
        words = " ".join(str(part) for part in error.args if part is not None)
        return words or type(error).__name__
    return str(error) or type(error).__name__


async def connect(
    addresses: Sequence[str], *, name: str, make: Callable[[URL], Connection] | None = None
) -> Connection:
    """A plain connection to the first address that takes one, tried in random order.

    Plain, not robust: a robust connection restores its queues one after another, and one refused queue keeps all others
    down. Who calls this has a supervisor of their own.

    Args:
        addresses: AMQP URLs. `heartbeat` in the URL wins over our 10 s.
        name: shown in RabbitMQ's list of connections.
        make: makes the connection of a URL, not yet open. By default a `Connection`, which publishes.

    Raises:
        BrokerError: none of the addresses took it; the error of the last one tried, which names it.

    Cancelling leaves no connection behind.
    """
    failure: BrokerError | None = None
    for address in random.sample(list(addresses), len(addresses)):
        url = URL(address)
        url = url.update_query({"name": name, "heartbeat": url.query.get("heartbeat", HEARTBEAT_SECONDS)})
        quiet = _quiet.set(True)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = (make or Connection)(url)
                await connection.connect()
                return connection
        except (*ERRORS, TimeoutError) as error:
            failure = translate(error, f"connecting to {redact(address)}")
        except (Exception, asyncio.CancelledError) as error:
            if not is_rejection(error):
                raise
            failure = BrokerUnavailable(f"connecting to {redact(address)}: the connection was closed")
        finally:
            _quiet.reset(quiet)
    assert failure is not None, "parse_urls gives at least one address"
    raise failure


async def open_channel(connection: aio_pika.abc.AbstractConnection, *, confirms: bool = False) -> AbstractChannel:
    """A channel of the protocol itself, without aio-pika's objects for exchanges and queues around it.

    Raises:
        BrokerError
    """
    async with translating("opening a channel"):
        transport = connection.transport
        if transport is None:
            raise BrokerUnavailable("opening a channel: the connection is closed")
        try:
            return await transport.connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        except RuntimeError as error:  # What aiormq says of a connection that has just gone.
            raise BrokerUnavailable(f"opening a channel: {error}") from error


def most_channels(connection: aio_pika.abc.AbstractConnection) -> int:
    """As many channels RabbitMQ lets this connection have (`channel_max`). Beyond it RabbitMQ closes the connection."""
    transport = connection.transport
    negotiated = 0 if transport is None else transport.connection.connection_tune.channel_max
    return negotiated or 65_535  # 0 is no limit; the number of a channel has 16 bits.


async def close(connection: aio_pika.abc.AbstractConnection) -> None:
    """Closes within five seconds, or gives the connection up. Never raises an error of the broker's."""
    with contextlib.suppress(*ERRORS, TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()


def is_rejection(error: BaseException) -> bool:
    """Whether this is aiormq's way to tell a waiter that its connection is gone.

    It rejects the futures of a connection that closes with whatever the reader ended with: a bare `Exception`, or a
    CancelledError in a task that nobody has cancelled.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return type(error) is Exception


@contextlib.asynccontextmanager
async def translating(doing: str) -> AsyncIterator[None]:
    """Errors of aio-pika that pass become ours."""
    try:
        yield
    except ERRORS as error:
        raise translate(error, doing) from error
    except (Exception, asyncio.CancelledError) as error:
        if not is_rejection(error):
            raise
        raise BrokerUnavailable(f"{doing}: the connection was closed") from error


def pauses() -> Callable[[], float]:
    """Pauses between tries, in seconds: at most 0.1, 0.2, 0.4, ... 5, each drawn anew from zero up ("full jitter")."""
    ceiling = _FIRST_PAUSE_SECONDS

    def draw() -> float:
        nonlocal ceiling
        pause = random.uniform(0, ceiling)
        ceiling = min(ceiling * 2, _LONGEST_PAUSE_SECONDS)
        return pause

    return draw


class _Protocol(aiormq.connection.Connection):
    """The library's connection, but with RabbitMQ's own words for a connection that it refuses."""

    @staticmethod
    async def _rpc(
        request: Any, writer: asyncio.StreamWriter, frame_receiver: FrameReceiver, wait_response: bool = True
    ) -> Any:
        # RabbitMQ answers Connection.Open with Connection.Close for a virtual host or a limit. The library expects
        # Open-Ok only, and hides the reason behind "got <Connection.Close object at 0x...>".
        writer.write(pamqp.frame.marshal(request, 0))
        await writer.drain()
        if not wait_response:
            return None
        _, _, frame = await frame_receiver.get_frame()
        if isinstance(frame, commands.Connection.Close):
            if frame.reply_code == _ACCESS_REFUSED:
                raise ProbableAuthenticationError(frame.reply_text)
            raise exception_by_code(frame)
        if request.synchronous and frame.name not in request.valid_responses:
            raise InvalidFrameError(f"expected {' or '.join(request.valid_responses)}, got {frame.name}")
        return frame


class _Underlay(UnderlayConnection):
    @classmethod
    async def make_connection(cls, url: URL, timeout: Any = None, **kwargs: Any) -> Any:
        connection = _Protocol(url, **kwargs)
        await connection.connect()
        await connection.ready()
        return connection


class Connection(aio_pika.Connection):
    """A plain connection of the library, without its close by the garbage collector. Made by `connect`."""

    def __del__(self) -> None:
        """Nothing: whoever called `connect` closes.

        The library's own makes a task that closes, in whatever thread collects the garbage, where no loop may run. A
        connection that is open is never collected: the tasks that read and write it hold it.
        """

    async def connect(self, timeout: Any = None) -> None:
        self.transport = await _Underlay.connect(self.url, self._on_connection_close, **self.kwargs)
        await self._on_connected()
