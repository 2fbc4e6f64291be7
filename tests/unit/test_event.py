"""The bridge accepts an event, or refuses it with a reason."""

import json
from datetime import datetime
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bridge.event import (
    MAX_DETAIL_CHARS,
    Cut,
    Event,
    EventData,
    InvalidEvent,
    Malformed,
    Models,
    NotACloudEvent,
    SchemaViolation,
    TooLarge,
    TypeMismatch,
    UnknownType,
    describe_faults,
    encode_data,
    read_as_written,
    read_event,
    shorten,
    write_event,
)
from bridge.routing import InvalidType
from bridge.service.streams.streamevent import StreamEvent


class Part(BaseModel):
    name: str


class Done(EventData, type="test.done"):
    job_id: str
    seconds: float = 0
    part: Part | None = None
    anything: Any = None
    at: datetime | None = None
    renamed: str = Field("x", alias="reNamed")


class Grumpy(EventData, type="test.grumpy"):
    job_id: str

    def model_post_init(self, _: Any) -> None:
        raise KeyError("a team's bug")


MODELS: Models = {"test.done": Done, "test.grumpy": Grumpy}


def envelope(**changes: Any) -> dict[str, Any]:
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": "e-1",
        "source": "/t",
        "type": "test.done",
        "data": {"job_id": "r"},
    }
    event.update(changes)
    return {name: value for name, value in event.items() if value is not ...}


def line_of(event: StreamEvent) -> bytes:
    return event.plain.removeprefix(b"data: ").removesuffix(b"\n\n")


def read(body: bytes | dict[str, Any], key: str = "user.42.test.done", **options: Any) -> StreamEvent:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return StreamEvent(read_event(raw, key, MODELS, **options))


def refusal(body: bytes | dict[str, Any], key: str = "user.42.test.done", **options: Any) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        read(body, key, **options)
    return caught.value


@pytest.mark.contract("1.8", "2.24")
def test_an_event_is_one_line_in_its_frame() -> None:
    event = read(envelope(time="2026-01-31T12:00:00Z", subject="s"))
    assert json.loads(line_of(event)) == {
        **envelope(time="2026-01-31T12:00:00Z", subject="s"),
        "data": {"job_id": "r", "seconds": 0.0, "part": None, "anything": None, "at": None, "reNamed": "x"},
    }
    assert event.plain == b"data: " + line_of(event) + b"\n\n"
    assert event.named == b"event: test.done\n" + event.plain
    assert len(event.digest) == 6


@pytest.mark.contract("1.13", "5.1")
def test_members_that_no_model_declares_are_not_sent() -> None:
    data = {"job_id": "r", "password": "s3cret", "part": {"name": "n", "secret": "s3cret"}}
    event = read(
        envelope(data=data, tenant="s3cret", traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    )
    assert b"s3cret" not in event.named
    assert json.loads(line_of(event))["traceparent"] == "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        "a\rb",
        "a\r\nb",
        "\n\ndata: x\n\n",
        "\0",
        "\ufeff",
        "\u2028\u2029\u0085",
        "😀",
        '"\\',
        "event: x\nid: 1\n",
    ],
)
def test_no_text_ends_a_line(text: str) -> None:
    event = read(envelope(data={"job_id": text}, subject=text))
    assert event.plain.count(b"\n") == 2
    assert not set(event.plain) & {0, 13}
    assert json.loads(line_of(event))["data"]["job_id"] == text


