"""Serves HTTP/1.1 with Hypercorn, and adds what long streams need. The only file that imports hypercorn and h11.

Hypercorn reads requests, and writes heads and short answers. A stream gets the bare transport. `entrance.py` limits the
number of connections and their time without a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any, cast

import h11
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from quart import Quart

from bridge.service.http.entrance import Entrance, Guest
from bridge.service.http.requesthead import MAX_HEAD_BYTES, HeadFault, fault_of_head, fault_of_lines, origin_form
from bridge.service.http.web import PROBLEM_TYPE, TAKE_OVER, problem_document
from bridge.service.metrics import GuestEnd

READ_BYTES = 65_536

LINGER_SECONDS = 1.0
"""After the last answer, the connection is read for this time, unless the client closes it earlier. Bytes that arrive
at a closed connection cause a reset, which may overtake the answer (RFC 9112, section 9.6)."""

LAST_ANSWERS_SECONDS = 1.0
"""Limit for answers in progress when the service stops. Streams have been drained before."""


async def host(
    app: Quart,
    listener: socket.socket,
    end: asyncio.Event,
    *,
    name: str,
    guests: int,
    on_ended: Callable[[GuestEnd], object],
    on_shortage: Callable[[], object],
    on_entrance: Callable[[Entrance], object] = lambda _: None,
) -> None:
    """Serves until `end` is set, and then at most 1 s longer for answers in progress.

    Hypercorn's own `serve` is not used for three reasons: the application cannot take over a connection, the number of
    connections has no limit, and on Python 3.12 and later it waits for open connections without a limit.

    Args:
        name, on_ended, on_shortage: as `Entrance`.
        guests: the most guests at once, as `most` of `Entrance`.
        on_entrance: called with the entrance once it is open.

    Cancelling closes the entrance and the connections too, within 1 s.
    """
    config = Config()
    config.errorlog = logging.getLogger("hypercorn")
    config.accesslog = None
    config.include_server_header = False
    context = WorkerContext(None)
    connections: set[asyncio.Task[None]] = set()

    def welcome(guest: Guest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_HttpConnection(app, config, context, guest, reader, writer).run(), name="http")
        connections.add(task)
        task.add_done_callback(connections.discard)

    entrance = Entrance(listener, name=name, most=guests, welcome=welcome, on_ended=on_ended, on_shortage=on_shortage)
    entrance.open()
    on_entrance(entrance)
    try:
        await end.wait()
    finally:
        await context.terminated.set()  # Connections are not kept for another request.
        entrance.close()
        if connections:
            await asyncio.wait(connections, timeout=LAST_ANSWERS_SECONDS)
        for task in connections:
            task.cancel()


class _NoTask:
    """Replaces Hypercorn's timer for idle connections: the entrance has the deadlines, without a task for each."""

    async def restart(self, *_: object) -> None: ...

    async def stop(self) -> None: ...


class _HttpConnection(TCPServer):
    """A connection of Hypercorn that the application may take over once the response's head is written.

    With all of Hypercorn, an open stream costs four tasks and 18 KB, and 7 µs more for each write (docs/decisions/05).
    """

    def __init__(self, app: Quart, config: Config, context: WorkerContext, guest: Guest,
                 reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # fmt: skip
        super().__init__(self._call, asyncio.get_running_loop(), config, context, {}, reader, writer)
        self._quart = app
        self._guest = guest
        self._lingers = False
        self._late_answer: asyncio.Task[None] | None = None
        guest.on_late = self._answer_late_head
        self.idle_task = _NoTask()  # type: ignore[assignment]

    async def run(self) -> None:
        # A client that leaves during the close causes, for example, ENOTCONN, which Hypercorn does not expect.
        with contextlib.suppress(OSError):
            await super().run()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            if event.idle:
                self._guest.idle()
            else:
                self._guest.answering()
        elif isinstance(event, Closed) and isinstance(self.protocol.protocol, _Http1) and not self.reader.at_eof():
            self._linger()
        else:
            await super().protocol_send(event)

    def _linger(self) -> None:
        """Closes only the sending side, and lets the client close the connection. Further bytes are discarded."""
        if not self._lingers:
            self._lingers = True
            with contextlib.suppress(NotImplementedError, OSError, RuntimeError):
                self.writer.write_eof()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._guest.close)

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
            if not self._lingers:
                await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())

    def _answer_late_head(self) -> None:
        """Answers 408: a head has begun but is not complete at its deadline (RFC 9110, section 15.5.9)."""
        protocol = self.protocol.protocol
        if isinstance(protocol, _Http1):
            self._late_answer = asyncio.create_task(self._refuse(protocol, 408), name="http-late")
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
        # Discard Hypercorn's further writes (it believes that the body is empty), and end its reader. Its tasks then
        # end, and free all that they kept for this connection.
        self.writer = _NullWriter()  # type: ignore[assignment]
        self.reader.feed_eof()
        return transport


