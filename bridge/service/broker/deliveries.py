"""Cuts deliveries out of the bytes that the broker sends (AMQP 0-9-1, sections 2.3.5 and 4.2).

Pure. `feed` gets bytes in pieces of any size. Deliveries on taken channels go to their callbacks. `feed` returns every
other frame for the AMQP library, whole. Through aiormq a delivery costs ten times as much: objects for its three
frames, two tasks, a queue.

The returned frames contain no message properties. The library decodes every property, and closes the connection if one
is invalid, for example a timestamp in nanoseconds or a header name that is not UTF-8. RabbitMQ accepts both from any
publisher. `properties.py` reads those of deliveries. The library needs none, so two things change in returned frames:

- A content header has only the body's size, and the offset that RabbitMQ adds for a stream.
- A routing key that is not UTF-8 has `?` in place of each byte that is not ASCII.

A body that is larger than `max_body` is not buffered. The content header has its size, so this is known before the
first byte of the body. The callback gets a `Cut`: the beginning and the size.

Parsing ends at bytes that are not AMQP, at a frame out of order, and at a frame over the agreed limit. `feed` returns
these bytes after a frame that the library refuses, so the library closes the connection. No callback gets any of these
bytes, and `feed` raises nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from bridge.event import Cut
from bridge.service.broker.properties import STRUCTURED, decode_short, with_properties

_METHOD, _HEADER, _BODY = 1, 2, 3
_KINDS = (_METHOD, _BODY, _HEADER, 8)  # 8 is the heartbeat (4.2.7).
_BASIC = 60  # The only class whose methods carry content.
_LEAST_HEADER_BYTES = 14  # Class, weight, size of the body, flags (2.3.5.2).
MAX_BODY_BYTES = 131_072
"""Default limit of a body in bytes. A callback gets a `Cut` of a larger one."""

KEPT_BYTES = 4_096
"""Bytes that a `Cut` keeps from the beginning of a larger body."""

FIRST_FRAME_BYTES = 131_072
"""Limit of a frame until the broker sends its own (`connection.tune`, 1.4.2.5). This is RabbitMQ's default."""

HEADER_FRAMES = 8
"""Limit of a content header, in agreed frame sizes: RabbitMQ adds headers such as `x-death`, and does not split the
frame. With RabbitMQ's default this is 1 MiB."""

UNLIMITED_BYTES = 1 << 29
"""Limit of a frame if the broker sends none. It is RabbitMQ's largest message (512 MiB)."""

_FRAME_END = 0xCE
_TUNE = b"\x00\x0a\x00\x1e"
_BASIC_DELIVER = b"\x00\x3c\x00\x3c"
_BASIC_GET_OK = b"\x00\x3c\x00\x47"
_CHANNEL_CLOSE = b"\x00\x14\x00\x28"
_CHANNEL_CLOSE_OK = b"\x00\x14\x00\x29"
_HEADERS_FLAG = 1 << 13
_CONTENT_TYPE_FLAG = 1 << 15
_CONTENT_ENCODING_FLAG = 1 << 14
_OFFSET = b"\x0fx-stream-offset"

_FRAME = struct.Struct(">BHI")  # Type, channel, size of the payload (4.2.3).
_CONTENT = struct.Struct(">BHIHHQ")  # A content header's frame: the same three, then class, weight, size of the body.
_HEAD = struct.Struct(">HHQ")  # A content header's payload: class, weight, size of the body.
_DELIVER = struct.Struct(">QBB")  # After the consumer's tag: delivery tag, redelivered, length of the exchange's name.
_ACK = struct.Struct(">BHIHHQBB")

# Sizes of the fixed-size values of a field table, by type (4.2.5.5 as RabbitMQ reads it). S, x, A and F contain theirs.
_SIZES = {b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4, b"D": 5, b"l": 8, b"d": 8, b"T": 8,
          b"L": 8, b"V": 0}  # fmt: skip

