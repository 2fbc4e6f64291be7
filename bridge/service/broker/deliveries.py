"""Deliveries, cut out of what the broker sends (AMQP 0-9-1, sections 2.3.5 and 4.2).

Pure: bytes in any pieces go in; deliveries on the channels that were taken go to their callbacks; every other frame
comes out, whole and unchanged, for the AMQP library. Through aiormq a delivery costs ten times as much: objects for its
three frames, two tasks, a queue.

What is not taken goes on without the properties of messages. The library decodes every one of them and gives the whole
connection up over one that it cannot: a timestamp in nanoseconds or a header name that is no UTF-8, which the broker
takes from anybody. The bridge relies on no property, so none gets that far: a content header goes on with its size
alone (and a stream's offset, which the broker itself put there), and a routing key that is no text goes on with `?` for
what is none.

A body that is larger than `max_body` is not gathered. Its size is known from the content header, before its first byte
comes. The callback gets a `Cut`, which has the beginning and the size.

Bytes that are not AMQP, frames out of their order, and frames that are larger than the broker and we agreed on, end the
parsing here. They go on to the library behind a frame that it refuses, so the library ends the connection. No callback
gets anything of them, and `feed` raises nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from bridge.event import Cut

_METHOD, _HEADER, _BODY = 1, 2, 3
_KINDS = (_METHOD, _BODY, _HEADER, 8)  # And the heartbeat (4.2.7).
_BASIC = 60  # The class of all content.
_LEAST_HEADER_BYTES = 14  # Class, weight, size of the body, flags (2.3.5.2).
MAX_BODY_BYTES = 131_072
"""Bodies up to this size are gathered, unless `Deliveries` is given another limit."""

KEPT_BYTES = 4_096
"""Of a larger body, this much of its beginning is kept."""

FIRST_FRAME_BYTES = 131_072
"""Largest frame until the broker has named its own limit (`connection.tune`, 1.4.2.5). RabbitMQ's default for it."""

HEADER_FRAMES = 8
"""A content header may be this many times larger than the agreed frame: RabbitMQ adds headers such as `x-death` to it,
and does not split it. With the default this is 1 MiB."""

UNLIMITED_BYTES = 1 << 29
"""Largest frame where the broker has named no limit. RabbitMQ has no larger message (512 MiB)."""

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

_FRAME = struct.Struct(">BHI")  # Type, channel, size of the payload; 4.2.3.
_CONTENT = struct.Struct(">BHIHHQ")  # The same of a content header's frame, then class, weight, size of the body.
_HEAD = struct.Struct(">HHQ")  # A content header's payload: class, weight, size of the body.
_DELIVER = struct.Struct(">QBB")  # Behind the consumer's tag: delivery tag, redelivered, length of the exchange.
_ACK = struct.Struct(">BHIHHQBB")

# Sizes of the values of a field table that have one (RabbitMQ's reading of 4.2.5.5); S, x, A and F say theirs.
_SIZES = {b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4, b"D": 5, b"l": 8, b"d": 8, b"T": 8,
          b"L": 8, b"V": 0}  # fmt: skip

_NO_FRAME = b"\x00\x00\x00\x00\x00\x00\x00\xce"
"""A frame of a kind that does not exist. The library refuses it as soon as it reads it."""

HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
"""A heartbeat's frame (4.2.7)."""


class NotAmqp(Exception):
    """The broker, or a program in its place, sent bytes that are not AMQP 0-9-1. The connection ends."""


class _Unreadable(Exception):
    """From here on the bytes are not AMQP. Does not leave this file."""


Sink = Callable[[bytes, str, bytes, int | None], None]
"""Called with the consumer's tag, the routing key, the body, and the offset if the queue is a stream."""


class _Open:
    """A delivery whose frames have not all come."""

    __slots__ = ("delivery_tag", "is_cut", "key", "missing", "offset", "parts", "room", "size", "tag")

    def __init__(self, tag: bytes, delivery_tag: int, key: bytes) -> None:
        self.tag = tag
        self.delivery_tag = delivery_tag
        self.key = key
        self.size = self.missing = -1  # Until the content header says it.
        self.offset: int | None = None
        self.is_cut = False
        self.room = 0
        """Of a body that is cut, so many more bytes are kept."""
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
        return Cut(body, self.size) if self.is_cut else body


