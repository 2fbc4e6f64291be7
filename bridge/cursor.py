"""A client's place, as the text that it sends back in Last-Event-ID.

Pure. A cursor is a time and the digests of the last few events that were sent before it. It holds no authority: any
site can make a browser send any Last-Event-ID, so what comes in is read by a strict grammar and used for nothing but
where to begin reading; what may be seen comes from the token alone.

    1.19b5f0c2a10.q83vEjRW...      version . time in ms, hexadecimal . digests of four characters, oldest first
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

MAX_CHARS = 160

MAX_DIGESTS = 16
"""Events of different publishers may stand in the log in another order than they came live; what was sent of the last
sixteen can be told by name. 64 characters."""

_CURSOR = re.compile(r"1\.([0-9a-f]{1,12})\.((?:[A-Za-z0-9_-]{4}){0,16})")


class InvalidCursor(ValueError):
    """Text that no bridge wrote. It is answered with `bridge.gap`, `unknown`, never with a status."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """`time_ms`: when the bridge received the last event sent, by its own clock, in ms since 1970. `digests`: of the
    last events sent, oldest first, four characters each, joined."""

    time_ms: int
    digests: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Raises:
            InvalidCursor: whatever else a client sent.
        """
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise InvalidCursor(f"not a cursor of this bridge ({len(text)} characters)")
        return cls(int(match[1], 16), match[2])

    def __str__(self) -> str:
        return f"1.{self.time_ms:x}.{self.digests}"