_INVALID_FRAME = b"\x00\x00\x00\x00\x00\x00\x00\xce"
"""A frame of an unknown type. The library refuses it as soon as it reads it."""

HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
"""A heartbeat frame (4.2.7)."""


class NotAmqp(Exception):
    """The broker, or a program in its place, sent bytes that are not AMQP 0-9-1. The connection ends."""


class _Unreadable(Exception):
    """The following bytes are not AMQP. This exception does not leave this file."""


Sink = Callable[[bytes, str, bytes, int | None], None]
"""Called with the consumer's tag, the routing key, the body, and the offset if the queue is a stream. The body is a
`MessageBody` if its properties may say what its form is."""


class _Incomplete:
    """A delivery that has not arrived completely."""

    __slots__ = ("delivery_tag", "header", "is_cut", "key", "missing", "parts", "room", "size", "tag")

    def __init__(self, tag: bytes, delivery_tag: int, key: bytes) -> None:
        self.tag = tag
        self.delivery_tag = delivery_tag
        self.key = key
        self.size = self.missing = -1  # -1 until the content header arrives.
        self.header = b""
        self.is_cut = False
        self.room = 0
        """Bytes of a cut body that may still be kept."""
        self.parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        self.missing -= len(part)
        if not self.is_cut:
            self.parts.append(part)
        elif self.room:
            self.parts.append(part[: self.room])
            self.room -= len(self.parts[-1])

    @property
    def body(self) -> bytes:
        body = b"".join(self.parts)
        return Cut(body, self.size) if self.is_cut else with_properties(body, self.header)


