"""Look-ups for the console: entries of the event log, and messages in quarantine.

For development only, because it shows all users' events. Each look-up has its own connection, so that a missing right
or a slow answer does not affect streams. One look-up runs at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bridge import amqp
from bridge.amqp import BrokerUnavailable, NotFound
from bridge.event import Cut, InvalidEvent
from bridge.routing import Audience, RoutingError, TypeFilter, split_key
from bridge.service.broker.consumer import Consumer, ConsumingConnection
from bridge.service.broker.eventlog import EventLog
from bridge.service.broker.quarantine import RefusedMessage, peek
from bridge.service.forms import MessageReader
from bridge.service.streams.cursor import Anchor

SCAN_ENTRIES = 20_000
"""Limit of the entries that one look-up reads, in about two seconds. The next look-up can continue before them."""

MAX_ANSWERS = 200
"""Limit of the messages in one answer."""

MAX_ANSWER_BYTES = 4_194_304
"""Limit of all bodies in one answer, in bytes. One message may exceed it."""

LOOK_SECONDS = 30.0
"""Limit of one look-up, with its wait for the look-up before it."""

_PREFETCH = 1_000
_TAG = "look-up"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class LogQuestion:
    """The filter of a look-up in the log.

    Args:
        search: text in the routing key or the body, in upper or lower case; empty = any.
        types: only events of these types.
        audience: only events for this audience; None = any.
        before: only entries before this offset; None = up to the newest.
        limit: the number of entries; the newest are returned.
    """

    search: str = ""
    types: TypeFilter = TypeFilter()  # noqa: RUF009 - A filter does not change.
    audience: Audience | None = None
    before: int | None = None
    limit: int = 50

    def matches(self, routing_key: str, body: bytes) -> bool:
        if self.audience is not None and not routing_key.startswith(self.audience.prefix):
            return False
        if self.types.patterns:
            try:
                _, event_type = split_key(routing_key)
            except RoutingError:
                return False
            if not self.types.matches(event_type):
                return False
        if not self.search:
            return True
        words = self.search.casefold()
        text = body.decode("utf-8", "replace")
        if words in f"{routing_key} {text}".casefold():
            return True
        if "\\u" not in text:
            return False
        # Many publishers escape every character that is not ASCII.
        try:
            return words in json.dumps(json.loads(text), ensure_ascii=False).casefold()
        except (ValueError, RecursionError):
            return False


class Matches:
    """The newest matching entries of a range of the log, in the log's order. No I/O.

    Args:
        start: the first offset of the range.
        until: the offset after the last one of the range.
        own_key: the routing key of the bridge's own entries, which never match.
    """

    def __init__(self, question: LogQuestion, *, start: int, until: int, own_key: str) -> None:
        self._question = question
        self._start = start
        self._until = until
        self._own_key = own_key
        self._first: int | None = None
        self._bytes = 0
        self._left_out = False
        self.found: deque[tuple[int, str, bytes]] = deque()

    def take(self, offset: int, routing_key: str, body: bytes) -> bool:
        """Checks one entry, and keeps it if it matches. Returns True at the end of the range."""
        if offset >= self._until:
            return True
        if offset < self._start:
            return False
        if self._first is None:
            self._first = offset
        # The routing key of the bridge's own entries is the log's name.
        if routing_key != self._own_key and self._question.matches(routing_key, body):
            self.found.append((offset, routing_key, body))
            self._bytes += len(body)
            while len(self.found) > self._question.limit or (self._bytes > MAX_ANSWER_BYTES and len(self.found) > 1):
                self._bytes -= len(self.found.popleft()[2])
                self._left_out = True
        return offset + 1 >= self._until

    @property
    def further(self) -> int | None:
        """The offset before which the next look-up finds older entries. None if the log has none."""
        if self._left_out:
            return self.found[0][0]
        return self._start if self._first == self._start and self._start > 0 else None


class LookUp:
    """Runs look-ups, one at a time, each on its own connection.

    Args:
        addresses: AMQP URLs of the cluster's nodes.
        quarantine: the name of the quarantine.
        log_name: the name of the log.
        log: returns the event log, or None without a log.
        messages: reads one message. An entry that it refuses is shown with the reason. Of a body above its limit, only
            the beginning is returned.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        quarantine: str,
        log_name: str,
        log: Callable[[], EventLog | None],
        messages: MessageReader,
    ) -> None:
        self._addresses = addresses
        self._quarantine = quarantine
        self._log_name = log_name
        self._log = log
        self._messages = messages
        self._one_at_a_time = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    async def quarantine(self, limit: int) -> list[dict[str, Any]]:
        """The oldest messages in quarantine. They stay in the queue.

        Raises:
            amqp.BrokerError
        """
        messages = await self._run_shielded(
            peek(self._addresses, queue=self._quarantine, limit=limit, max_bytes=MAX_ANSWER_BYTES)
        )
        return [_shown_refused(message) for message in messages]

    async def log(self, question: LogQuestion) -> dict[str, Any]:
        """The matching entries of the log, the newest first.

        Raises:
            amqp.BrokerError
        """
        matches = await self._run_shielded(self._read_log(question))
        return {
            "entries": [self._shown_entry(*entry) for entry in reversed(matches.found)],
            "further": matches.further,
        }

    async def _run_shielded(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        """Runs the work to its end even if the request is cancelled, so that its connection is closed properly.

        Otherwise a RabbitMQ node keeps the connection for a while.

        Raises:
            amqp.BrokerError
        """
        task = asyncio.create_task(self._run_alone(work), name="look-up")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # After a cancel of the request nothing else reads the failure, and asyncio would report it.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def _run_alone(self, work: Coroutine[Any, Any, _Answer]) -> _Answer:
        try:
            async with asyncio.timeout(LOOK_SECONDS), self._one_at_a_time:
                return await work
        except TimeoutError:
            raise BrokerUnavailable(f"RabbitMQ did not answer the look-up within {LOOK_SECONDS:g} s") from None
        finally:
            work.close()

    async def _read_log(self, question: LogQuestion) -> Matches:
        newest = await self._newest()
        until = newest if question.before is None else min(question.before, newest)
        start = max(0, until - SCAN_ENTRIES)
        matches = Matches(question, start=start, until=until, own_key=self._log_name)
        if until > 0:
            await self._read(start, matches.take)
        return matches

    async def _newest(self) -> int:
        log = self._log()
        if log is None:
            raise NotFound("the bridge has no log, because BRIDGE_LOG is empty; set it to read events here")
        answer: asyncio.Future[Anchor | None] = asyncio.get_running_loop().create_future()
        log.write_watermark(lambda anchor, _: None if answer.done() else answer.set_result(anchor))
        anchor = await answer
        if anchor is None:
            raise BrokerUnavailable("the log does not answer; see the bridge's log lines for the reason")
        return anchor.offset

    async def _read(self, start: int, take: Callable[[int, str, bytes], bool]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_entry(_: bytes, routing_key: str, body: bytes, offset: int | None) -> None:
            assert offset is not None, "every delivery of a stream carries its offset"
            if not done.done() and take(offset, routing_key, body):
                done.set_result(None)

        def on_closed(closing: asyncio.Future[object]) -> None:
            if not done.done():
                error = None if closing.cancelled() else closing.exception()
                done.set_exception(amqp.translate(error or Exception("channel closed"), "reading the log"))

        connection = await ConsumingConnection.open(
            self._addresses,
            name="bridge console",
            write_batch=contextlib.nullcontext(),
            max_body=self._messages.max_bytes,
        )
        try:
            consumer = await Consumer.open(connection, on_entry, prefetch=_PREFETCH)
            consumer.channel.closing.add_done_callback(on_closed)
            try:
                await consumer.consume(self._log_name, _TAG, arguments={"x-stream-offset": start})
                await done
            finally:
                consumer.stop()
        finally:
            done.cancel()
            await amqp.close(connection)

    def _shown_entry(self, offset: int, routing_key: str, body: bytes) -> dict[str, Any]:
        try:
            self._messages.read(body, routing_key, offset)
            refused = None
        except InvalidEvent as error:
            refused = {"reason": error.reason, "detail": error.detail}
        return {"offset": offset, **_shown(routing_key, body), "refused": refused}


def _shown_refused(message: RefusedMessage) -> dict[str, Any]:
    refused = {"reason": message.reason, "detail": message.detail}
    return {**_shown(message.routing_key, message.body), "refused": refused}


def _shown(routing_key: str, body: bytes) -> dict[str, Any]:
    try:
        audience = str(split_key(routing_key)[0])
    except RoutingError:
        audience = None
    return {
        "routing_key": routing_key,
        "audience": audience,
        # Bytes that are not UTF-8 are shown as \xNN.
        "body": body.decode("utf-8", "backslashreplace"),
        "bytes": body.size if isinstance(body, Cut) else len(body),
        "is_cut": isinstance(body, Cut),
    }
