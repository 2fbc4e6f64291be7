"""Reads the event log, a RabbitMQ stream, for those who come back.

Owns two questions to it. A *tick*: which entry is the newest now? It is answered by writing an entry of our own and
waiting to see it. A *replay*: what stands between two entries for these audiences? It is answered by a *pass*, one
consumer that reads once for everybody who waits, so that ten thousand browsers that come back after a deploy cost a few
passes and not ten thousand. What a client has to be sent of it is the session's to decide.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import structlog
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, NotFound, TopologyMismatch
from bridge.publisher import new_id
from bridge.sender import Sender
from bridge.service.broker import topology
from bridge.service.broker.consumer import Consumer, ConsumingConnection, Packet
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.settings import LogSettings
from bridge.service.streams.cursor import Anchor, digest
from bridge.service.streams.session import Replay
from bridge.service.streams.sse import GapReason

if TYPE_CHECKING:
    import aio_pika

MAX_PASSES = 3
"""Passes that read at once: one far back, another once that one has read for long, and one for those who were away for
a moment. As many more may have come to the end, and read on for a second."""

SPAN_ENTRIES = 20_000
"""Readers whose starts are this close together share a pass. The one who starts last waits while it is read."""

LINE_SECONDS = 10.0
"""So long whoever was away for more than a moment waits for others who will ask as soon as their queues are made. A
pass costs the broker time, of which it has none to spare then; one for all is over sooner than the second of two."""

LONGEST_LINE_SECONDS = 15.0
"""Of a line that will be over by then, as it looks, the end is waited for. Both are counted from the stream's opening:
who has no ready after twenty seconds is sent away, and it is told that once a pass has found where it was."""

PREFETCH = 1_000

SETTLE_SECONDS = 1.0
"""So long a pass reads on for those it has brought to their tick. In a cluster a publisher on another node may not
route to a new queue for a moment after it was bound; what it missed stands in the log."""

TICK_SECONDS = 2.0
"""A tick that takes longer is given up: an alarm blocks the connection that writes it. The newest entry that can be
read serves then; nobody publishes during an alarm."""

PATIENCE_SECONDS = 8.0
"""So long a tick is tried again: in a cluster whose node died, until the log has another leader. Who waited longer is
told that there is no log. Shorter than a new stream waits for its ready."""

TICK_KEY = "bridge.tick"

_CONSUMER_TAG = "log"

_RETRY_SECONDS = 0.5

_LOOK_AGAIN_SECONDS = 0.5

_log = structlog.get_logger("bridge.eventlog")

Ticked = Callable[[Anchor | None, int], None]
"""Called with the entry and when it was written (ms since 1970); None when the log cannot be asked."""


class Reader(Protocol):
    """Whom a replay is for. Called in the log's order; `offset` and `check` are those of the entry."""

    def found(self) -> None: ...
    def not_found(self, reason: GapReason) -> None: ...
    def read(self, offset: int, check: str, routing_key: str, body: bytes) -> bool:
        """Takes an entry; False stops the reading, which this entry is then the first of, when it goes on."""
        ...

    def caught_up(self) -> None: ...
    def settle(self, routing_key: str, body: bytes) -> None: ...
    def settled(self) -> None: ...


class Request:
    """One wish to read. `cancel` ends it at any time; nothing is called after that."""

    __slots__ = ("cancelled", "caught_up_at", "next", "only_settles", "prefixes", "reader", "replay", "since",
                 "verified")  # fmt: skip

    def __init__(
        self, replay: Replay, prefixes: Sequence[str], reader: Reader, *, since: float = 0.0, only_settles: bool = False
    ) -> None:
        self.replay = replay
        self.prefixes = prefixes
        self.reader = reader
        self.only_settles = only_settles
        self.since = since
        self.next = replay.start
        self.verified = replay.check is None
        self.cancelled = False
        self.caught_up_at: float | None = None

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def is_far(self) -> bool:
        return self.replay.until - self.next >= SPAN_ENTRIES

    def begin_again(self) -> None:
        """A pass has broken off. Who had been brought to the tick still needs what stands just behind it."""
        if self.caught_up_at is not None:
            self.only_settles = True
            self.next = self.replay.until
            self.caught_up_at = None


