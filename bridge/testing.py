"""Fake publishers, for tests of programs that publish. They need neither RabbitMQ nor pytest.

    fake = FakePublisher.blocking()
    fake.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))
    assert [event.type for event in fake.published] == ["job.completed"]

A fake is a subclass of the real publisher with a simulated connection. Its methods, checks and errors are those of
`Publisher` and `BlockingPublisher`. Only RabbitMQ's confirm is simulated.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from bridge import amqp
from bridge.blocking import BlockingPublisher
from bridge.event import MAX_EVENT_BYTES, EventData, read_event
from bridge.publisher import (
    TIMEOUT_SECONDS,
    Attribute,
    EventWriter,
    ExchangeMissing,
    Id,
    Publisher,
    PublishError,
    PublishForbidden,
    PublishTimeout,
    as_text,
)
from bridge.roundtrip import declaring_class
from bridge.routing import Audience
from bridge.sender import PIPELINE_EVENTS, Message, Pipeline, PipelineProgress, Sender, WindowEntry

URL = "amqp://fake/"
"""A placeholder: a fake never connects."""

_REASONS: dict[type[PublishError], tuple[type[amqp.BrokerError], str]] = {
    PublishTimeout: (amqp.BrokerUnavailable, "not confirmed in time (made by fail_next)"),
    PublishForbidden: (amqp.AccessRefused, "ACCESS_REFUSED (made by fail_next)"),
    ExchangeMissing: (amqp.NotFound, "NOT_FOUND - no such exchange (made by fail_next)"),
}


@dataclass(frozen=True, slots=True)
class Published:
    """An event that a fake has confirmed.

    Attributes:
        id: the event's id.
        audience: the user or the group that may see it, or everyone.
        type: the event type.
        data: the instance that was passed.
        attributes: the CloudEvents attributes as text: all members except `data`.
        event: the CloudEvent as a page gets it, parsed from JSON.
    """

    id: str
    audience: Audience
    type: str
    data: EventData
    attributes: Mapping[str, str]
    event: Mapping[str, Any]


class _Recording:
    """The methods that both fakes offer to a test."""

    _record: _Record

    @property
    def published(self) -> list[Published]:
        """A copy of the list of confirmed events, in order. The same `source` and `id` for the same audience are the
        same event: the list has it once, as a page shows it once."""
        return list(self._record.published)

    @property
    def repeats(self) -> list[Published]:
        """The events that `published` leaves out: their `source` and `id` were already published for the same
        audience."""
        return list(self._record.repeats)

    def find(
        self, kind: type[EventData] | str | None = None, *, user: Id | None = None, group: Id | None = None
    ) -> list[Published]:
        """The events of `published` of this type that were published to this user or to this group.

        Args:
            kind: a class of the event catalogue, or the text of a type. None: every type.
            user: only the events for this user.
            group: only the events for this group. With `user` too, the events for either of them.
        """
        event_type = kind if isinstance(kind, str) or kind is None else kind.event_type
        audiences = [Audience.user(as_text(user))] if user is not None else []
        audiences += [Audience.group(as_text(group))] if group is not None else []
        return [
            event
            for event in self._record.published
            if event_type in (None, event.type) and (not audiences or event.audience in audiences)
        ]

    def seen_by(self, user: Id, *groups: Id) -> list[Published]:
        """The events that a page of this user shows: events for the user, for these groups and for everybody. An
        event that was published to several of them is in the list once."""
        audiences = {Audience.user(as_text(user)), *(Audience.group(as_text(group)) for group in groups)}
        seen: dict[tuple[str, str], Published] = {}
        for event in self._record.published:
            if event.audience in audiences or event.audience.kind == "all":
                seen.setdefault((event.event["source"], event.id), event)
        return list(seen.values())

    def clear(self) -> None:
        """Deletes the recorded events and the pending failures of `fail_next`."""
        self._record.clear()

    def fail_next(
        self, kind: type[PublishError] = PublishTimeout, *, after: int = 0, times: int = 1, arrived: bool = False
    ) -> None:
        """Makes the next publish raise, as if RabbitMQ refused or did not confirm it. Calls queue up.

        In `publish_many`, the event that fails ends the batch. As with a real RabbitMQ, up to 255 later events are
        already sent by then: they are in `error.unconfirmed` too.

        Args:
            kind: PublishTimeout, PublishForbidden or ExchangeMissing.
            after: the number of events that are confirmed before the failing one.
            times: the number of publishes in a row that fail.
            arrived: whether the failing event is recorded anyway, as if only the confirm was lost. The later events in
                `error.unconfirmed` are then recorded too.

        Raises:
            ValueError: `kind` is another class, or the numbers or `arrived` do not fit. For EventRefused, publish an
                invalid event instead.
        """
        if kind not in _REASONS:
            known = ", ".join(reason.__name__ for reason in _REASONS)
            raise ValueError(f"fail_next cannot raise {getattr(kind, '__name__', kind)}: pass one of {known}")
        if after < 0 or times < 1:
            raise ValueError(f"after={after}, times={times}: pass after=0 or more, and times=1 or more")
        if arrived and kind is not PublishTimeout:
            raise ValueError(f"arrived=True with {kind.__name__}: RabbitMQ refused the event. Pass PublishTimeout")
        self._record.plan(_Failure(kind, arrived), after=after, times=times)


class FakePublisher(_Recording, Publisher):
    """`Publisher` without RabbitMQ: it makes the same checks, raises the same errors, and records confirmed events.

    Args:
        As `Publisher`. The address and the source have defaults, and a publish never waits for `timeout`.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        source: str = "/fake",
        exchange: str = "events",
        timeout: float = TIMEOUT_SECONDS,
        max_event_bytes: int = MAX_EVENT_BYTES,
        log: bool = True,
    ) -> None:
        super().__init__(
            url, source=source, exchange=exchange, timeout=timeout, max_event_bytes=max_event_bytes, log=log
        )
        self._writer = _RecordingWriter(source=source, exchange=exchange, max_event_bytes=max_event_bytes, log=log)
        self._connect(_Record())

    def _connect(self, record: _Record) -> None:
        self._record = record
        self._sender = self._fake = _FakeSender(record)

    @staticmethod
    def blocking(
        url: str = URL,
        *,
        source: str = "/fake",
        exchange: str = "events",
        timeout: float = TIMEOUT_SECONDS,
        max_event_bytes: int = MAX_EVENT_BYTES,
        log: bool = True,
    ) -> FakeBlockingPublisher:
        """A fake for programs without an event loop, as `Publisher.blocking`."""
        return FakeBlockingPublisher(
            url, source=source, exchange=exchange, timeout=timeout, max_event_bytes=max_event_bytes, log=log
        )

    def pipeline(self) -> Pipeline:
        """A pipeline for many events; see `publish_many`. Internal."""
        return _FakePipeline(self._fake, timeout=self._timeout)


