"""Whatever bytes come: an event that streams as one line, or a named refusal. Never another exception."""

import contextlib
import json
from datetime import datetime
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings
from pydantic import Field

from bridge.event import (
    EventData,
    InvalidEvent,
    _parse,
    _pass_through,
    _read,
    _read_as_written,
    _revalidate,
    read_event,
)
from tests.decoder import Decoder

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Loose(EventData, type="loose"):
    value: Any


class Lax(EventData, type="lax"):
    number: float = 0
    whole: int = 0
    text: str = ""
    at: datetime | None = None
    renamed: list[float] = Field(default=[], alias="reNamed")


class Exact(Lax, type="exact", strict=True): ...


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
        assert frame.id == "c"
    return frame.data


exact_values = st.fixed_dictionaries(
    {},
    optional={
        "number": st.floats() | st.integers() | st.sampled_from(["inf", "1", 1e400, -0.0]),
        "whole": st.integers() | st.floats() | st.booleans(),
        "text": st.text() | st.sampled_from(["null", "NaN", "\ud800"]),
        "at": st.none() | st.sampled_from(["2026-01-31T12:00:00Z", "2026-01-31", 0]),
        "reNamed": st.lists(st.floats() | st.integers(), max_size=3),
        "unknown": json_values,
    },
)


@settings(max_examples=500)
@given(
    st.tuples(st.sampled_from([Lax, Exact]), exact_values)
    | st.tuples(st.just(Loose), st.builds(dict, value=json_values)),
    st.booleans(),
)
def test_the_short_way_says_what_the_careful_one_says_or_nothing(
    of: tuple[type[EventData], dict[str, Any]], escaped: bool
) -> None:
    model, data = of
    body = json.dumps({"data": data}, ensure_ascii=escaped).encode("utf-8", errors="surrogatepass")
    try:
        envelope = _parse(body)
    except InvalidEvent:
        return  # Only what has been read gets there.
    short = _pass_through(body, model)
    if short is not None:
        assert json.loads(short) == json.loads(_revalidate(envelope["data"], model))


plain = st.text(st.characters(min_codepoint=31, max_codepoint=128), max_size=5)


names = st.sampled_from(["id", "source", "time", "subject", "tracestate", "data", "new"])
blots = st.tuples(st.floats(0, 1), st.sampled_from([b"", b"}", b'"', b",", b" ", b"null", b"NaN", b"\\", b"\xff"]))


@settings(max_examples=500)
@given(
    st.lists(st.tuples(names, plain | json_values), max_size=2),
    st.tuples(st.sampled_from([Lax, Exact]), exact_values)
    | st.tuples(st.just(Loose), st.builds(dict, value=json_values)),
    st.booleans(),
    st.none() | blots,
)
def test_a_body_as_written_says_what_it_says_read_with_care_or_nothing(
    attributes: list[tuple[str, Any]],
    of: tuple[type[EventData], dict[str, Any]],
    rewritten: bool,
    blot: tuple[float, bytes] | None,
) -> None:
    model, data = of
    if rewritten:  # Then most are as written.
        with contextlib.suppress(ValueError):
            data = json.loads(model.model_validate(data).model_dump_json(by_alias=True))
    order = ["specversion", "id", "source", "type", "time", "subject", "tracestate", "data"]
    event = {
        "specversion": "1.0",
        "id": "e",
        "source": "/t",
        "type": model.event_type,
        "data": data,
        **dict(attributes),
    }
    event = dict(sorted(event.items(), key=lambda member: order.index(member[0]) if member[0] in order else 9))
    body = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="surrogatepass")
    if blot is not None:
        at = round(blot[0] * len(body))
        body = body[:at] + blot[1] + body[at + 1 :]
    key, models = f"user.42.{model.event_type}", {model.event_type: model}
    short = _read_as_written(body, key, models)
    if short is not None:
        careful = _read(body, key, models)
        assert (short.id, short.type, short.named) == (careful.id, careful.type, careful.named)
