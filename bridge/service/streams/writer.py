"""Writes the sessions' bytes to their sockets, after the head of the response has been written.

A stream has no task. Callbacks wake it: its session has output (`wake`), its peer reads again, a deadline has passed,
or its socket is closed. Streams that are woken together write together (`WriteBatch`), so that ten events that arrived
in one packet leave in one write.

A stream holds its resources from `open` until its transport calls `connection_lost`, which happens exactly once.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from bridge.service import clock
from bridge.service.logs import RareLine
from bridge.service.metrics import Metrics
from bridge.service.streams import sse
from bridge.service.streams.cursor import echo
from bridge.service.streams.hub import CAUSES, Connection, Hub, StreamRefused, StreamRequest
from bridge.service.streams.session import State

if TYPE_CHECKING:
    from bridge.service.tracing import Tracing  # Its library is there only where it is wanted.

_log = structlog.get_logger("bridge.stream")

BLOCKED_SECONDS = 1.0
"""How often the deadlines of a stream are checked whose peer reads nothing. It can only end, and say so later."""

LAST_CHUNK = b"0\r\n\r\n"
"""RFC 9112, section 7.1."""


class WriteBatch:
    """Collects the streams that have output, and has them write together.

    As a context manager around the deliveries of one packet: all streams write on exit, at once, without waiting for
    the next loop iteration. Outside of a packet they write in the next loop iteration.
    """

    __slots__ = ("_gathering", "_woken")

    def __init__(self) -> None:
        self._woken: list[_Stream] = []
        self._gathering = False

    def __enter__(self) -> None:
        self._gathering = True

    def __exit__(self, *_: object) -> None:
        self._gathering = False
        if self._woken:
            self._serve()

    def wake(self, stream: _Stream) -> None:
        if not self._woken and not self._gathering:
            asyncio.get_running_loop().call_soon(self._serve)
        self._woken.append(stream)

    def _serve(self) -> None:
        woken, self._woken = self._woken, []
        now = time.monotonic()
        for stream in woken:
            stream.serve(now)


class Streams:
    """
    Args:
        stall_seconds: a stream whose peer has read nothing for this long counts as stalled when its socket is closed.
        tracing: makes a span of each delivery.
    """

    def __init__(
        self,
        hub: Hub,
        metrics: Metrics,
        write_batch: WriteBatch,
        *,
        stall_seconds: float,
        tracing: Tracing | None = None,
    ) -> None:
        self.hub = hub
        self.metrics = metrics
        self.write_batch = write_batch
        self.stall_seconds = stall_seconds
        self.tracing = tracing
        self.refusals = {cause: RareLine("stream refused", _log.info) for cause in CAUSES}

    def open(self, transport: asyncio.Transport, request: StreamRequest, *, chunked: bool) -> None:
        """Streams to a connection whose response head has been written, until its end; then the connection is closed.

        Args:
            transport: not closing. It is ours from here on.
            chunked: whether the body is in chunks (HTTP/1.1), or ends with the connection (HTTP/1.0).
        """
        # A class of its own, so that without tracing an event costs not even a condition.
        stream = (
            _Stream(self, transport, chunked=chunked)
            if self.tracing is None
            else _TracedStream(self, transport, self.tracing, chunked=chunked)
        )
        transport.set_protocol(stream)
        transport.resume_reading()  # The HTTP host may have paused it; the stream has to notice the end.
        stream.begin(request)


class _Stream(asyncio.Protocol):
    __slots__ = (
        "_blocked_since",
        "_chunked",
        "_connection",
        "_failed",
        "_streams",
        "_timer",
        "_transport",
        "_woken",
    )  # fmt: skip

    def __init__(self, streams: Streams, transport: asyncio.Transport, *, chunked: bool) -> None:
        self._streams = streams
        self._transport = transport
        self._chunked = chunked
        self._connection: Connection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._blocked_since: float | None = None
        self._woken = False
        self._failed = False

    def begin(self, request: StreamRequest) -> None:
        try:
            self._connection = self._streams.hub.attach(request, self.wake)
        except StreamRefused as refusal:
            self._streams.metrics.streams_ended.labels(refusal.reason).inc()
            self._streams.refusals[refusal.cause].log(user=request.subscriber.user, cause=refusal.cause)
            self._write(sse.encode_bye(refusal.reason, refusal.retry_ms, cursor=echo(request.last_event_id)))
            self._close()
            return
        _log.info(
            "stream opened",
            stream=self._connection.subscription.number,
            user=request.subscriber.user,
            types=list(request.types.patterns),
            groups=len(request.subscriber.groups),
            resumes=bool(request.last_event_id),
        )
        self._arm(time.monotonic())

    def wake(self) -> None:
        """The session has output, or has ended."""
        if not self._woken:
            self._woken = True
            self._streams.write_batch.wake(self)

    def serve(self, now: float) -> None:
        """Writes the session's output, as far as the peer reads."""
        self._woken = False
        connection = self._connection
        if connection is None or self._blocked_since is not None or self._transport.is_closing():
            return
        try:
            self._say(connection, now)
        except Exception as error:  # noqa: BLE001
            # A fault in one stream ends that stream, and not the others of this batch.
            self._fail(connection, error)

    def _say(self, connection: Connection, now: float) -> None:
        if connection.fault is not None:
            raise connection.fault
        session = connection.session
        delivered = session.delivered
        chunk = session.take()
        if chunk:
            metrics = self._streams.metrics
            metrics.events_delivered.value += session.delivered - delivered
            if session.unreadable_gaps:
                metrics.gaps.labels("not-readable").inc(session.unreadable_gaps)
                session.unreadable_gaps = 0
            if session.oldest_ms is not None:
                connection.deadlines.moved(now)
                metrics.delivery_seconds.observe((clock.now_ms() - session.oldest_ms) / 1000)
            self._write(chunk)
            connection.deadlines.wrote(now)
            connection.read_on()
        if session.has_output:
            self.wake()  # One chunk a turn: a stream with a long backlog leaves room for the others.
        elif session.state is State.ENDED:
            self._close()

    def _write(self, chunk: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._chunked else chunk)

    def _fail(self, connection: Connection, error: Exception) -> None:
        self._failed = True
        _log.error("stream failed", stream=connection.subscription.number, exc_info=error)
        self._transport.abort()

    def _close(self) -> None:
        if self._chunked:
            self._transport.write(LAST_CHUNK)
        self._transport.close()  # Once all that was written is out.

    # Deadlines. One timer, always armed. If bytes have been written meanwhile it fires too early, and is set again: a
    # timer that moved with every write would cost more than the write.

    def _arm(self, now: float) -> None:
        assert self._connection is not None, "only what is attached has deadlines"
        seconds = BLOCKED_SECONDS if self._blocked_since is not None else self._connection.deadline(now) - now
        self._timer = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._on_time)

    def _on_time(self) -> None:
        assert self._connection is not None, "only what is attached has deadlines"
        now = time.monotonic()
        try:
            self._connection.advance(now)
        except Exception as error:  # noqa: BLE001
            self._fail(self._connection, error)
            return
        session = self._connection.session
        if session.has_output:
            self.serve(now)
        if session.state is not State.ENDED and not self._transport.is_closing():
            self._arm(time.monotonic())

    # asyncio's side (asyncio.Protocol).

    def data_received(self, data: bytes) -> None:
        """Drops the data: a client has nothing to send after its request."""

    def eof_received(self) -> None:
        """The client has closed its side. The transport closes itself."""

    def pause_writing(self) -> None:
        self._blocked_since = time.monotonic()

    def resume_writing(self) -> None:
        self._blocked_since = None
        self.wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        session = connection.session
        self._streams.hub.detach(connection)
        reason = self._why(connection, error)
        self._streams.metrics.streams_ended.labels(reason).inc()
        self._streams.metrics.events_duplicate.inc(session.duplicates)
        _log.info(
            "stream ended",
            stream=connection.subscription.number,
            user=session.user,
            reason=reason,
            seconds=round(time.monotonic() - connection.opened_at, 3),
            events=session.delivered,
            duplicates=session.duplicates,
        )

    def _why(self, connection: Connection, error: Exception | None) -> str:
        """Why the stream ended: the reason of its goodbye, or `client`, `stalled` or `error`.

        The kernel measures a stall by itself (TCP_USER_TIMEOUT) and ends the connection with ETIMEDOUT. On a busy
        machine it may do so before the bridge has noticed for as long that its writes wait.
        """
        if self._failed:
            return "error"
        blocked_since = self._blocked_since
        if blocked_since is not None and (
            isinstance(error, TimeoutError) or time.monotonic() - blocked_since >= self._streams.stall_seconds
        ):
            return "stalled"
        return connection.session.end_reason or "client"


class _TracedStream(_Stream):
    __slots__ = ("_tracing",)

    def __init__(self, streams: Streams, transport: asyncio.Transport, tracing: Tracing, *, chunked: bool) -> None:
        super().__init__(streams, transport, chunked=chunked)
        self._tracing = tracing

    def _say(self, connection: Connection, now: float) -> None:
        session = connection.session
        waiting, delivered = session.waiting(), session.delivered
        super()._say(connection, now)
        self._tracing.delivered(waiting[: session.delivered - delivered], connection.subscription.number)
