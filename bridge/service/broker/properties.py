"""Reads the properties of a message from its content header (AMQP 0-9-1, sections 2.3.5.2 and 4.2.5).

Pure. Properties come from any publisher, so nothing here raises. What cannot be read is left out, and everything behind
it too: the fields of a table have no other boundaries than their own sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cached_property
from operator import itemgetter
from typing import Final, NamedTuple, Self

MAX_HEADERS = 64
MAX_HEADERS_BYTES = 16_384
"""Headers that are read: their number, and the bytes of their names and texts. CloudEvents names a dozen attributes."""

_FIELDS_AT = 14  # After class, weight, size of the body, flags (2.3.5.2).
_FIRST_SECOND = -62_135_596_800  # 0001-01-01T00:00:00Z
_LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59Z
_DAYS_OF_FOUR_HUNDRED_YEARS = 146_097

CONTENT_TYPE, CONTENT_ENCODING, HEADERS, MESSAGE_ID, TIMESTAMP, APP_ID = (1 << bit for bit in (15, 14, 13, 7, 6, 3))
"""Flags of the properties that say what form a message has (table of section 1.8.2, from the highest bit on)."""

# The properties in the order in which a content header has them, by flag, with the form of each.
_PROPERTIES = (
    (1 << 15, "content_type", "text"),
    (1 << 14, "content_encoding", "text"),
    (1 << 13, "headers", "table"),
    (1 << 12, "delivery_mode", "octet"),
    (1 << 11, "priority", "octet"),
    (1 << 10, "correlation_id", "text"),
    (1 << 9, "reply_to", "text"),
    (1 << 8, "expiration", "text"),
    (1 << 7, "message_id", "text"),
    (1 << 6, "timestamp", "time"),
    (1 << 5, "type", "text"),
    (1 << 4, "user_id", "text"),
    (1 << 3, "app_id", "text"),
)

# Fixed-size values of a table, by type (4.2.5.5 as RabbitMQ reads it). The second part: how an integer is read.
_FIXED: Final[Mapping[bytes, tuple[int, str]]] = {
    b"t": (1, ""),
    b"b": (1, ">b"),
    b"B": (1, ">B"),
    b"s": (2, ">h"),
    b"u": (2, ">H"),
    b"I": (4, ">i"),
    b"i": (4, ">I"),
    b"l": (8, ">q"),
    b"L": (8, ">q"),
    b"T": (8, ""),
    b"f": (4, ""),
    b"d": (8, ""),
    b"D": (5, ""),
    b"V": (0, ""),
}

Value = str | bool | int


class Properties(NamedTuple):
    """The properties that the bridge reads; empty or None where a message has none."""

    content_type: str = ""
    content_encoding: str = ""
    message_id: str = ""
    timestamp: int | None = None
    """Seconds since 1970."""
    type: str = ""
    app_id: str = ""
    headers: tuple[tuple[str, Value], ...] = ()
    """Names and values, sorted by name, because a stream may change their order. Without the headers that RabbitMQ adds
    (`x-…`), and without values that are lists, tables, floats, decimals, or bytes that are not text."""

    @property
    def time(self) -> str | None:
        """The timestamp as RFC 3339; None without one, and outside of the years 1 to 9999."""
        return None if self.timestamp is None else write_time(self.timestamp)

    @classmethod
    def read(cls, header: bytes) -> Self:
        """
        Args:
            header: the payload of a content header's frame.
        """
        found: dict[str, object] = {}
        try:
            (flags,) = struct.unpack_from(">H", header, 12)
            at, more = _FIELDS_AT, flags
            while more & 1:  # Another 16 bits of flags follow.
                (more,) = struct.unpack_from(">H", header, at)
                at += 2
            for flag, name, form in _PROPERTIES:
                if not flags & flag:
                    continue
                if form == "text":
                    end = at + 1 + header[at]
                    found[name] = decode_short(header[at + 1 : end])
                    at = end
                elif form == "table":
                    end = at + 4 + int.from_bytes(header[at : at + 4], "big")
                    found[name] = _read_headers(header[at + 4 : end])
                    at = end
                elif form == "time":
                    found[name] = struct.unpack_from(">q", header, at)[0]
                    at += 8
                else:
                    at += 1
        except (struct.error, IndexError):
            pass
        return cls(**{name: value for name, value in found.items() if name in cls._fields})  # type: ignore[arg-type]


class MessageBody(bytes):
    """A message's body with its properties, which are read when somebody asks for them."""

    _source: bytes | Properties

    def __new__(cls, body: bytes, source: bytes | Properties) -> Self:
        """
        Args:
            source: the payload of the content header, or properties that were read before.
        """
        made = super().__new__(cls, body)
        made._source = source
        return made

    @cached_property
    def properties(self) -> Properties:
        return Properties.read(self._source) if isinstance(self._source, bytes) else self._source


