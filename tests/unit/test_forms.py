"""Messages of every form become the same structured CloudEvent, or are refused with what they look like."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bridge.event import (
    Cut,
    Event,
    EventData,
    InvalidEvent,
    Malformed,
    NoId,
    NotACloudEvent,
    SchemaViolation,
    TooLarge,
    TypeMismatch,
    UnknownType,
)
from bridge.service.broker.properties import MessageBody, Properties
from bridge.service.forms import PREFIXES, MessageReader, offset_id, read_message
from bridge.service.settings import BrokerSettings

KEY = "user.42.test.done"
DATA = b'{"job_id": "r-7", "share": 0.50}'


class Done(EventData, type="test.done"):
    job_id: str
    share: float = 0


def read(
    body: bytes, *, key: str = KEY, offset: int | None = None, max_bytes: int = 65_536, **properties: Any
) -> Event:
    message = MessageBody(body, Properties(**properties)) if properties else body
    models = {"test.done": Done}
    return read_message(message, key, models, max_bytes=max_bytes, exchange="events", offset=offset)


def shown(event: Event) -> Any:
    value = json.loads(event.text)
    assert (event.id, event.source, event.type) == (value["id"], value["source"], value["type"])
    return value


def headers(prefix: str = "ce-", **changes: Any) -> tuple[tuple[str, Any], ...]:
    attributes = {"specversion": "1.0", "id": "1", "source": "/app", "type": "test.done"} | changes
    return tuple((prefix + name, value) for name, value in attributes.items() if value is not None)


def structured(**changes: Any) -> bytes:
    event = {"specversion": "1.0", "id": "1", "source": "/app", "type": "test.done", "data": json.loads(DATA)}
    return json.dumps(event | changes).encode()


ENVELOPE = {"specversion": "1.0", "id": "1", "source": "/app", "type": "test.done"}


@pytest.mark.contract("1.25")
@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/cloudevents+json",
        "application/cloudevents+json; charset=utf-8",
        "application/json",
        "text/plain",
    ],
)
def test_a_structured_event_is_one_whatever_its_content_type(content_type: str) -> None:
    event = read(structured(), content_type=content_type, message_id="other", app_id="other")
    assert shown(event) == ENVELOPE | {"data": {"job_id": "r-7", "share": 0.5}}


@pytest.mark.contract("1.25")
def test_a_body_that_is_declared_as_structured_must_be_one() -> None:
    with pytest.raises(NotACloudEvent, match="specversion"):
        read(DATA, content_type="application/cloudevents+json; charset=utf-8", message_id="1")


def test_the_member_specversion_deeper_in_the_body_makes_no_structured_event() -> None:
    event = read(b'{"job_id":"r-7","more":{"specversion":"1.0"}}', message_id="1")
    assert (event.id, event.type) == ("1", "test.done")
    with pytest.raises(SchemaViolation):
        read(b'{"more":"\\"specversion\\""}', message_id="1")


def test_the_member_specversion_may_be_written_with_an_escape() -> None:
    assert read(structured().replace(b"specversion", b"specv\\u0065rsion")).id == "1"


@pytest.mark.contract("1.26", "1.28")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_binary_mode(prefix: str) -> None:
    found = headers(prefix, time="2026-01-31T12:00:00Z", subject="s", traceparent=f"00-{'1' * 32}-{'2' * 16}-01")
    event = read(DATA, content_type="application/json; charset=utf-8", headers=(*found, ("other", 1)), message_id="x")
    assert shown(event) == ENVELOPE | {
        "time": "2026-01-31T12:00:00Z",
        "subject": "s",
        "datacontenttype": "application/json",
        "traceparent": f"00-{'1' * 32}-{'2' * 16}-01",
        "data": {"job_id": "r-7", "share": 0.5},
    }


@pytest.mark.contract("1.26", "1.28")
@pytest.mark.parametrize(
    ("changes", "properties", "detail"),
    [
        ({"specversion": None}, {}, "'specversion' is missing"),
        ({"id": None}, {}, "'id' is missing"),
        ({"id": 7}, {}, "'id' must be a string"),
        ({"id": "a b"}, {}, "id must be 1 to 128"),
        ({"time": "today"}, {}, "time must be RFC 3339"),
        ({"Subject": "s"}, {}, "only the characters a-z and 0-9"),
        ({"data": "{}"}, {}, "has the name of the data"),
        ({}, {"content_type": "application/xml"}, "datacontenttype must be a JSON type"),
    ],
)
def test_binary_mode_is_checked_as_structured_events_are(
    changes: dict[str, Any], properties: dict[str, Any], detail: str
) -> None:
    with pytest.raises(NotACloudEvent, match=detail):
        read(DATA, headers=headers(**changes), **properties)


@pytest.mark.contract("1.29")
def test_two_headers_must_not_contradict_each_other() -> None:
    assert read(DATA, headers=(*headers(), *headers("cloudEvents:"))).id == "1"
    with pytest.raises(NotACloudEvent, match="two headers give the attribute 'id' different values"):
        read(DATA, headers=(*headers(), ("cloudEvents:id", "2")))


def test_a_type_in_a_header_must_be_that_of_the_key() -> None:
    with pytest.raises(TypeMismatch):
        read(DATA, headers=headers(type="test.other"))


@pytest.mark.contract("1.27")
def test_plain_json() -> None:
    event = read(DATA, message_id="m-1", app_id="/billing", timestamp=1_769_860_800, content_type="text/plain")
    assert shown(event) == {
        "specversion": "1.0",
        "id": "m-1",
        "source": "/billing",
        "type": "test.done",
        "time": "2026-01-31T12:00:00Z",
        "data": {"job_id": "r-7", "share": 0.5},
    }
    assert read(DATA, message_id="m-1").source == "events"


@pytest.mark.contract("1.29")
def test_plain_json_gets_the_trace_context_of_a_tracing_library() -> None:
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    event = read(DATA, message_id="1", headers=(("traceparent", parent), ("tracestate", "a=1")))
    assert (shown(event)["traceparent"], shown(event)["tracestate"]) == (parent, "a=1")
    assert "traceparent" not in shown(read(DATA, message_id="1", headers=(("traceparent", "x"),)))


@pytest.mark.contract("1.29")
@pytest.mark.parametrize("timestamp", [None, 2**62, -(2**62)])
def test_a_time_without_a_date_counts_as_absent(timestamp: int | None) -> None:
    assert "time" not in shown(read(DATA, message_id="1", timestamp=timestamp))


@pytest.mark.contract("1.30")
def test_plain_json_without_an_id() -> None:
    with pytest.raises(NoId, match="message_id"):
        read(DATA)
    event = read(DATA, offset=17)
    assert (event.id, event.source) == (offset_id(17), "events")
    assert NoId.depends_on_catalogue, "a bridge with the other feed may show it"


@pytest.mark.contract("1.30")
def test_only_a_bridge_with_the_feed_log_gives_ids() -> None:
    log, queues = (
        MessageReader.of({"test.done": Done}, BrokerSettings(feed=feed, exchange="jobs")) for feed in ("log", "queues")
    )
    event = log.read(DATA, KEY, 3)
    assert (event.id, event.source) == ("offset:3", "jobs")
    for reader, offset in ((queues, 3), (log, None)):
        with pytest.raises(NoId):
            reader.read(DATA, KEY, offset)


@pytest.mark.parametrize("message_id", ["a b", "x" * 129, "é", "?"])
def test_a_message_id_that_is_no_event_id_is_refused(message_id: str) -> None:
    with pytest.raises(NotACloudEvent, match="id must be"):
        read(DATA, message_id=message_id)


@pytest.mark.parametrize(
    ("key", "error"), [("user.42.test.unknown", UnknownType), ("user.42.Test", TypeMismatch), ("other", TypeMismatch)]
)
def test_the_type_of_plain_json_is_that_of_its_key(key: str, error: type[InvalidEvent]) -> None:
    with pytest.raises(error):
        read(DATA, key=key, message_id="1")


def test_an_envelope_that_lacks_its_version_is_named_as_such() -> None:
    body = json.dumps({"id": "1", "source": "/app", "type": "test.done", "data": {}}).encode()
    with pytest.raises(NotACloudEvent, match="'specversion' is missing"):
        read(body)


def test_data_cannot_add_an_attribute() -> None:
    with pytest.raises(Malformed):
        read(b'{"job_id":"r-7"},"subject":"x"', message_id="1")
    with pytest.raises(Malformed):
        read(b'{"job_id":"r-7"}},{"a":{', message_id="1")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"\xff", b'{"job_id":1e999}', b'{"job_id":"a","job_id":"b"}', b"[" * 50_000]
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises((Malformed, NotACloudEvent)):
        read(body, message_id="1")


def test_numbers_are_not_written_again_before_the_model_reads_them() -> None:
    assert b"0.1234567890123456" in read(b'{"job_id":"a","share":0.1234567890123456}', message_id="1").text


def test_the_limit_is_that_of_the_body() -> None:
    assert read(DATA, message_id="1", max_bytes=len(DATA)).id == "1"
    for body in (DATA + b" ", Cut(DATA, 1_000)):
        with pytest.raises(TooLarge):
            read(body, max_bytes=len(DATA))


@pytest.mark.contract("1.31")
def test_a_batch_is_refused() -> None:
    with pytest.raises(NotACloudEvent, match="batch"):
        read(b"[%b]" % structured(), content_type="application/cloudevents-batch+json; charset=utf-8")


@pytest.mark.contract("1.33")
@pytest.mark.parametrize(
    ("body", "properties", "name"),
    [
        (b'{"messageId":"1","messageType":["urn:message:A"],"message":{}}', {}, "a MassTransit envelope"),
        (b"{}", {"content_type": "application/vnd.masstransit+json"}, "a MassTransit envelope"),
        (b'[[1],{},{"chord":null}]', {"headers": (("lang", "py"), ("task", "t"), ("id", "1"))}, "a Celery task"),
        (b'{"hostname":"h","utcoffset":0,"pid":1,"clock":1,"type":"task-sent"}', {}, "a Celery event"),
        (b'{"pattern":"job","data":{}}', {}, "a NestJS pattern"),
        (b"{}", {"headers": (("X-Message-Stamp-Bus", "x"),)}, "a Symfony Messenger message"),
        (b"{}", {"headers": (("NServiceBus.MessageId", "x"),)}, "an NServiceBus message"),
        (b"{}", {"headers": (("rbs2-msg-id", "x"),)}, "a Rebus message"),
        (b'{"uuid":"1","displayName":"A","job":"B","data":{}}', {}, "a Laravel job"),
        (b'{"actor_name":"a","args":[],"kwargs":{},"message_id":"1"}', {}, "a Dramatiq message"),
        (b'{"schema":{},"payload":{}}', {}, "a Debezium change event"),
        (b"\xac\xed\x00\x05sr", {}, "a serialised Java object"),
        (b"\x80\x04\x95\x00", {}, "a Python pickle"),
        (b"\x1f\x8b\x08", {}, "a compressed body"),
        (b"?", {"content_encoding": "gzip"}, "a compressed body"),
        (b"\n<a/>", {}, "XML"),
    ],
)
def test_a_refusal_names_what_the_message_looks_like(body: bytes, properties: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidEvent, match=f"this looks like {name}.*; see docs/messages.md. "):
        read(body, **({"message_id": "1"} | properties))


@pytest.mark.contract("1.33")
def test_a_refused_event_of_ones_own_looks_like_nothing_else() -> None:
    with pytest.raises(SchemaViolation, match=r"^schema: data\.job_id"):
        read(b"{}", message_id="1")
    with pytest.raises(SchemaViolation, match=r"^schema: data\.job_id"):
        read(structured(data={"pattern": 1, "data": 1}, pattern="x"))


ODD = st.text(max_size=8) | st.booleans() | st.integers()


@given(
    st.binary(max_size=30) | st.sampled_from([DATA, structured()]),
    st.builds(
        Properties,
        content_type=st.sampled_from(["", "application/json", "application/cloudevents+json"]) | st.text(max_size=8),
        message_id=st.text(max_size=5),
        timestamp=st.none() | st.integers(),
        app_id=st.text(max_size=5),
        headers=st.lists(
            st.tuples(st.sampled_from([name for prefix in PREFIXES for name, _ in headers(prefix)]) | st.text(), ODD)
        ).map(tuple),
    ),
    st.none() | st.integers(0),
)
def test_whatever_arrives_is_an_event_or_is_refused(body: bytes, properties: Properties, offset: int | None) -> None:
    message = MessageBody(body, properties)
    try:
        event = read_message(message, KEY, {"test.done": Done}, max_bytes=99, exchange="events", offset=offset)
    except InvalidEvent:
        return
    assert shown(event)["type"] == "test.done"