class Deliveries:
    """One connection's bytes, from the broker's greeting on.

    Args:
        max_body: larger bodies are not gathered; of them a `Cut` is handed on.
    """

    __slots__ = ("_at_once", "_has_begun", "_max_frame", "_max_header", "_newest", "_open", "_pieces",
                 "_raw", "_sinks", "_skipped", "_to_skip", "_wanted", "faults", "max_body", "unacked")  # fmt: skip

    def __init__(self, *, max_body: int = MAX_BODY_BYTES) -> None:
        self._pieces: list[bytes] = []
        """A frame of which not all has come."""
        self._wanted = 0
        """So many bytes more have to come before it can be read on."""
        self._skipped = 0
        """The channel of a body's frame that is not gathered."""
        self._to_skip = 0
        """So many bytes of it have to come, its end mark included; 0 if there is no such frame."""
        self.max_body = max_body
        self._limit_frames(FIRST_FRAME_BYTES)
        self._has_begun = False
        self._raw = False
        self._sinks: dict[int, Sink] = {}
        self._open: dict[int, _Open] = {}
        self._newest: dict[int, int] = {}  # By channel, the newest delivery that was handed to its callback.
        self.unacked = 0
        """Deliveries that were handed to callbacks since the acks were last taken."""
        self.faults: list[Exception] = []
        """What callbacks have raised; the deliveries after it went on. Or `NotAmqp`, once: nothing is cut out after it.
        The caller logs them and clears it."""

    def take(self, channel: int, sink: Sink) -> None:
        """From here on the channel's deliveries go to `sink`, until the channel is closed."""
        self._sinks[channel] = sink

    def drop(self, channel: int, sink: Sink) -> None:
        """The channel's deliveries go nowhere from here on, and are not acknowledged.

        To be called before the channel is closed from our side: an ack behind the close would close the connection.
        Where the broker has closed it, its number may be another consumer's by now, which keeps it.
        """
        if self._sinks.get(channel) is sink:
            self._sinks[channel] = _nowhere
            self._newest.pop(channel, None)

    @property
    def takes(self) -> bool:
        """Whether any channel has been taken; before that there is nothing that could be cut out."""
        return bool(self._sinks)

    def take_acks(self) -> bytes:
        """The frames that acknowledge all that was handed on: a `basic.ack`, `multiple`, for each channel."""
        acks = b"".join(
            _ACK.pack(_METHOD, channel, 13, 60, 80, tag, 1, _FRAME_END) for channel, tag in self._newest.items()
        )
        self._newest.clear()
        self.unacked = 0
        return acks

    @property
    def buffered(self) -> int:
        """Bytes that are held until the rest of their frame or of their body has come."""
        parts = [*self._pieces, *(part for delivery in self._open.values() for part in delivery.parts)]
        return sum(map(len, parts))

    def feed(self, data: bytes) -> bytes:
        """Returns what the library shall read. Raises nothing, whatever the bytes are."""
        if self._pieces:
            self._pieces.append(data)
            self._wanted -= len(data)
            if self._wanted > 0:
                return b""  # Joined once, and not for each piece.
            data = b"".join(self._pieces)
            self._pieces = []
        if not self._has_begun and data:
            self._has_begun = True
            # As `AMQP` and a version: the broker speaks another one, and the library says so.
            self._raw = data[0] not in _KINDS
        if self._raw:
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
                if end > size:  # The rest of it has not come yet.
                    if kind == _BODY and self._may_skip(channel, length):
                        self._open[channel].add(data[at + 7 :])
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
                    passed.append(_bare(kind, channel, payload))
                elif kind == _METHOD:
                    method = data[at + 7 : at + 11]
                    if method == _BASIC_DELIVER:
                        end = self._deliver(data, at, end, size, channel)
                    else:
                        if method in (_CHANNEL_CLOSE, _CHANNEL_CLOSE_OK):
                            # Its number may be another channel's next.
                            del sinks[channel]
                            self._open.pop(channel, None)
                            self._newest.pop(channel, None)
                        passed.append(data[at:end])
                else:
                    self._go_on(kind, channel, data[at + 7 : end - 1])
                at = end
            if at < size and data[at] not in _KINDS:
                raise _Unreadable
        except _Unreadable as error:
            self._raw = True  # What follows cannot be understood either.
            self.faults.append(NotAmqp(f"the broker sent what is not AMQP: {str(error) or data[at : at + 40]!r}"))
            # The library reads much that is not AMQP: it takes a string that ends behind its frame for a shorter one,
            # forgets a frame that comes out of order, and waits for all of a frame, however large it is.
            passed.append(_NO_FRAME + data[at:])
            self._to_skip, at = 0, size
        if at < size:
            self._pieces = [data[at:]]
            left = size - at
            self._wanted = 8 - left if left < 8 else _FRAME.unpack_from(data, at)[2] + 8 - left
        return b"".join(passed)

    def _limit_frames(self, limit: int) -> None:
        self._max_frame = limit
        self._max_header = min(HEADER_FRAMES * limit, UNLIMITED_BYTES)
        self._at_once = min(limit, self.max_body)

    def _tune(self, payload: bytes) -> None:
        """The library agrees to the broker's limit, whatever it is; 0 means that there is none."""
        if len(payload) >= 10:
            self._limit_frames(min(int.from_bytes(payload[6:10], "big") or UNLIMITED_BYTES, UNLIMITED_BYTES))

    def _may_skip(self, channel: int, length: int) -> bool:
        """Whether this frame is of a body that is not gathered, and as large as it may be."""
        delivery = self._open.get(channel)
        return delivery is not None and delivery.is_cut and length <= delivery.missing

    def _skip(self, data: bytes) -> int:
        """Passes over the rest of a body's frame. Returns where the next frame begins.

        Raises:
            _Unreadable: the frame does not end where it should.
        """
        channel, delivery = self._skipped, self._open[self._skipped]
        here = min(self._to_skip, len(data))
        if here < self._to_skip:
            delivery.add(data)
        elif data[here - 1] != _FRAME_END:
            raise _Unreadable
        else:
            delivery.add(data[: here - 1])
            self._hand_on_if_complete(channel, delivery)
        self._to_skip -= here
        return here

    def _deliver(self, data: bytes, at: int, end: int, size: int, channel: int) -> int:
        """Reads a `deliver`, and the frames behind it if they are there. Returns where what it has read ends.

        Raises:
            _Unreadable: it is not a `deliver`, or another one is not complete on its channel.
        """
        try:
            tag_end = at + 12 + data[at + 11]
            delivery_tag, _, exchange_size = _DELIVER.unpack_from(data, tag_end)
            key_at = tag_end + 10 + exchange_size
            key_end = key_at + 1 + data[key_at]
        except (IndexError, struct.error):
            raise _Unreadable from None
        # The key is the last argument. So each string before it ends within the frame, too.
        if key_end != end - 1 or (self._open and channel in self._open):
            raise _Unreadable
        tag, key = data[at + 12 : tag_end], data[key_at + 1 : key_end]
        # Nearly always the rest is there too, in one header and one body.
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
                and body_size <= self._at_once
                and data[header_end - 1] == _FRAME_END == data[body_end - 1]
                and (not body_size or _FRAME.unpack_from(data, header_end) == (_BODY, channel, body_size))
            ):
                offset = _offset(data[end + 7 : header_end - 1]) if length > _LEAST_HEADER_BYTES else None
                body = data[header_end + 7 : body_end - 1] if body_size else b""
                self._hand_on(channel, tag, delivery_tag, key, body, offset)
                return body_end
        self._open[channel] = _Open(tag, delivery_tag, key)
        return end

    def _go_on(self, kind: int, channel: int, payload: bytes) -> None:
        """Reads a frame of a delivery that did not come in one piece.

        Raises:
            _Unreadable: it is out of its order, or not a frame of this kind. It is not of a message that the library
                asked for: there is none on a channel that was taken.
        """
        delivery = self._open.get(channel)
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
            delivery.offset = _offset(payload)
        elif kind == _BODY and size <= delivery.missing:
            delivery.add(payload)
        else:
            raise _Unreadable
        self._hand_on_if_complete(channel, delivery)

    def _hand_on_if_complete(self, channel: int, delivery: _Open) -> None:
        if delivery.missing == 0:
            del self._open[channel]
            self._hand_on(channel, delivery.tag, delivery.delivery_tag, delivery.key, delivery.body, delivery.offset)

    def _hand_on(
        self, channel: int, tag: bytes, delivery_tag: int, key: bytes, body: bytes, offset: int | None
    ) -> None:
        sink = self._sinks[channel]
        if sink is _nowhere:
            return
        self._newest[channel] = delivery_tag
        self.unacked += 1
        try:
            text = key.decode()
        except UnicodeDecodeError:
            text = _text(key)
        try:
            sink(tag, text, body, offset)
        except Exception as fault:  # noqa: BLE001
            self.faults.append(fault)


