"""A client's place, as the text that it sends back in Last-Event-ID.

Pure. A cursor is an anchor, an entry of the event log with a few bits of its content, and the digests of what was sent
of the entries behind it. Nothing in it depends on a clock. It holds no authority: any site can make a browser send any
Last-Event-ID, so what comes in is read by a strict grammar and used for nothing but where to begin reading; what may be
seen comes from the token alone. And whoever invents an anchor makes us read one entry, which does not fit.

    2.1f4a.q83vEj.RWeJq8EjRWeJ          version . offset, hexadecimal . check . digests, oldest first
    2.1f4a.q83vEj.RWeJq8EjRWeJ.mZ0_xa   and, of what stands before the anchor, some that may stand behind it once more
    2.1f4a.q83vEj.~RWeJq8...            more than twenty were sent behind the anchor; these are the last
    0.19b5f0c2a10                       no place in any log: there is none, or it could not be asked
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

MAX_CHARS = 160

MAX_DIGESTS = 20
"""Events of different publishers may stand in the log in another order than they came live; what was sent of the last
twenty can be told by name. 120 characters."""

DIGEST_CHARS = 6
"""36 bits: the chance that an unsent event is taken for one of twenty sent ones is one in three thousand million."""

_CURSOR = re.compile(
    r"2\.([0-9a-f]{1,16})\.([A-Za-z0-9_-]{6})\.(~?)((?:[A-Za-z0-9_-]{6}){0,20})(?:\.((?:[A-Za-z0-9_-]{6}){1,20}))?"
    r"|0\.[0-9a-f]{1,12}"
)


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
    """An entry of the log: its offset, and the digest of its body. A log that was deleted and made anew uses the same
    offsets again, for other bodies."""

    offset: int
    check: str


def encode(anchor: Anchor, digests: str, truncated: bool, passed: Collection[str]) -> str:
    """The text of a cursor with an anchor, straight from its parts: a busy stream writes one with every event."""
    text = f"2.{anchor.offset:x}.{anchor.check}.{'~' if truncated else ''}{digests}"
    return f"{text}.{''.join(passed)}" if passed else text


@dataclass(frozen=True, slots=True)
class Cursor:
    """
    Args:
        anchor: what is at or before it in the log needs not to be sent; None for a place in no log.
        digests: of events sent from behind the anchor, oldest first.
        truncated: whether more were sent than `digests` has.
        passed: digests of the last events up to the anchor: a publisher's retry may stand behind it once more. Together
            with `digests` at most MAX_DIGESTS.
        time_ms: for a place in no log, so that no two ids are the same.
    """

    anchor: Anchor | None
    digests: tuple[str, ...] = ()
    truncated: bool = False
    passed: tuple[str, ...] = ()
    time_ms: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Raises:
            InvalidCursor: whatever else a client sent.
        """
        match = _CURSOR.fullmatch(text)
        if match is None or len(match[4] or "") + len(match[5] or "") > MAX_DIGESTS * DIGEST_CHARS:
            raise InvalidCursor(f"not a cursor of this bridge ({len(text)} characters)")
        if match[1] is None:
            return cls(None, time_ms=int(text[2:], 16))
        return cls(Anchor(int(match[1], 16), match[2]), split(match[4]), match[3] == "~", split(match[5] or ""))

    def __str__(self) -> str:
        if self.anchor is None:
            return f"0.{self.time_ms:x}"
        return encode(self.anchor, "".join(self.digests), self.truncated, self.passed)


def split(digests: str) -> tuple[str, ...]:
    """The digests that stand in one text, side by side."""
    return tuple(digests[at : at + DIGEST_CHARS] for at in range(0, len(digests), DIGEST_CHARS))
