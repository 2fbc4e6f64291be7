"""One HTTP stream: a single async generator, one task, one deadline.

Whatever a stream holds is acquired inside its first step and given back in its `finally`, without an await: a generator
that was never started never runs its `finally`, and one that is ended may be cancelled a second time while it runs it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import structlog

from bridge import sse
from bridge.cursor import echo
from bridge.hub import Connection, Hub, Refused, StreamRequest
from bridge.metrics import Metrics
from bridge.session import State

_log = structlog.get_logger("bridge.stream")


class Bell:
    """Wakes one waiting task, when somebody rings or when it is time.

    The timer stays armed from wait to wait: a busy stream would otherwise make and cancel one for each event.
    """

    __slots__ = ("_loop", "_rung", "_timer", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rung = False

    def ring(self) -> None:
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait_until(self, deadline: float) -> None:
        """Returns when rung (also if that was before), or at `deadline` (monotonic seconds), or a little too early."""
        if self._rung:
            self._rung = False
            return
        when = deadline - time.monotonic() + self._loop.time()
        if self._timer is None or self._timer.when() > when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(when, self._on_time)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._rung = False

    def _on_time(self) -> None:
        self._timer = None
        self.ring()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def stream(hub: Hub, request: StreamRequest, metrics: Metrics, *, stall_seconds: float) -> AsyncGenerator[bytes]:
    """The body of one `GET /events`, in chunks that are whole frames.

    Ends by itself after `bridge.bye`. Closing or cancelling it at any point takes its queue down and counts it.
    """
    bell = Bell(asyncio.get_running_loop())
    try:
        connection = hub.attach(request, bell.ring)
    except Refused as refusal:
        metrics.streams_ended.labels(refusal.reason).inc()
        _log.info("stream refused", user=request.subscriber.user, reason=refusal.reason)
        yield sse.encode_bye(refusal.reason, refusal.retry_ms, cursor=echo(request.last_event_id))
        return
    session = connection.session
    log = _log.bind(stream=connection.subscription.number, user=session.user)
    log.info("stream opened", types=list(request.types.patterns), groups=len(request.subscriber.groups),
             resumes=bool(request.last_event_id))  # fmt: skip
    failed = False
    try:
        while True:
            now = time.monotonic()
            connection.advance(now)
            delivered = session.delivered
            chunk = session.take()
            if chunk:
                if session.oldest_ms is not None:
                    connection.pace.moved(now)
                    metrics.events_delivered.inc(session.delivered - delivered)
                    metrics.delivery_seconds.observe(max(0.0, time.time() - session.oldest_ms / 1000))
                connection.writing_since = now
                yield chunk
                connection.writing_since = None
                connection.pace.wrote(now)
            elif session.state is State.ENDED:
                return
            else:
                await bell.wait_until(connection.deadline(now))
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException:
        failed = True
        raise
    finally:
        bell.stop()
        hub.detach(connection)
        reason = "error" if failed else _why(connection, stall_seconds)
        metrics.streams_ended.labels(reason).inc()
        metrics.events_duplicate.inc(session.duplicates)
        log.info(
            "stream ended",
            reason=reason,
            seconds=round(time.monotonic() - connection.opened_at, 3),
            events=session.delivered,
            duplicates=session.duplicates,
        )


def _why(connection: Connection, stall_seconds: float) -> str:
    """Why it ended: what was said, or what became of the client."""
    writing_since = connection.writing_since
    if writing_since is not None and time.monotonic() - writing_since >= stall_seconds:
        return "stalled"
    if connection.session.end_reason is not None:
        return connection.session.end_reason
    return "client"
