"""Connects to RabbitMQ, and translates the errors of aio-pika into the bridge's own.

Only this file and `sender.py` know errors of aio-pika. The SDK and the quarantine publish through `sender.Sender`. The
service consumes through `consumer.py`. This file needs aio-pika, but no module of the service.

    BrokerError
    ├─ BrokerUnavailable    unreachable, disconnected, or no answer in time: another try may succeed
    │  ├─ LimitReached      a limit of connections, channels or queues
    │  └─ NoReplica         this node has no running replica of a stream; another may have one
    ├─ AccessRefused        credentials, virtual host or a permission: an operator must change them
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
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
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
"""Limit of one connection attempt. aiormq has none: a listener that never answers would block the caller forever."""

HEARTBEAT_SECONDS = 10
"""With aiormq's default of 60, the loss of a broker is noticed after (60 + 1) * 3 = 183 s. With 10 it takes 33 s."""

CLOSE_SECONDS = 5.0
"""Limit of a close: a broker that is blocked or gone never answers it."""

_ACCESS_REFUSED = 403
"""AMQP 0-9-1, section 1.2, "access-refused". While a connection opens, it refers to the user or the virtual host."""

_LIMIT = re.compile(r"limit .*reached|reached the maximum")
"""Occurs in RabbitMQ's texts for a limit of connections, channels or queues. Such a limit may be temporary."""

_NO_REPLICA = "does not have a running replica on the local node"
"""Occurs in RabbitMQ's refusal to read a stream on a node without a running replica."""

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0

RECONNECT_SECONDS = 1.0
"""Longest pause before the bridge tries to reach RabbitMQ again: open streams wait for it. There are few bridges, and
may be thousands of publishers."""

_log = logging.getLogger("bridge.amqp")

ERRORS = (
    AMQPError,
    ChannelInvalidStateError,
    ConnectionError,
    OSError,
    asyncio.IncompleteReadError,
    PAMQPException,
    StopAsyncIteration,  # The connection ended during its handshake.
)


_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
"""True in all tasks of a connection that `connect` made."""


class _Quiet(logging.Filter):
    """Drops the library's warnings about connections that `connect` made; they go to the debug log instead.

    The library reports each lost connection several times, with tracebacks. The caller of `connect` reports it once,
    with its cause. Other connections of the same program keep their log lines.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if not _quiet.get() or record.levelno < logging.WARNING:
            return True
        _log.debug("%s: %s", record.name, record.getMessage())
        return False


for _name in ("aiormq.connection", "aiormq.channel", "aio_pika.connection", "aio_pika.channel"):
    logging.getLogger(_name).addFilter(_Quiet())


class BrokerError(Exception):
    """An operation with RabbitMQ failed: one of the classes below."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached, the connection was lost, or no answer arrived in time."""


class LimitReached(BrokerUnavailable):
    """A limit of RabbitMQ for connections, channels or queues is reached. This may be temporary."""


class NoReplica(BrokerUnavailable):
    """This node has no running replica of a stream. It may be starting; another node may have one."""


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
        ValueError: not an `amqp://` or `amqps://` address with a host. The message does not contain the password.
    """
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise ValueError("no address is given; write amqp://user:password@host:5672/")
    for address in addresses:
        try:
            url = URL(address)
            good = url.scheme in ("amqp", "amqps") and bool(url.host)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{redact(address)!r} is not an AMQP address; write amqp://user:password@host:5672/vhost")
    return addresses


def credentials(address: str) -> str:
    """The `user:password` of an address; AMQP's default for each is `guest`."""
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
    """The address of a connection, without its password and its query."""
    assert isinstance(connection, aio_pika.Connection)
    return redact(str(connection.url.with_query(None)))


def translate(error: BaseException, doing: str) -> BrokerError:
    """Translates an error of aio-pika into a BrokerError. `doing` names the operation, for the message."""
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
    if isinstance(error, ChannelPreconditionFailed) and _NO_REPLICA in text:
        return NoReplica(f"{text}. Add one with `rabbitmq-streams add_replica`, or wait for the node's start")
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
    addresses: Sequence[str], *, name: str, make: Callable[[URL], BrokerConnection] | None = None
) -> BrokerConnection:
    """Opens a connection to the first address that accepts one. The order of the addresses is random.

    The connection is plain, not robust: a robust one restores its queues one after another, and one refused queue
    blocks all others. Each caller reconnects by itself.

    Args:
        addresses: AMQP URLs. A `heartbeat` in the URL replaces the default of 10 s.
        name: shown in RabbitMQ's list of connections.
        make: creates the connection for a URL, not yet open. The default is `BrokerConnection`.

    Raises:
        BrokerError: no address accepted the connection. It is the error of the last address tried, and names it.

    Cancelling leaves no connection behind.
    """
    failure: BrokerError | None = None
    for address in random.sample(list(addresses), len(addresses)):
        url = URL(address)
        url = url.update_query({"name": name, "heartbeat": url.query.get("heartbeat", HEARTBEAT_SECONDS)})
        quiet = _quiet.set(True)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = (make or BrokerConnection)(url)
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
    """Opens a channel of aiormq, without aio-pika's objects for exchanges and queues.

    Args:
        confirms: RabbitMQ confirms each message, and a returned message raises an error.

    Raises:
        BrokerError
    """
    async with translating("opening a channel"):
        transport = connection.transport
        if transport is None:
            raise BrokerUnavailable("opening a channel: the connection is closed")
        try:
            return await transport.connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        except RuntimeError as error:  # aiormq raises it for a connection that was lost a moment ago.
            raise BrokerUnavailable(f"opening a channel: {error}") from error


