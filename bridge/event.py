"""Reads a message's bytes into an event for pages, or raises the reason for a refusal.

Pure. Owns the CloudEvents envelope (CloudEvents 1.0.2, JSON event format 1.0.2, structured mode) and the base class of
the event catalogue. An event contains only validated data: members that no model declares are dropped, and so are
extension attributes other than those of W3C Trace Context.
"""

from __future__ import annotations

import calendar
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring as _quote
from typing import Any, ClassVar, Generic, Literal, NoReturn, Self, TypeVar

from pydantic import BaseModel, ValidationError

from bridge.routing import check_type, is_key_of, split_key

MAX_EVENT_BYTES = 65_536
"""Default limit of a message's body in bytes. Send a link to larger data: WebKit scans an unfinished line again for
each network chunk, and several clients refuse lines over 128 KiB."""

MAX_ID_CHARS = 128

MAX_DETAIL_CHARS = 1_000
"""Limit of a refusal's detail in characters, for the quarantine's `x-detail` header."""

SPECVERSION = "1.0"
CONTENT_TYPE = "application/cloudevents+json"

_ID = re.compile(rf"[A-Za-z0-9._:~-]{{1,{MAX_ID_CHARS}}}")
_EXTENSION_NAME = re.compile(r"[a-z0-9]+")
_RFC3339 = re.compile(
    r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])[Tt](?:[01]\d|2[0-3]):[0-5]\d:(?:[0-5]\d|60)(?:\.\d+)?"
    r"(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_JSON_TYPE = re.compile(
    rf"{_TOKEN}/(?:[!#$%&'*+.^_`|~0-9A-Za-z-]*\+)?json"
    rf"(?:[ \t]*;(?:[ \t]*{_TOKEN}=(?:{_TOKEN}|\"(?:[^\"\\\x00-\x08\x0a-\x1f\x7f]|\\[^\x00-\x08\x0a-\x1f\x7f])*\"))?)*"
    r"[ \t]*",
    re.IGNORECASE | re.ASCII,
)
"""A media type of JSON (CloudEvents JSON event format 1.0.2, section 3.1). Parameters: RFC 9110, section 8.3.1."""
_PARENT = r"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rf"00{_PARENT}|(?!00|ff)[0-9a-f]{{2}}{_PARENT}(?:-[ !#-\[\]-~]*+)?")
"""W3C Trace Context, sections 3.2.2 and 4.3. Versions after 00 may append fields."""
_TRACESTATE_MEMBER = re.compile(r"([a-z0-9][a-z0-9_*/@-]{0,255})=[ !-+\x2d-<>-~]{0,255}[!-+\x2d-<>-~]")
_MAX_TRACESTATE_MEMBERS = 32
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""A body without this match has no lone surrogate, because UTF-8 cannot encode one."""
# JSON may escape half of a surrogate pair (RFC 8259, section 8.2), which cannot be written as UTF-8.
_LONE_SURROGATE = "a string contains a lone surrogate (\\ud800 to \\udfff), which is not Unicode text"
_OPTIONAL = ("time", "subject", "datacontenttype", "dataschema")
_TRACE_CONTEXT = ("traceparent", "tracestate")
_REQUIRED = ("specversion", "id", "source", "type")
_ORDER = (*_REQUIRED, *_OPTIONAL, *_TRACE_CONTEXT)
ATTRIBUTES = _ORDER
"""The attributes that pages get, in the order in which they are written."""

_OWN = frozenset({*_REQUIRED, *_OPTIONAL, "data", "data_base64"})

_PLAIN = r"[ !#-\[\]-~]"  # The ASCII characters that JSON strings contain without an escape.
_HEAD_AS_WRITTEN = re.compile(
    rf'\{{"specversion":"1\.0","id":"({_ID.pattern})","source":"({_PLAIN}++)","type":"([a-z0-9_.-]++)"'
    rf'(?:,"time":"({_RFC3339.pattern})")?(?:,"subject":"{_PLAIN}++")?(?:,"datacontenttype":"application/json")?'
    rf'(?:,"dataschema":"{_PLAIN}++")?(?:,"traceparent":"(?:{_TRACEPARENT.pattern})"(?:,"tracestate":"({_PLAIN}++)")?)?'
    rf',"data":'.encode()
)
"""An envelope up to its data, byte for byte as `_read_attributes` would write it."""

Reason = Literal["malformed", "not-a-cloudevent", "unknown-type", "schema", "type-mismatch", "too-large", "no-id"]


class EventData(BaseModel):
    """Base class of an event's `data`: one subclass for each event type, in the package that `BRIDGE_SCHEMAS` names.

        class JobCompleted(EventData, type="job.completed"):
            job_id: str
            duration_seconds: float

    A subclass without `type` is a base class for others. Models inside an event (an address, a line of an invoice) are
    plain subclasses of `pydantic.BaseModel`.

    Raises:
        InvalidType: when the class is defined, for a type that is reserved or does not match the grammar.
    """

    event_type: ClassVar[str]

    # Pydantic calls both of these methods, after it has removed its own keywords (`frozen=True`).
    def __init_subclass__(cls, *, type: str | None = None) -> None:
        super().__init_subclass__()
        if type is not None:
            cls.event_type = check_type(type)

    @classmethod
    def __pydantic_init_subclass__(cls, *, type: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__()

    @classmethod
    def declares_type(cls) -> bool:
        """Whether this class itself names a type. A type is never inherited."""
        return "event_type" in cls.__dict__


Models = Mapping[str, type[EventData]]

_Data = TypeVar("_Data", bound=EventData)


class Cut(bytes):
    """The beginning of a body that was too large to keep. `size` is the whole body's size in bytes."""

    size: int

    def __new__(cls, beginning: bytes, size: int) -> Self:
        made = super().__new__(cls, beginning)
        made.size = size
        return made


class InvalidEvent(ValueError):
    """A message is refused and reaches no page.

    Attributes:
        reason: the word for the reason, as in the quarantine.
        detail: where and why, at most 1,000 characters.
    """

    reason: ClassVar[Reason]
    depends_on_catalogue: ClassVar[bool] = False
    """Whether a bridge with another catalogue or other settings may accept the same message."""

    def __init__(self, detail: str) -> None:
        self.detail = detail if len(detail) <= MAX_DETAIL_CHARS else detail[: MAX_DETAIL_CHARS - 3] + "..."
        super().__init__(f"{self.reason}: {self.detail}")


class TooLarge(InvalidEvent):
    reason = "too-large"
    depends_on_catalogue = True


class Malformed(InvalidEvent):
    reason = "malformed"


class NotACloudEvent(InvalidEvent):
    reason = "not-a-cloudevent"


class TypeMismatch(InvalidEvent):
    reason = "type-mismatch"


class UnknownType(InvalidEvent):
    reason = "unknown-type"
    depends_on_catalogue = True


class SchemaViolation(InvalidEvent):
    reason = "schema"
    depends_on_catalogue = True


class NoId(InvalidEvent):
    reason = "no-id"
    depends_on_catalogue = True  # A bridge with the feed `log` may accept it.


REASONS: tuple[Reason, ...] = tuple(
    error.reason for error in (Malformed, NotACloudEvent, UnknownType, SchemaViolation, TypeMismatch, TooLarge, NoId)
)


class Event:
    """A validated event. Do not change it: streams share it.

    Args:
        source: `source` and `id` together identify the event (CloudEvents 1.0.2, section "source").
        text: the CloudEvent as one line of JSON, UTF-8.
    """

    __slots__ = ("id", "source", "text", "type")

    def __init__(self, *, id: str, source: str, type: str, text: bytes) -> None:
        self.id = id
        self.source = source
        self.type = type
        self.text = text

    def __repr__(self) -> str:
        return f"<Event {self.id} {self.type}>"


def read_event(body: bytes, routing_key: str, models: Models, *, max_bytes: int = MAX_EVENT_BYTES) -> Event:
    """Reads and validates one message.

    Args:
        body: the message's body, a CloudEvent in JSON structured mode. A `Cut` is always too large.
        routing_key: the key that it was published with. The key's type must be the event's type.
        models: the catalogue, event type to model.
        max_bytes: the largest body that is accepted.

    Raises:
        InvalidEvent: one of its subclasses. Any other exception is a bug in this module.
    """
    check_size(body, max_bytes)
    try:
        return read_as_written(body, routing_key, models) or _read(body, routing_key, models)
    except RecursionError:
        raise Malformed("the JSON is nested too deeply") from None
    except UnicodeEncodeError:
        raise Malformed(_LONE_SURROGATE) from None  # The model itself made it.


def check_size(body: bytes, max_bytes: int) -> None:
    """
    Raises:
        TooLarge: the body has more bytes, or it is a `Cut`.
    """
    if isinstance(body, Cut):
        raise TooLarge(
            f"the body has {body.size} bytes, the limit is {max_bytes}; only its first {len(body)} were kept"
        )
    if len(body) > max_bytes:
        raise TooLarge(f"the body has {len(body)} bytes, the limit is {max_bytes}")


def read_as_written(body: bytes, routing_key: str, models: Models) -> Event | None:
    """A fast path: the event of a body that the bridge would write again byte for byte. The SDK publishes such bodies.

    Returns None for any other body, valid or not. Everything is still checked: the pattern checks the attributes, and
    the model validates the data. The model also writes the same text, which proves that no member is repeated or
    undeclared, and that no number can be read in two ways.
    """
    head = _HEAD_AS_WRITTEN.match(body)
    if head is None or body[-1:] != b"}":
        return None
    at = head.start(4)
    # Only a day above 28 or a second of 60 needs the calendar. `at` is -1 if there is no time.
    is_rare = at > 0 and (body[at + 8 : at + 10] > b"28" or body[at + 17 : at + 19] == b"60")
    if is_rare and not _is_in_calendar(head[4].decode()):
        return None
    if head.start(5) > 0 and not _is_tracestate(head[5].decode()):
        return None
    event_type = head[3].decode("ascii")
    model = models.get(event_type)
    if model is None or not is_key_of(routing_key, event_type):
        return None
    data = body[head.end() : -1]
    try:
        text = model.__pydantic_serializer__.to_json(model.__pydantic_validator__.validate_json(data), by_alias=True)
    except Exception:  # noqa: BLE001 - `_read` raises the error again, with its reason.
        return None
    # Pydantic reads and writes these two, but they are not JSON.
    if text != data or b"NaN" in text or b"Infinity" in text:
        return None
    return Event(id=head[1].decode("ascii"), source=head[2].decode("ascii"), type=event_type, text=body)


def _read(body: bytes, routing_key: str, models: Models) -> Event:
    envelope = parse_object(body)
    head = _read_attributes(envelope)
    event_type = envelope["type"]
    model = models.get(event_type)
    if model is None or not is_key_of(routing_key, event_type):
        _check_type_in_key(event_type, routing_key)
        if model is None:
            raise UnknownType(f"the catalogue has no model for type {event_type[:200]!r}")
    data = _pass_through(body, model)
    if data is None:
        data = _revalidate(body, model)
    text = b'{%b,"data":%b}' % (head.encode(), data)
    return Event(id=envelope["id"], source=envelope["source"], type=event_type, text=text)


class _AmbiguousJson(ValueError):
    """The body contains JSON that Python accepts, but that is invalid or that parsers read in different ways."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        # Parsers differ in which of the two they use (RFC 8259, section 4): a page could show the unvalidated one.
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _AmbiguousJson(f"the member {name[:100]!r} occurs twice in one object")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _AmbiguousJson(f"the number {text[:40]} is out of range")
    return number


def _no_constant(name: str) -> NoReturn:
    raise _AmbiguousJson(f"{name} is not JSON (RFC 8259, section 6)")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _decode(text: str) -> object:
    if text[:1] == "{" and text[-1:] == "}":  # No white space around it, so skip the two patterns of `decode`.
        value, end = _DECODER.raw_decode(text)
        if end == len(text):
            return value
    return _DECODER.decode(text)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body (RFC 8259), read strictly.

    Raises:
        Malformed: it is not JSON, or parsers read it in different ways.
        NotACloudEvent: it is JSON, but not an object.
        RecursionError: it is nested too deeply.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise Malformed("the body begins with a byte order mark (RFC 8259, section 8.1)")
    try:
        value = _decode(text)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except _AmbiguousJson as error:
        raise Malformed(str(error)) from None
    except ValueError:  # Python's limit (sys.set_int_max_str_digits): the time to read a number grows with its square.
        raise Malformed("a number has more than 4,300 digits") from None
    if _SURROGATE.search(body):
        try:
            _JSON.encode(value).encode()
        except UnicodeEncodeError:
            raise Malformed(_LONE_SURROGATE) from None
    if not isinstance(value, dict):
        raise NotACloudEvent("the body is JSON, but not an object")
    return value


def _read_attributes(envelope: dict[str, Any]) -> str:
    """Checks all attributes. Returns those that pages get, as the beginning of a JSON object without its brace.

    Raises:
        NotACloudEvent
    """
    for name in _REQUIRED:
        value = envelope.get(name)
        if not isinstance(value, str) or not value:
            problem = "is missing" if name not in envelope else "must be a string that is not empty"
            raise NotACloudEvent(f"the attribute {name!r} {problem}")
    if envelope["specversion"] != SPECVERSION:
        raise NotACloudEvent(f"specversion must be '1.0', not {envelope['specversion'][:40]!r}")
    if not _ID.fullmatch(envelope["id"]):
        raise NotACloudEvent(f"id must be 1 to {MAX_ID_CHARS} characters of A-Z a-z 0-9 . _ : ~ -")
    if "data" not in envelope:
        hint = " (data_base64 is not supported: data must be JSON)" if "data_base64" in envelope else ""
        raise NotACloudEvent(f"the member 'data' is missing{hint}")
    if envelope.get("data_base64") is not None:
        # JSON event format, section 3.1.1: an event has only one of them. Readers differ in which they use.
        raise NotACloudEvent("the event has 'data' and 'data_base64': leave out data_base64, data must be JSON")
    extensions = envelope.keys() - _OWN
    for name in sorted(extensions):
        _check_extension(name, envelope[name])
    text = f'"specversion":"1.0","id":"{envelope["id"]}","source":{_quote(envelope["source"])}'
    text += f',"type":{_quote(envelope["type"])}'
    for name in _OPTIONAL:
        value = envelope.get(name)
        if value is None:  # An attribute that is null counts as absent (JSON event format, section 2.2).
            continue
        if not isinstance(value, str) or not value:
            raise NotACloudEvent(f"the attribute {name!r} must be a string that is not empty")
        if name == "time" and not _RFC3339.fullmatch(value):
            raise NotACloudEvent(f"time must be RFC 3339 (2026-01-31T12:00:00Z), not {value[:60]!r}")
        if name == "time" and not _is_in_calendar(value):
            raise NotACloudEvent(
                f"time is {value[:60]!r}: the day does not exist, or its second 60 is not the last second of a month "
                "in UTC (RFC 3339, section 5.7)"
            )
        if name == "datacontenttype":
            if not _JSON_TYPE.fullmatch(value):
                raise NotACloudEvent(f"datacontenttype must be a JSON type (application/json), not {value[:100]!r}")
            value = "application/json"  # Parameters have no meaning for JSON (RFC 8259, section 11).
        text += f',"{name}":{_quote(value)}'
    if extensions:
        for name, value in read_trace_context(envelope).items():
            text += f',"{name}":{_quote(value)}'
    return text


def _is_in_calendar(time: str) -> bool:
    """Whether the day of a time exists, and a second 60 is the last of a month in UTC (RFC 3339, section 5.7)."""
    is_leap_second = time[17:19] == "60"
    if time[8:10] <= "28" and not is_leap_second:
        return True
    year, month, day = int(time[:4]), int(time[5:7]), int(time[8:10])
    _, days = calendar.monthrange(year, month)
    if day > days or not is_leap_second:
        return day <= days
    minutes = int(time[11:13]) * 60 + int(time[14:16])
    if time[-1] not in "Zz":
        offset = int(time[-5:-3]) * 60 + int(time[-2:])
        minutes += offset if time[-6] == "-" else -offset
    days_on, minute = divmod(minutes, 24 * 60)
    # Day 0 is the last day of the previous month.
    return minute == 24 * 60 - 1 and day + days_on in (0, days)


def read_trace_context(attributes: Mapping[str, object]) -> dict[str, str]:
    """Returns the valid ones of `traceparent` and `tracestate`; pages get these.

    An invalid `traceparent` is ignored together with the `tracestate`. An invalid `tracestate` is ignored alone (W3C
    Trace Context, sections 3.3 and 4.3). The event is still valid.
    """
    parent, state = (attributes.get(name) for name in _TRACE_CONTEXT)
    if not isinstance(parent, str) or not _TRACEPARENT.fullmatch(parent):
        return {}
    if not isinstance(state, str) or not _is_tracestate(state):
        return {"traceparent": parent}
    return {"traceparent": parent, "tracestate": state}


def _is_tracestate(text: str) -> bool:
    """W3C Trace Context, section 3.3.1: 1 to 32 members, each key once. Empty members are allowed."""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    found = [_TRACESTATE_MEMBER.fullmatch(member) for member in members[: _MAX_TRACESTATE_MEMBERS + 1]]
    keys = {member[1] for member in found if member is not None}
    return 1 <= len(members) == len(keys) <= _MAX_TRACESTATE_MEMBERS


def _check_extension(name: str, value: object) -> None:
    if not _EXTENSION_NAME.fullmatch(name):
        raise NotACloudEvent(f"the attribute name {name[:100]!r} must have only the characters a-z and 0-9")
    # CloudEvents 1.0.2, "Type system": in JSON an attribute is a string, a boolean or an integer.
    if value is not None and not isinstance(value, str | bool | int):
        raise NotACloudEvent(f"the extension attribute {name[:100]!r} must be a string, a boolean or an integer")


def _check_type_in_key(event_type: str, routing_key: str) -> None:
    try:
        _, key_type = split_key(routing_key)
    except ValueError as error:
        raise TypeMismatch(f"the routing key has no valid event type: {error}") from None
    if key_type != event_type:
        raise TypeMismatch(f"the event's type is {event_type[:150]!r}, the routing key's is {key_type!r}")


class _Envelope(BaseModel, Generic[_Data]):
    """Validates only the data of an envelope: `parse_object` and `_read_attributes` have checked the rest."""

    data: _Data


@lru_cache(maxsize=4096)
def _envelope_of(model: type[EventData]) -> type[_Envelope[Any]]:
    return _Envelope[model]  # type: ignore[valid-type]


def _pass_through(body: bytes, model: type[EventData]) -> bytes | None:
    """A fast path of `_revalidate`: pydantic's own parser and writer take a third of the time.

    Returns None in doubtful cases. `_revalidate` then returns the same text, or raises the reason.
    """
    try:
        envelope = _envelope_of(model).__pydantic_validator__.validate_json(body)
        text: bytes = model.__pydantic_serializer__.to_json(envelope.data, by_alias=True)
    except Exception:  # noqa: BLE001 - `_revalidate` raises the error again, with its reason.
        return None
    # Pydantic writes an infinite number or NaN as one of these. If a string contains them, `_revalidate` decides.
    return None if b"null" in text or b"NaN" in text or b"Infinity" in text else text


def _revalidate(body: bytes, model: type[EventData]) -> bytes:
    """The data as JSON, written again by its model. Members that the model does not declare are dropped.

    Args:
        body: the whole body, which `parse_object` has checked.

    Raises:
        SchemaViolation: the model refuses the data, or its code raised an error.
        RecursionError, UnicodeEncodeError: faults of the body; the caller tells them apart.
    """
    # Validated as JSON, not as Python values: with `strict=True` a model accepts a time as text only from JSON. The
    # bytes and the parser are those of `_pass_through`, so both read each number in the same way.
    try:
        return encode_data(_envelope_of(model).__pydantic_validator__.validate_json(body).data).encode()
    except ValidationError as error:
        raise SchemaViolation(describe_faults(error, ())) from None
    except (RecursionError, UnicodeEncodeError):
        raise
    except ValueError as error:
        raise SchemaViolation(str(error)) from None
    except Exception as error:
        raise SchemaViolation(f"data: {model.__name__} raised {type(error).__name__}: {error}") from error


def encode_data(data: EventData) -> str:
    """The data as JSON, written by its model.

    Raises:
        ValueError: the data contains an infinite number or NaN.
    """
    value = data.model_dump(mode="json", by_alias=True)
    try:
        return _JSON.encode(value)
    except ValueError:
        # A model reads the text "inf" as a float and would write it as null. Name the member.
        where = _find_infinite(value, "data")
        if where is None:
            raise
        raise ValueError(f"{where} is infinite or NaN, which JSON cannot express") from None


def _find_infinite(value: object, where: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    members: Iterable[tuple[str, object]] = ()
    if isinstance(value, dict):
        members = ((f"{where}.{name}", member) for name, member in value.items())
    elif isinstance(value, list):
        members = ((f"{where}[{index}]", item) for index, item in enumerate(value))
    return next((found for name, member in members if (found := _find_infinite(member, name))), None)


def describe_faults(error: ValidationError, within: tuple[str, ...] = ("data",)) -> str:
    """Describes each fault with the path of its member, but without the value: texts go to logs, values may be private.

    Args:
        within: the path of the validated value in the event; () for the whole event.
    """
    faults = [
        ".".join([*within, *(str(part) for part in fault["loc"])] or ["data"]) + ": " + fault["msg"]
        for fault in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return "; ".join(faults)


def shorten(value: Any) -> str:
    """The value as Python writes it, for an error message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_event(attributes: Mapping[str, str], event_type: str, data: bytes) -> bytes:
    """The body of a message that publishes an event.

    Args:
        attributes: the CloudEvents attributes, without `specversion` and `type`.
        data: the event's data as JSON, as `encode_data` writes it.

    Raises:
        ValueError: an attribute is not Unicode text.
    """
    # In the bridge's order, so that the bridge can take its fast path (`read_as_written`).
    given = {"specversion": SPECVERSION, **attributes, "type": event_type}
    envelope = {name: given[name] for name in _ORDER if name in given} | given
    return b'%b,"data":%b}' % (_JSON.encode(envelope)[:-1].encode(), data)