def _nowhere(tag: bytes, routing_key: str, body: bytes, offset: int | None) -> None: ...


def _bare(kind: int, channel: int, payload: bytes) -> bytes:
    if kind == _HEADER:
        payload = _bare_header(payload)
    elif kind == _METHOD and payload[:4] in (_BASIC_DELIVER, _BASIC_GET_OK) and not payload.isascii():
        payload = _readable_key(payload)
    return b"%b%b\xce" % (_FRAME.pack(kind, channel, len(payload)), payload)


def _offset(payload: bytes) -> int | None:
    found = _stream_offset(payload)
    return None if found is None else int.from_bytes(found, "big", signed=True)


def _text(key: bytes) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else "?" for byte in key)


def _bare_header(payload: bytes) -> bytes:
    if len(payload) < _LEAST_HEADER_BYTES:
        return payload  # The library says so.
    offset = _stream_offset(payload)
    if offset is None:
        return payload[:12] + b"\x00\x00"
    field = _OFFSET + b"l" + offset
    return payload[:12] + struct.pack(">HI", _HEADERS_FLAG, len(field)) + field


def _stream_offset(payload: bytes) -> bytes | None:
    """The eight bytes of the header `x-stream-offset`, where there is one."""
    if _OFFSET not in payload:
        return None
    try:
        (flags,) = struct.unpack_from(">H", payload, 12)
        at, more = 14, flags
        while more & 1:  # Another word of flags follows (2.3.5.2).
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


def _readable_key(payload: bytes) -> bytes:
    """The routing key is the last short string of `deliver`; what is no UTF-8 in it becomes `?`, byte for byte."""
    deliver = payload[:4] == _BASIC_DELIVER
    at = 4
    try:
        if deliver:
            at += 1 + payload[at]  # consumer tag
        at += 9  # delivery tag, redelivered
        at += 1 + payload[at]  # exchange
        key = payload[at + 1 : at + 1 + payload[at]]
    except IndexError:
        return payload  # It ends too early; the library shall judge.
    return payload[: at + 1] + _text(key).encode() + payload[at + 1 + len(key) :]
