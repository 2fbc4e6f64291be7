"""Any bytes become an event that fits into one line of a stream, or an `InvalidEvent`. No other exception is raised."""

import contextlib
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import Field

from bridge.event import (
    EventData,
    InvalidEvent,
    _pass_through,
    _read,
    _revalidate,
    parse_object,
    read_as_written,
    read_event,
)
from bridge.service.streams.streamevent import StreamEvent
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
def test_any_bytes(body: bytes) -> None:
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
        event = StreamEvent(read_event(body, KEY, MODELS))
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
def test_the_fast_path_of_data_gives_what_the_full_path_gives_or_nothing(
    of: tuple[type[EventData], dict[str, Any]], escaped: bool
) -> None:
    model, data = of
    body = json.dumps({"data": data}, ensure_ascii=escaped).encode("utf-8", errors="surrogatepass")
    try:
        parse_object(body)
    except InvalidEvent:
        return  # The fast path gets only bodies that have been parsed.
    fast = _pass_through(body, model)
    if fast is not None:
        assert exactly(fast) == exactly(_revalidate(body, model))


def exactly(text: bytes) -> str:
    """The JSON value, with differences that `==` ignores: 1 is not 1.0, and 0.0 is not -0.0."""
    return repr(json.loads(text))


plain = st.text(st.characters(min_codepoint=31, max_codepoint=128), max_size=5)

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
numerals = st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
"""Numbers as publishers may write them: -0, 1.0, 1E5, 1e400, integers beyond a double."""
times = st.builds(
    "{:04}-{:02}-{:02}{}{:02}:{:02}:{:02}{}{}".format,
    st.sampled_from([0, 1900, 2000, 2024, 2026, 9999]),
    st.integers(1, 12),
    st.sampled_from([1, 28, 29, 30, 31]),
    st.sampled_from("Tt"),
    st.sampled_from([0, 12, 23]) | st.integers(0, 23),
    st.sampled_from([0, 29, 59]),
    st.sampled_from([0, 59, 60]),
    st.sampled_from(["", ".5", ".123456789"]),
    st.sampled_from(["Z", "z", "+00:00", "-00:00", "+05:30", "-08:00", "+23:59", "-23:59", "-01:00", "+14:00"]),
)
traceparents = st.just(TRACEPARENT) | st.builds(
    lambda at, new: TRACEPARENT[:at] + new + TRACEPARENT[at + 1 :],
    st.integers(0, len(TRACEPARENT)),
    st.sampled_from(["", "0", "f", "F", "-", "-x", " "]),
)
members = st.sampled_from(
    ["v=1", "a@b=c d", "0/x=-", "v", "=1", "V=1", "v=", " ", "", "v= 1", "v=1 ", "v=a=b", "\u00e9=1"]
)
tracestates = st.lists(members, max_size=4).map(",".join)

names = st.sampled_from(["id", "source", "time", "subject", "traceparent", "tracestate", "data", "new"])
damages = st.tuples(st.floats(0, 1), st.sampled_from([b"", b"}", b'"', b",", b" ", b"null", b"NaN", b"\\", b"\xff"]))


@settings(max_examples=500)
@given(
    st.lists(
        st.tuples(names, plain | json_values)
        | st.tuples(st.just("time"), times)
        | st.tuples(st.just("traceparent"), traceparents)
        | st.tuples(st.just("tracestate"), tracestates),
        max_size=4,
    ),
    st.tuples(st.sampled_from([Lax, Exact]), exact_values)
    | st.tuples(st.just(Loose), st.builds(dict, value=json_values)),
    st.booleans(),
    st.none() | damages,
)
def test_the_fast_path_of_a_body_gives_what_the_full_path_gives_or_nothing(
    attributes: list[tuple[str, Any]],
    of: tuple[type[EventData], dict[str, Any]],
    rewritten: bool,
    damage: tuple[float, bytes] | None,
) -> None:
    model, data = of
    if rewritten:  # Then most bodies can take the fast path.
        with contextlib.suppress(ValueError):
            data = json.loads(model.model_validate(data).model_dump_json(by_alias=True))
    order = ["specversion", "id", "source", "type", "time", "subject", "traceparent", "tracestate", "data"]
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
    if damage is not None:
        at = round(damage[0] * len(body))
        body = body[:at] + damage[1] + body[at + 1 :]
    key, models = f"user.42.{model.event_type}", {model.event_type: model}
    fast = read_as_written(body, key, models)
    if fast is not None:
        full = _read(body, key, models)
        assert (fast.id, fast.type, fast.text) == (full.id, full.type, full.text)


