"""The service: wiring, listening sockets, signals, the order of the end. The only file that imports hypercorn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any, cast

import structlog
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol
from quart import Quart

from bridge import __version__
from bridge.amqp import BrokerError
from bridge.catalogue.load import Catalogue
from bridge.publisher import Publisher
from bridge.service.broker.eventlog import EventLog
from bridge.service.broker.live import Broker, Delivery
from bridge.service.broker.quarantine import Quarantine
from bridge.service.health import Status, why_not_ready
from bridge.service.http.auth import Authenticator, InvalidKeySet
from bridge.service.http.web import TAKE_OVER, create_app, create_internal_app
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings, parse_bind, unknown_names
from bridge.service.streams.hub import Hub
from bridge.service.streams.reader import EventReader
from bridge.service.streams.writer import Turn

if TYPE_CHECKING:
    from bridge.service.tracing import Tracing

BACKLOG = 4096
"""Hypercorn's default of 100 turned 2,600 new connections a second into 200."""

SEND_BUFFER_BYTES = 65_536
"""Left to itself the kernel takes 2.7 MB for a client that reads nothing, before anybody can see that it is slow."""

KEEP_ALIVE_SECONDS = 75.0
"""Longer than the 60 s for which a load balancer keeps an idle connection, or it would use one that we just closed."""

STOP_SECONDS = 5.0
"""For each step of the end that waits on somebody else."""

ANSWER_SECONDS = 1.0
"""For answers that are being made when the service ends. No stream is among them: those have been drained."""

LAG_SECONDS = 0.5

_log = structlog.get_logger("bridge.server")


