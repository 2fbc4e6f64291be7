"""An event's bytes, as all streams share them."""

from __future__ import annotations

import json

import pytest

from bridge.event import Event
from bridge.service.streams.streamevent import StreamEvent
from tests.decoder import Decoder
from tests.events import make_event

TEXT = b'{"id":"e1","data":{"x":"\xc3\xa9"}}'


def event(text: bytes = TEXT, key: str = "user.42.test.done") -> StreamEvent:
    return StreamEvent(Event(id="e1", source="/test", type="test.done", text=text), key)


def test_the_frame_has_a_type_unless_the_stream_wants_none() -> None:
    assert event().named == b"event: test.done\n" + event().plain
    (frame,) = Decoder().feed(event().named)
    assert (frame.event, frame.data.encode()) == ("test.done", TEXT)
    (frame,) = Decoder().feed(event().plain)
    assert frame.event == "message"


def test_the_text_can_be_read_from_the_frame() -> None:
    assert event().text == TEXT


@pytest.mark.parametrize(
    ("key", "audience"), [("user.42.test.done", "user:42"), ("group.a.test.done", "group:a"), ("all.test.done", "all")]
)
def test_a_frame_with_its_audience(key: str, audience: str) -> None:
    made = event(key=key)
    for named in (True, False):
        (frame,) = Decoder().feed(made.with_audience(named=named))
        assert frame.event == ("test.done" if named else "message")
        assert json.loads(frame.data) == {**json.loads(TEXT), "audience": audience}


def test_an_audience_is_written_in_utf_8_as_the_text_is() -> None:
    made = event(key="user.%C3%A9.test.done").with_audience(named=True)
    assert b',"audience":"user:\xc3\xa9"}' in made


@pytest.mark.parametrize("text", [b"a\nb", b"a\rb", b"a\0b"])
def test_a_text_that_would_break_the_frame_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        event(text)


def names(source: str, event_id: str) -> tuple[bytes, str, int]:
    made = StreamEvent(Event(id=event_id, source=source, type="test.done", text=TEXT))
    return made.key, made.digest, made.value


@pytest.mark.contract("1.10")
def test_source_and_id_together_are_the_identity() -> None:
    one = names("/workers/a", "1")
    for another in (names("/workers/a", "2"), names("/workers/b", "1"), names("/workers/a1", "")):
        assert all(mine != its for mine, its in zip(one, another, strict=True))
    assert make_event(1, size=9).key == make_event(1).key, "whatever else the event has"


def test_an_event_is_shown_by_its_id_and_type() -> None:
    assert repr(event()) == "<StreamEvent e1 test.done>"
