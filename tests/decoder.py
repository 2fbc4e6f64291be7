"""An independent decoder of streams: the algorithm of the HTML standard, section 9.2.6, written from its text alone.

It shares no code with the bridge. It takes bytes in any pieces and returns what an EventSource would dispatch. It also
records blocks without data: an EventSource ignores them, but some clients make an empty event of them.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Frame:
    event: str
    data: str
    id: str
    retry: int | None

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Decoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._line = ""
        self._after_cr = False
        self._at_start = True
        self._data = ""
        self._type = ""
        self._id_buffer = ""
        self._retry: int | None = None
        self.last_event_id = ""
        self.comments = 0
        self.empty_blocks: list[str] = []
        """The event type of each block without data."""

    def feed(self, chunk: bytes) -> list[Frame]:
        frames = []
        for char in self._utf8.decode(chunk):
            if self._at_start:
                self._at_start = False
                if char == "\ufeff":
                    continue
            if self._after_cr:
                self._after_cr = False
                if char == "\n":
                    continue
            if char in "\r\n":
                self._after_cr = char == "\r"
                frame = self._end_line(self._line)
                self._line = ""
                if frame is not None:
                    frames.append(frame)
            else:
                self._line += char
        return frames

    def _end_line(self, line: str) -> Frame | None:
        if line == "":
            return self._dispatch()
        if line.startswith(":"):
            self.comments += 1
            return None
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ") if colon else ""
        if name == "event":
            self._type = value
        elif name == "data":
            self._data += value + "\n"
        elif name == "id":
            if "\0" not in value:
                self._id_buffer = value
        elif name == "retry" and value and all(char in "0123456789" for char in value):
            self._retry = int(value)
        return None

    def _dispatch(self) -> Frame | None:
        self.last_event_id = self._id_buffer
        data, kind, retry = self._data, self._type, self._retry
        self._data, self._type, self._retry = "", "", None
        if data == "":
            self.empty_blocks.append(kind)
            return None
        return Frame(kind or "message", data.removesuffix("\n"), self.last_event_id, retry)