def run(settings: Settings, catalogue: Catalogue) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit code.

    0 after a drain; 1 when it could not start (an address in use, a broker that refuses); the log says why.
    """
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_serve(settings, catalogue))


async def _serve(settings: Settings, catalogue: Catalogue) -> int:
    # First of all: as a container's first process, a signal without a handler would be ignored.
    stop = _on_signals()
    for problem in unknown_names(Settings):
        _log.warning("unknown setting", problem=problem)
    for note in catalogue.notes:
        _log.warning("not in the catalogue", detail=note)
    try:
        public_socket = listen(settings.bind, stall_seconds=settings.stall_seconds)
        internal_socket = listen(settings.internal_bind, stall_seconds=settings.stall_seconds)
    except OSError as error:
        _log.error("cannot listen", error=str(error))
        return 1
    service = _Service(settings, catalogue)
    try:
        await service.authenticator.start()
    except InvalidKeySet as error:
        _log.error("cannot start", error=str(error))
        return 1
    return await service.run(public_socket, internal_socket, stop)


def listen(bind: str, *, stall_seconds: float) -> socket.socket:
    """A listening socket whose options every accepted connection inherits.

    TCP_USER_TIMEOUT ends a connection whose peer takes no bytes for `stall_seconds`: Hypercorn has no write timeout,
    and a write that never ends would hold its shutdown for ever. Keepalive finds peers that vanished without a word.

    Raises:
        OSError: the address is in use or not ours; its text names the address.
    """
    host, port = parse_bind(bind)
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stall_seconds * 1000))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{bind}: {error.strerror or error}") from None
    return listener


class _Service:
    """The parts of one process and the order in which they start and end."""

    def __init__(self, settings: Settings, catalogue: Catalogue) -> None:
        self.settings = settings
        self.metrics = metrics = Metrics()
        self.turn = Turn()
        secret = settings.jwt_secret
        self.authenticator = Authenticator(
            secret=None if secret is None else secret.get_secret_value(),
            jwks=settings.jwks,
            audience=settings.jwt_audience,
            issuer=settings.jwt_issuer,
            user_claim=settings.jwt_user_claim,
            groups_claim=settings.jwt_groups_claim,
        )
        self.quarantine = Quarantine(
            settings.addresses, queue=settings.quarantine, on_dropped=metrics.quarantine_dropped.inc
        )
        self.publisher = (
            Publisher(
                settings.amqp_url.get_secret_value(),
                source="/bridge/console",
                exchange=settings.exchange,
                timeout=STOP_SECONDS,
                max_event_bytes=settings.max_event_bytes,
                log=bool(settings.log),
            )
            if settings.console == "development"
            else None
        )
        self.tracing = _tracing() if settings.tracing else None
        stream = settings.log_stream
        self.log = (
            None
            if stream is None
            else EventLog(settings.addresses, log=stream, exchange=settings.exchange, packet=self.turn)
        )
        self.hub = Hub(
            reader=EventReader(
                catalogue,
                max_event_bytes=settings.max_event_bytes,
                metrics=metrics,
                quarantine=self.quarantine,
            ),
            limits=settings,
            metrics=metrics,
            make_broker=self._make_broker,
            log=self.log,
        )
        broker = self.hub.broker
        metrics.connections_limit.set(settings.max_connections)
        metrics.ready.set_function(lambda: self._why_not_ready() is None)
        metrics.broker_connected.set_function(lambda: broker.connected)
        metrics.broker_connects.set_function(lambda: broker.connects)
        metrics.broker_dropped.set_function(lambda: broker.dropped)
        if self.log is not None:
            log = self.log
            metrics.log_passes.set_function(lambda: log.passes)
            metrics.log_entries.set_function(lambda: log.entries_read)
            metrics.log_answers.set(1)  # Until it is asked: without a stream nobody needs it.
        self.public = create_app(
            hub=self.hub,
            authenticator=self.authenticator,
            settings=settings,
            catalogue=catalogue,
            metrics=metrics,
            turn=self.turn,
            publisher=self.publisher,
            tracing=self.tracing,
        )
        self.internal = create_internal_app(why_not_ready=self._why_not_ready, metrics=metrics)

    def _make_broker(self, on_shared: Delivery) -> Broker:
        settings = self.settings
        return Broker(
            settings.addresses,
            exchange=settings.exchange,
            quarantine=settings.quarantine,
            log=settings.log_stream,
            on_shared=on_shared,
            packet=self.turn,
        )

    def _why_not_ready(self, exclude: Set[str] = frozenset()) -> str | None:
        down_since = self.hub.broker.down_since
        status = Status(
            started=self.hub.broker.connects > 0,
            draining=self.hub.draining,
            connections=len(self.hub),
            max_connections=self.settings.max_connections,
            broker_away_seconds=None if down_since is None else time.monotonic() - down_since,
        )
        return why_not_ready(status, grace_seconds=self.settings.broker_grace_seconds, exclude=exclude)

    async def run(self, public_socket: socket.socket, internal_socket: socket.socket, stop: asyncio.Event) -> int:
        _log.info(
            "serving",
            version=__version__,
            public=_address(public_socket),
            internal=_address(internal_socket),
            pid=os.getpid(),
        )
        end_public, end_internal = asyncio.Event(), asyncio.Event()
        internal = asyncio.create_task(_host(self.internal, internal_socket, end_internal), name="internal")
        public = asyncio.create_task(_host(self.public, public_socket, end_public), name="public")
        lag = asyncio.create_task(self._measure_lag(), name="loop-lag")
        quarantine = asyncio.create_task(self.quarantine.run(), name="quarantine")
        # What holds connections to RabbitMQ, each a task of its own: of several in one `gather` the first to be
        # cancelled would end it, and the others' goodbyes would be cut short at the end of the loop.
        connected = {asyncio.create_task(self.hub.broker.run(), name="broker")}
        if self.log is not None:
            connected.add(asyncio.create_task(self.log.run(), name="log"))
            connected.add(asyncio.create_task(self.hub.watermark_for_ever(), name="anchor"))
        stopping = asyncio.create_task(stop.wait(), name="stop")
        # From here on almost everything lives as long as the process; the collector need not walk it again and again.
        gc.collect()
        gc.freeze()

        # Nothing but a signal ends the service; a part that ends by itself has failed.
        done, _ = await asyncio.wait(
            {stopping, *connected, quarantine, public, internal}, return_when=asyncio.FIRST_COMPLETED
        )
        code = 0 if stopping in done else 1
        for task in done - {stopping}:
            error = task.exception()
            if isinstance(error, BrokerError):
                _log.error("cannot start", error=str(error))
            else:
                _log.error("failed", part=task.get_name(), exc_info=error)

        await self.hub.drain()
        # Only now the door: a client that reconnects during the drain is told to, and not left before a closed one.
        end_public.set()
        await _finish(public)
        for task in connected:
            task.cancel()
        # A broker that answers nothing more must not keep the process either.
        await asyncio.gather(asyncio.wait(connected, timeout=STOP_SECONDS), self.quarantine.close())
        if self.publisher is not None:
            await self.publisher.close()
        quarantine.cancel()
        end_internal.set()
        await _finish(internal)
        for task in (lag, stopping):
            task.cancel()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close, STOP_SECONDS)
        _log.info("stopped", code=code)
        return code

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.loop_lag_seconds.set(max(0.0, time.monotonic() - due))


def _tracing() -> Tracing:
    # Imported only here: it takes 7 MB and a fifth of a second, from nobody who does not want it.
    from bridge.service.tracing import Tracing

    return Tracing()


def _on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            _log.warning("signalled again, leaving at once", signal=number.name)
            os._exit(128 + number)
        _log.info("signalled", signal=number.name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


class _Connection(TCPServer):
    """One of Hypercorn's connections, which the application may take over once it has written a response's head.

    A stream through all of Hypercorn costs four tasks and 18 KB for as long as it is open, and 7 microseconds more a
    write (docs/decisions/05). So Hypercorn reads requests and writes heads and everything that is short. A stream
    writes to the bare transport.
    """

    def __init__(self, app: Quart, config: Config, context: WorkerContext, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter) -> None:  # fmt: skip
        super().__init__(self._call, asyncio.get_running_loop(), config, context, {}, reader, writer)
        self._quart = app

    async def _read_data(self) -> None:
        made = self.protocol
        made.protocol = _Http1(made.app, made.config, made.context, made.task_group, made.state, made.ssl, made.client,
                               made.server, made.send)  # fmt: skip
        await super()._read_data()

    async def _call(self, scope: Any, receive: Any, send: Any, sync_spawn: object, call_soon: object) -> None:
        scope["extensions"][TAKE_OVER] = self._take_over
        await self._quart(scope, receive, send)

    def _take_over(self) -> asyncio.Transport | None:
        transport = cast("asyncio.Transport", self.writer.transport)
        if transport.is_closing() or self.reader.at_eof():
            return None
        # What Hypercorn still writes (the end of a body that it takes for empty) goes nowhere, and to its reader the
        # client is gone: its tasks end, and everything that it kept for this connection goes with them.
        self.writer = _Nowhere()  # type: ignore[assignment]
        self.reader.feed_eof()
        return transport


class _Http1(H11Protocol):
    """Hypercorn's HTTP/1.1 without `Upgrade: h2c`, which Java's HttpClient and curl send without being asked.

    A server may ignore an upgrade (RFC 9110, section 7.8), and HTTP/2 in the clear has none any more (RFC 9113, section
    3.1). Hypercorn has no setting for it. A client that begins with HTTP/2's preface still gets it, and a 505.
    """

    async def _check_protocol(self, event: Any) -> None:
        if event.http_version == b"2.0":
            await super()._check_protocol(event)


class _Nowhere:
    """Of a StreamWriter, what Hypercorn uses of it at the end of a connection."""

    def write(self, data: bytes) -> None: ...

    def write_eof(self) -> None: ...

    def close(self) -> None: ...

    async def drain(self) -> None: ...

    async def wait_closed(self) -> None: ...


class _Writer(asyncio.StreamWriter):
    """One that may be thrown away: asyncio's own takes its connection along, even to another protocol."""

    def __del__(self) -> None: ...