NO_PROPERTIES = Properties()

_FORM_FLAGS = CONTENT_TYPE | CONTENT_ENCODING | HEADERS | MESSAGE_ID | TIMESTAMP | APP_ID
STRUCTURED = b"application/cloudevents+json"
"""The content type of a structured event. It is the first property, so it begins at byte 15 of the header."""


def with_properties(body: bytes, header: bytes) -> bytes:
    """The body, as a `MessageBody` if its properties may say what its form is. Those of a structured event do not.

    Args:
        header: the payload of the content header, of at least 14 bytes.
    """
    flags = header[12] << 8 | header[13]
    if not flags & _FORM_FLAGS:
        return body
    # The first property, and exactly this text or with parameters behind it.
    if flags & CONTENT_TYPE and flags & 1 == 0 and header[15:43] == STRUCTURED:
        return body
    return MessageBody(body, header)


def properties_of(body: bytes) -> Properties:
    return body.properties if isinstance(body, MessageBody) else NO_PROPERTIES


def write_time(seconds: int) -> str | None:
    """RFC 3339 in UTC; None outside of the years 1 to 9999.

    Args:
        seconds: since 1970.
    """
    if not _FIRST_SECOND <= seconds <= _LAST_SECOND:
        return None
    days, second = divmod(seconds, 86_400)
    # Years that begin with March have their leap day at the end, and so the same months in every year.
    periods, day = divmod(days + 719_468, _DAYS_OF_FOUR_HUNDRED_YEARS)
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5 - 1
    year += 400 * periods + (month >= 10)
    month += 3 if month < 10 else -9
    return f"{year:04}-{month:02}-{day:02}T{second // 3_600:02}:{second // 60 % 60:02}:{second % 60:02}Z"


def decode_short(data: bytes) -> str:
    """A short string (4.2.5.3). If it is not UTF-8, with `?` in place of each byte that is not ASCII."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 0x80 else "?" for byte in data)


def _read_headers(table: bytes) -> tuple[tuple[str, Value], ...]:
    found: list[tuple[str, Value]] = []
    at, left = 0, MAX_HEADERS_BYTES
    try:
        while at < len(table) and len(found) < MAX_HEADERS:
            name_end = at + 1 + table[at]
            name, kind = decode_short(table[at + 1 : name_end]), table[name_end : name_end + 1]
            at = name_end + 1
            value: Value | None = None
            if kind in (b"S", b"x", b"A", b"F"):
                end = at + 4 + struct.unpack_from(">I", table, at)[0]
                if end > len(table):
                    break
                if kind in (b"S", b"x"):
                    value = _whole_text(table[at + 4 : end])
            else:
                size, form = _FIXED[kind]
                end = at + size
                if end > len(table):
                    break
                if form:
                    (value,) = struct.unpack_from(form, table, at)
                elif kind == b"t":
                    value = table[at] != 0
                elif kind == b"T":
                    value = write_time(struct.unpack_from(">q", table, at)[0])
            at = end
            if value is not None and not name.startswith("x-"):
                left -= len(name) + (len(value) if isinstance(value, str) else 8)
                if left < 0:
                    break
                found.append((name, value))
    except (struct.error, IndexError, KeyError):
        pass
    return tuple(sorted(found, key=itemgetter(0)))


def _whole_text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
