"""Reads the event log, a RabbitMQ stream, for clients that resume.

It answers two questions:

- Which entry is the newest now? It writes a *watermark*, an entry of its own, and waits until it reads it.
- Which events lie between two entries for these audiences? A *replay* asks this. A *scan* answers it: one consumer that
  reads once for many streams. Ten thousand browsers that return after a deploy cost a few scans.

`scans.py` decides which part is read next, and for which streams. The session decides which events its client gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import structlog
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, NoReplica, NotFound
from bridge.publisher import new_id
from bridge.sender import Sender
from bridge.service.broker import topology
from bridge.service.broker.consumer import Batch, Consumer, ConsumingConnection
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.broker.scans import Scan, Schedule, Want, cost
from bridge.service.logs import RareLine
from bridge.service.settings import LogSettings
from bridge.service.streams.cursor import Anchor, digest
from bridge.service.streams.session import Replay
from bridge.service.streams.sse import GapReason

if TYPE_CHECKING:
    import aio_pika

MOST_SCANS = 6
"""Scans at once, including those that are in their tail read."""

PREFETCH = 1_000
"""Entries on their way. Also the cost of a scan that ends at once: `scans.OPEN_COST`."""

TAIL_BEHIND = 1_000
"""A near scan begins up to this many entries earlier to serve tail reads too."""

TAIL_SECONDS = 1.0
"""A scan reads on for this long after a stream's watermark (the tail read). In a cluster, another node may not yet
route to a queue that was just bound. The log has the events that such a queue missed."""

WATERMARK_TIMEOUT_SECONDS = 2.0
"""The bridge waits this long for a watermark: an alarm blocks the connection that writes it. Then it takes the newest
entry that it can read. During an alarm RabbitMQ takes no message from publishers."""

PATIENCE_SECONDS = 8.0
"""A watermark is tried again for this long: after the death of a node, the log needs a moment for a new leader. A
stream that waited longer gets the gap `no-log`. Shorter than the time in which a new stream must be ready."""

WATERMARK_TYPE = "bridge.tick"

_CONSUMER_TAG = "log"

_RETRY_SECONDS = 0.5

_LEAST_PAUSE_SECONDS = 0.05
"""Shortest pause before the schedule is asked again."""

_log = structlog.get_logger("bridge.eventlog")

OnWatermark = Callable[[Anchor | None, int], None]
"""Called with the entry and when it was written (ms since 1970). None: the log does not answer."""


class Reader(Protocol):
    """The stream that a replay is for. Called in the log's order; `offset` and `check` are those of the entry."""

    def found(self) -> None: ...
    def not_found(self, reason: GapReason) -> None: ...
    def read(self, offset: int, check: str, routing_key: str, body: bytes) -> bool:
        """Takes an entry. False stops the read; when it goes on, this entry is the first."""
        ...

    def caught_up(self) -> None: ...
    def read_tail(self, routing_key: str, body: bytes) -> None: ...
    def tail_ended(self) -> None: ...


class Request(Want):
    """One request to read. `cancel` ends it at any time; its reader is not called after that."""

    __slots__ = (
        "_on_cancel",
        "cancelled",
        "caught_up_at",
        "has_begun",
        "prefixes",
        "reader",
        "reads_tail",
        "replay",
        "verified",
    )

    def __init__(
        self,
        replay: Replay,
        prefixes: Sequence[str],
        reader: Reader,
        *,
        user: str,
        since: float = 0.0,
        extends: bool = False,
        tail_only: bool = False,
        reads_tail: bool = True,
        on_cancel: Callable[[Request], object] = bool,
    ) -> None:
        super().__init__(
            user,
            replay.start,
            replay.until,
            since=since,
            extends=extends,
            free=tail_only,
            returns=replay.check is not None and not tail_only,
        )
        self.replay = replay
        self.prefixes = prefixes
        self.reader = reader
        self.reads_tail = reads_tail
        """Whether the tail read follows. It does not if the stream gets every later entry."""
        self.verified = replay.check is None
        self.cancelled = False
        self.caught_up_at: float | None = None
        self.has_begun = False
        self._on_cancel = on_cancel

    @property
    def tail_only(self) -> bool:
        return self.free

    def cancel(self) -> None:
        self.cancelled = True
        self._on_cancel(self)

    def begin_again(self, position: int) -> None:
        """Its scan has ended before this entry.

        A stream that had reached its watermark still needs the tail read.
        """
        if self.caught_up_at is not None:
            self.free = True
            self.next = self.replay.until
            self.caught_up_at = None
        elif not self.free:
            self.next = max(self.next, position)


