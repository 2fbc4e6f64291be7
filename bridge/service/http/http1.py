"""HTTP/1.1: Hypercorn, with what it lacks for long streams. The only file that imports hypercorn and h11.

Hypercorn reads requests and writes heads and everything that is short; a stream gets the bare transport. How many
connections there may be, and for how long without a request, is the entrance's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any, cast

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from quart import Quart

from bridge.service.http.entrance import Entrance, Guest, Why
from bridge.service.http.web import TAKE_OVER

READ_BYTES = 65_536

LAST_ANSWERS_SECONDS = 1.0
"""For answers that are being made when the service ends. No stream is among them: those have been drained."""


async def host(
    app: Quart,
    listener: socket.socket,
    end: asyncio.Event,
    *,
    name: str,
    guests: int,
    on_ended: Callable[[Why], object],
    on_shortage: Callable[[], object],
    on_entrance: Callable[[Entrance], object] = lambda _: None,
) -> None:
    """Serves until `end`, and then a second longer for what is being answered.

    Hypercorn's own `serve` would do, but for three things: it gives the application no way to a connection, it has no
    limit of them, and on Python 3.12 and later it waits without end for the connections that are open.

    Args:
        name, guests, on_ended, on_shortage: as of `Entrance`.
        on_entrance: called with it, once it is open.
    """
    config = Config()
    config.errorlog = logging.getLogger("hypercorn")
    config.accesslog = None
    config.include_server_header = False
    context = WorkerContext(None)
    connections: set[asyncio.Task[None]] = set()

    def welcome(guest: Guest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_Connection(app, config, context, guest, reader, writer).run(), name="http")
        connections.add(task)
        task.add_done_callback(connections.discard)

    entrance = Entrance(listener, name=name, most=guests, welcome=welcome, on_ended=on_ended, on_shortage=on_shortage)
    entrance.open()
    on_entrance(entrance)
    try:
        await end.wait()
    finally:
        await context.terminated.set()  # No connection is kept for another request.
        entrance.close()
        if connections:
            await asyncio.wait(connections, timeout=LAST_ANSWERS_SECONDS)
        for task in connections:
            task.cancel()


class _NoTask:
    """For Hypercorn's timer of idle connections. A task for each is saved, and the entrance has the deadlines."""

    async def restart(self, *_: object) -> None: ...

    async def stop(self) -> None: ...


class _Connection(TCPServer):
    """One of Hypercorn's connections, which the application may take over once it has written a response's head.

    A stream through all of Hypercorn costs four tasks and 18 KB for as long as it is open, and 7 microseconds more a
    write (docs/decisions/05). So Hypercorn reads requests and writes heads and everything that is short. A stream
    writes to the bare transport.
    """

    def __init__(self, app: Quart, config: Config, context: WorkerContext, guest: Guest,
                 reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # fmt: skip
        super().__init__(self._call, asyncio.get_running_loop(), config, context, {}, reader, writer)
        self._quart = app
        self._guest = guest
        self._last_words: asyncio.Task[None] | None = None
        guest.on_late = self._say_late
        self.idle_task = _NoTask()  # type: ignore[assignment]

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            if event.idle:
                self._guest.idle()
            else:
                self._guest.answering()
        else:
            await super().protocol_send(event)

    async def _read_data(self) -> None:
        made = self.protocol
        made.protocol = _Http1(made.app, made.config, made.context, made.task_group, made.state, made.ssl, made.client,
                               made.server, made.send)  # fmt: skip
        while not self.reader.at_eof():
            try:
                data = await self.reader.read(READ_BYTES)
            except OSError:
                break
            self._guest.has_unread = False
            await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())

    def _say_late(self) -> None:
        """Its head has begun and does not end (RFC 9110, section 15.5.9)."""
        protocol = self.protocol.protocol
        if isinstance(protocol, _Http1):
            self._last_words = asyncio.create_task(self._refuse(protocol, 408), name="http-late")
        else:
            self._guest.close()

    async def _refuse(self, protocol: _Http1, status: int) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            await protocol._send_error_response(status)
        self._guest.close()

    async def _call(self, scope: Any, receive: Any, send: Any, sync_spawn: object, call_soon: object) -> None:
        scope["extensions"][TAKE_OVER] = self._take_over
        await self._quart(scope, receive, send)

    def _take_over(self) -> asyncio.Transport | None:
        transport = cast("asyncio.Transport", self.writer.transport)
        if transport.is_closing() or self.reader.at_eof():
            return None
        self._guest.leave()
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
