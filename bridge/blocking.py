"""`Publisher` for programs without an event loop: an event loop in a thread of its own, made with the first call.

Owns threads and forks: any thread may call, and a process that was forked gets a connection of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from bridge import amqp
from bridge.event import EventData
from bridge.publisher import (
    SETTLE_SECONDS,
    Attribute,
    EventWriter,
    Id,
    Item,
    Publisher,
    PublishTimeout,
    as_text,
    batch_error,
    report_progress,
)
from bridge.routing import Audience
from bridge.sender import PIPELINE_EVENTS, Message, Progress

MARGIN_SECONDS = 2.0
"""A call that has not returned this long after its timeout raises: the thread of the event loop does not answer."""

LAST_TURNS = 4
"""Times that the tasks of a closing publisher are waited for, together half of `MARGIN_SECONDS`."""

Result = TypeVar("Result")

_forks = 0
"""How many forks lie between the first process and this one. Unlike a process id it is never used again."""


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class BlockingPublisher:
    """`Publisher` for programs without an event loop. Made by `Publisher.blocking`; threads may share one.

    Connects with the first event, so it may be a module's global: made before a fork (Celery's prefork pool, gunicorn
    with `--preload`), it connects again in each child. Every call ends within its timeout, but for two seconds.
    """

    def __init__(
        self, url: str, *, source: str, exchange: str, timeout: float, max_event_bytes: int, log: bool
    ) -> None:
        self._make: Callable[[], Publisher] = partial(
            Publisher,
            url,
            source=source,
            exchange=exchange,
            timeout=timeout,
            max_event_bytes=max_event_bytes,
            log=log,
        )
        self._make()  # Raises for a bad address now, and not with the first event.
        self._writer = EventWriter(source=source, exchange=exchange, max_event_bytes=max_event_bytes, log=log)
        self._timeout = timeout
        self._is_closed = False
        # By number of forks. What a parent left behind is kept and never touched: its sockets and its selector are
        # shared with the parent, and to close them would cut the parent's connection off.
        self._workers: dict[int, _Worker] = {}
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)  # Also at the end of the program.

    def __enter__(self) -> Self:
        """As `open`."""
        try:
            self.open()
        except BaseException:
            self._stop()  # `__exit__` is not called then. A later event starts again.
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connects, within the timeout. Not needed: the first event connects too. Also opens again after `close`.

        Raises:
            as `Publisher.open`. A later event tries again.
        """
        self._is_closed = False
        self._call(lambda publisher: publisher.open(), "")

    def close(self) -> None:
        """Closes the connection, within five seconds. Threads that still wait for a confirm get PublishTimeout."""
        self._is_closed = True
        self._stop()

    def _stop(self) -> None:
        worker = self._workers.pop(_forks, None)
        if worker is not None:
            worker.stop(amqp.CLOSE_SECONDS + MARGIN_SECONDS)

    def to_user(self, user: Id, data: EventData, **attributes: Attribute) -> str:
        """As `Publisher.to_user`; returns when confirmed."""
        return self.publish(Audience.user(as_text(user)), data, **attributes)

    def to_group(self, group: Id, data: EventData, **attributes: Attribute) -> str:
        """As `Publisher.to_group`; returns when confirmed."""
        return self.publish(Audience.group(as_text(group)), data, **attributes)

    def to_all(self, data: EventData, **attributes: Attribute) -> str:
        """As `Publisher.to_all`; returns when confirmed."""
        return self.publish(Audience.everyone(), data, **attributes)

    def publish(self, audience: Audience, data: EventData, **attributes: Attribute) -> str:
        """As `Publisher.publish`; returns when confirmed."""
        message = self._writer.message(audience, data, attributes)
        self._call(lambda publisher: publisher.publish_message(message), message.id)
        return message.id

    def publish_many(self, events: Iterable[Item]) -> int:
        """As `Publisher.publish_many`; returns when all are confirmed.

        The iterable runs in the calling thread: it may be a queryset or a cursor, and may publish by itself.
        """
        worker = self._worker()
        batch = _Batch(worker, self._timeout)
        count = 0
        try:
            for item in events:
                batch.put(self._writer.item(item, count))
                count += 1
            batch.finish()
        except _BatchFailed as failed:
            raise batch_error(failed.error, batch.progress()) from failed.error
        except BaseException as error:
            # Of the event or the iterable, or Ctrl-C: nothing is wrong with what was taken before.
            failure = batch.settle(self._timeout if isinstance(error, Exception) else SETTLE_SECONDS)
            if failure is not None and isinstance(error, Exception):
                raise batch_error(failure, batch.progress()) from failure
            reported = report_progress(error, batch.progress())
            if reported is error:
                raise
            raise reported from error.__cause__
        return count

    def _worker(self) -> _Worker:
        if self._is_closed:
            raise RuntimeError("this publisher is closed: call open() to use it again")
        worker = self._workers.get(_forks)
        if worker is None:
            # Of two threads that come here at once, the one whose worker is in the dictionary wins; it is atomic.
            worker = self._workers.setdefault(_forks, _Worker(self._make))
        worker.start(self._timeout)
        return worker

    def _call(self, call: Callable[[Publisher], Coroutine[Any, Any, Result]], event_id: str) -> Result:
        worker = self._worker()
        future = worker.submit(call(worker.publisher))
        try:
            return future.result(self._timeout + MARGIN_SECONDS)
        except concurrent.futures.TimeoutError:
            future.cancel()
            text = f"the publisher's thread did not answer within {self._timeout:g} s"
            raise PublishTimeout(text, id=event_id) from None
        except concurrent.futures.CancelledError:
            raise PublishTimeout("this publisher was closed before the confirm came", id=event_id) from None
        except BaseException:
            future.cancel()  # Ctrl-C in the caller must not leave the publish running behind its back.
            raise


