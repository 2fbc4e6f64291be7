"""`Deliveries` takes deliveries out of a connection's bytes. The AMQP library's own parser checks it, and the rest."""

from __future__ import annotations

import asyncio
import struct
from datetime import UTC, datetime
from random import Random
from typing import Any

import hypothesis.strategies as st
import pamqp.exceptions
import pamqp.frame
import pytest
from aiormq.connection import FrameReceiver
from hypothesis import given, settings
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel, Connection, Queue
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from bridge.event import Cut
from bridge.service.broker.deliveries import HEADER_FRAMES, HEARTBEAT, Deliveries
from tests.raw_amqp import short_string, table

keys = st.text("abc.*#%é", max_size=20).filter(lambda key: len(key.encode()) < 60)
values = st.one_of(
    st.booleans(), st.integers(-(2**31), 2**31), st.text(max_size=8), st.none(), st.floats(allow_nan=False, width=32),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(0, 9)),
)  # fmt: skip
headers = st.dictionaries(st.text("abcx-", min_size=1, max_size=8), values, max_size=4)


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[Any], str, bytes, int | None]:
    """The frames of one delivery, and what must remain of it: its key, body and offset."""
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
    cutter, out, at = Deliveries(), b"", 0
    while at < len(raw):
        size = cuts[at % len(cuts)]
        out += cutter.feed(raw[at : at + size])
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
        out, _, heartbeat = take(out)
        assert isinstance(heartbeat, Heartbeat)
        out, _, declared = take(out)
        assert declared.message_count == 1
    assert out == b""


CHANNELS = [1, 2, 3]
TAKEN = [1, 2]


@st.composite
def conversations(draw: st.DrawFn) -> list[list[bytes]]:
    """For each channel, its frames in order: bodies in several frames, empty bodies, and other methods between them."""
    found = []
    for channel in CHANNELS:
        raw = []
        for _ in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from(["delivery", "delivery", "delivery", "method", "cancel"]))
            if kind == "method":
                raw.append(pamqp.frame.marshal(Queue.DeclareOk("q", 1, 2), channel))
            elif kind == "cancel":
                raw.append(pamqp.frame.marshal(Basic.Cancel("gone"), channel))
            else:
                (deliver, header, *_), _, body, _ = draw(messages())
                raw += [pamqp.frame.marshal(deliver, channel), pamqp.frame.marshal(header, channel)]
                cuts = sorted(draw(st.lists(st.integers(1, max(1, len(body) - 1)), max_size=3, unique=True)))
                parts = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
                raw += [pamqp.frame.marshal(ContentBody(part), channel) for part in parts if part]
        found.append(raw)
    return found


class Library:
    """Reads the same bytes as aiormq does: with its frame receiver, and its rules for assembling messages."""

    def __init__(self, raw: bytes) -> None:
        self.deliveries: list[tuple[int, str, int, str, bytes, int | None]] = []
        self.others: list[tuple[int, str]] = []
        self._raw = raw

    async def read(self) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(self._raw)
        reader.feed_eof()
        receiver = FrameReceiver(reader)
        begun: dict[int, tuple[Any, Any, list[bytes]]] = {}
        while not reader.at_eof():
            _, channel, frame = await receiver.get_frame()
            if isinstance(frame, Basic.Deliver):
                begun[channel] = (frame, None, [])
            elif isinstance(frame, ContentHeader):
                begun[channel] = (begun[channel][0], frame, [])
            elif isinstance(frame, ContentBody):
                begun[channel][2].append(frame.value)
            else:
                self.others.append((channel, frame.name))
                continue
            deliver, header, parts = begun[channel]
            if header is not None and sum(map(len, parts)) == header.body_size:
                del begun[channel]
                offset = (header.properties.headers or {}).get("x-stream-offset")
                self.deliveries.append(
                    (channel, deliver.consumer_tag, deliver.delivery_tag, deliver.routing_key, b"".join(parts), offset)
                )