class FakeBlockingPublisher(_Recording, BlockingPublisher):
    """`BlockingPublisher` without RabbitMQ. Made by `FakePublisher.blocking`.

    Like the real one it runs a thread, and a test may publish from several threads. A forked child records into its
    own memory: the parent does not see those events.
    """

    def __init__(
        self, url: str, *, source: str, exchange: str, timeout: float, max_event_bytes: int, log: bool
    ) -> None:
        super().__init__(
            url, source=source, exchange=exchange, timeout=timeout, max_event_bytes=max_event_bytes, log=log
        )
        make = partial(
            FakePublisher,
            url,
            source=source,
            exchange=exchange,
            timeout=timeout,
            max_event_bytes=max_event_bytes,
            log=log,
        )
        self._record = _Record()
        self._make = lambda: _connected(make(), self._record)
        self._writer = _RecordingWriter(source=source, exchange=exchange, max_event_bytes=max_event_bytes, log=log)


def _connected(fake: FakePublisher, record: _Record) -> FakePublisher:
    fake._connect(record)
    return fake


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _MessageWithEvent(Message):
    """A message together with the event that it was made from."""

    audience: Audience
    data: EventData
    max_event_bytes: int


class _RecordingWriter(EventWriter):
    def message(self, audience: Audience, data: EventData, attributes: Mapping[str, Attribute]) -> Message:
        made = super().message(audience, data, attributes)
        values = {field.name: getattr(made, field.name) for field in fields(made)}
        return _MessageWithEvent(**values, audience=audience, data=data, max_event_bytes=self._max_event_bytes)


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: type[PublishError]
    arrived: bool

    def error(self) -> amqp.BrokerError:
        kind, text = _REASONS[self.kind]
        return kind(text)