class Deliveries:
    """Parses the bytes of one connection, from the broker's first byte on.

    Args:
        max_body: limit of a body in bytes; callbacks get a `Cut` of a larger one.
    """

    __slots__ = ("_has_begun", "_incomplete", "_last_tags", "_max_frame", "_max_header", "_max_whole", "_passes_all",
                 "_pieces", "_sinks", "_skipped", "_to_skip", "_wanted", "faults", "max_body", "unacked")  # fmt: skip

    def __init__(self, *, max_body: int = MAX_BODY_BYTES) -> None:
        self._pieces: list[bytes] = []
        """The beginning of a frame that has not arrived completely."""
        self._wanted = 0
        """Bytes that must still arrive before parsing can continue."""
        self._skipped = 0
        """The channel of the body frame that is being skipped."""
        self._to_skip = 0
        """Bytes of that frame that must still arrive, its end mark included; 0 without such a frame."""
        self.max_body = max_body
        self._limit_frames(FIRST_FRAME_BYTES)
        self._has_begun = False
        self._passes_all = False
        self._sinks: dict[int, Sink] = {}
        self._incomplete: dict[int, _Incomplete] = {}
        self._last_tags: dict[int, int] = {}  # By channel: the tag of the last delivery that its callback got.
        self.unacked = 0
        """Deliveries that callbacks got since the last `take_acks`."""
        self.faults: list[Exception] = []
        """Exceptions that callbacks raised; later deliveries are not affected. Or one `NotAmqp`: parsing has ended.
        The caller logs the exceptions and clears the list."""

    def take(self, channel: int, sink: Sink) -> None:
        """Passes the channel's deliveries to `sink` until the channel is closed."""
        self._sinks[channel] = sink

    def drop(self, channel: int, sink: Sink) -> None:
        """Discards the channel's deliveries from now on, without acknowledging them.

        Call it before the bridge closes the channel: an ack after the close would make RabbitMQ close the connection.
        If the broker closed the channel, another consumer may have its number now. That consumer keeps it.
        """
        if self._sinks.get(channel) is sink:
            self._sinks[channel] = _discard
            self._last_tags.pop(channel, None)

    @property
    def takes(self) -> bool:
        """Whether any channel is taken."""
        return bool(self._sinks)

    def take_acks(self) -> bytes:
        """Returns one `basic.ack` with `multiple` for each channel, for all deliveries that callbacks got."""
        acks = b"".join(
            _ACK.pack(_METHOD, channel, 13, 60, 80, tag, 1, _FRAME_END) for channel, tag in self._last_tags.items()
        )
        self._last_tags.clear()
        self.unacked = 0
        return acks

    @property
    def buffered(self) -> int:
        """Bytes in memory that wait for the rest of their frame or body."""
        parts = [*self._pieces, *(part for delivery in self._incomplete.values() for part in delivery.parts)]
        return sum(map(len, parts))

    def feed(self, data: bytes) -> bytes:
        """Parses bytes, calls callbacks, and returns the bytes for the library. Raises nothing for any bytes."""
        if self._pieces:
            self._pieces.append(data)
            self._wanted -= len(data)
            if self._wanted > 0:
                return b""  # All pieces are joined once, when the last one arrives.
            data = b"".join(self._pieces)
            self._pieces = []
        if not self._has_begun and data:
            self._has_begun = True
            # For example `AMQP` and a version: the broker needs another version, and the library reports that.
            self._passes_all = data[0] not in _KINDS
        if self._passes_all:
            return data
        passed: list[bytes] = []
        sinks, size, at = self._sinks, len(data), 0
        max_frame = self._max_frame
        try:
            if self._to_skip:
                at = self._skip(data)
            while size - at >= 8:
                kind, channel, length = _FRAME.unpack_from(data, at)
                end = at + 8 + length
                if length > max_frame and (kind != _HEADER or length > self._max_header):
                    raise _Unreadable(f"a frame of {length} bytes, where the limit is {max_frame}")
                if end > size:  # The rest has not arrived.
                    if kind == _BODY and self._may_skip(channel, length):
                        self._incomplete[channel].add(data[at + 7 :])
                        self._skipped, self._to_skip = channel, end - size
                        at = size
                    break
                if data[end - 1] != _FRAME_END:
                    raise _Unreadable
                if channel not in sinks:
                    if kind not in _KINDS:
                        raise _Unreadable
                    payload = data[at + 7 : end - 1]
                    if not channel and payload[:4] == _TUNE:
                        self._tune(payload)
                        max_frame = self._max_frame
                    passed.append(_for_library(kind, channel, payload))
                elif kind == _METHOD:
                    method = data[at + 7 : at + 11]
                    if method == _BASIC_DELIVER:
                        end = self._deliver(data, at, end, size, channel)
                    else:
                        if method in (_CHANNEL_CLOSE, _CHANNEL_CLOSE_OK):
                            # Another channel may get this number.
                            del sinks[channel]
                            self._incomplete.pop(channel, None)
                            self._last_tags.pop(channel, None)
                        passed.append(data[at:end])
                else:
                    self._continue(kind, channel, data[at + 7 : end - 1])
                at = end
            if at < size and data[at] not in _KINDS:
                raise _Unreadable
        except _Unreadable as error:
            self._passes_all = True  # The following bytes cannot be parsed either.
            self.faults.append(
                NotAmqp(f"the broker sent bytes that are not AMQP: {str(error) or data[at : at + 40]!r}")
            )
            # The library accepts much that is not AMQP: it shortens a string that ends after its frame, drops a frame
            # that is out of order, and waits for the whole of a frame of any size.
            passed.append(_INVALID_FRAME + data[at:])
            self._to_skip, at = 0, size
        if at < size:
            self._pieces = [data[at:]]
            left = size - at
            self._wanted = 8 - left if left < 8 else _FRAME.unpack_from(data, at)[2] + 8 - left
        return b"".join(passed)

    def _limit_frames(self, limit: int) -> None:
        self._max_frame = limit
        self._max_header = min(HEADER_FRAMES * limit, UNLIMITED_BYTES)
        self._max_whole = min(limit, self.max_body)

    def _tune(self, payload: bytes) -> None:
        """Reads the broker's limit from `connection.tune`, which the library always accepts. 0 means no limit."""
        if len(payload) >= 10:
            self._limit_frames(min(int.from_bytes(payload[6:10], "big") or UNLIMITED_BYTES, UNLIMITED_BYTES))

    def _may_skip(self, channel: int, length: int) -> bool:
        """Whether this body frame belongs to a body that is cut, and is not larger than the rest of it."""
        delivery = self._incomplete.get(channel)
        return delivery is not None and delivery.is_cut and length <= delivery.missing

    def _skip(self, data: bytes) -> int:
        """Skips the rest of a body frame. Returns the position of the next frame.

        Raises:
            _Unreadable: the frame does not end where it should.
        """
        channel, delivery = self._skipped, self._incomplete[self._skipped]
        here = min(self._to_skip, len(data))
        if here < self._to_skip:
            delivery.add(data)
        elif data[here - 1] != _FRAME_END:
            raise _Unreadable
        else:
            delivery.add(data[: here - 1])
            self._finish_if_complete(channel, delivery)
        self._to_skip -= here
        return here

    def _deliver(self, data: bytes, at: int, end: int, size: int, channel: int) -> int:
        """Reads a `basic.deliver`, and its header and body if they have arrived. Returns the position after them.

        Raises:
            _Unreadable: it is malformed, or the delivery before it on the channel is incomplete.
        """
        try:
            tag_end = at + 12 + data[at + 11]
            delivery_tag, _, exchange_size = _DELIVER.unpack_from(data, tag_end)
            key_at = tag_end + 10 + exchange_size
            key_end = key_at + 1 + data[key_at]
        except (IndexError, struct.error):
            raise _Unreadable from None
        # The routing key is the last argument. If it ends with the frame, no string before it is too long.
        if key_end != end - 1 or (self._incomplete and channel in self._incomplete):
            raise _Unreadable
        tag, key = data[at + 12 : tag_end], data[key_at + 1 : key_end]
        # Nearly always the header and the body have arrived too, one frame each.
        if size - end >= 22:
            kind, of, length, class_id, _, body_size = _CONTENT.unpack_from(data, end)
            header_end: int = end + 8 + length
            body_end: int = header_end + 8 + body_size if body_size else header_end
            if (
                kind == _HEADER
                and of == channel
                and class_id == _BASIC
                and _LEAST_HEADER_BYTES <= length <= self._max_header
                and body_end <= size
                and body_size <= self._max_whole
                and data[header_end - 1] == _FRAME_END == data[body_end - 1]
                and (not body_size or _FRAME.unpack_from(data, header_end) == (_BODY, channel, body_size))
            ):
                body = data[header_end + 7 : body_end - 1] if body_size else b""
                offset = None
                if length > _LEAST_HEADER_BYTES:
                    header = data[end + 7 : header_end - 1]
                    offset = _offset(header)
                    if header[15:43] != STRUCTURED:  # Nearly always it is, and needs nothing more.
                        body = with_properties(body, header)
                self._call_sink(channel, tag, delivery_tag, key, body, offset)
                return body_end
        self._incomplete[channel] = _Incomplete(tag, delivery_tag, key)
        return end

    def _continue(self, kind: int, channel: int, payload: bytes) -> None:
        """Reads a header or body frame of a delivery that did not arrive in one piece.

        Raises:
            _Unreadable: the frame is out of order or malformed. It cannot belong to a message that the library
                requested, because the library requests none on a taken channel.
        """
        delivery = self._incomplete.get(channel)
        if delivery is None:
            raise _Unreadable
        size = len(payload)
        if kind == _HEADER and delivery.missing < 0 and size >= _LEAST_HEADER_BYTES:
            class_id, _, delivery.size = _HEAD.unpack_from(payload)
            if class_id != _BASIC:
                raise _Unreadable
            delivery.missing = delivery.size
            delivery.is_cut = delivery.size > self.max_body
            delivery.room = min(KEPT_BYTES, self.max_body)
            delivery.header = payload
        elif kind == _BODY and size <= delivery.missing:
            delivery.add(payload)
        else:
            raise _Unreadable
        self._finish_if_complete(channel, delivery)

    def _finish_if_complete(self, channel: int, delivery: _Incomplete) -> None:
        if delivery.missing == 0:
            del self._incomplete[channel]
            offset = _offset(delivery.header)
            self._call_sink(channel, delivery.tag, delivery.delivery_tag, delivery.key, delivery.body, offset)

    def _call_sink(
        self, channel: int, tag: bytes, delivery_tag: int, key: bytes, body: bytes, offset: int | None
    ) -> None:
        sink = self._sinks[channel]
        if sink is _discard:
            return
        self._last_tags[channel] = delivery_tag
        self.unacked += 1
        try:
            text = key.decode()
        except UnicodeDecodeError:
            text = decode_short(key)
        try:
            sink(tag, text, body, offset)
        except Exception as fault:  # noqa: BLE001
            self.faults.append(fault)


