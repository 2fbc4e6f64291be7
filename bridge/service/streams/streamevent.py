"""An event as all streams of a process share it: its frame, made once, and its names in cursors.

Pure. Knows nothing of the connections that send it.
"""

from __future__ import annotations

from bridge.event import Event
from bridge.service.streams import sse
from bridge.service.streams.cursor import digest, value


class StreamEvent:
    """A validated event with its bytes on the wire. Not to be changed."""

    __slots__ = ("_unnamed_at", "digest", "id", "named", "type", "value")

    def __init__(self, event: Event) -> None:
        """
        Raises:
            ValueError: the event's text holds CR, LF or NUL, which no JSON encoder writes.
        """
        self.id = event.id
        self.type = event.type
        name = event.id.encode("ascii")
        self.digest = digest(name)
        """Of the id: how a cursor names an event that was sent."""
        self.value = value(name)
        """Of the id: what a cursor adds up of events that it does not name."""
        line = sse.encode_type(event.type)
        self.named = line + sse.encode_data(event.text)
        """The frame after its `id:` line, with an `event:` line."""
        self._unnamed_at = len(line)

    @property
    def plain(self) -> bytes:
        """The same without the `event:` line, for `named=false`."""
        return self.named[self._unnamed_at :]

    @property
    def text(self) -> bytes:
        """The CloudEvent as one line of JSON."""
        return sse.decode_data(self.plain)

    def __repr__(self) -> str:
        return f"<StreamEvent {self.id} {self.type}>"