class _Record:
    """The confirmed events, and the planned failures."""

    def __init__(self) -> None:
        self.published: list[Published] = []
        self.repeats: list[Published] = []
        self._keys: set[tuple[Audience, str, str]] = set()
        self._plan: deque[_Failure | None] = deque()
        """One entry for each future publish; None means confirmed. Publishes beyond the end are confirmed."""

    def plan(self, failure: _Failure, *, after: int, times: int) -> None:
        self._plan += [*[None] * after, *[failure] * times]

    def clear(self) -> None:
        self.published, self.repeats = [], []
        self._keys.clear()
        self._plan.clear()

    def take(self, message: Message) -> _Failure | None:
        """Records a message as confirmed, or returns its planned failure."""
        failure = self._plan.popleft() if self._plan else None
        if failure is None or failure.arrived:
            self.add(message)
        return failure

    def add(self, message: Message) -> None:
        assert isinstance(message, _MessageWithEvent), "made by this module's writer"
        made = _read(message)
        key = made.audience, made.event["source"], made.id
        is_repeat = key in self._keys
        self._keys.add(key)
        (self.repeats if is_repeat else self.published).append(made)


def _read(message: _MessageWithEvent) -> Published:
    """The event as the bridge reads it and a page gets it."""
    kind = declaring_class(type(message.data))
    models = {kind.event_type: kind}
    read = read_event(message.body, message.routing_key, models, max_bytes=message.max_event_bytes)
    event = json.loads(read.text)
    attributes = {name: value for name, value in event.items() if name != "data"}
    return Published(read.id, message.audience, read.type, message.data, attributes, event)


class _FakeSender(Sender):
    def __init__(self, record: _Record) -> None:
        super().__init__((), name="fake")
        self.record = record

    async def open(self, timeout: float) -> None:
        self._closed = False

    async def deliver(self, message: Message, timeout: float, *, alone: bool = False) -> None:
        await asyncio.sleep(0)  # As with a real broker, other tasks run before the confirm.
        if (failure := self.record.take(message)) is not None:
            raise failure.error()


class _FakePipeline(Pipeline):
    """Confirms messages until one fails. Later messages count as sent and unconfirmed, until the window is full."""

    def __init__(self, sender: _FakeSender, *, timeout: float) -> None:
        super().__init__(sender, timeout=timeout, on_unroutable=lambda message, error: None)
        self._record = sender.record
        self._added = 0
        self._planned: _Failure | None = None
        self._unconfirmed: list[WindowEntry] = []

    def progress(self) -> PipelineProgress:
        return PipelineProgress(self._added - len(self._unconfirmed), list(self._unconfirmed))

    async def put(self, message: Message) -> None:
        await asyncio.sleep(0)
        if len(self._unconfirmed) == PIPELINE_EVENTS:
            await self.drain()
        if self._planned is None:
            self._planned = self._record.take(message)
        elif self._planned.arrived:
            self._record.add(message)
        if self._planned is not None:
            self._unconfirmed.append(WindowEntry(self._added, message, deadline=0.0))
        self._added += 1

    async def drain(self) -> None:
        await asyncio.sleep(0)
        if self._planned is not None:
            raise self._planned.error()

    def abandon(self) -> None:
        pass