@pytest.mark.contract("1.7", "5.9")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b'{"id": "\xc3"}',
        b"\xef\xbb\xbf" + json.dumps(envelope()).encode(),
        json.dumps(envelope()).encode("utf-16"),
        json.dumps(envelope()).encode() + b"{}",
        b"[" * 30_000,
        b"[" * 30_000 + b"]" * 30_000,
        json.dumps(envelope(data={"job_id": "r", "seconds": "@"})).encode().replace(b'"@"', b"NaN"),
        json.dumps(envelope(data={"job_id": "r", "seconds": "@"})).encode().replace(b'"@"', b"-Infinity"),
        json.dumps(envelope(data={"job_id": "r", "anything": "@"})).encode().replace(b'"@"', b"1e999"),
        json.dumps(envelope(data={"job_id": "r", "anything": "@"})).encode().replace(b'"@"', b"9" * 5000),
        b'{"id": "a", "id": "b"}',
        json.dumps(envelope(data={"job_id": "@"})).encode().replace(b'"@"', b'"a", "job_id": "b"'),
        json.dumps(envelope(data={"job_id": "@"})).encode().replace(b"@", rb"\ud800"),
        json.dumps(envelope(data={"job_id": "r", "anything": {"@": 1}})).encode().replace(b"@", rb"\udfff"),
        json.dumps(envelope(subject="@")).encode().replace(b"@", rb"\ud83d"),
        # The bridge would send none of these three members.
        json.dumps(envelope(tenant="@")).encode().replace(b"@", rb"\uDBFF"),
        json.dumps(envelope(traceparent="@")).encode().replace(b"@", rb"\udc00\ud800"),
        json.dumps(envelope(data={"job_id": "r", "other": ["@"]})).encode().replace(b"@", rb"\ud800"),
    ],
)
def test_malformed(body: bytes) -> None:
    assert refusal(body).reason == "malformed"


@pytest.mark.contract("1.8", "1.9", "5.1", "5.2", "5.3", "5.6")
@pytest.mark.parametrize(
    "changes",
    [
        {"specversion": "0.3"},
        {"specversion": 1.0},
        {"specversion": ...},
        {"id": ...},
        {"id": ""},
        {"id": "a b"},
        {"id": "a\n"},
        {"id": "x" * 129},
        {"id": 7},
        {"source": ...},
        {"source": ""},
        {"type": ...},
        {"type": None},
        {"data": ...},
        {"data": ..., "data_base64": "AA=="},
        {"data_base64": "AA=="},
        {"data_base64": 5},
        {"time": "2026-02-29T00:00:00Z"},
        {"time": "1900-02-29T00:00:00Z"},
        {"time": "2026-04-31T00:00:00Z"},
        {"time": "2026-01-31T12:00:60Z"},
        {"time": "2026-01-30T23:59:60Z"},
        {"time": "2026-12-31T23:59:60+01:00"},
        {"time": "2026-12-31T23:59:61Z"},
        {"time": "yesterday"},
        {"time": "2026-13-01T00:00:00Z"},
        {"time": 12},
        {"subject": ""},
        {"datacontenttype": "text/plain"},
        {"dataschema": {}},
        {"Upper": "x"},
        {"with_underscore": "x"},
        {"nested": {}},
        {"float": 1.5},
        {"traceparent": ["x"]},
    ],
)
def test_not_a_cloudevent(changes: dict[str, Any]) -> None:
    assert refusal(envelope(**changes)).reason == "not-a-cloudevent"


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"{}"])
def test_json_that_is_not_a_cloudevent(body: bytes) -> None:
    assert refusal(body).reason == "not-a-cloudevent"


@pytest.mark.contract("5.3", "5.4")
@pytest.mark.parametrize(
    "time",
    [
        "2024-02-29T00:00:00Z",
        "0000-02-29T00:00:00-00:00",
        "2016-12-31T23:59:60Z",
        "2017-01-01T05:29:60.5+05:30",
        "2016-12-31T15:59:60-08:00",
        "2012-06-30t23:59:60z",
    ],
)
def test_times_are_sent_as_they_were_written(time: str) -> None:
    assert json.loads(read(envelope(time=time)).text)["time"] == time
    assert json.loads(read(json.dumps(envelope(time=time), separators=(",", ":")).encode()).text)["time"] == time


