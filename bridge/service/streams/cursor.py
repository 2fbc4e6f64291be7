"""A client's position, as the text that it sends back in Last-Event-ID.

Pure. A cursor has two parts:

- The position (anchor): an entry of the event log, as its offset and a few bits of its content.
- The events that were sent after the position: the last sixteen by name, and the others as a count and a sum for each
  of the client's two queues.

Nothing in it depends on a clock or on the order in which the queues delivered. It holds no authority: any site can make
a browser send any Last-Event-ID. So a strict grammar reads it, and the bridge uses it only to begin the read of the
log. The token alone decides which events a client may see. An invented position costs one entry read, whose digest
differs.

    3.1f4a.q83vEj...RWeJq8EjRWeJ            version . offset . check . own . shared . names, oldest first
    3.1f4a.q83vEj.2a:1b..RWeJq8EjRWeJ       42 more were sent by the client's own queue; their sum is 1b (hexadecimal)
    3.1f4a.q83vEj...RWeJq8EjRWeJ.mZ0_xa     and names from before the anchor, which a publisher's retry may repeat
    3.1f4a.q83vEj.~.~.RWeJq8                more were sent, and the bridge does not know which
    0.19b5f0c2a10                           no position in any log: there is none, or it could not be asked

A cursor of version 2 (`2.offset.check.names`) is still read. Its `~` means that others were sent, too.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Self

MAX_CHARS = 160

MAX_DIGESTS = 16
"""The log may hold events of different publishers in another order than they arrived live. A cursor names the last
sixteen that were sent: 96 characters."""

DIGEST_CHARS = 6
"""36 bits: an unsent event is mistaken for one of sixteen sent ones with a probability of 2^-32."""

VALUE_BITS = 48
"""Size of an event's number in a sum. Another set of events has the same sum with a probability of 2^-48. One set is
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
    """Text that no bridge wrote. The answer is `bridge.gap`, `unknown`, never an HTTP error."""


def digest(content: bytes) -> str:
    """Six characters of base64url, 36 bits of a hash."""
    return _name(blake2b(content, digest_size=5).digest())


def _name(hashed: bytes) -> str:
    return b2a_base64(hashed)[:DIGEST_CHARS].translate(_URL_SAFE).decode("ascii")


def echo(last_event_id: str | None) -> str | None:
    """The client's Last-Event-ID, to be sent back to it; None if it is not a cursor."""
    try:
        return str(Cursor.parse(last_event_id)) if last_event_id else None
    except InvalidCursor:
        return None


class Anchor(NamedTuple):
    """An entry of the log: its offset, and the digest of its body. After a log was deleted and declared again, the same
    offsets have other bodies."""

    offset: int
    check: str


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Events that were sent after the position and are not named: how many, and the sum of their values."""

    count: int = 0
    total: int = 0


NONE = Unnamed()

BySource = tuple[Unnamed | None, Unnamed | None]
"""For the client's own queue and for the shared one. None: events may have been sent, and the bridge does not know
which."""


def hash_event(source: str, event_id: str) -> tuple[bytes, str, int]:
    """Hashes what identifies an event. Returns its key (128 bits), its digest in cursors (the first 36 of these bits),
    and its number in sums (the last 48)."""
    # An id contains no space, so no other pair has the same text.
    key = blake2b(f"{event_id} {source}".encode(), digest_size=16).digest()
    return key, _name(key[:5]), int.from_bytes(key[-VALUE_BITS // 8 :], "big")


def encode_unnamed(unnamed: Unnamed | None) -> str:
    if unnamed is None or unnamed.count > MAX_UNNAMED:
        return "~"
    return f"{unnamed.count:x}:{unnamed.total:x}" if unnamed.count else ""


def _read_unnamed(text: str) -> Unnamed | None:
    if text == "~":
        return None
    count, _, total = text.partition(":")
    return Unnamed(int(count, 16), int(total, 16)) if text else NONE


def encode(anchor: Anchor, digests: str, own: str, shared: str, passed: str) -> str:
    """The text of a cursor with a position. The parts are text already: a busy stream writes one with every event."""
    text = f"3.{anchor.offset:x}.{anchor.check}.{own}.{shared}.{digests}"
    return f"{text}.{passed}" if passed else text


@dataclass(frozen=True, slots=True)
class Cursor:
    """
    Args:
        anchor: the position. The client needs no entry of the log up to it. None without a log.
        digests: names of events that were sent after the position, oldest first.
        unnamed: the other events that were sent after the position, by the queue that delivered them.
        passed: names of the last events up to the position, which a publisher's retry may repeat after it. Together
            with `digests` at most MAX_DIGESTS.
        time_ms: without a log: when the cursor was made (ms since 1970), so that no two ids are equal.
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
            InvalidCursor: the text is not a cursor.
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
        return encode(self.anchor, "".join(self.digests), own, shared, "".join(self.passed))


def split(digests: str) -> tuple[str, ...]:
    """The digests of a text that joins them."""
    return tuple(digests[at : at + DIGEST_CHARS] for at in range(0, len(digests), DIGEST_CHARS))