def is_worth_waiting(waited: float, here: int, expected: int) -> bool:
    """Whether those who are here wait for those who are expected, or have the log read without them.

    Args:
        waited: how long the first of them has waited, in seconds.
        here: how many want to read from far back; at least one.
    """
    if not expected:
        return False
    left = expected * waited / here  # At the pace at which they have come so far.
    return waited < LINE_SECONDS or waited + left < LONGEST_LINE_SECONDS


class EventLog:
    """
    Args:
        addresses: AMQP URLs of the cluster's nodes.
        log: the stream.
        exchange: what it is bound to.
        packet: entered and left around the calls of readers for all entries that come in one packet.
        max_body: of larger entries, readers get a `Cut`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        log: LogSettings,
        exchange: str,
        packet: Packet,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self._addresses = addresses
        self._packet = packet
        self._max_body = max_body
        self._log_stream = log
        self._exchange = exchange
        self._name = log.name
        self._sender = Sender(addresses, name="bridge log writer")
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._connecting = asyncio.Lock()
        self._tick_waiters: list[tuple[Ticked, float]] = []
        self._tick_wanted = asyncio.Event()
        self._requests: list[Request] = []
        self._request_made = asyncio.Event()
        self._expected = 0
        self._looks_again = False
        self._passes: dict[asyncio.Task[None], _Pass] = {}
        self._fences: set[asyncio.Task[None]] = set()
        self.passes = 0
        """Passes begun since the start."""
        self.entries_read = 0

    def tick(self, ticked: Ticked) -> None:
        """Asks for an entry that is written after this call; many who ask at once share one."""
        self._tick_waiters.append((ticked, time.monotonic()))
        self._tick_wanted.set()

    def fence(self, queue: str, body: bytes) -> None:
        """Puts a message into a queue of the bridge's own, behind all that it holds. If it does not get there, nothing
        comes back, and nothing is proven by it."""
        task = asyncio.create_task(self._fence(queue, body), name="fence")
        self._fences.add(task)
        task.add_done_callback(self._fences.discard)

    async def _fence(self, queue: str, body: bytes) -> None:
        with contextlib.suppress(BrokerError):
            await self._sender.send(
                body, exchange="", routing_key=queue, properties=Basic.Properties(), timeout=TICK_SECONDS
            )

    def replay(self, replay: Replay, prefixes: Sequence[str], reader: Reader, *, since: float) -> Request:
        """Asks for the entries of a replay whose routing keys begin with one of the prefixes (`user.42.`, `all.`).

        Args:
            since: when the client began to wait, by the monotonic clock.
        """
        return self._add(Request(replay, prefixes, reader, since=since))

    def settle(self, tick: Anchor, prefixes: Sequence[str], reader: Reader) -> Request:
        """Asks only for what stands just behind a tick, for one who needs nothing from before it: of the reader nothing
        but `settle` is called."""
        return self._add(Request(Replay(tick.offset, tick.offset, tick.check), prefixes, reader, only_settles=True))

    def expect(self, count: int) -> None:
        """So many more streams will ask for a replay before long; below zero, so many have, or never will."""
        self._expected += count
        if not self._expected:
            self._request_made.set()

    def _add(self, request: Request) -> Request:
        self._requests.append(request)
        self._request_made.set()
        return request

    async def run(self) -> None:
        """Answers, for ever. Cancelling it ends the connections."""
        tasks = [asyncio.create_task(self._tick_for_ever()), asyncio.create_task(self._replay_for_ever())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in (*tasks, *self._passes, *self._fences):
                task.cancel()
            await asyncio.gather(*tasks, *self._passes, *self._fences, return_exceptions=True)
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
                    self._addresses, name="bridge log reader", packet=self._packet, max_body=self._max_body
                )
            return self._connection

    # Ticks.

    async def _tick_for_ever(self) -> None:
        next_pause = amqp.pauses()
        while True:
            await self._tick_wanted.wait()
            self._tick_wanted.clear()
            waiters, self._tick_waiters = self._tick_waiters, []
            written_ms = time.time_ns() // 1_000_000
            try:
                anchor = await self._write_tick()
                next_pause = amqp.pauses()
            except BrokerError as error:
                _log.warning("no tick", error=str(error), waiting=len(waiters))
                overdue = time.monotonic() - PATIENCE_SECONDS
                # A right that is missing does not come by waiting; nor does a log that cannot be made.
                if isinstance(error, AccessRefused) or (isinstance(error, NotFound) and not await self._make_anew()):
                    overdue = time.monotonic()
                patient = [waiter for waiter in waiters if waiter[1] > overdue]
                self._answer([waiter for waiter in waiters if waiter[1] <= overdue], None, written_ms)
                await self._elsewhere(error)
                await asyncio.sleep(next_pause())
                if patient:
                    self._tick_waiters += patient
                    self._tick_wanted.set()
            else:
                self._answer(waiters, anchor, written_ms)

    @staticmethod
    def _answer(waiters: list[tuple[Ticked, float]], anchor: Anchor | None, written_ms: int) -> None:
        for ticked, _ in waiters:
            ticked(anchor, written_ms)

    async def _elsewhere(self, error: BrokerError) -> None:
        """A node that has no replica of the log, or one that is just starting, refuses to read it; another will do."""
        if isinstance(error, TopologyMismatch) and self._connection is not None:
            await amqp.close(self._connection)

    async def _make_anew(self) -> bool:
        """Somebody deleted it, or its node is down. What it held is gone; who comes back is told."""
        if self._connection is not None:
            try:
                await topology.declare_log(self._connection, self._log_stream, self._exchange)
                return True
            except BrokerError as error:
                _log.error("the log cannot be made", error=str(error))
        return False

    async def _write_tick(self) -> Anchor:
        mine = new_id().encode("ascii")
        seen: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_entry(offset: int, _: str, body: bytes) -> None:
            if body == mine and not seen.done():
                seen.set_result(offset)

        try:
            async with asyncio.timeout(TICK_SECONDS), _Consumer(await self._connect(), self._name, "next", on_entry):
                await self._sender.send(
                    mine,
                    exchange="",
                    routing_key=self._name,
                    properties=Basic.Properties(delivery_mode=2, message_type=TICK_KEY),
                    mandatory=True,
                    timeout=TICK_SECONDS,
                )
                return Anchor(await seen, digest(mine))
        except amqp.Unroutable as error:
            raise NotFound(str(error)) from None
        except (TimeoutError, BrokerUnavailable) as error:
            _log.warning("the log takes no entry; using its newest", error=str(error) or "no answer in time")
            return await self._newest()

    async def _newest(self) -> Anchor:
        """The last entry there is.

        Raises:
            BrokerError: it cannot be read, or there is none.
        """
        newest: list[Anchor] = []
        async with _Consumer(
            await self._connect(),
            self._name,
            "last",
            lambda offset, _, body: newest.append(Anchor(offset, digest(body))),
        ):
            # `last` is the last chunk of entries; how many it has is not told.
            await asyncio.sleep(_RETRY_SECONDS)
        if not newest:
            raise BrokerUnavailable("the log gives no entry")
        return newest[-1]

    # Passes.

    async def _replay_for_ever(self) -> None:
        while True:
            await self._request_made.wait()
            self._request_made.clear()
            while together := self._choose(time.monotonic()):
                chosen = set(together)
                self._requests = [request for request in self._requests if request not in chosen]
                reading = _Pass(together, self._request_made.set)
                task = asyncio.create_task(self._pass(reading), name="log-pass")
                self._passes[task] = reading
                task.add_done_callback(self._end_pass)

    def _choose(self, now: float) -> list[Request]:
        """Those for whom a pass begins now, if one does."""
        self._requests = [request for request in self._requests if not request.cancelled]
        reading = [each for each in self._passes.values() if not each.has_caught_up]
        if len(reading) >= MAX_PASSES or len(self._passes) >= 2 * MAX_PASSES:
            return []
        waiting = [request for request in self._requests if not request.only_settles]
        # First: new streams and those who were away for a moment come all the time, and would never leave them a turn.
        far = [request for request in waiting if request.is_far]
        if far and self._may_read_far(far, [each for each in reading if each.is_far], now):
            # Whoever has waited longest, and who is near them.
            first = min(far, key=lambda request: request.since)
            return [request for request in far if abs(request.next - first.next) < SPAN_ENTRIES]
        near = [request for request in waiting if not request.is_far]
        if near or len(self._passes) < MAX_PASSES - 1:
            # Nobody waits for who only settles. They gather, so that streams that come all the time cost one pass after
            # another, and go along with who does wait.
            return near + [request for request in self._requests if request.only_settles]
        return []

    def _may_read_far(self, far: list[Request], reading: list[_Pass], now: float) -> bool:
        if any(now < each.began + LINE_SECONDS for each in reading) or len(reading) >= MAX_PASSES - 1:
            self._look_again()
            return False
        if is_worth_waiting(now - min(request.since for request in far), len(far), self._expected):
            self._look_again()
            return False
        return True

    def _look_again(self) -> None:
        """What is waited for may be a moment, too, and not only somebody who comes."""
        if not self._looks_again:
            self._looks_again = True
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_SECONDS, self._looked_again)

    def _looked_again(self) -> None:
        self._looks_again = False
        self._request_made.set()

    def _end_pass(self, task: asyncio.Task[None]) -> None:
        del self._passes[task]
        self._request_made.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("pass failed", exc_info=error)

    async def _pass(self, reading: _Pass) -> None:
        self.passes += 1
        readers = len(reading.active)
        began = time.monotonic()
        try:
            start = min(request.next for request in reading.active)
            async with _Consumer(await self._connect(), self._name, start, reading.on_entry) as consumer:
                while reading.active:
                    await consumer.idle(SETTLE_SECONDS / 4)
                    reading.settle_until(time.monotonic() - SETTLE_SECONDS)
        except NotFound as error:
            _log.error("the log is missing", error=str(error))
            reading.refuse_all("no-log")
        except BrokerError as error:
            _log.warning("pass interrupted", error=str(error), readers=len(reading.active))
            await self._elsewhere(error)
            await asyncio.sleep(_RETRY_SECONDS)
            for request in reading.active:
                request.begin_again()
            self._requests += reading.active
        finally:
            self.entries_read += reading.entries
            _log.info(
                "log read",
                readers=readers,
                entries=reading.entries,
                seconds=round(time.monotonic() - began, 3),
            )


class _Pass:
    """Hands the entries of one consumer to whom they are for. No I/O of its own.

    Args:
        requests: the readers.
        on_caught_up: called when all have been brought to their ticks; from then on it only settles.
    """

    def __init__(self, requests: list[Request], on_caught_up: Callable[[], object] = bool) -> None:
        self._on_caught_up = on_caught_up
        self._pending = sorted(requests, key=lambda request: -request.next)
        self._by_prefix: dict[str, dict[Request, None]] = {}
        self._by_until: list[tuple[int, int, Request]] = []
        self.active = dict.fromkeys(requests)
        self._behind = len(self.active)
        """Of the active, those who have not been brought to their ticks."""
        self.is_far = any(request.is_far for request in requests)
        self.began = time.monotonic()
        self.entries = 0

    def on_entry(self, offset: int, routing_key: str, body: bytes) -> None:
        self.entries += 1
        check = ""
        if self._pending and self._pending[-1].next <= offset:
            check = digest(body)
            self._begin(offset, check)
        # `user.42.job.done` -> `user.42.`, `all.job.done` -> `all.`
        kind, _, rest = routing_key.partition(".")
        prefix = "all." if kind == "all" else f"{kind}.{rest.partition('.')[0]}."
        for request in list(self._by_prefix.get(prefix, ())):
            if request.cancelled:
                self._remove(request)
            elif offset < request.next:
                continue  # Where it was stopped, or the anchor itself.
            elif request.only_settles or request.caught_up_at is not None:
                request.reader.settle(routing_key, body)
            else:
                check = check or digest(body)
                if request.reader.read(offset, check, routing_key, body):
                    request.next = offset + 1
                else:
                    request.next = offset
                    self._remove(request)
        while self._by_until and self._by_until[0][0] <= offset:
            _, _, request = self._by_until.pop(0)
            if not request.cancelled and request in self.active:
                request.caught_up_at = time.monotonic()
                self._behind -= 1
                if not request.only_settles:
                    request.reader.caught_up()
                if self.has_caught_up:
                    self._on_caught_up()

    @property
    def has_caught_up(self) -> bool:
        return not self._behind

    def _begin(self, offset: int, check: str) -> None:
        while self._pending and self._pending[-1].next <= offset:
            request = self._pending.pop()
            if request.cancelled:
                self._remove(request)
                continue
            if request.next < offset:
                # The log begins later by now: what was to be read next is gone, also for one that had begun to read.
                self._refuse(request, "expired")
                continue
            if not request.verified:
                if request.replay.check != check:  # The anchor itself must be there, and be it.
                    self._refuse(request, "unknown")
                    continue
                request.verified = True
                request.next = offset + 1
                if not request.only_settles:
                    request.reader.found()
                if request.cancelled:
                    self._remove(request)
                    continue
            for prefix in request.prefixes:
                self._by_prefix.setdefault(prefix, {})[request] = None
            bisect.insort(self._by_until, (request.replay.until, id(request), request))

    def _refuse(self, request: Request, reason: GapReason) -> None:
        self._remove(request)
        if request.only_settles or request.caught_up_at is not None:
            request.reader.settled()
        else:
            request.reader.not_found(reason)

    def refuse_all(self, reason: GapReason) -> None:
        for request in list(self.active):
            if not request.cancelled:
                self._refuse(request, reason)

    def settle_until(self, deadline: float) -> None:
        """Lets go of those who were caught up before `deadline`, and of those who went away."""
        for request in list(self.active):
            if request.cancelled:
                self._remove(request)
            elif request.caught_up_at is not None and request.caught_up_at < deadline:
                self._remove(request)
                request.reader.settled()

    def _remove(self, request: Request) -> None:
        if request not in self.active:
            return
        del self.active[request]
        self._behind -= request.caught_up_at is None
        for prefix in request.prefixes:
            self._by_prefix.get(prefix, {}).pop(request, None)


class _Consumer:
    """Reads a stream from an offset, on a channel of its own, within `async with`.

    On the way out it consumes no more before it closes the channel: an ack behind a closed channel would close the
    connection.
    """

    def __init__(
        self,
        connection: aio_pika.abc.AbstractConnection,
        stream: str,
        offset: int | str,
        on_entry: Callable[[int, str, bytes], None],
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._offset = offset
        self._on_entry = on_entry
        self._consumer: Consumer
        self._failure: BaseException | None = None

    async def __aenter__(self) -> _Consumer:
        self._consumer = await Consumer.open(self._connection, self._deliver, prefetch=PREFETCH)
        channel = self._consumer.channel
        channel.closing.add_done_callback(self._note_closed)
        channel.on_consumer_cancel_callbacks.add(self._note_cancelled)
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

    async def idle(self, seconds: float) -> None:
        """Waits a little.

        Raises:
            BrokerError: the consumer is gone.
        """
        await asyncio.sleep(seconds)
        if self._failure is not None:
            raise amqp.translate(self._failure, "reading the log")

    def _deliver(self, _: bytes, routing_key: str, body: bytes, offset: int | None) -> None:
        assert offset is not None, "every delivery of a stream carries its offset"
        self._on_entry(offset, routing_key, body)

    def _note_closed(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._failure = error or Exception("channel closed")

    def _note_cancelled(self, _: Basic.Cancel) -> None:
        self._failure = NotFound("the broker cancelled the consumer")