@pytest.mark.contract("5.4")
@pytest.mark.parametrize(
    ("time", "valid"),
    [
        ("2026-02-28T23:59:60Z", True), ("2024-02-28T23:59:60Z", False), ("2024-02-29T23:59:60Z", True),
        ("2026-04-30T23:59:60Z", True), ("2026-12-31T23:58:60Z", False), ("2026-12-31T22:59:60Z", False),
        # East of Greenwich the next month has already begun. West of it, this month has not ended.
        ("2027-01-01T00:59:60+01:00", True), ("2027-01-02T00:59:60+01:00", False), ("2027-01-01T00:59:60Z", False),
        ("2027-01-01T00:59:60-01:00", False), ("2027-01-01T23:58:60+23:59", True), ("2027-01-01T23:59:60Z", False),
        ("2026-12-31T22:29:60-01:30", True), ("2026-12-31T22:29:60+01:30", False), ("2026-12-31T00:00:60-23:59", True),
        ("2026-12-31T22:29:60-01:31", False), ("2026-12-31T22:29:60-02:30", False),
        ("2026-01-15T23:59:60Z", False), ("2026-01-15T23:59:59Z", True), ("2026-01-29T00:00:00Z", True),
        ("2026-02-29T00:00:00Z", False), ("2026-02-28T00:00:00Z", True), ("2026-04-30T00:00:00Z", True),
    ],
)  # fmt: skip
def test_a_leap_second_is_the_last_one_of_a_month_in_utc(time: str, valid: bool) -> None:
    compact = WRITTEN.replace(b'"test.done"', b'"test.done","time":"%b"' % time.encode())
    assert (read_as_written(compact, "user.42.test.done", MODELS) is not None) is valid
    for body in (envelope(time=time), compact):
        if valid:
            assert json.loads(read(body).text)["time"] == time
        else:
            assert refusal(body).reason == "not-a-cloudevent"


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MOST_STATES = ",".join(f"k{number}=1" for number in range(32))


@pytest.mark.contract("5.5")
@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"traceparent": PARENT}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1, b@c=2"}, {"traceparent": PARENT, "tracestate": "a=1, b@c=2"}),
        ({"traceparent": "01" + PARENT[2:] + "-more"}, {"traceparent": "01" + PARENT[2:] + "-more"}),
        ({"traceparent": PARENT, "tracestate": ", ,a=1,"}, {"traceparent": PARENT, "tracestate": ", ,a=1,"}),
        ({"traceparent": PARENT, "tracestate": MOST_STATES}, {"traceparent": PARENT, "tracestate": MOST_STATES}),
        ({"traceparent": PARENT, "tracestate": ", ,"}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": 5}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": ""}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1,a=2"}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": MOST_STATES + ",l=1"}, {"traceparent": PARENT}),
        ({"tracestate": "a=1"}, {}),
        ({"traceparent": 5, "tracestate": "a=1"}, {}),
        ({"traceparent": True}, {}),
        ({"traceparent": ""}, {}),
        ({"traceparent": PARENT.upper()}, {}),
        ({"traceparent": PARENT + "-more"}, {}),
        ({"traceparent": "ff" + PARENT[2:]}, {}),
        ({"traceparent": "00-" + "0" * 32 + PARENT[35:]}, {}),
        ({"traceparent": PARENT[:36] + "0" * 16 + PARENT[52:]}, {}),
    ],
)
def test_a_trace_context_that_cannot_be_read_is_left_out(given: dict[str, Any], shown: dict[str, Any]) -> None:
    bare = envelope()
    data = bare.pop("data")
    compact = json.dumps({**bare, **given, "data": data}, separators=(",", ":")).encode()
    for body in (envelope(**given), compact):
        found = json.loads(read(body).text)
        assert {name: found[name] for name in ("traceparent", "tracestate") if name in found} == shown


@pytest.mark.contract("5.8")
def test_optional_attributes_may_be_null() -> None:
    event = read(envelope(time=None, subject=None, traceparent=None, tenant=None, data_base64=None))
    assert set(json.loads(line_of(event))) == {"specversion", "id", "source", "type", "data"}