def most_channels(connection: aio_pika.abc.AbstractConnection) -> int:
    """The most channels that this connection may have (`channel_max`). RabbitMQ closes a connection that exceeds it."""
    transport = connection.transport
    negotiated = 0 if transport is None else transport.connection.connection_tune.channel_max
    return negotiated or 65_535  # 0 means no limit; a channel number has 16 bits.


async def close(connection: aio_pika.abc.AbstractConnection) -> None:
    """Closes the connection, or gives up after 5 s. Raises no error of the broker."""
    with contextlib.suppress(*ERRORS, TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()


def loss_error(cause: BaseException | None) -> BrokerUnavailable:
    """The error for a lost connection. `cause` is what the library's close callback was given."""
    found = translate(cause or BrokerUnavailable("the connection was closed"), "consuming")
    kind = LimitReached if isinstance(found, LimitReached) else BrokerUnavailable
    return kind(f"connection lost: {found}")


async def while_open(connection: aio_pika.abc.AbstractConnection, work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`, and cancels it when the connection is lost: `work` may wait for something else at that moment.

    Cancelling it cancels `work`, and waits for its end.

    Raises:
        BrokerUnavailable: the connection was lost.
        Exception: `work` raised it.
    """
    if not connection.connected.is_set():
        work.close()
        raise BrokerUnavailable("connection lost: before it was used")
    lost: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    def on_closed(_: object, error: BaseException | None) -> None:
        if not lost.done():
            lost.set_result(error)

    connection.close_callbacks.add(on_closed)
    task = asyncio.create_task(work, name="amqp-while-open")
    try:
        either: set[asyncio.Future[Any]] = {task, lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise loss_error(lost.result())
    finally:
        lost.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    task.result()


def is_rejection(error: BaseException) -> bool:
    """Whether aiormq raised this error because the connection closed.

    On close, aiormq fails the pending futures with the error that ended its reader. That is a bare `Exception`, or a
    CancelledError in a task that was not cancelled.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return type(error) is Exception


@contextlib.asynccontextmanager
async def translating(doing: str) -> AsyncIterator[None]:
    """Translates errors of aio-pika in its body into BrokerError. `doing` names the operation."""
    try:
        yield
    except ERRORS as error:
        raise translate(error, doing) from error
    except (Exception, asyncio.CancelledError) as error:
        if not is_rejection(error):
            raise
        raise BrokerUnavailable(f"{doing}: the connection was closed") from error


def pauses(longest: float = _LONGEST_PAUSE_SECONDS) -> Callable[[], float]:
    """Returns the backoff between tries: each call draws seconds from 0 up to 0.1, 0.2, 0.4, ... `longest` ("full
    jitter")."""
    ceiling = _FIRST_PAUSE_SECONDS

    def draw() -> float:
        nonlocal ceiling
        pause = random.uniform(0, ceiling)
        ceiling = min(ceiling * 2, longest)
        return pause

    return draw


class _Protocol(aiormq.connection.Connection):
    """aiormq's connection, which also reports RabbitMQ's text when RabbitMQ refuses the connection."""

    @staticmethod
    async def _rpc(
        request: Any, writer: asyncio.StreamWriter, frame_receiver: FrameReceiver, wait_response: bool = True
    ) -> Any:
        # To refuse a virtual host or enforce a limit, RabbitMQ answers Connection.Open with Connection.Close. aiormq
        # expects only Open-Ok, and reports "got <Connection.Close object at 0x...>" instead of the reason.
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


class BrokerConnection(aio_pika.Connection):
    """A plain connection of aio-pika that the garbage collector does not close. Made by `connect`."""

    def __del__(self) -> None:
        """Does nothing: the caller of `connect` closes the connection.

        aio-pika's version creates a task in the thread that collects the garbage, where no event loop may run. An open
        connection is never collected: the tasks that read and write it refer to it.
        """

    async def connect(self, timeout: Any = None) -> None:
        self.transport = await _Underlay.connect(self.url, self._on_connection_close, **self.kwargs)
        await self._on_connected()
