"""Reads a message of any form into an event: structured and binary CloudEvents, and plain JSON (docs/contract.md,
"Forms of a message").

Pure. A message of another form is written as a structured CloudEvent first, so that one reader checks every event.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from bridge.event import (
    SPECVERSION,
    Event,
    InvalidEvent,
    Malformed,
    Models,
    NoId,
    NotACloudEvent,
    TypeMismatch,
    UnknownType,
    check_size,
    parse_object,
    read_as_written,
    read_event,
)
from bridge.routing import RoutingError, split_key
from bridge.service.broker.properties import Properties, Value, properties_of

PREFIXES = ("ce-", "cloudEvents_", "cloudEvents:")
"""Prefixes of the headers that are attributes. The last two: CloudEvents AMQP binding 1.0.2, section 3.1.3.1. The first
is that of HTTP, which libraries for RabbitMQ use."""

_STRUCTURED = "application/cloudevents"
_BATCH = "application/cloudevents-batch"
_MARKS = frozenset({"specversion", "id", "source", "type"})
_ENVELOPE = frozenset({"id", "source", "type", "data"})
_PAGE = "see docs/messages.md"


class FormSettings(Protocol):
    """The settings that say how a message is read (see bridge.service.settings)."""

    @property
    def max_event_bytes(self) -> int: ...
    @property
    def exchange(self) -> str: ...
    @property
    def feed(self) -> str: ...


@dataclass(frozen=True, slots=True)
class MessageReader:
    """Reads messages as one bridge does.

    Args:
        models: the catalogue, event type to model.
        max_bytes: the largest body that is accepted.
        exchange: where the messages come from.
        gives_ids: whether the offset of an entry of the log is the id of an event that has none.
    """

    models: Models
    max_bytes: int
    exchange: str
    gives_ids: bool = False

    @classmethod
    def of(cls, models: Models, settings: FormSettings) -> Self:
        """As a bridge with these settings."""
        return cls(models, settings.max_event_bytes, settings.exchange, settings.feed == "log")

    def read(self, body: bytes, routing_key: str, offset: int | None = None) -> Event:
        """As `read_message`.

        Args:
            offset: of the message's entry in the log; None for a message of a queue.

        Raises:
            InvalidEvent
        """
        given = offset if self.gives_ids else None
        return read_message(
            body, routing_key, self.models, max_bytes=self.max_bytes, exchange=self.exchange, offset=given
        )


def read_message(
    body: bytes, routing_key: str, models: Models, *, max_bytes: int, exchange: str, offset: int | None = None
) -> Event:
    """Reads and validates one message.

    Args:
        body: as `deliveries` gives it: a `MessageBody` if its properties matter, a `Cut` if it was too large to keep.
        routing_key: the key that it was published with.
        models: the catalogue, event type to model.
        max_bytes: the largest body that is accepted.
        exchange: the source of plain JSON that names no other.
        offset: of its entry in the log, if that may be an event's id.

    Raises:
        InvalidEvent: one of its subclasses. Any other exception is a bug in this module.
    """
    check_size(body, max_bytes)
    if type(body) is bytes and (event := read_as_written(body, routing_key, models)) is not None:
        return event
    properties = properties_of(body)
    body = bytes(body)
    try:
        if properties.content_type.lower().startswith(_BATCH):
            raise NotACloudEvent("a batch of events is not supported: publish each event as a message of its own")
        if (event := _read_if_structured(body, routing_key, models)) is not None:
            return event
        structured = _structured(body, properties, routing_key, models, exchange, offset)
        return read_event(structured, routing_key, models, max_bytes=len(structured))
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    except InvalidEvent as error:
        if (other := _likeness(body, properties)) is None:
            raise
        raise type(error)(f"this looks like {other}; {_PAGE}. {error.detail}") from None


def _read_if_structured(body: bytes, routing_key: str, models: Models) -> Event | None:
    """The event of a body that has the member `specversion`, whatever its properties say; None of another body.

    Nearly every such body is read once: only if an attribute is missing, the member may be deeper in the body.

    Raises:
        InvalidEvent
        RecursionError: the body is nested too deeply.
    """
    if b'"specversion"' not in body:
        return None
    try:
        return read_event(body, routing_key, models, max_bytes=len(body))
    except NotACloudEvent:
        if "specversion" in parse_object(body):
            raise
        return None


def offset_id(offset: int) -> str:
    """The id of an event whose message has none."""
    return f"offset:{offset}"


def _structured(
    body: bytes, properties: Properties, routing_key: str, models: Models, exchange: str, offset: int | None
) -> bytes:
    """The message as a structured CloudEvent. Its attributes and its data are not checked yet.

    Raises:
        InvalidEvent
        RecursionError: the body is nested too deeply.
    """
    if properties.content_type.lower().startswith(_STRUCTURED):
        return body
    attributes = _attributes(properties)
    value = parse_object(body)
    if "specversion" in value:
        return body
    if not _MARKS.isdisjoint(attributes):
        if properties.content_type:
            attributes["datacontenttype"] = properties.content_type
    else:
        attributes = _from_properties(value, properties, routing_key, models, exchange, offset)
    # `data` is the body as it is: a number that is read and written again may be another one.
    return b'%b,"data":%b}' % (json.dumps(attributes, separators=(",", ":"))[:-1].encode(), body)


def _attributes(properties: Properties) -> dict[str, Value]:
    """The attributes that are headers (binary mode).

    Raises:
        NotACloudEvent: two headers give one attribute different values, or one is `data`.
    """
    found: dict[str, Value] = {}
    for header, value in properties.headers:
        for prefix in PREFIXES:
            if header.startswith(prefix):
                name = header.removeprefix(prefix)
                if name in ("data", "data_base64"):
                    raise NotACloudEvent(f"the header {header!r} has the name of the data, which is the body")
                if found.setdefault(name, value) != value:
                    raise NotACloudEvent(f"two headers give the attribute {name[:100]!r} different values")
    return found


def _from_properties(
    value: Mapping[str, object],
    properties: Properties,
    routing_key: str,
    models: Models,
    exchange: str,
    offset: int | None,
) -> dict[str, Value]:
    """The attributes of plain JSON.

    Raises:
        InvalidEvent: the routing key has no type of the catalogue, or the message has no id.
    """
    try:
        _, event_type = split_key(routing_key)
    except RoutingError as error:
        raise TypeMismatch(f"the routing key has no valid event type: {error}") from None
    if not properties.message_id and len(_ENVELOPE & value.keys()) >= 3:
        raise NotACloudEvent("the attribute 'specversion' is missing")
    if event_type not in models:
        raise UnknownType(f"the catalogue has no model for type {event_type!r}")
    if properties.message_id:
        event_id = properties.message_id
    elif offset is not None:
        event_id = offset_id(offset)
    else:
        raise NoId(
            "the message has no id: set the property message_id, or publish a CloudEvent. With BRIDGE_FEED=log the "
            "bridge gives such a message an id"
        )
    attributes: dict[str, Value] = {
        "specversion": SPECVERSION,
        "id": event_id,
        "source": properties.app_id or exchange,
        "type": event_type,
    }
    if (time := properties.time) is not None:
        attributes["time"] = time
    # Tracing libraries write these two headers. They are checked like every attribute.
    attributes |= {name: header for name, header in properties.headers if name in ("traceparent", "tracestate")}
    return attributes


def _likeness(body: bytes, properties: Properties) -> str | None:
    """What a refused message looks like, if it is the message of a program that people use with RabbitMQ."""
    headers = {name for name, _ in properties.headers}
    media_type = properties.content_type.lower()
    for beginning, format_name in _BINARY.items():
        if body.startswith(beginning):
            return format_name
    if "gzip" in properties.content_encoding.lower():
        return "a compressed body (the property content_encoding is 'gzip')"
    if media_type.startswith("application/vnd.masstransit"):
        return "a MassTransit envelope"
    if {"task", "id", "lang"} <= headers:
        return "a Celery task"
    if any(name.startswith("NServiceBus.") for name in headers):
        return "an NServiceBus message"
    if any(name.startswith("rbs2-") for name in headers):
        return "a Rebus message"
    if any(name.startswith("X-Message-Stamp-") for name in headers):
        return "a Symfony Messenger message"
    try:
        value = parse_object(body)
    except (InvalidEvent, RecursionError):
        return "XML" if body.lstrip()[:1] == b"<" else None
    members = value.keys()
    if "specversion" in members:
        return None
    for needed, name in _ENVELOPES:
        if needed <= members:
            return name
    return None


_BINARY = {
    b"\xac\xed\x00\x05": "a serialised Java object (use a JSON message converter)",
    b"\x80\x02}": "a Python pickle",
    b"\x80\x03}": "a Python pickle",
    b"\x80\x04\x95": "a Python pickle",
    b"\x80\x05\x95": "a Python pickle",
    b"\x1f\x8b": "a compressed body (gzip)",
    b"\x28\xb5\x2f\xfd": "a compressed body (zstd)",
}
"""What other formats begin with."""

_ENVELOPES = (
    (frozenset({"messageId", "messageType", "message"}), "a MassTransit envelope"),
    (frozenset({"pattern", "data"}), "a NestJS pattern"),
    (frozenset({"hostname", "utcoffset", "pid", "clock", "type"}), "a Celery event"),
    (frozenset({"actor_name", "args", "kwargs", "message_id"}), "a Dramatiq message"),
    (frozenset({"displayName", "job", "data"}), "a Laravel job"),
    (frozenset({"schema", "payload"}), "a Debezium change event"),
)
"""Members that an envelope has in every message."""