@pytest.mark.contract("1.12")
@pytest.mark.parametrize("key", ["user.42.test.other", "user.42", "", "user.42.Test.done", "team.x.test.done"])
def test_a_type_that_differs_from_its_key(key: str) -> None:
    assert refusal(envelope(), key).reason == "type-mismatch"


def test_an_unknown_type() -> None:
    assert refusal(envelope(type="test.new"), "all.test.new").reason == "unknown-type"


@pytest.mark.contract("1.13", "5.9")
@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({}, "data.job_id"),
        (None, "data"),
        ([], "data"),
        ({"job_id": 1}, "data.job_id"),
        ({"job_id": "r", "part": {}}, "data.part.name"),
        ({"job_id": "r", "seconds": "inf"}, "data.seconds"),
        ({"job_id": "r", "seconds": "NaN"}, "data.seconds"),
    ],
)
def test_data_that_does_not_fit_its_model(data: Any, where: str) -> None:
    error = refusal(envelope(data=data))
    assert error.reason == "schema"
    assert where in error.detail


def test_the_detail_does_not_repeat_the_data() -> None:
    assert "s3cret" not in refusal(envelope(data={"job_id": ["s3cret"]})).detail


def test_a_model_that_raises_is_a_refusal_too() -> None:
    error = refusal(envelope(type="test.grumpy"), "all.test.grumpy")
    assert error.reason == "schema"
    assert "Grumpy raised KeyError" in error.detail


@pytest.mark.contract("1.7")
def test_the_size_is_checked_first() -> None:
    body = json.dumps(envelope(data={"job_id": "x" * 65_536})).encode()
    assert refusal(body).reason == "too-large"
    exact = json.dumps(envelope(data={"job_id": ""})).encode()
    assert read(exact, max_bytes=len(exact)).id == "e-1"
    assert refusal(exact, max_bytes=len(exact) - 1).reason == "too-large"
    pad = "x" * (64 * 1024 - len(exact))
    assert read(envelope(data={"job_id": pad})).id == "e-1", "64 KB by default"
    assert refusal(envelope(data={"job_id": pad + "x"})).reason == "too-large"


@pytest.mark.contract("1.9")
def test_an_id_has_at_most_128_characters() -> None:
    assert read(envelope(id="x" * 128)).id == "x" * 128
    assert refusal(envelope(id="x" * 129)).detail == "id must be 1 to 128 characters of A-Z a-z 0-9 . _ : ~ -"


def test_the_detail_of_a_cut_body_has_the_whole_size() -> None:
    whole = json.dumps(envelope()).encode()
    error = refusal(Cut(whole, 10_000_000), max_bytes=20_000_000)
    assert error.reason == "too-large"
    assert "10000000 bytes" in error.detail
    assert f"first {len(whole)}" in error.detail


@pytest.mark.contract("1.22")
def test_the_detail_is_bounded() -> None:
    assert len(refusal(envelope(**{"X" * 5000: 1})).detail) <= MAX_DETAIL_CHARS
    assert len(refusal(envelope(data={f"k{n}": 1 for n in range(2000)} | {"part": {}})).detail) <= MAX_DETAIL_CHARS


def test_a_detail_that_is_too_long_ends_with_dots() -> None:
    assert Malformed("x" * MAX_DETAIL_CHARS).detail == "x" * MAX_DETAIL_CHARS
    error = Malformed("x" * (MAX_DETAIL_CHARS + 1))
    assert error.detail == "x" * (MAX_DETAIL_CHARS - 3) + "..."
    assert str(error) == "malformed: " + error.detail


@pytest.mark.parametrize(
    ("refused", "depends"),
    [
        (Malformed, False), (NotACloudEvent, False), (TypeMismatch, False),
        (UnknownType, True), (SchemaViolation, True), (TooLarge, True),
    ],
)  # fmt: skip
def test_another_bridge_may_accept_only_what_its_catalogue_or_settings_decide(
    refused: type[InvalidEvent], depends: bool
) -> None:
    assert refused("x").depends_on_catalogue is depends