class EventLog:
    """
    Args:
        addresses: AMQP URLs of the cluster's nodes.
        log: the stream.
        exchange: the exchange that the log is bound to.
        write_batch: entered and left around the calls of readers for all entries of one packet.
        max_body: of larger entries, readers get a `Cut`.
        entries_per_user: the budget of each user, see `scans.Schedule`.
        on_read: called with the seconds that a replay waited for its first entry.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        log: LogSettings,
        exchange: str,
        write_batch: Batch,
        max_body: int = MAX_BODY_BYTES,
        entries_per_user: int,
        on_read: Callable[[float], object] = bool,
    ) -> None:
        self._addresses = addresses
        self._on_read = on_read
        self._write_batch = write_batch
        self._max_body = max_body
        self._log_stream = log
        self._exchange = exchange
        self._name = log.name
        self._sender = Sender(addresses, name="bridge log writer")
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._connecting = asyncio.Lock()
        self._watermark_waiters: list[tuple[OnWatermark, float]] = []
        self._watermark_wanted = asyncio.Event()
        self._schedule = Schedule(entries_per_user)
        self._tail_requests: dict[Request, None] = {}
        """Tail reads that wait for a scan."""
        self._request_made = asyncio.Event()
        self._expected: Counter[str] = Counter()
        self._look_again: asyncio.TimerHandle | None = None
        self._no_budget = RareLine("replay waits for its user's budget", _log.warning)
        self._scans: dict[Scan, _Reading] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._fences: set[asyncio.Task[None]] = set()
        self.scans = 0
        """Scans begun since the start."""
        self._entries_read = 0

    def write_watermark(self, on_written: OnWatermark) -> None:
        """Asks for an entry that is written after this call. Callers that ask at the same time share one."""
        self._watermark_waiters.append((on_written, time.monotonic()))
        self._watermark_wanted.set()

    def fence(self, queue: str, body: bytes) -> None:
        """Puts a message into a queue of the bridge's own, behind everything in it. If it does not get there, nothing
        comes back, and nothing is proven."""
        task = asyncio.create_task(self._fence(queue, body), name="fence")
        self._fences.add(task)
        task.add_done_callback(self._fences.discard)

    async def _fence(self, queue: str, body: bytes) -> None:
        with contextlib.suppress(BrokerError):
            await self._sender.send(
                body, exchange="", routing_key=queue, properties=Basic.Properties(), timeout=WATERMARK_TIMEOUT_SECONDS
            )

    def replay(
        self,
        replay: Replay,
        prefixes: Sequence[str],
        reader: Reader,
        *,
        user: str,
        since: float,
        extends: bool = False,
        reads_tail: bool = True,
    ) -> Request:
        """Asks for the entries of a replay whose routing keys begin with one of the prefixes (`user.42.`, `all.`).

        Args:
            user: whose budget pays for it.
            since: when the client began to wait, by the monotonic clock.
            extends: it continues a replay that reached its end, with the events published since then.
            reads_tail: whether the second after the end is read too. Without it, `tail_ended` follows `caught_up`.
        """
        request = Request(
            replay,
            prefixes,
            reader,
            user=user,
            since=since,
            extends=extends,
            reads_tail=reads_tail,
            on_cancel=self._forget,
        )
        self._add(request)
        return request

    def read_tail(self, watermark: Anchor, prefixes: Sequence[str], reader: Reader, *, user: str) -> Request:
        """Asks only for the entries just behind a watermark, for a stream that needs nothing from before it.

        Of the reader, only `read_tail` and `tail_ended` are called."""
        replay = Replay(watermark.offset, watermark.offset, watermark.check)
        request = Request(replay, prefixes, reader, user=user, tail_only=True, on_cancel=self._forget)
        self._add(request)
        return request

    def _forget(self, request: Request) -> None:
        """Removes a cancelled request from where it waits. A scan drops it at its next entry."""
        self._tail_requests.pop(request, None)
        self._schedule.discard(request)

    def expect(self, user: str, count: int) -> None:
        """`count` more streams of this user will ask for a replay soon. Negative: they have asked, or never will."""
        self._expected[user] += count
        if not self._expected[user]:
            del self._expected[user]
        if not self._expected:
            self._request_made.set()

    def _add(self, request: Request) -> None:
        if request.tail_only:
            self._tail_requests[request] = None
        elif (scan := self._schedule.add(request, time.monotonic())) is not None:
            self._scans[scan].add(request)
            self._record_begun(request)
        self._request_made.set()

    def _record_begun(self, request: Request) -> None:
        if not request.has_begun and request.queued_at is not None:
            request.has_begun = True
            self._on_read(time.monotonic() - request.queued_at)

    @property
    def entries_read(self) -> int:
        """Entries read in scans since the start."""
        return self._entries_read + sum(reading.entries for reading in self._scans.values())

    @property
    def waiting(self) -> int:
        """Replays that wait for a scan."""
        return self._schedule.waiting

    @property
    def waiting_for_budget(self) -> int:
        """Replays that wait because their user has used up the budget."""
        return self._schedule.waiting_for_budget(time.monotonic())

    async def run(self) -> None:
        """Answers until it is cancelled. Cancelling it ends the connections."""
        tasks = [asyncio.create_task(self._write_watermarks()), asyncio.create_task(self._replay_for_ever())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, *self._tasks, *self._fences):
                task.cancel()
            await asyncio.gather(*tasks, *self._tasks, *self._fences, return_exceptions=True)
            await self._sender.close()
            if self._connection is not None:
                await amqp.close(self._connection)

    async def _connect(self) -> aio_pika.abc.AbstractConnection:
        async with self._connecting:
            if self._connection is None or not self._connection.connected.is_set():
                if self._connection is not None:
                    await amqp.close(self._connection)
                    self._connection = None
                self._connection = await ConsumingConnection.open(
                    self._addresses, name="bridge log reader", write_batch=self._write_batch, max_body=self._max_body
                )
            return self._connection

    # Watermarks.

    async def _write_watermarks(self) -> None:
        next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
        while True:
            await self._watermark_wanted.wait()
            self._watermark_wanted.clear()
            waiters, self._watermark_waiters = self._watermark_waiters, []
            written_ms = time.time_ns() // 1_000_000
            try:
                anchor = await self._write_watermark()
                next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
            except BrokerError as error:
                _log.warning("watermark not written", error=str(error), waiting=len(waiters))
                overdue = time.monotonic() - PATIENCE_SECONDS
                # Waiting does not help against a missing right, or a log that cannot be declared.
                if isinstance(error, AccessRefused) or (
                    isinstance(error, NotFound) and not await self._declare_again()
                ):
                    overdue = time.monotonic()
                patient = [waiter for waiter in waiters if waiter[1] > overdue]
                self._answer([waiter for waiter in waiters if waiter[1] <= overdue], None, written_ms)
                await self._elsewhere(error)
                await asyncio.sleep(next_pause())
                if patient:
                    self._watermark_waiters += patient
                    self._watermark_wanted.set()
            else:
                self._answer(waiters, anchor, written_ms)

    @staticmethod
    def _answer(waiters: list[tuple[OnWatermark, float]], anchor: Anchor | None, written_ms: int) -> None:
        for on_written, _ in waiters:
            on_written(anchor, written_ms)

    async def _elsewhere(self, error: BrokerError) -> None:
        """If this node cannot read the log, closes the connection, so that the next one is to another node."""
        if isinstance(error, NoReplica) and self._connection is not None:
            await amqp.close(self._connection)

    async def _declare_again(self) -> bool:
        """The log was deleted, or its node is down. Its entries are gone; clients that resume are sent a gap."""
        if self._connection is not None:
            try:
                await topology.declare_log(self._connection, self._log_stream, self._exchange)
                return True
            except BrokerError as error:
                _log.error("the log cannot be made", error=str(error))
        return False

    async def _write_watermark(self) -> Anchor:
        mine = new_id().encode("ascii")
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_entry(offset: int, _: str, body: bytes) -> None:
            if body == mine and not seen.done():
                seen.set_result(offset)

        def on_failure() -> None:
            if not seen.done():
                seen.set_exception(BrokerUnavailable("the reader of the log was lost"))
                seen.exception()  # If sending fails first, this one is not reported.

        try:
            async with (
                asyncio.timeout(WATERMARK_TIMEOUT_SECONDS),
                LogConsumer(await self._connect(), self._name, "next", on_entry, on_failure),
            ):
                await self._sender.send(
                    mine,
                    exchange="",
                    routing_key=self._name,
                    properties=Basic.Properties(delivery_mode=2, message_type=WATERMARK_TYPE),
                    mandatory=True,
                    timeout=WATERMARK_TIMEOUT_SECONDS,
                )
                return Anchor(await seen, digest(mine))
        except amqp.Unroutable as error:
            raise NotFound(str(error)) from None
        except NoReplica:
            raise
        except (TimeoutError, BrokerUnavailable) as error:
            _log.warning("the log takes no entry; using its newest", error=str(error) or "no answer in time")
            return await self.newest()

    async def newest(self) -> Anchor:
        """The last entry of the log.

        Raises:
            BrokerError: the log cannot be read, or is empty.
        """
        newest: list[Anchor] = []
        async with LogConsumer(
            await self._connect(),
            self._name,
            "last",
            lambda offset, _, body: newest.append(Anchor(offset, digest(body))),
        ):
            # `last` is the last chunk of entries. RabbitMQ does not say how many it has.
            await asyncio.sleep(_RETRY_SECONDS)
        if not newest:
            raise BrokerUnavailable("the log gives no entry")
        return newest[-1]

    # Scans.

    async def _replay_for_ever(self) -> None:
        while True:
            await self._request_made.wait()
            self._request_made.clear()
            while (scan := self._choose(time.monotonic())) is not None:
                self._begin(scan)

    def _choose(self, now: float) -> Scan | None:
        """The scan that begins now, if one does."""
        if len(self._scans) >= MOST_SCANS:
            return None
        scan = self._schedule.choose(now, expected=len(self._expected))
        for user in self._schedule.without_budget:
            self._no_budget.log(user=user, users=len(self._schedule.without_budget))
            break
        if scan is not None and not scan.is_far:
            # Tail reads are not urgent. They join a scan that reads there anyway, at no cost.
            for request in [each for each in self._tail_requests if each.next >= scan.start - TAIL_BEHIND]:
                del self._tail_requests[request]
                scan.carry(request)
        elif scan is None and self._tail_requests and len(self._scans) < MOST_SCANS // 2 - 1:
            # They wait for each other, so that streams that open one after the other share a scan.
            scan = Scan(self._tail_requests, min(request.next for request in self._tail_requests))
            self._tail_requests = {}
        if scan is None:
            self._look_again_in(self._schedule.seconds_until_change(now))
        return scan

    def _look_again_in(self, seconds: float | None) -> None:
        """Asks the schedule again after this time: when a budget has refilled, or when the batch window may end."""
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
        if seconds is not None:
            delay = max(seconds, _LEAST_PAUSE_SECONDS)
            self._look_again = asyncio.get_running_loop().call_later(delay, self._request_made.set)

    def _begin(self, scan: Scan) -> None:
        self.scans += 1
        reading = self._scans[scan] = _Reading(scan, self._may_go_on, self._caught_up)
        for request in reading.active:
            self._record_begun(request)
        task = asyncio.create_task(self._read(reading), name="log-scan")
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _may_go_on(self, scan: Scan) -> bool:
        return self._schedule.may_go_on(scan, time.monotonic(), expected=len(self._expected))

    def _caught_up(self, scan: Scan) -> None:
        """All requests of the scan have reached their end. The tail read that follows takes no slot."""
        self._schedule.end(scan, time.monotonic())
        self._request_made.set()

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("scan failed", exc_info=error)

    async def _read(self, reading: _Reading) -> None:
        scan, readers = reading.scan, len(reading.active)
        began = time.monotonic()
        try:
            async with LogConsumer(await self._connect(), self._name, scan.start, reading.on_entry) as consumer:
                while reading.active and not reading.is_stopped:
                    await consumer.idle(TAIL_SECONDS / 4, reading.changed)
                    reading.end_tails(time.monotonic() - TAIL_SECONDS)
        except NotFound as error:
            _log.error("the log is missing", error=str(error))
            reading.refuse_all("no-log")
        except BrokerError as error:
            _log.warning("scan interrupted", error=str(error), readers=len(reading.active))
            await self._elsewhere(error)
            await asyncio.sleep(_RETRY_SECONDS)
        finally:
            self._entries_read += reading.entries
            del self._scans[scan]
            self._schedule.end(scan, time.monotonic())
            left = [request for request in reading.active if not request.cancelled]
            _log.info(
                "log read",
                readers=readers,
                entries=reading.entries,
                unfinished=len(left),
                seconds=round(time.monotonic() - began, 3),
            )
            for request in left:
                request.begin_again(scan.position)
                self._add(request)
            self._request_made.set()


class _Reading:
    """Gives the entries of one scan to the streams that they are for. No I/O of its own.

    Args:
        may_go_on: asked when the scan has reached its cost limit.
        on_caught_up: called when all requests have reached their end. From then on the scan is a tail read.
    """

    def __init__(
        self,
        scan: Scan,
        may_go_on: Callable[[Scan], bool] = lambda _: True,
        on_caught_up: Callable[[Scan], object] = bool,
    ) -> None:
        self.scan = scan
        self._may_go_on = may_go_on
        self._on_caught_up = on_caught_up
        self._by_prefix: dict[str, dict[Request, None]] = {}
        self.active: dict[Request, None] = dict.fromkeys(cast("list[Request]", scan.wants))
        self._has_caught_up = False
        self.entries = 0
        self.is_stopped = False
        """Whether it has ended early. Another scan continues for its active requests."""
        self.changed = asyncio.Event()
        """Set when it is stopped, or has no active request."""

    def add(self, request: Request) -> None:
        """Adds a request that has joined the scan."""
        self.active[request] = None

    def on_entry(self, offset: int, routing_key: str, body: bytes) -> None:
        if self.is_stopped or not self.active:
            return
        self.entries += 1
        scan, check = self.scan, ""
        if begun := scan.reach(offset, cost(len(body))):
            check = digest(body)
            for want in begun:
                self._begin(cast("Request", want), offset, check)
        # `user.42.job.done` -> `user.42.`, `all.job.done` -> `all.`
        kind, _, rest = routing_key.partition(".")
        prefix = "all." if kind == "all" else f"{kind}.{rest.partition('.')[0]}."
        for request in list(self._by_prefix.get(prefix, ())):
            if request.cancelled:
                self._remove(request)
            elif offset < request.next:
                continue  # The entry at the position itself.
            elif request.tail_only or request.caught_up_at is not None:
                request.reader.read_tail(routing_key, body)
            else:
                check = check or digest(body)
                if request.reader.read(offset, check, routing_key, body):
                    request.next = offset + 1
                else:
                    request.next = offset
                    self._remove(request)
        for want in scan.ended(offset):
            self._catch_up(cast("Request", want))
        self._check_end()

    def _check_end(self) -> None:
        scan = self.scan
        if scan.is_done:
            if not self._has_caught_up:
                self._has_caught_up = True
                self._on_caught_up(scan)
        elif scan.is_over and not self._may_go_on(scan):
            self.is_stopped = True
            self.changed.set()

    def _catch_up(self, request: Request) -> None:
        if request.cancelled or request not in self.active:
            return
        request.caught_up_at = time.monotonic()
        if not request.tail_only:
            request.reader.caught_up()
        if not request.reads_tail and not request.cancelled:
            self._remove(request)
            request.reader.tail_ended()

    def _begin(self, request: Request, offset: int, check: str) -> None:
        if request.cancelled:
            self._remove(request)
            return
        if request.next < offset:
            # Retention has deleted the entries that this request needs next, perhaps while it was read.
            self._refuse(request, "expired")
            return
        if not request.verified:
            if request.replay.check != check:  # The entry at the position must be the one that the cursor names.
                self._refuse(request, "unknown")
                return
            request.verified = True
            request.next = offset + 1
            if not request.tail_only:
                request.reader.found()
            if request.cancelled:
                self._remove(request)
                return
        for prefix in request.prefixes:
            self._by_prefix.setdefault(prefix, {})[request] = None

    def _refuse(self, request: Request, reason: GapReason) -> None:
        self._remove(request)
        if request.tail_only or request.caught_up_at is not None:
            request.reader.tail_ended()
        else:
            request.reader.not_found(reason)

    def refuse_all(self, reason: GapReason) -> None:
        for request in list(self.active):
            if not request.cancelled:
                self._refuse(request, reason)

    def end_tails(self, deadline: float) -> None:
        """Ends the tail reads that began before `deadline`, and drops cancelled requests."""
        for request in list(self.active):
            if request.cancelled:
                self._remove(request)
            elif request.caught_up_at is not None and request.caught_up_at < deadline:
                self._remove(request)
                request.reader.tail_ended()

    def _remove(self, request: Request) -> None:
        if request not in self.active:
            return
        del self.active[request]
        self.scan.leave(request)
        for prefix in request.prefixes:
            self._by_prefix.get(prefix, {}).pop(request, None)
        if not self.active:
            self.changed.set()


class LogConsumer:
    """Reads a RabbitMQ stream from an offset, on a channel of its own, within `async with`.

    On exit it stops consuming before it closes the channel: an ack after the channel's close would close the
    connection.
    """

    def __init__(
        self,
        connection: aio_pika.abc.AbstractConnection,
        stream: str,
        offset: int | str,
        on_entry: Callable[[int, str, bytes], None],
        on_failure: Callable[[], object] = bool,
    ) -> None:
        self._on_failure = on_failure
        self._connection = connection
        self._stream = stream
        self._offset = offset
        self._on_entry = on_entry
        self._consumer: Consumer
        self._failure: BaseException | None = None

    async def __aenter__(self) -> LogConsumer:
        self._consumer = await Consumer.open(self._connection, self._deliver, prefetch=PREFETCH)
        channel = self._consumer.channel
        channel.closing.add_done_callback(self._on_closed)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)
        await self._consumer.consume(self._stream, _CONSUMER_TAG, arguments={"x-stream-offset": self._offset})
        return self

    async def __aexit__(self, *_: object) -> None:
        self._consumer.stop()
        channel = self._consumer.channel
        with contextlib.suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(amqp.CLOSE_SECONDS), amqp.translating("ending the reading"):
                if not channel.is_closed:
                    await channel.basic_cancel(_CONSUMER_TAG)
                    await channel.close()

    async def idle(self, seconds: float, changed: asyncio.Event) -> None:
        """Waits for some seconds, or until something has changed.

        Raises:
            BrokerError: the consumer is gone.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()
        if self._failure is not None:
            raise amqp.translate(self._failure, "reading the log")

    def _deliver(self, _: bytes, routing_key: str, body: bytes, offset: int | None) -> None:
        assert offset is not None, "every delivery of a stream carries its offset"
        self._on_entry(offset, routing_key, body)

    def _on_closed(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._failure = error or Exception("channel closed")
        self._on_failure()

    def _on_cancelled(self, _: Basic.Cancel) -> None:
        self._failure = NotFound("the broker cancelled the consumer")
        self._on_failure()
