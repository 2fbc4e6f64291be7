"""A client's position, as the text that it sends back in Last-Event-ID.

Pure. A cursor is an anchor, an entry of the event log with a few bits of its content, and what was sent of the entries
behind it: the last sixteen events by name, and those before these as a count and a sum for each of its two queues.
Nothing in it depends on a clock or on the order in which the queues delivered. It holds no authority: any site can make
a browser send any Last-Event-ID, so what comes in is read by a strict grammar and used for nothing but where to begin
reading; what may be seen comes from the token alone. An invented anchor costs one read
entry, which does not fit.

    3.1f4a.q83vEj...RWeJq8EjRWeJ            version . offset . check . own . shared . names, oldest first
    3.1f4a.q83vEj.2a:1b..RWeJq8EjRWeJ       42 more were sent by the client's own queue; their sum is 1b (hexadecimal)
    3.1f4a.q83vEj...RWeJq8EjRWeJ.mZ0_xa     and names from before the anchor, which a publisher's retry may repeat
    3.1f4a.q83vEj.~.~.RWeJq8                more were sent, and it is not known which
    0.19b5f0c2a10                           no position in any log: there is none, or it could not be asked

A cursor of version 2 (`2.offset.check.names`) is still read: with `~`, it was not known which others were sent.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

MAX_CHARS = 160

MAX_DIGESTS = 16
"""The log may hold events of different publishers in another order than they arrived live. A cursor names the last
sixteen that were sent: 96 characters."""

DIGEST_CHARS = 6
"""36 bits: an unsent event is mistaken for one of sixteen sent ones with a probability of 2^-32."""

VALUE_BITS = 48
"""Size of an event's number in a sum. Another set of events has the same sum with a probability of 2^-48; one set is
tried for each cursor."""

VALUE_MASK = (1 << VALUE_BITS) - 1

MAX_UNNAMED = 0xFFFF

_UNNAMED = r"(?:~|[1-9a-f][0-9a-f]{0,3}:[0-9a-f]{1,12})?"

_CURSOR = re.compile(
    rf"3\.(?P<offset>[0-9a-f]{{1,16}})\.(?P<check>[A-Za-z0-9_-]{{6}})\.(?P<own>{_UNNAMED})\.(?P<shared>{_UNNAMED})"
    r"\.(?P<names>(?:[A-Za-z0-9_-]{6}){0,16})(?:\.(?P<passed>(?:[A-Za-z0-9_-]{6}){1,16}))?"
)
_CURSOR_2 = re.compile(
    r"2\.([0-9a-f]{1,16})\.([A-Za-z0-9_-]{6})\.(~?)((?:[A-Za-z0-9_-]{6}){0,20})(?:\.((?:[A-Za-z0-9_-]{6}){1,20}))?"
)
_CURSOR_0 = re.compile(r"0\.([0-9a-f]{1,12})")


_URL_SAFE = bytes.maketrans(b"+/", b"-_")  # RFC 4648, section 5.


class InvalidCursor(ValueError):
    """Text that no bridge wrote. It is answered with `bridge.gap`, `unknown`, never with a status."""


def digest(content: bytes) -> str:
    """Six characters of base64url, 36 bits of a hash."""
    return b2a_base64(blake2b(content, digest_size=5).digest())[:DIGEST_CHARS].translate(_URL_SAFE).decode("ascii")


def echo(last_event_id: str | None) -> str | None:
    """What a client sent, if it is a cursor, to be sent back to it."""
    try:
        return str(Cursor.parse(last_event_id)) if last_event_id else None
    except InvalidCursor:
        return None


@dataclass(frozen=True, slots=True)
class Anchor:
    """An entry of the log: its offset, and the digest of its body. A log that was deleted and made again uses the same
    offsets for other bodies."""

    offset: int
    check: str


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Events that were sent behind the anchor and are not named: how many, and the sum of their values."""

    count: int = 0
    total: int = 0


NONE = Unnamed()

BySource = tuple[Unnamed | None, Unnamed | None]
"""Of the client's own queue and of the shared one. None: some may have been sent, and it is not known which."""


def value(content: bytes) -> int:
    """The number of an event in a sum: 48 bits of a hash."""
    return int.from_bytes(blake2b(content, digest_size=VALUE_BITS // 8).digest(), "big")


def encode_unnamed(unnamed: Unnamed | None) -> str:
    if unnamed is None or unnamed.count > MAX_UNNAMED:
        return "~"
    return f"{unnamed.count:x}:{unnamed.total:x}" if unnamed.count else ""


def _read_unnamed(text: str) -> Unnamed | None:
    if text == "~":
        return None
    count, _, total = text.partition(":")
    return Unnamed(int(count, 16), int(total, 16)) if text else NONE


def encode(anchor: Anchor, digests: str, own: str, shared: str, passed: Collection[str]) -> str:
    """The text of a cursor with an anchor, straight from its parts: a busy stream writes one with every event."""
    text = f"3.{anchor.offset:x}.{anchor.check}.{own}.{shared}.{digests}"
    return f"{text}.{''.join(passed)}" if passed else text


@dataclass(frozen=True, slots=True)
class Cursor:
    """
    Args:
        anchor: what is at or before it in the log needs not to be sent; None for a position in no log.
        digests: names of events sent from behind the anchor, oldest first.
        unnamed: what else was sent from behind the anchor, by the queue that brought it.
        passed: names of the last events up to the anchor: a publisher's retry may be after it again. Together
            with `digests` at most MAX_DIGESTS.
        time_ms: for a position in no log, so that no two ids are the same.
    """

    anchor: Anchor | None
    digests: tuple[str, ...] = ()
    unnamed: BySource = (NONE, NONE)
    passed: tuple[str, ...] = ()
    time_ms: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Raises:
            InvalidCursor: whatever else a client sent.
        """
        if (match := _CURSOR.fullmatch(text)) is not None:
            names, passed = match["names"], match["passed"] or ""
            if len(names) + len(passed) <= MAX_DIGESTS * DIGEST_CHARS:
                anchor = Anchor(int(match["offset"], 16), match["check"])
                unnamed = (_read_unnamed(match["own"]), _read_unnamed(match["shared"]))
                return cls(anchor, split(names), unnamed, split(passed))
        if (match := _CURSOR_2.fullmatch(text)) is not None:
            anchor = Anchor(int(match[1], 16), match[2])
            return cls(anchor, split(match[4]), (None, None) if match[3] else (NONE, NONE), split(match[5] or ""))
        if (match := _CURSOR_0.fullmatch(text)) is not None:
            return cls(None, time_ms=int(match[1], 16))
        raise InvalidCursor(f"not a cursor of this bridge ({len(text)} characters)")

    def __str__(self) -> str:
        if self.anchor is None:
            return f"0.{self.time_ms:x}"
        own, shared = map(encode_unnamed, self.unnamed)
        return encode(self.anchor, "".join(self.digests), own, shared, self.passed)


def split(digests: str) -> tuple[str, ...]:
    """The digests that are joined in one text."""
    return tuple(digests[at : at + DIGEST_CHARS] for at in range(0, len(digests), DIGEST_CHARS))