@pytest.mark.contract("5.1", "5.2", "5.9")
@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"a":1,"b":2,"a":3}', "the member 'a' occurs twice in one object"),
        (b'{"id": "\xc3"}', "not UTF-8: invalid continuation byte at byte 8"),
        (b'{\n"a" 1}', "not JSON: Expecting ':' delimiter at line 2, column 5"),
        (b"\xef\xbb\xbf{}", "the body begins with a byte order mark (RFC 8259, section 8.1)"),
        (b"-Infinity", "-Infinity is not JSON (RFC 8259, section 6)"),
        (b"1e999", "the number 1e999 is out of range"),
        (envelope(source=...), "the attribute 'source' is missing"),
        (envelope(source=""), "the attribute 'source' must be a string that is not empty"),
        (envelope(source=7), "the attribute 'source' must be a string that is not empty"),
        (envelope(subject=""), "the attribute 'subject' must be a string that is not empty"),
        (envelope(data=...), "the member 'data' is missing"),
        (
            envelope(data=..., data_base64="AA=="),
            "the member 'data' is missing (data_base64 is not supported: data must be JSON)",
        ),
        (
            envelope(data_base64="AA=="),
            "the event has 'data' and 'data_base64': leave out data_base64, data must be JSON",
        ),
    ],
)
def test_a_detail_says_what_is_wrong(body: bytes | dict[str, Any], detail: str) -> None:
    assert refusal(body).detail == detail


def write(attributes: dict[str, str], data: EventData) -> bytes:
    return write_event(attributes, data.event_type, encode_data(data).encode())


def test_a_written_event_is_read_back() -> None:
    data = Done.model_validate({"job_id": "r", "reNamed": "y", "at": "2026-01-01T00:00:00Z"})
    event = read(write({"id": "e", "source": "/t"}, data))
    assert json.loads(line_of(event))["data"]["reNamed"] == "y"


def test_an_event_of_the_sdk_is_sent_without_a_change() -> None:
    attributes = {"tracestate": "v=1", "time": "2026-01-31T12:00:00.5Z", "subject": "s", "id": "e", "source": "/t"}
    data = Done(job_id="r", seconds=1.5, anything={"text": 'é \n " \\', "none": None, "list": [1, -0.25, True]})
    body = write(
        {
            **attributes,
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "dataschema": "https://x.example/s",
        },
        data,
    )
    event = read_as_written(body, "user.42.test.done", MODELS)
    assert event is not None, "it takes the slow path, which costs three times as much"
    assert event.text == body == line_of(read(body))