class Numbers(EventData, type="numbers"):
    anything: Any = None
    number: float = 0
    whole: int = 0
    exact: Decimal = Decimal(0)
    either: int | float = 0
    empty: None = None
    """It is written as null: then the full path is taken."""


class NumbersAlone(EventData, type="numbers"):
    anything: Any = 0
    number: float = 0
    whole: int = 0
    exact: Decimal = Decimal(0)
    either: int | float = 0


@pytest.mark.contract("5.10")
@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(["anything", "number", "whole", "exact", "either", "other"]), numerals))
def test_a_page_gets_the_number_that_was_validated(numbers: dict[str, str]) -> None:
    members = ",".join(f'"{name}":{numeral}' for name, numeral in numbers.items())
    body = b'{"specversion":"1.0","id":"e","source":"/t","type":"numbers","data":{%b}}' % members.encode()
    shown: list[str] = []
    for model in (Numbers, NumbersAlone):
        try:
            event = read_event(body, "all.numbers", {"numbers": model})
        except InvalidEvent as error:
            shown.append(error.reason)
            continue
        data = json.loads(event.text)["data"]
        data.pop("empty", None)
        if "anything" not in numbers:
            del data["anything"]
        shown.append(repr(data))
        # The page gets the value that the model reads from the publisher's own text.
        validated = json.loads(model.model_validate_json(b"{%b}" % members.encode()).model_dump_json())
        assert repr({name: validated[name] for name in data}) == repr(data)
    assert shown[0] == shown[1], "the fast path and the full path show different numbers"


@pytest.mark.contract("5.3")
@settings(max_examples=500)
@given(times)
def test_a_time_is_accepted_if_the_calendar_has_it(time: str) -> None:
    event = {"specversion": "1.0", "id": "e", "source": "/t", "type": "loose", "time": time, "data": {"value": 1}}
    # Python's calendar has no year 0, which is a leap year like 2000, and no second 60.
    known = time.upper().replace("0000-", "2000-", 1)
    try:
        minute = datetime.fromisoformat(known.replace(":60", ":59", 1) if known[17:19] == "60" else known)
        good = True
        if known[17:19] == "60":
            shift = timedelta(seconds=1)
            utc = minute.replace(microsecond=0).astimezone(UTC)
            good = (utc.hour, utc.minute, utc.second) == (23, 59, 59) and (utc.month != (utc + shift).month)
    except ValueError:
        good = False
    except OverflowError:  # The last second of the year 9999.
        return
    for separators in [(",", ":"), (", ", ": ")]:
        body = json.dumps(event, separators=separators).encode()
        assert (try_to_read(body) is not None) == good


@pytest.mark.contract("5.5", "5.6")
@settings(max_examples=500)
@given(traceparents | json_values, tracestates | json_values)
def test_a_trace_context_is_shown_as_it_is_or_not_at_all(parent: Any, state: Any) -> None:
    event: dict[str, Any] = {"specversion": "1.0", "id": "e", "source": "/t", "type": "loose"}
    event |= {"traceparent": parent, "tracestate": state, "data": {"value": 1}}
    shown = try_to_read(json.dumps(event).encode("utf-8", errors="surrogatepass"))
    if shown is None:
        # As any extension attribute: neither a list, nor an object, nor a float, nor half of a surrogate pair.
        values = [value for value in (parent, state) if value is not None]
        bad = [value for value in values if not isinstance(value, str | bool | int)]
        assert bad or any(0xD800 <= ord(sign) <= 0xDFFF for value in values for sign in str(value))
        return
    envelope = json.loads(shown)
    if "tracestate" in envelope:
        assert (envelope["traceparent"], envelope["tracestate"]) == (parent, state)
    context = TraceContextTextMapPropagator().extract({"traceparent": parent if isinstance(parent, str) else ""})
    if "traceparent" in envelope:
        assert envelope["traceparent"] == parent
        assert context, "OpenTelemetry reads it, too"
    elif isinstance(parent, str):
        # OpenTelemetry accepts white space around it.
        assert not context or parent != parent.strip(" \t") or len(parent) != len(TRACEPARENT)
