"""What is let through to the AMQP library of what the broker sends (AMQP 0-9-1, sections 2.3.5 and 4.2).

Pure. The library decodes every property of every message and gives the whole connection up over one that it cannot: a
timestamp in nanoseconds or a header name that is no UTF-8, which the broker takes from anybody. The bridge relies on no
property, so none gets that far: a content header goes on with its size alone (and a stream's offset, which the broker
itself put there), and a routing key that is no text goes on with `?` for what is none.
"""

from __future__ import annotations

import struct

_METHOD, _HEADER = 1, 2
_FRAME_END = 0xCE
_BASIC_DELIVER = b"\x00\x3c\x00\x3c"
_BASIC_GET_OK = b"\x00\x3c\x00\x47"
_HEADERS_FLAG = 1 << 13
_CONTENT_TYPE_FLAG = 1 << 15
_CONTENT_ENCODING_FLAG = 1 << 14
_OFFSET = b"\x0fx-stream-offset"

# Sizes of the values of a field table that have one (RabbitMQ's reading of 4.2.5.5); S, x, A and F say theirs.
_SIZES = {b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"I": 4, b"i": 4, b"f": 4, b"D": 5, b"l": 8, b"d": 8, b"T": 8,
          b"L": 8, b"V": 0}  # fmt: skip


class FrameFilter:
    """A stream of bytes in any pieces in, the same frames with bare content headers out."""

    __slots__ = ("_buffer", "_raw")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._raw = False

    def feed(self, data: bytes) -> bytes:
        buffer = self._buffer
        buffer += data
        if not self._raw and buffer[:1] == b"A":
            self._raw = True  # `AMQP` and a version: the broker speaks another one, and the library says so.
        if self._raw:
            passed, self._buffer = bytes(buffer), bytearray()
            return passed
        parts = []
        start = 0
        while len(buffer) - start >= 7:
            kind, channel, size = struct.unpack_from(">BHI", buffer, start)
            end = start + 7 + size + 1
            if len(buffer) < end:
                break
            if buffer[end - 1] != _FRAME_END:
                # Not a frame. What follows cannot be understood, and the library shall say so.
                self._raw = True
                parts.append(bytes(buffer[start:]))
                start = len(buffer)
                break
            payload = bytes(buffer[start + 7 : end - 1])
            if kind == _HEADER:
                payload = _bare_header(payload)
            elif kind == _METHOD and payload[:4] in (_BASIC_DELIVER, _BASIC_GET_OK) and not payload.isascii():
                payload = _readable_key(payload)
            parts.append(struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce")
            start = end
        del buffer[:start]
        return b"".join(parts)


def _bare_header(payload: bytes) -> bytes:
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
                return payload[at : at + 8]
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
    if deliver:
        at += 1 + payload[at]  # consumer tag
    at += 9  # delivery tag, redelivered
    at += 1 + payload[at]  # exchange
    key = payload[at + 1 : at + 1 + payload[at]]
    try:
        key.decode("utf-8")
    except UnicodeDecodeError:
        key = bytes(byte if byte < 0x80 else ord("?") for byte in key)
        return payload[: at + 1] + key + payload[at + 1 + len(key) :]
    return payload