def _discard(tag: bytes, routing_key: str, body: bytes, offset: int | None) -> None: ...


def _for_library(kind: int, channel: int, payload: bytes) -> bytes:
    if kind == _HEADER:
        payload = _without_properties(payload)
    elif kind == _METHOD and payload[:4] in (_BASIC_DELIVER, _BASIC_GET_OK) and not payload.isascii():
        payload = _with_readable_key(payload)
    return b"%b%b\xce" % (_FRAME.pack(kind, channel, len(payload)), payload)


def _offset(payload: bytes) -> int | None:
    found = _stream_offset(payload)
    return None if found is None else int.from_bytes(found, "big", signed=True)


def _without_properties(payload: bytes) -> bytes:
    if len(payload) < _LEAST_HEADER_BYTES:
        return payload  # The library reports the error.
    offset = _stream_offset(payload)
    if offset is None:
        return payload[:12] + b"\x00\x00"
    field = _OFFSET + b"l" + offset
    return payload[:12] + struct.pack(">HI", _HEADERS_FLAG, len(field)) + field


def _stream_offset(payload: bytes) -> bytes | None:
    """The eight bytes of the header `x-stream-offset`, if the message has it."""
    if _OFFSET not in payload:
        return None
    try:
        (flags,) = struct.unpack_from(">H", payload, 12)
        at, more = 14, flags
        while more & 1:  # Another 16 bits of flags follow (2.3.5.2).
            (more,) = struct.unpack_from(">H", payload, at)
            at += 2
        for flag in (_CONTENT_TYPE_FLAG, _CONTENT_ENCODING_FLAG):
            if flags & flag:
                at += 1 + payload[at]
        (size,) = struct.unpack_from(">I", payload, at)
        at += 4
        end = at + size
        while at < end:
            name_end = at + 1 + payload[at]
            name, kind = payload[at:name_end], payload[name_end : name_end + 1]
            at = name_end + 1
            if name == _OFFSET and kind == b"l":
                return payload[at : at + 8] if at + 8 <= end <= len(payload) else None
            if kind in b"SxAF" and kind:
                (length,) = struct.unpack_from(">I", payload, at)
                at += 4 + length
            else:
                at += _SIZES[kind]
    except (struct.error, IndexError, KeyError):
        pass
    return None


def _with_readable_key(payload: bytes) -> bytes:
    """In a `deliver` or `get-ok` whose routing key is not UTF-8, replaces each byte that is not ASCII by `?`."""
    deliver = payload[:4] == _BASIC_DELIVER
    at = 4
    try:
        if deliver:
            at += 1 + payload[at]  # consumer tag
        at += 9  # delivery tag, redelivered
        at += 1 + payload[at]  # exchange
        key = payload[at + 1 : at + 1 + payload[at]]
    except IndexError:
        return payload  # The payload is too short; the library reports the error.
    return payload[: at + 1] + decode_short(key).encode() + payload[at + 1 + len(key) :]
