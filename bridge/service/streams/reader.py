"""Reads each message once for all streams of a process, and puts each refused message into quarantine once.

Of streams and queues it knows only their numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import structlog

from bridge.event import Cut, InvalidEvent, SchemaViolation
from bridge.service.broker.properties import NO_PROPERTIES, MessageBody, Properties
from bridge.service.broker.quarantine import Quarantine
from bridge.service.forms import MessageReader, offset_id
from bridge.service.logs import RareLine
from bridge.service.metrics import Metrics
from bridge.service.streams.streamevent import StreamEvent

CACHE_EVENTS = 256
CACHE_BYTES = 4_194_304
"""Limits of the cache of read events. An entry has to stay only while one event arrives by several queues."""

REFUSALS = 10_000
"""Refused messages that are remembered. Each goes to quarantine once, by whichever queue it arrives and however often
the log is read."""

REFUSED_LINES = 50
"""Refused messages with a log line each. After these, one line in ten seconds counts the others."""

_log = structlog.get_logger("bridge.reader")

_Key = tuple[str, bytes] | tuple[str, bytes, Properties]


def _key(routing_key: str, body: bytes) -> _Key:
    """What the event of a message depends on."""
    if isinstance(body, MessageBody) and body.properties != NO_PROPERTIES:
        return routing_key, body, body.properties
    return routing_key, body


@dataclass(slots=True)
class _RefusalCount:
    """A message that was refused: how often each queue delivered it, and how often it must have been published."""

    came_by: Counter[int] = field(default_factory=Counter)
    published: int = 0

    def is_new(self, via: int) -> bool:
        """Whether this delivery shows another publication. A queue delivers each publication once. So the queue with
        the most deliveries shows how many publications there were."""
        self.came_by[via] += 1
        if self.came_by[via] <= self.published:
            return False
        self.published += 1
        return True

    def is_new_in_log(self) -> bool:
        """Whether this process sees the message for the first time, in this entry of the log."""
        if self.published:
            return False
        self.published = 1
        return True


class EventReader:
    """
    Args:
        messages: reads one message.
    """

    def __init__(self, messages: MessageReader, *, metrics: Metrics, quarantine: Quarantine) -> None:
        self._messages = messages
        self._metrics = metrics
        self._quarantine = quarantine
        self._cache: OrderedDict[_Key, StreamEvent | InvalidEvent] = OrderedDict()
        self._cache_bytes = 0
        self._refusals: OrderedDict[tuple[str, bytes], _RefusalCount] = OrderedDict()
        self._refused = RareLine("message refused", _log.warning, by="reason", burst=REFUSED_LINES)

    def read(
        self, routing_key: str, body: bytes, *, via: int, offset: int | None = None, only: bool = False
    ) -> StreamEvent | InvalidEvent:
        """The event of a message, or why it is refused. Read once, however many queues of this process deliver it.

        Args:
            via: number of the queue. A refused message goes to quarantine once for all queues that deliver it. If the
                same queue delivers it again, it was published again.
            offset: of the entry of the log that delivers it; None for a message of a queue.
            only: no other queue delivers it, so it is not cached.
        """
        self._metrics.events_received.value += 1
        key = _key(routing_key, body)
        event = None if only else self._cache.get(key)
        if event is None:
            event = self._read(routing_key, body, offset)
            if not only:
                self._remember(key, event, offset)
        if not isinstance(event, StreamEvent) and self._refusal(routing_key, body).is_new(via):
            self._refuse(routing_key, body, event)
        return event

    def read_logged(self, routing_key: str, body: bytes, offset: int | None = None) -> StreamEvent | InvalidEvent:
        """The same for an entry of the log. A refused entry goes to quarantine if this process has not seen it live."""
        key = _key(routing_key, body)
        event = self._cache.get(key)
        if event is None:
            event = self._read(routing_key, body, offset)
            self._remember(key, event, offset)
            if not isinstance(event, StreamEvent):
                self._metrics.log_unreadable.labels(event.reason).inc()
                if self._refusal(routing_key, body).is_new_in_log():
                    self._refuse(routing_key, body, event)
        return event

    def _read(self, routing_key: str, body: bytes, offset: int | None) -> StreamEvent | InvalidEvent:
        try:
            return StreamEvent(self._messages.read(body, routing_key, offset), routing_key)
        except InvalidEvent as error:
            return type(error)(error.detail)  # Kept in the cache, so without its traceback.
        except Exception as error:  # noqa: BLE001
            # If it were raised, each client would resume at this message and fail again. Pages are sent a gap instead.
            _log.exception("event not read", routing_key=routing_key)
            return SchemaViolation(f"the bridge failed to read it, which is a bug of the bridge: {error!r:.200}")

    def _refusal(self, routing_key: str, body: bytes) -> _RefusalCount:
        # By a digest: the body may be as large as the broker takes.
        hashed = hashlib.blake2b(body, digest_size=16)
        if isinstance(body, MessageBody):
            hashed.update(repr(body.properties).encode("utf-8", "backslashreplace"))
        digested = (routing_key, hashed.digest())
        refusal = self._refusals.setdefault(digested, _RefusalCount())
        if len(self._refusals) > REFUSALS:
            self._refusals.popitem(last=False)
        return refusal

    def _remember(self, key: _Key, value: StreamEvent | InvalidEvent, offset: int | None) -> None:
        """Adds a key that is not in the cache. An event whose id is an offset is another one in each entry."""
        if offset is not None and isinstance(value, StreamEvent) and value.id == offset_id(offset):
            return
        self._cache[key] = value
        self._cache_bytes += len(key[1])
        while len(self._cache) > CACHE_EVENTS or self._cache_bytes > CACHE_BYTES:
            key, _ = self._cache.popitem(last=False)
            self._cache_bytes -= len(key[1])

    def _refuse(self, routing_key: str, body: bytes, error: InvalidEvent) -> None:
        self._metrics.events_invalid.labels(error.reason).inc()
        size = body.size if isinstance(body, Cut) else len(body)
        self._refused.log(reason=error.reason, detail=error.detail, routing_key=routing_key, bytes=size)
        self._quarantine.put(body, routing_key=routing_key, reason=error.reason, detail=error.detail)