class _Http1(H11Protocol):
    """Hypercorn's HTTP/1.1, as strict as RFC 9112 allows, with a body for each error and without upgrades.

    A server may ignore an upgrade (RFC 9110, section 7.8). Java's HttpClient and curl send `Upgrade: h2c` by default,
    which RFC 9113, section 3.1, has made obsolete. The bridge has no WebSockets. A client that begins with HTTP/2's
    preface gets HTTP/2, and then a 505.
    """

    connection: _Requests

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.connection = _Requests(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def _check_protocol(self, event: Any) -> None:
        if event.http_version == b"2.0":
            await super()._check_protocol(event)

    async def _create_stream(self, request: h11.Request) -> None:
        target, host = origin_form(request.target)
        # RFC 9110, section 2.5: a later HTTP/1.x is treated as 1.1.
        version = (
            b"1.1" if request.http_version[:2] == b"1." and request.http_version > b"1.1" else request.http_version
        )
        headers = [
            (name, host if host is not None and name == b"host" else value)
            for name, value in request.headers
            if name != b"upgrade"
        ]
        if (target, version) != (request.target, request.http_version) or len(headers) != len(request.headers):
            request = h11.Request(method=request.method, target=target, headers=headers, http_version=version)
        await super()._create_stream(request)

    async def _send_error_response(self, status_code: int) -> None:
        fault = self.connection.fault
        if fault is None or fault.status != status_code:
            fault = HeadFault(status_code, *_FAULTS.get(status_code, _FAULTS[400]))
        body = problem_document(fault.status, fault.code, fault.detail).encode()
        headers = [
            ("Content-Type", PROBLEM_TYPE),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
        headers += [(name.decode(), value.decode()) for name, value in self.config.response_headers("h11")]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        if not self.connection.asks_for_head:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


_FAULTS = {
    400: ("bad-request", "the request is not valid HTTP/1.1 (RFC 9112)"),
    408: ("request-timeout", "the head of the request was not complete in time"),
    431: ("headers-too-large", "the headers of the request are larger than 16 KB: send fewer cookies"),
    501: ("not-implemented", "the only supported transfer coding is chunked"),
}
"""Messages for requests that h11 refuses. h11's own messages repeat received text, which may be a token."""


class _Requests(h11.Connection):
    """h11 with the additional checks of `requesthead.py`: h11 alone tolerates faults of old clients."""

    fault: HeadFault | None = None
    asks_for_head = False

    def receive_data(self, data: bytes) -> None:
        if self.their_state is h11.IDLE and data[:2] == b"\r\n" and not self.trailing_data[0]:
            data = data[2:]  # An empty line before a request is ignored (RFC 9112, section 2.2).
            if not data:
                return  # h11 would treat empty data as the end of the connection.
        super().receive_data(data)

    def next_event(self) -> Any:
        before = self.trailing_data[0]
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.asks_for_head = event.method == b"HEAD"
            self.fault = fault_of_head(
                before[: len(before) - len(self.trailing_data[0])],
                method=event.method,
                version=event.http_version,
                headers=event.headers,
            )
        elif isinstance(event, h11.EndOfMessage):
            # With this event h11 consumes the last chunk's line and the trailers, but no byte of the body.
            self.fault = fault_of_lines(before[: len(before) - len(self.trailing_data[0])])
        else:
            return event
        if self.fault is not None:
            self._process_error(self.their_role)  # As h11 does for its own errors: only the error's answer may follow.
            raise h11.RemoteProtocolError(self.fault.detail, error_status_hint=self.fault.status)
        return event


class _NullWriter:
    """Discards all bytes. It has the methods of StreamWriter that Hypercorn calls at the end of a connection."""

    def write(self, data: bytes) -> None: ...

    def write_eof(self) -> None: ...

    def close(self) -> None: ...

    async def drain(self) -> None: ...

    async def wait_closed(self) -> None: ...
