"""`Publisher` for programs without an event loop. The first call starts an event loop in a separate thread.

Owns threads and forks: any thread may call, and a forked process opens its own connection.
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
    error_of_batch,
)
from bridge.routing import Audience
from bridge.sender import PIPELINE_EVENTS, Message, PipelineProgress

MARGIN_SECONDS = 2.0
"""A call raises this long after its timeout, if the thread of the event loop does not answer."""

LAST_TURNS = 4
"""How often a closing publisher waits for its tasks; all waits together take half of `MARGIN_SECONDS`."""

Result = TypeVar("Result")

_forks = 0
"""The number of forks from the first process to this one. Unlike a process id, no ancestor has the same number."""


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class BlockingPublisher:
    """`Publisher` for programs without an event loop. Made by `Publisher.blocking`; threads may share it.

    It connects with the first event, so it may be a module's global. If it is made before a fork (Celery's prefork
    pool, gunicorn with `--preload`), each child opens its own connection. A call for one event ends at most two
    seconds after its timeout.
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
        self._make()  # Raises for an invalid address now, not with the first event.
        self._writer = EventWriter(source=source, exchange=exchange, max_event_bytes=max_event_bytes, log=log)
        self._timeout = timeout
        self._is_closed = False
        # By number of forks. A parent's worker is kept and never used: its sockets and its selector are shared with
        # the parent. Closing them would close the parent's connection.
        self._workers: dict[int, _Worker] = {}
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)  # Also runs when the program ends.

    def __enter__(self) -> Self:
        """As `open`."""
        try:
            self.open()
        except BaseException:
            self._stop()  # Python does not call `__exit__` after this. A later event connects again.
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connects within the timeout. Optional: the first event connects too. After `close`, it opens again.

        Raises:
            As `Publisher.open`. A later event tries again.
        """
        self._is_closed = False
        self._call(lambda publisher: publisher.open(), "")

    def close(self) -> None:
        """Closes the connection, within seven seconds. Threads that wait for a confirm get PublishTimeout."""
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

        The iterable runs in the calling thread. It may be a queryset or a database cursor, and may itself publish.
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
            # An event, the iterable or Ctrl-C raised this. Earlier events are not affected: wait for their confirms.
            failure = batch.settle(self._timeout if isinstance(error, Exception) else SETTLE_SECONDS)
            made = error_of_batch(error, failure, batch.progress())
            if made is error:
                raise
            raise made from made.__cause__
        return count

    def _worker(self) -> _Worker:
        if self._is_closed:
            raise RuntimeError("this publisher is closed: call open() to use it again")
        worker = self._workers.get(_forks)
        if worker is None:
            # `setdefault` is atomic: two threads that arrive here at once both get the same worker.
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
            raise PublishTimeout("this publisher was closed before the confirm arrived", id=event_id) from None
        except BaseException:
            future.cancel()  # After Ctrl-C the publish must not continue in the other thread.
            raise


def _stop_all(workers: dict[int, _Worker]) -> None:
    worker = workers.pop(_forks, None)
    if worker is not None:
        worker.stop(MARGIN_SECONDS)


class _Worker:
    """One process's thread and event loop, and the publisher that runs in them."""

    def __init__(self, make: Callable[[], Publisher]) -> None:
        self.publisher = make()
        self.loop: asyncio.AbstractEventLoop
        self._running = threading.Event()
        # Reentrant: a signal handler may publish too, and may interrupt its own thread inside `submit`.
        self._lock = threading.RLock()
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(self, timeout: float) -> None:
        """Starts the thread once. Any thread may call this, any number of times.

        Raises:
            PublishTimeout: the thread did not start within `timeout` seconds.
        """
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
            # After this nothing is submitted, so `_finish` finds every task.
            self._is_stopped = True
            finished = asyncio.run_coroutine_threadsafe(self._finish(), self.loop)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            finished.result(timeout)
        self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(max(0.0, until - time.monotonic()))

    async def _finish(self) -> None:
        await self.publisher.close()
        # `close` has failed the tasks that wait for a confirm; they need a loop iteration to raise their errors.
        # aio-pika starts more tasks while a connection closes. Python would report an unfinished one as never awaited.
        for _ in range(LAST_TURNS):
            await asyncio.sleep(0)
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if not rest:
                return
            _, unfinished = await asyncio.wait(rest, timeout=MARGIN_SECONDS / 2 / LAST_TURNS)
            for task in unfinished:
                task.cancel()


class _BatchFailed(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(str(error))


class _Batch:
    """Passes messages from the caller's thread to a pipeline in the loop's thread, at most 256 ahead of it."""

    def __init__(self, worker: _Worker, timeout: float) -> None:
        self._worker = worker
        self._timeout = timeout
        self._slots = threading.Semaphore(PIPELINE_EVENTS)
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue()
        self._pipeline = worker.publisher.pipeline()
        self._done = worker.submit(self._send_all())
        # Release all slots whatever the result: a caller that waits for a slot must continue.
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
            PublishTimeout: the loop's thread gave no slot within the timeout and two seconds.
        """
        if not self._slots.acquire(timeout=self._timeout + MARGIN_SECONDS):
            raise PublishTimeout(f"the publisher's thread did not answer within {self._timeout:g} s", id=message.id)
        if self._done.done():
            self._raise()
        self._hand_over(message)

    def finish(self) -> None:
        """Returns once all messages are confirmed. Raises as `put`."""
        self._hand_over(None)
        self._wait(None)
        self._raise()

    def settle(self, limit: float) -> BaseException | None:
        """Waits at most `limit` seconds for the confirms. Returns the error, or None."""
        self._hand_over(None)
        try:
            self._wait(limit)
            self._raise()
        except _BatchFailed as failed:
            return failed.error
        return None

    def progress(self) -> PipelineProgress:
        """The progress of the pipeline, read in the loop's thread because the pipeline may still be running there."""

        async def ask() -> PipelineProgress:
            return self._pipeline.progress()

        try:
            return self._worker.submit(ask()).result(MARGIN_SECONDS)
        except (RuntimeError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            return self._pipeline.progress()  # The loop has ended: the progress no longer changes.

    def _hand_over(self, message: Message | None) -> None:
        with contextlib.suppress(RuntimeError):  # The loop is closed, and `_done` has the error.
            self._worker.loop.call_soon_threadsafe(self._inbox.put_nowait, message)

    def _wait(self, limit: float | None) -> None:
        # Without a limit the wait still ends: each message in the pipeline has a deadline.
        with contextlib.suppress(concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            self._done.exception(limit)
        if not self._done.done():
            self._done.cancel()

    def _raise(self) -> None:
        if self._done.cancelled():
            text = "this publisher was closed, or its timeout ended, before all events were confirmed"
            raise _BatchFailed(amqp.BrokerUnavailable(text))
        if (error := self._done.exception()) is not None:
            raise _BatchFailed(error)
