"""Makes events as the bridge has them after it has read a message."""

from bridge.event import Event
from bridge.service.streams.streamevent import StreamEvent


def make_event(number: int, *, size: int = 0, event_type: str = "test.done", source: str = "/test") -> StreamEvent:
    from_source = "" if source == "/test" else f'"source":"{source}",'
    text = f'{{"id":"e{number}",{from_source}"pad":"{"x" * size}"}}'
    return StreamEvent(Event(id=f"e{number}", source=source, type=event_type, text=text.encode()))
