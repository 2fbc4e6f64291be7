"""Whatever bytes come: an event that streams as one line, or a named refusal. Never another exception."""

import json
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from bridge.event import EventData, InvalidEvent, read_event
from tests.decoder import Decoder

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Loose(EventData, type="loose"):
    value: Any


MODELS = {"loose": Loose}
KEY = "user.42.loose"


@given(st.binary(max_size=300))
def test_bytes(body: bytes) -> None:
    try_to_read(body)


@given(json_values, st.booleans())
def test_any_json_value_of_any_text(value: Any, escaped: bool) -> None:
    event = {"specversion": "1.0", "id": "e", "source": "/t", "type": "loose", "data": {"value": value}}
    body = json.dumps(event, ensure_ascii=escaped).encode("utf-8", errors="surrogatepass")
    text = try_to_read(body)
    if text is not None:
        assert json.loads(text)["data"]["value"] == json.loads(json.dumps(value))


@settings(max_examples=300)
@given(st.data())
def test_an_envelope_with_anything_in_it(data: st.DataObject) -> None:
    event: dict[str, Any] = {"specversion": "1.0", "id": "e", "source": "/t", "type": "loose", "data": {"value": 1}}
    names = st.sampled_from([*event, "time", "subject", "traceparent", "datacontenttype", "ext"]) | st.text(max_size=5)
    for name in data.draw(st.lists(names, max_size=3)):
        event[name] = data.draw(json_values)
    try_to_read(json.dumps(event).encode())


def try_to_read(body: bytes) -> str | None:
    try:
        event = read_event(body, KEY, MODELS)
    except InvalidEvent:
        return None
    for tail in (event.named, event.plain):
        decoder = Decoder()
        (frame,) = [frame for byte in b"id: c\n" + tail for frame in decoder.feed(bytes([byte]))]
        assert (frame.id, frame.data) == ("c", event.text.decode())
    return frame.data
