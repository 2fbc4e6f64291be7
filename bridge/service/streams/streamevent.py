"""An event as all streams of a process share it: its frame, written once, and its names in cursors.

Pure. It does not know which connections send it.
"""

from __future__ import annotations

import json

from bridge.event import Event
from bridge.routing import split_key
from bridge.service.streams import sse
from bridge.service.streams.cursor import hash_event


class StreamEvent:
    """A validated event with its bytes on the wire. Immutable."""

    __slots__ = ("_routing_key", "_unnamed_at", "digest", "id", "key", "named", "type", "value")

    def __init__(self, event: Event, key: str = "") -> None:
        """
        Args:
            key: its routing key.

        Raises:
            ValueError: the event's text holds CR, LF or NUL, which no JSON encoder writes.
        """
        self._routing_key = key
        self.id = event.id
        self.type = event.type
        self.key, self.digest, self.value = hash_event(event.source, event.id)
        """`key`: the same for each publication of this event. `digest`: how a cursor names an event that was sent.
        `value`: a cursor has the sum of these for events that it does not name."""
        line = sse.encode_type(event.type)
        self.named = line + sse.encode_data(event.text)
        """The frame after its `id:` line, with an `event:` line."""
        self._unnamed_at = len(line)

    @property
    def plain(self) -> bytes:
        """The same without the `event:` line, for `named=false`."""
        return self.named[self._unnamed_at :]

    def with_audience(self, *, named: bool) -> bytes:
        """The frame for `audience=true`: the event has one more attribute. Not cached: few streams ask for it."""
        audience = json.dumps(str(split_key(self._routing_key)[0]), ensure_ascii=False).encode()
        text = b'%b,"audience":%b}' % (self.text[:-1], audience)
        return (sse.encode_type(self.type) if named else b"") + sse.encode_data(text)

    @property
    def text(self) -> bytes:
        """The CloudEvent as one line of JSON."""
        return sse.decode_data(self.plain)

    def __repr__(self) -> str:
        return f"<StreamEvent {self.id} {self.type}>"