def _stop_all(workers: dict[int, _Worker]) -> None:
    worker = workers.pop(_forks, None)
    if worker is not None:
        worker.stop(MARGIN_SECONDS)


class _Worker:
    """The thread and the event loop of one process, and the publisher in it."""

    def __init__(self, make: Callable[[], Publisher]) -> None:
        self.publisher = make()
        self.loop: asyncio.AbstractEventLoop
        self._running = threading.Event()
        # A signal's handler may publish too, and interrupts its own thread within `submit`.
        self._lock = threading.RLock()
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(self, timeout: float) -> None:
        """Starts the thread, once. Any thread may call this, any number of times."""
        if self._running.is_set():
            return
        with self._lock:
            if self._thread is None:
                self.loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name="bridge-publisher", daemon=True)
                self._thread.start()
        if not self._running.wait(timeout):
            raise PublishTimeout(f"the publisher's thread did not start within {timeout:g} s")

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._running.set)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> concurrent.futures.Future[Result]:
        """Runs a coroutine in the loop.

        Raises:
            RuntimeError: `stop` was called.
        """
        with self._lock:
            if not self._is_stopped:
                return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        coroutine.close()
        raise RuntimeError("this publisher is closed: call open() to use it again")

    def stop(self, timeout: float) -> None:
        """Closes the connection and ends the thread, within `timeout` seconds."""
        until = time.monotonic() + timeout
        with self._lock:
            if self._thread is None or self._is_stopped:
                return
            # Nothing is submitted after this, so `_finish` finds every task that there is.
            self._is_stopped = True
            finished = asyncio.run_coroutine_threadsafe(self._finish(), self.loop)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            finished.result(timeout)
        self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(max(0.0, until - time.monotonic()))

    async def _finish(self) -> None:
        await self.publisher.close()
        # Tasks that still wait for a confirm have their error now, and need a turn of the loop to pass it on. The
        # library starts more tasks while a connection ends; one left behind would be reported as never awaited.
        for _ in range(LAST_TURNS):
            await asyncio.sleep(0)
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if not rest:
                return
            _, late = await asyncio.wait(rest, timeout=MARGIN_SECONDS / 2 / LAST_TURNS)
            for task in late:
                task.cancel()


class _BatchFailed(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(str(error))


class _Batch:
    """Hands messages from the caller's thread to a pipeline in the loop's, at most 256 ahead."""

    def __init__(self, worker: _Worker, timeout: float) -> None:
        self._worker = worker
        self._timeout = timeout
        self._slots = threading.Semaphore(PIPELINE_EVENTS)
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._pipeline = worker.publisher.pipeline()
        self._done = worker.submit(self._send_all())
        # Whatever the result, a caller that waits for a slot must continue.
        self._done.add_done_callback(lambda _: self._slots.release(PIPELINE_EVENTS))

    async def _send_all(self) -> None:
        self._worker.publisher.use_here()
        while (message := await self._inbox.get()) is not None:
            await self._pipeline.put(message)
            self._slots.release()
        await self._pipeline.drain()

    def put(self, message: Message) -> None:
        """
        Raises:
            _BatchFailed: an earlier message has failed.
        """
        if not self._slots.acquire(timeout=self._timeout + MARGIN_SECONDS):
            raise PublishTimeout(f"the publisher's thread did not answer within {self._timeout:g} s", id=message.id)
        if self._done.done():
            self._raise()
        self._hand_over(message)

    def finish(self) -> None:
        """Returns once everything is confirmed. Raises as `put`."""
        self._hand_over(None)
        self._wait(None)
        self._raise()

    def settle(self, limit: float) -> BaseException | None:
        """Waits `limit` seconds at most for the confirms, and returns what went wrong."""
        self._hand_over(None)
        try:
            self._wait(limit)
            self._raise()
        except _BatchFailed as failed:
            return failed.error
        return None

    def progress(self) -> Progress:
        """How far it is, asked in the loop's thread, which may still be at it."""

        async def ask() -> Progress:
            return self._pipeline.progress()

        try:
            return self._worker.submit(ask()).result(MARGIN_SECONDS)
        except (RuntimeError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            return self._pipeline.progress()  # The loop has ended, and changes nothing any more.

    def _hand_over(self, message: Message | None) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed; then `_done` has the error.
            self._worker.loop.call_soon_threadsafe(self._inbox.put_nowait, message)

    def _wait(self, limit: float | None) -> None:
        # Without a limit the pipeline's own deadlines end it: each message has one.
        with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            self._done.exception(limit)
        if not self._done.done():
            self._done.cancel()

    def _raise(self) -> None:
        if self._done.cancelled():
            raise _BatchFailed(amqp.BrokerUnavailable("this publisher was closed, or ended, before all were confirmed"))
        if (error := self._done.exception()) is not None:
            raise _BatchFailed(error)