WRITTEN = (
    b'{"specversion":"1.0","id":"e","source":"/t","type":"test.done",'
    b'"data":{"job_id":"r","seconds":0.0,"part":null,"anything":null,"at":null,"reNamed":"x"}}'
)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"", b"", None),
        (b'"id":"e","source":"/t"', b'"source":"/t","id":"e"', None),
        (b'"id":"e"', b'"id": "e"', None),
        (b'"id":"e"', b'"id":"e","id":"e"', "malformed"),
        (b'"id":"e"', b'"id":"%b"' % (b"e" * 129), "not-a-cloudevent"),
        (b'"/t"', b'""', "not-a-cloudevent"),
        (b'"/t"', b'"\xff"', "malformed"),
        (b'"/t"', b'"\n"', "malformed"),
        (b"/t", b"\\n", None),
        (b'"/t"', b'"/t","time":"yesterday"', "not-a-cloudevent"),
        (b'"test.done"', b'"test.done","time":"2026-02-30"', "not-a-cloudevent"),
        (b'"test.done"', b'"test.done","time":"2026-02-30T00:00:00Z"', "not-a-cloudevent"),
        (b'"test.done"', b'"test.done","tracestate":"v=1"', None),
        (b'"test.done"', b'"test.done","traceparent":"00-1-2-3"', None),
        (b'"test.done"', b'"test.done","traceparent":"%b","tracestate":"v"' % PARENT.encode(), None),
        (b'"test.done"', b'"test.done","datacontenttype":"text/plain"', "not-a-cloudevent"),
        (b'"test.done"', b'"test.done","subject":""', "not-a-cloudevent"),
        (b'"test.done"', b'"test.done","other":"x"', None),
        (b"test.done", b"test.gone", "type-mismatch"),
        (b'"x"}}', b'"x"}', "malformed"),
        (b'"x"}}', b'"x"}]', "malformed"),
        (b'"x"}}', b'"x"}}}', "malformed"),
        (b'"x"}}', b'"x"},"id":"f"}', "malformed"),
        (b'"x"}}', b'"x","more":1}}', None),
        (b'"job_id":"r"', b'"job_id":"r","job_id":"r"', "malformed"),
        (b'"job_id":"r"', b'"job_id":1', "schema"),
        (b'"anything":null', b'"anything":{"a":1,"a":2}', "malformed"),
        (b'"anything":null', b'"anything":NaN', "malformed"),
        (b'"anything":null', b'"anything":Infinity', "malformed"),
        (b'"anything":null', b'"anything":1e400', "malformed"),
        (b'"anything":null', b'"anything":"\\ud800"', "malformed"),
        (b'"anything":null', b'"anything":"\xff"', "malformed"),
        (b'"anything":null', b'"anything":"a\nb"', "malformed"),
        (b'"seconds":0.0', b'"seconds":"inf"', "schema"),
    ],
)
def test_only_the_form_that_the_sdk_writes_takes_the_fast_path(old: bytes, new: bytes, reason: str | None) -> None:
    body = WRITTEN.replace(old, new)
    event = read_as_written(body, "user.42.test.done", MODELS)
    assert (event is not None) == (body == WRITTEN)
    if reason is None:
        assert read(body).id == "e"
    else:
        assert refusal(body).reason == reason


@pytest.mark.contract("1.12")
def test_a_body_as_the_sdk_writes_it_needs_its_own_key_and_model_too() -> None:
    assert refusal(WRITTEN, "user.42.test.other").reason == "type-mismatch"
    body = WRITTEN.replace(b"test.done", b"test.new")
    assert refusal(body, "user.42.test.new").reason == "unknown-type"


def test_white_space_around_a_body_is_allowed() -> None:
    for body in (b" \n" + WRITTEN, WRITTEN + b"\r\t", b" " + WRITTEN + b" "):
        assert read(body).text == WRITTEN


class Aliased(EventData, type="test.aliased"):
    renamed: str = Field("x", alias="reNamed")