async def read_frames(raw: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    receiver = FrameReceiver(reader)
    while not reader.at_eof():
        await receiver.get_frame()


@settings(max_examples=500)
@given(conversations(), st.lists(st.integers(1, 60), min_size=1), st.randoms(use_true_random=False), st.booleans())
def test_it_finds_what_the_library_finds(
    conversation: list[list[bytes]], cuts: list[int], random: Random, whole: bool
) -> None:
    # The frames of one channel stay in order; those of different channels are mixed (4.2.6: content frames may be
    # interleaved with those of other channels).
    waiting = [list(frames) for frames in conversation]
    raw = b""
    while any(waiting):
        raw += random.choice([frames for frames in waiting if frames]).pop(0)
        if random.random() < 0.1:
            raw += pamqp.frame.marshal(Heartbeat(), 0)
    library = Library(raw)
    asyncio.run(library.read())

    found: list[tuple[int, str, str, bytes, int | None]] = []
    cutter = Deliveries()
    for channel in TAKEN:

        def sink(tag: bytes, key: str, body: bytes, offset: int | None, channel: int = channel) -> None:
            found.append((channel, tag.decode(), key, body, offset))

        cutter.take(channel, sink)
    out, at = b"", 0
    while at < len(raw):
        size = len(raw) if whole else cuts[at % len(cuts)]
        out += cutter.feed(raw[at : at + size])
        at += size
    rest = Library(out)
    asyncio.run(rest.read())
    taken = [delivery for delivery in library.deliveries if delivery[0] in TAKEN]
    assert found == [(channel, tag, key, body, offset) for channel, tag, _, key, body, offset in taken]
    assert [each[:5] for each in rest.deliveries] == [each[:5] for each in library.deliveries if each[0] not in TAKEN]
    assert rest.others == library.others
    newest = {channel: tag for channel, _, tag, *_ in taken}
    assert cutter.unacked == len(found)
    acks = cutter.take_acks()
    for channel, tag in newest.items():
        acks, on, ack = take(acks)
        assert (on, ack.name, ack.delivery_tag, ack.multiple) == (channel, "Basic.Ack", tag, True)
    assert (acks, cutter.take_acks()) == (b"", b"")


def delivery(body: bytes, channel: int = 1) -> list[bytes]:
    deliver = Basic.Deliver("tag", 7, False, "events", "all.x")
    return [
        pamqp.frame.marshal(deliver, channel),
        pamqp.frame.marshal(ContentHeader(body_size=len(body)), channel),
        pamqp.frame.marshal(ContentBody(body), channel),
    ]


def test_the_rest_of_a_message_is_dropped_if_its_channel_closes() -> None:
    found: list[bytes] = []
    cutter = Deliveries()
    cutter.take(1, lambda _tag, _key, body, _offset: found.append(body))
    deliver, header, _ = delivery(b"first")
    assert cutter.feed(deliver + header) == b""
    close = pamqp.frame.marshal(Channel.Close(406, "no", 0, 0), 1)
    assert cutter.feed(close) == close
    # The number now belongs to another channel: its deliveries go to the library, until `take` is called for it.
    assert cutter.feed(b"".join(delivery(b"second"))) != b""
    cutter.take(1, lambda _tag, _key, body, _offset: found.append(body))
    assert cutter.feed(b"".join(delivery(b"third"))) == b""
    assert found == [b"third"]


def test_a_late_drop_leaves_a_new_channel_with_the_same_number_alone() -> None:
    found: list[bytes] = []

    def first(_tag: bytes, _key: str, _body: bytes, _offset: int | None) -> None: ...

    def second(_tag: bytes, _key: str, body: bytes, _offset: int | None) -> None:
        found.append(body)

    cutter = Deliveries()
    cutter.take(1, first)
    cutter.feed(pamqp.frame.marshal(Channel.Close(406, "no", 0, 0), 1))
    cutter.take(1, second)
    cutter.drop(1, first)
    cutter.feed(b"".join(delivery(b"body")))
    assert found == [b"body"]
    assert cutter.take_acks() != b""


def test_deliveries_of_a_dropped_channel_reach_no_callback_and_are_not_acknowledged() -> None:
    found: list[bytes] = []

    def sink(_tag: bytes, _key: str, body: bytes, _offset: int | None) -> None:
        found.append(body)

    cutter = Deliveries()
    cutter.take(1, sink)
    deliver, header, body = delivery(b"first")
    cutter.feed(b"".join(delivery(b"before")) + deliver)
    cutter.drop(1, sink)
    assert cutter.feed(header + body + b"".join(delivery(b"second"))) == b""
    assert found == [b"before"]
    assert cutter.take_acks() == b""
    closed = pamqp.frame.marshal(Channel.CloseOk(), 1)
    assert cutter.feed(closed) == closed


def test_a_callback_that_fails_does_not_stop_other_deliveries() -> None:
    found: list[bytes] = []

    def sink(_tag: bytes, _key: str, body: bytes, _offset: int | None) -> None:
        if body == b"bad":
            raise ValueError("bad")
        found.append(body)

    cutter = Deliveries()
    cutter.take(1, sink)
    cutter.feed(b"".join(delivery(b"good") + delivery(b"bad") + delivery(b"better")))
    assert found == [b"good", b"better"]
    assert [str(fault) for fault in cutter.faults] == ["bad"]


def test_the_library_reads_the_heartbeat_frame() -> None:
    _, channel, frame = take(HEARTBEAT)
    assert (channel, frame.name) == (0, "Heartbeat")


def take(raw: bytes) -> tuple[bytes, int, Any]:
    size, channel, frame = pamqp.frame.unmarshal(raw)
    return raw[size:], channel, frame


@given(st.binary(max_size=40), st.integers(0, 0xFFFF))
def test_with_any_properties_the_library_can_read_the_rest(properties: bytes, flags: int) -> None:
    payload = struct.pack(">HHQH", 60, 0, 5, flags) + properties
    raw = struct.pack(">BHI", 2, 1, len(payload)) + payload + b"\xce"
    _, _, header = take(Deliveries().feed(raw))
    assert header.body_size == 5


@given(st.binary(max_size=20))
def test_any_routing_key_becomes_text(key: bytes) -> None:
    deliver = (
        struct.pack(">HH", 60, 60) + short_string(b"tag") + b"\0" * 9 + short_string(b"events") + short_string(key)
    )
    raw = struct.pack(">BHI", 1, 1, len(deliver)) + deliver + b"\xce"
    _, _, frame = take(Deliveries().feed(raw))
    try:
        assert frame.routing_key == key.decode()
    except UnicodeDecodeError:
        assert frame.routing_key == "".join(chr(byte) if byte < 0x80 else "?" for byte in key)


def test_bytes_that_are_not_amqp_pass_unchanged() -> None:
    assert Deliveries().feed(b"AMQP\x00\x00\x08\x00") == b"AMQP\x00\x00\x08\x00"
    assert Deliveries().feed(b"HTTP/1.1 400 Bad Request\r\n") in (b"", b"HTTP/1.1 400 Bad Request\r\n")


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
    _, _, header = take(Deliveries().feed(raw))
    assert header.properties.headers == {"x-stream-offset": 77}


Found = list[tuple[int, bytes, bytes, tuple[bytes, int], Any]]
"""Channel, consumer's tag, routing key, body and the size of all of it, offset."""

MAX_BODY = 12
"""For the object under test: some bodies of `messages` are smaller, some are larger."""

MAX_FRAME = 100
"""The frame size that the broker announces: many damaged lengths are above it, and no correct one is."""

TUNE = pamqp.frame.marshal(Connection.Tune(2047, MAX_FRAME, 0), 0)


def parse_plainly(raw: bytes) -> tuple[Found, bool]:
    """The deliveries of the channels in `TAKEN`, read one frame at a time, and whether all of it was AMQP."""
    found: Found = []
    taken, begun, at = set(TAKEN), dict[int, list[Any]](), 0
    while at < len(raw):
        kind = raw[at]
        if kind not in (1, 2, 3, 8):
            return found, False
        if len(raw) - at < 8:
            break
        channel, size = int.from_bytes(raw[at + 1 : at + 3], "big"), int.from_bytes(raw[at + 3 : at + 7], "big")
        if size > MAX_FRAME * (HEADER_FRAMES if kind == 2 else 1):
            return found, False
        payload, end_mark = raw[at + 7 : at + 7 + size], raw[at + 7 + size : at + 8 + size]
        if end_mark == b"":
            return found, True
        if end_mark != b"\xce":
            return found, False
        at += size + 8
        if channel not in taken:
            continue
        if kind == 1 and payload[:4] == b"\x00\x3c\x00\x3c":
            strings, rest = [], payload[4:]
            for fixed_before in (0, 9, 0):
                fixed, rest = rest[:fixed_before], rest[fixed_before:]
                if len(fixed) < fixed_before or not rest or len(rest) < 1 + rest[0]:
                    return found, False
                strings.append(rest[1 : 1 + rest[0]])
                rest = rest[1 + rest[0] :]
            if rest or channel in begun:
                return found, False
            begun[channel] = [strings[0], strings[2], None, b"", None]
        elif kind == 1:
            if payload[:4] in (b"\x00\x14\x00\x28", b"\x00\x14\x00\x29"):
                taken.remove(channel)
                begun.pop(channel, None)
            continue
        elif channel not in begun:
            return found, False
        elif kind == 2 and begun[channel][2] is None and len(payload) >= 14 and payload[:2] == b"\x00\x3c":
            begun[channel][2] = int.from_bytes(payload[4:12], "big")
            begun[channel][4] = offset_of(payload)
        elif kind == 3 and begun[channel][2] is not None:
            begun[channel][3] += payload
        else:
            return found, False
        tag, key, missing, body, offset = begun[channel]
        if missing is not None and len(body) > missing:
            return found, False
        if missing == len(body):
            found.append((channel, tag, key, (body[:MAX_BODY] if len(body) > MAX_BODY else body, len(body)), offset))
            del begun[channel]
    return found, True


def offset_of(payload: bytes) -> Any:
    """The offset, by the library's own decoder. `...` if it cannot read the properties: then any offset is right."""
    try:
        header = ContentHeader()
        header.unmarshal(payload)
        table_of = header.properties.headers
    except Exception:  # noqa: BLE001 - It raises many kinds of errors for bytes that it cannot read.
        return ...
    return (table_of or {}).get("x-stream-offset")


def cut_out(raw: bytes, cuts: list[int]) -> tuple[Found, bytes, Deliveries]:
    found: Found = []
    cutter = Deliveries(max_body=MAX_BODY)
    assert cutter.feed(TUNE) == TUNE
    for channel in TAKEN:

        def sink(tag: bytes, key: str, body: bytes, offset: int | None, channel: int = channel) -> None:
            size = body.size if isinstance(body, Cut) else len(body)
            found.append((channel, tag, key.encode(), (bytes(body), size), offset))

        cutter.take(channel, sink)
    out, at, turn = b"", 0, 0
    while at < len(raw):
        size = cuts[turn % len(cuts)]
        out += cutter.feed(raw[at : at + size])
        at, turn = at + size, turn + 1
        assert cutter.buffered <= HEADER_FRAMES * MAX_FRAME + 8 + len(TAKEN) * MAX_BODY
    return found, out, cutter


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A conversation of which some bytes, lengths and frames are changed, lost, repeated or in another order."""
    conversation = draw(conversations())
    frames = [frame for frames in conversation for frame in frames]
    frames = draw(st.permutations(frames)) if draw(st.booleans()) else frames
    for _ in range(draw(st.integers(0, 3)) if frames else 0):
        at = draw(st.integers(0, len(frames) - 1))
        frame = frames[at]
        place = draw(st.integers(0, len(frame) - 1))
        match draw(st.sampled_from(["byte", "size", "shorter", "longer", "cut", "lost", "twice", "header", "channel"])):
            case "byte":
                frames[at] = frame[:place] + draw(st.binary(min_size=1, max_size=1)) + frame[place + 1 :]
            case "size":
                size = draw(st.integers(0, 300) | st.integers(0, 2**32 - 1))
                frames[at] = frame[:3] + size.to_bytes(4, "big") + frame[7:]
            case "shorter":
                payload = frame[7:-1][: place % max(1, len(frame) - 8)]
                frames[at] = frame[:3] + len(payload).to_bytes(4, "big") + payload + b"\xce"
            case "longer":
                payload = frame[7:-1] + draw(st.binary(max_size=9))
                frames[at] = frame[:3] + len(payload).to_bytes(4, "big") + payload + b"\xce"
            case "cut":
                frames[at] = frame[:place]
            case "lost":
                frames[at] = b""
            case "twice":
                frames[at] = frame + frame
            case "header":
                payload = struct.pack(">HHQH", 60, 0, draw(st.integers(0, 2**64 - 1)), 1 << 13) + frame[7:-1]
                frames[at] = b"\x02" + frame[1:3] + len(payload).to_bytes(4, "big") + payload + b"\xce"
            case "channel":
                frames[at] = frame[:1] + draw(st.sampled_from([b"\x00\x01", b"\x00\x03"])) + frame[3:]
        if not frames[at]:
            del frames[at]
        if not frames:
            break
    return b"".join(frames)


pieces = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@settings(max_examples=1000)
@given(damaged() | st.binary(max_size=80) | st.tuples(st.binary(max_size=60), damaged()).map(b"".join), pieces)
def test_no_bytes_raise_and_none_that_are_not_amqp_reach_a_callback(raw: bytes, cuts: list[int]) -> None:
    expected, is_amqp = parse_plainly(raw)
    whole, out, cutter = cut_out(raw, [max(1, len(raw))])
    assert [each[:2] + each[3:4] for each in whole] == [each[:2] + each[3:4] for each in expected]
    for (_, _, got, _, offset), (_, _, key, _, wanted) in zip(whole, expected, strict=True):
        assert got == key or (got == got.decode().encode() and b"?" in got)
        assert offset == wanted or wanted is ...
    assert [type(fault).__name__ for fault in cutter.faults] in ([], ["NotAmqp"])
    # The result is the same if the bytes arrive in pieces.
    again, out_again, in_pieces = cut_out(raw, cuts)
    assert again == whole
    rest, rest_again = cutter.feed(b""), in_pieces.feed(b"")
    assert cutter.take_acks() == in_pieces.take_acks()
    if is_amqp:
        assert out + rest == out_again + rest_again
        return
    # The library refuses this frame or one before it. It does not wait for further bytes.
    for refused in (out + rest, out_again + rest_again):
        with pytest.raises(Exception, match=r"^(?!Server connection unexpectedly closed)"):
            asyncio.run(read_frames(refused))


@given(st.binary(max_size=60), st.sampled_from([b"\x00\x3c\x00\x3c", b"\x00\x3c\x00\x47"]), st.booleans())
def test_a_truncated_method_raises_nothing(payload: bytes, method: bytes, is_taken: bool) -> None:
    cutter = Deliveries()
    if is_taken:
        cutter.take(1, lambda *_: None)
    raw = struct.pack(">BHI", 1, 1, 4 + len(payload)) + method + payload + b"\xce"
    cutter.feed(raw)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (1, b"\x00\x3c\x00\x3c\x03tag"),
        (2, b"\x00\x3c" + b"\x00" * 12),
        (3, b"a body without a header"),
        (3, b""),
        (8, b""),
        (8, b"a heartbeat of a channel"),
    ],
)
def test_the_library_refuses_a_frame_out_of_order(kind: int, payload: bytes) -> None:
    cutter = Deliveries()
    cutter.take(1, lambda *_: None)
    out = cutter.feed(struct.pack(">BHI", kind, 1, len(payload)) + payload + b"\xce")
    with pytest.raises(pamqp.exceptions.UnmarshalingException):
        take(out)


def test_a_truncated_method_is_passed_on_in_a_form_that_the_library_refuses() -> None:
    found: list[bytes] = []
    cutter = Deliveries()
    cutter.take(1, lambda _tag, _key, body, _offset: found.append(body))
    good = b"".join(delivery(b"good"))
    # The key's length says 200 bytes, and the next frames have them. The library alone would read five bytes of key.
    short = b"\x00\x3c\x00\x3c" + short_string(b"tag") + b"\0" * 9 + short_string(b"events") + b"\xc8all.x"
    frame = struct.pack(">BHI", 1, 1, len(short)) + short + b"\xce"
    take(frame)
    out = cutter.feed(good + frame + good * 3)
    assert found == [b"good"]
    with pytest.raises(pamqp.exceptions.UnmarshalingException):
        take(out)
    assert [str(fault).partition(": ")[0] for fault in cutter.faults] == ["the broker sent bytes that are not AMQP"]
    assert cutter.feed(good) == good
