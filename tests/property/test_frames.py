"""What the frame filter leaves, read by the AMQP library's own parser, however the bytes are cut."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
import pamqp.frame
from hypothesis import given, settings
from pamqp.body import ContentBody
from pamqp.commands import Basic, Queue
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from bridge.frames import FrameFilter
from tests.raw_amqp import short_string, table

keys = st.text("abc.*#%é", max_size=20).filter(lambda key: len(key.encode()) < 60)
values = st.one_of(
    st.booleans(), st.integers(-(2**31), 2**31), st.text(max_size=8), st.none(), st.floats(allow_nan=False, width=32),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(0, 9)),
)  # fmt: skip
headers = st.dictionaries(st.text("abcx-", min_size=1, max_size=8), values, max_size=4)


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[Any], str, bytes, int | None]:
    """The frames of one delivery, with what has to be left of it."""
    key, body = draw(keys), draw(st.binary(max_size=30))
    offset = draw(st.none() | st.integers(0, 2**40))
    table_of: dict[str, Any] = dict(draw(headers))
    if offset is not None:
        table_of["x-stream-offset"] = offset + 2**33  # Written as a 64-bit integer, as the broker does.
    properties = Basic.Properties(
        content_type=draw(st.none() | st.text("a/", max_size=9)),
        content_encoding=draw(st.none() | st.text("a", max_size=9)),
        headers=table_of or None,
        delivery_mode=draw(st.sampled_from([None, 1, 2])),
        message_id=draw(st.none() | st.text("x", max_size=9)),
        timestamp=draw(st.none() | st.just(datetime(2026, 1, 1, tzinfo=UTC))),
    )
    frames: list[Any] = [
        Basic.Deliver("tag", draw(st.integers(1, 2**40)), False, "events", key),
        ContentHeader(body_size=len(body), properties=properties),
    ]
    if body:
        frames.append(ContentBody(body))
    return frames, key, body, None if offset is None else table_of["x-stream-offset"]


@settings(max_examples=300)
@given(st.lists(messages(), max_size=5), st.lists(st.integers(1, 50), min_size=1))
def test_deliveries_keep_their_key_their_body_and_a_streams_offset(
    deliveries: list[tuple[list[Any], str, bytes, int | None]], cuts: list[int]
) -> None:
    raw = b""
    for frames, *_ in deliveries:
        raw += b"".join(pamqp.frame.marshal(frame, 7) for frame in frames)
        raw += pamqp.frame.marshal(Heartbeat(), 0) + pamqp.frame.marshal(Queue.DeclareOk("q", 1, 2), 3)
    sieve, out, at = FrameFilter(), b"", 0
    while at < len(raw):
        size = cuts[at % len(cuts)]
        out += sieve.feed(raw[at : at + size])
        at += size
    for _, key, body, offset in deliveries:
        out, _, deliver = take(out)
        assert (deliver.routing_key, deliver.consumer_tag) == (key, "tag")
        out, channel, header = take(out)
        assert (channel, header.body_size) == (7, len(body))
        assert (header.properties.headers or {}) == ({} if offset is None else {"x-stream-offset": offset})
        assert header.properties.content_type is None
        if body:
            out, _, content = take(out)
            assert content.value == body
        out, _, beat = take(out)
        assert isinstance(beat, Heartbeat)
        out, _, declared = take(out)
        assert declared.message_count == 1
    assert out == b""


def take(raw: bytes) -> tuple[bytes, int, Any]:
    size, channel, frame = pamqp.frame.unmarshal(raw)
    return raw[size:], channel, frame


@given(st.binary(max_size=40), st.integers(0, 0xFFFF))
def test_whatever_the_properties_are_the_library_can_read_what_is_left(properties: bytes, flags: int) -> None:
    payload = struct.pack(">HHQH", 60, 0, 5, flags) + properties
    raw = struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"
    _, _, header = take(FrameFilter().feed(raw))
    assert header.body_size == 5


@given(st.binary(max_size=20))
def test_any_routing_key_becomes_text(key: bytes) -> None:
    deliver = (
        struct.pack(">HH", 60, 60) + short_string(b"tag") + b"\0" * 9 + short_string(b"events") + short_string(key)
    )
    raw = struct.pack(">BHI", 1, 1, len(deliver)) + deliver + b"\xce"
    _, _, frame = take(FrameFilter().feed(raw))
    try:
        assert frame.routing_key == key.decode()
    except UnicodeDecodeError:
        assert frame.routing_key == "".join(chr(byte) if byte < 0x80 else "?" for byte in key)


def test_what_is_no_amqp_goes_on_as_it_is() -> None:
    assert FrameFilter().feed(b"AMQP\x00\x00\x08\x00") == b"AMQP\x00\x00\x08\x00"
    assert FrameFilter().feed(b"HTTP/1.1 400 Bad Request\r\n") in (b"", b"HTTP/1.1 400 Bad Request\r\n")


def test_a_table_with_an_offset_among_odd_fields() -> None:
    offset = struct.pack(">q", 77)
    odd = [
        short_string(b"\xff") + b"S" + struct.pack(">I", 2) + b"\xff\xfe",
        short_string(b"at") + b"T" + b"\xff" * 8,
        short_string(b"x") + b"S" + struct.pack(">I", 16) + b"\x0fx-stream-offset"[:16],
        short_string(b"x-stream-offset") + b"l" + offset,
    ]
    payload = struct.pack(">HHQH", 60, 0, 5, 1 << 13 | 1 << 6) + table(*odd) + b"\xff" * 8
    raw = struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"
    _, _, header = take(FrameFilter().feed(raw))
    assert header.properties.headers == {"x-stream-offset": 77}