class Constants(EventData, type="test.constants"):
    """A model that would write an infinite number as `Infinity`, which is not JSON."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    number: float


def read_data(data: bytes, model: type[EventData], separator: bytes) -> bytes:
    """The text of an event with this data. With `separator` empty, the body is as the SDK writes it."""
    body = b'{"specversion":"1.0","id":"e","source":"/t","type":"%b",%b"data":%b}'
    body %= model.event_type.encode(), separator, data
    return read_event(body, f"all.{model.event_type}", {model.event_type: model}).text


@pytest.mark.parametrize("separator", [b"", b" "])
def test_a_member_is_written_by_its_alias(separator: bytes) -> None:
    assert b'"data":{"reNamed":"y"}' in read_data(b'{"reNamed":"y"}', Aliased, separator)


@pytest.mark.parametrize("separator", [b"", b" "])
@pytest.mark.parametrize(
    ("number", "refused"),
    [(b"NaN", Malformed), (b"Infinity", Malformed), (b'"NaN"', SchemaViolation), (b'"inf"', SchemaViolation)],
)
def test_no_model_writes_what_is_not_json(number: bytes, refused: type[InvalidEvent], separator: bytes) -> None:
    with pytest.raises(refused):
        read_data(b'{"number":%b}' % number, Constants, separator)


class Number(EventData, type="test.number"):
    anything: Any = 0
    number: float = 0
    whole: int = 0


@pytest.mark.contract("5.10", "5.11")
@pytest.mark.parametrize(
    ("member", "given", "shown"),
    [
        ("number", b"1E5", b"100000.0"),
        ("whole", b"1E5", b"100000"),
        ("anything", b"1E5", b"100000.0"),
        ("anything", b"1.0", b"1.0"),
        ("anything", b"1", b"1"),
        ("anything", b"-0", b"0"),
        ("anything", b"-0.0", b"-0.0"),
        ("number", b"1", b"1.0"),
        ("number", b"-0.0", b"-0.0"),
        ("number", b"1e-400", b"0.0"),
        ("whole", b"1.0", b"1"),
        ("whole", b"9007199254740993", b"9007199254740993"),
        ("anything", b"9" * 4_300, b"9" * 4_300),
        ("number", b"9" * 400, "schema"),
        ("whole", b"1.5", "schema"),
        ("anything", b"1e400", "malformed"),
        ("number", b"-1E400", "malformed"),
        ("anything", b"9" * 4_301, "malformed"),
    ],
)
def test_numbers_are_sent_as_the_model_validated_them(member: str, given: bytes, shown: bytes | str) -> None:
    body = b'{"specversion":"1.0","id":"e","source":"/t","type":"test.number","data":{"%b":%b}}'
    body %= member.encode(), given
    if isinstance(shown, str):
        with pytest.raises(InvalidEvent) as caught:
            read_event(body, "all.test.number", {"test.number": Number})
        assert caught.value.reason == shown
    else:
        text = read_event(body, "all.test.number", {"test.number": Number}).text
        assert b'"%b":%b' % (member.encode(), shown) in text.replace(b"}", b",")


def test_infinity_is_not_written_as_null() -> None:
    with pytest.raises(ValueError, match=r"data\.seconds is infinite"):
        write({"id": "e", "source": "/t"}, Done(job_id="r", seconds=float("inf")))


def test_the_path_of_an_infinite_number_has_members_and_indexes() -> None:
    class Measured(EventData):
        rows: list[dict[str, float]]

    with pytest.raises(ValueError, match=r"data\.rows\[1\]\.b is infinite or NaN"):
        encode_data(Measured(rows=[{"a": 1.5}, {"a": 0.0, "b": float("nan")}]))


def test_faults_are_named_by_their_paths_within_the_event() -> None:
    with pytest.raises(ValidationError) as caught:
        Done.model_validate({"job_id": 1, "part": {}})
    assert describe_faults(caught.value) == (
        "data.job_id: Input should be a valid string; data.part.name: Field required"
    )
    assert describe_faults(caught.value, ()).startswith("job_id: Input")
    with pytest.raises(ValidationError) as caught:
        Done.model_validate_json("[]")
    assert describe_faults(caught.value, ()).startswith("data: Input")


def test_a_value_in_a_message_has_at_most_80_characters() -> None:
    assert shorten("x" * 78) == repr("x" * 78)
    assert shorten("x" * 79) == "'" + "x" * 76 + "..."


def test_a_type_is_never_inherited() -> None:
    class Special(Done):
        pass

    assert (Done.declares_type(), Special.declares_type(), EventData.declares_type()) == (True, False, False)


def test_attributes_are_written_in_the_bridges_order() -> None:
    attributes = {"subject": "s", "tenant": "t", "source": "/t", "id": "é"}
    assert write_event(attributes, "test.done", b"{}").decode() == (
        '{"specversion":"1.0","id":"é","source":"/t","type":"test.done","subject":"s","tenant":"t","data":{}}'
    )


def test_an_event_is_shown_by_its_id_and_type() -> None:
    assert repr(Event(id="e1", source="/test", type="test.done", text=b"{}")) == "<Event e1 test.done>"


@pytest.mark.contract("5.71")
def test_a_reserved_type_cannot_be_declared() -> None:
    with pytest.raises(InvalidType, match="reserved"):
        type("Mine", (EventData,), {"__module__": __name__}, type="bridge.mine")