class _Door(asyncio.StreamReaderProtocol):
    """What `asyncio.start_server` makes of each accepted connection, with our writer."""

    def __init__(self, welcome: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]) -> None:
        self._reader: asyncio.StreamReader | None = asyncio.StreamReader()
        self._welcome = welcome
        super().__init__(self._reader)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        reader, self._reader = self._reader, None
        assert reader is not None, "a connection is made once"
        # uvloop's is none by class, only by its methods.
        self._welcome(reader, _Writer(cast("asyncio.Transport", transport), self, reader, asyncio.get_running_loop()))


async def _host(app: Quart, listener: socket.socket, end: asyncio.Event) -> None:
    """Serves until `end`, and then a second longer for what is being answered.

    Hypercorn's own `serve` would do, but for two things: it gives the application no way to a connection, and on Python
    3.12 and later it waits without end for the connections that are open.
    """
    config = Config()
    config.errorlog = logging.getLogger("hypercorn")
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    context = WorkerContext(None)
    connections: set[asyncio.Task[None]] = set()

    def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_Connection(app, config, context, reader, writer).run(), name="http")
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.get_running_loop().create_server(lambda: _Door(welcome), sock=listener, backlog=BACKLOG)
    try:
        await end.wait()
    finally:
        server.close()
        await context.terminated.set()  # Connections that wait for another request are closed.
        if connections:
            await asyncio.wait(connections, timeout=ANSWER_SECONDS)
        for task in connections:
            task.cancel()


async def _finish(task: asyncio.Task[None]) -> None:
    """Waits for a server's end; a peer that takes no more bytes must not keep the process."""
    _, unfinished = await asyncio.wait({task}, timeout=STOP_SECONDS)
    if unfinished:
        _log.warning("gave up connections that would not close", part=task.get_name())
        task.cancel()
    elif not task.cancelled() and (error := task.exception()) is not None:
        _log.error("failed", part=task.get_name(), exc_info=error)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
