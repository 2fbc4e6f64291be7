"""A message's properties are read from its content header. The AMQP library writes the headers here."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from bridge.service.broker.properties import (
    MAX_HEADERS,
    MAX_HEADERS_BYTES,
    NO_PROPERTIES,
    MessageBody,
    Properties,
    properties_of,
    with_properties,
    write_time,
)
from tests.raw_amqp import short_string, table

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def header(**properties: Any) -> bytes:
    """The payload of a content header."""
    return ContentHeader(body_size=3, properties=Basic.Properties(**properties)).marshal()


def header_of(flags: int, fields: bytes) -> bytes:
    return struct.pack(">HHQH", 60, 0, 3, flags) + fields


def with_headers(*fields: bytes) -> Properties:
    return Properties.read(header_of(1 << 13, table(*fields)))


def field(name: bytes, kind: bytes, value: bytes) -> bytes:
    return short_string(name) + kind + value


def text(name: bytes, value: bytes) -> bytes:
    return field(name, b"S", struct.pack(">I", len(value)) + value)


def test_every_property_that_is_read_is_found_among_the_others() -> None:
    found = Properties.read(
        header(
            content_type="application/json",
            content_encoding="utf-8",
            headers={"ce-id": "1", "x-death": "no", "count": 3, "flag": True, "at": NOW, "list": [1]},
            delivery_mode=2,
            priority=1,
            correlation_id="c",
            reply_to="r",
            expiration="60000",
            message_id="m-1",
            timestamp=NOW,
            message_type="t",
            user_id="guest",
            app_id="/app",
        )
    )
    assert found == Properties(
        content_type="application/json",
        content_encoding="utf-8",
        message_id="m-1",
        timestamp=int(NOW.timestamp()),
        type="t",
        app_id="/app",
        headers=(("at", "2026-01-31T12:00:00Z"), ("ce-id", "1"), ("count", 3), ("flag", True)),
    )
    assert found.time == "2026-01-31T12:00:00Z"


def test_a_message_without_properties_has_none() -> None:
    assert Properties.read(header()) == NO_PROPERTIES
    assert NO_PROPERTIES.time is None


@given(st.binary(max_size=80), st.integers(0, 0xFFFF))
def test_any_bytes_are_read_without_an_error(fields: bytes, flags: int) -> None:
    found = Properties.read(header_of(flags, fields))
    assert all(isinstance(value, str | bool | int) for _, value in found.headers)
    Properties.read(fields)


@given(st.lists(st.tuples(st.binary(max_size=9), st.sampled_from(b"tbBsuIilLTfdDVSxAF?"), st.binary(max_size=12))))
def test_any_table_is_read_without_an_error(fields: list[tuple[bytes, int, bytes]]) -> None:
    assert isinstance(with_headers(*(field(name, bytes([kind]), value) for name, kind, value in fields)), Properties)


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (b"t", b"\x00", False),
        (b"b", b"\xff", -1),
        (b"B", b"\xff", 255),
        (b"s", b"\xff\xff", -1),
        (b"u", b"\xff\xff", 65_535),
        (b"I", b"\xff\xff\xff\xff", -1),
        (b"i", b"\xff\xff\xff\xff", 2**32 - 1),
        (b"l", b"\xff" * 8, -1),
        (b"T", struct.pack(">q", 0), "1970-01-01T00:00:00Z"),
        (b"x", b"\0\0\0\x02ab", "ab"),
        (b"T", struct.pack(">q", 2**62), None),
        (b"x", b"\0\0\0\x01\xff", None),
        (b"d", b"\0" * 8, None),
        (b"V", b"", None),
    ],
)
def test_values_by_their_type(kind: bytes, value: bytes, found: object) -> None:
    read = with_headers(field(b"name", kind, value), text(b"next", b"1")).headers
    assert read == ((("name", found),) if found is not None else ()) + (("next", "1"),)


@pytest.mark.parametrize("broken", [b"\x04name?\0", b"\x04nameS\0\0\0\x09ab", b"\x09na", b"\x04namel\0", b"\x04name"])
def test_what_follows_a_broken_header_is_not_read(broken: bytes) -> None:
    assert with_headers(text(b"before", b"1"), broken).headers == (("before", "1"),)


def test_headers_are_read_within_a_bound() -> None:
    many = [text(b"%d" % number, b"") for number in range(MAX_HEADERS + 1)]
    assert len(with_headers(*many).headers) == MAX_HEADERS
    assert with_headers(text(b"a", b"x" * MAX_HEADERS_BYTES), text(b"b", b"")).headers == ()


def test_a_short_string_that_is_not_utf_8_has_question_marks() -> None:
    assert Properties.read(header_of(1 << 7, short_string(b"a\xff\xfe"))).message_id == "a??"


@given(st.datetimes(min_value=datetime(1, 1, 1), max_value=datetime(9999, 12, 31, 23, 59, 59)))
def test_times_are_those_of_the_calendar(time: datetime) -> None:
    time = time.replace(microsecond=0, tzinfo=UTC)
    seconds = round((time - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    assert write_time(seconds) == time.isoformat().replace("+00:00", "Z")


@pytest.mark.parametrize("seconds", [-62_135_596_801, 253_402_300_800, -(2**63), 2**63 - 1])
def test_a_time_outside_of_the_calendar_is_absent(seconds: int) -> None:
    assert write_time(seconds) is None


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"delivery_mode": 2, "priority": 1},
        {"content_type": "application/cloudevents+json", "message_id": "1", "headers": {"ce-id": "2"}},
        {"content_type": "application/cloudevents+json; charset=utf-8"},
    ],
)
def test_a_structured_event_is_only_its_body(properties: dict[str, Any]) -> None:
    assert type(with_properties(b"abc", header(**properties))) is bytes


def test_a_body_keeps_properties_that_say_what_it_is() -> None:
    body = with_properties(b"abc", header(content_type="application/json", message_id="1"))
    assert isinstance(body, MessageBody)
    assert body == b"abc"
    assert properties_of(body).message_id == "1"
    assert properties_of(b"abc") == NO_PROPERTIES
    assert properties_of(MessageBody(b"abc", Properties(app_id="a"))).app_id == "a"
