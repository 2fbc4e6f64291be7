"""Checks that a page gets the data that a publisher passed: a model's JSON is read back by the same model.

Pure. A publisher writes an event with its model. The bridge reads it and writes it again for pages. If the names,
validators and serializers of a model disagree, a page gets other data and no error is raised. The SDK calls `find_loss`
before it sends; the catalogue calls `check_model` when it is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, Secret, SecretBytes, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, to_jsonable_python

from bridge.event import EventData, describe_faults, shorten
from bridge.trial import samples

MAX_SAFE_INTEGER = 2**53 - 1
"""JavaScript may read a larger integer as another number (ECMA-262, Number.MAX_SAFE_INTEGER; RFC 7493, section 2.2)."""

_LONG_NUMBER = re.compile(rb"\d{16}")

_SEQUENCES = (list, tuple, deque)


def declaring_class(kind: type[EventData]) -> type[EventData]:
    """The base class that declares the type: the class in the catalogue. A subclass of it may add members."""
    return next(found for found in kind.__mro__ if issubclass(found, EventData) and found.declares_type())


def find_loss(passed: EventData, text: bytes) -> str | None:
    """Returns the first difference between the passed data and a page's data, and how to fix it. None: no difference.

    Args:
        passed: the event's data.
        text: the same data as JSON in UTF-8.

    Raises:
        pydantic.ValidationError: the model cannot read the JSON back.
    """
    model = declaring_class(type(passed))
    read = model.__pydantic_validator__.validate_json(text)
    loss = _find_unsafe(passed, "data", naive=_takes_naive(model)) or _compare(passed, read, "data")
    return loss or _compare_written(text, read, model) or _find_long_integer(text)


def _find_unsafe(value: Any, where: str, *, naive: bool) -> str | None:
    """Returns the first value that a page would misread in any written form, and how to fix it.

    Args:
        naive: whether the model declares times without a zone, which are then allowed.
    """
    if isinstance(value, SecretStr | SecretBytes | Secret):
        return f"{where} is a {type(value).__name__}, which is written as asterisks: declare it as a plain type"
    if isinstance(value, datetime) and value.tzinfo is None and not naive:
        return (
            f"{where} is {value.isoformat()}, a time without a zone, which each browser reads in its own zone: "
            "pass datetime.now(UTC), and declare it as AwareDatetime"
        )
    if isinstance(value, datetime) and value.tzinfo is not None and (value.utcoffset() or timedelta()).seconds % 60:
        return f"{where} has an offset with seconds, which RFC 3339 cannot write: pass it with astimezone(UTC)"
    parts = _parts_of(value, where)
    return next((found for part, at in parts if (found := _find_unsafe(part, at, naive=naive))), None)


def _parts_of(value: Any, where: str) -> Iterator[tuple[Any, str]]:
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            if not field.exclude:
                yield getattr(value, name, None), f"{where}.{name}"
    elif isinstance(value, dict):
        for name, part in value.items():
            yield name, f"a key of {where}"
            yield part, f"{where}.{name}"
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for index, part in enumerate(value):
            yield part, f"{where}[{index}]"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield getattr(value, each.name, None), f"{where}.{each.name}"


@lru_cache(maxsize=1024)
def _takes_naive(model: type[EventData]) -> bool:
    return "'tz_constraint': 'naive'" in str(model.__pydantic_core_schema__)


def _compare(passed: Any, read: Any, where: str) -> str | None:
    """Returns the first difference between a value and the same value read back."""
    if isinstance(passed, BaseModel):
        return _compare_models(passed, read, where)
    members: Iterable[tuple[Any, Any, str]]
    if isinstance(passed, dict) and isinstance(read, dict):
        keys = {name: name for name in read} if passed.keys() == read.keys() else {_key(name): name for name in read}
        found = {name if passed.keys() == read.keys() else _key(name): part for name, part in passed.items()}
        if found.keys() != keys.keys() or len(found) != len(passed):
            return _differs(passed, read, where)
        members = ((part, read[keys[name]], f"{where}.{name}") for name, part in found.items())
    elif isinstance(passed, _SEQUENCES) and isinstance(read, _SEQUENCES) and len(passed) == len(read):
        members = ((one, other, f"{where}[{at}]") for at, (one, other) in enumerate(zip(passed, read, strict=True)))
    elif dataclasses.is_dataclass(passed) and type(passed) is type(read):
        names = [each.name for each in dataclasses.fields(passed)]
        members = ((getattr(passed, name, None), getattr(read, name, None), f"{where}.{name}") for name in names)
    else:
        return None if _is_same(passed, read) else _differs(passed, read, where)
    return next((loss for one, other, at in members if (loss := _compare(one, other, at))), None)


def _key(name: Any) -> str:
    """A dict's key as JSON writes it."""
    return str(next(iter(to_jsonable_python({name: None}))))


def _compare_written(text: bytes, read: EventData, model: type[EventData]) -> str | None:
    """Returns the first difference between the sent JSON and the JSON that the bridge writes for pages."""
    shown = model.__pydantic_serializer__.to_json(read, by_alias=True)
    if shown == text:
        return None
    return _compare_json(json.loads(text), json.loads(shown), "data")


def _compare_json(sent: Any, shown: Any, where: str) -> str | None:
    if isinstance(sent, dict) and isinstance(shown, dict):
        for name in {**sent, **shown}:
            if name not in shown or name not in sent:
                made, got = sent.get(name, "nothing"), shown.get(name, "nothing")
                return f"{where}.{name}: {shorten(made)} would be sent, and a page would get {shorten(got)}"
            if loss := _compare_json(sent[name], shown[name], f"{where}.{name}"):
                return loss
    elif isinstance(sent, list) and isinstance(shown, list) and len(sent) == len(shown):
        losses = [
            _compare_json(one, other, f"{where}[{at}]") for at, (one, other) in enumerate(zip(sent, shown, strict=True))
        ]
        if any(losses) and sorted(map(json.dumps, sent)) != sorted(map(json.dumps, shown)):  # A set has no order.
            return next(loss for loss in losses if loss)
    elif sent != shown:
        return f"{where}: {shorten(sent)} would be sent, and a page would get {shorten(shown)}"
    return None


def _compare_models(passed: BaseModel, read: Any, where: str) -> str | None:
    if not isinstance(read, BaseModel):
        # The member takes any type. Its own class writes it, so no part of it is lost.
        return None if _is_same(passed, read) else _differs(passed, read, where)
    own, fields = type(passed).model_fields, type(read).model_fields
    lost = [name for name, field in own.items() if name not in fields and not field.exclude]
    if lost:
        return (
            f"{where} is a {type(passed).__name__}, but the event declares {type(read).__name__}: "
            f"{', '.join(lost)} would not reach a page. Pass a {type(read).__name__}, or declare the members there"
        )
    for name, field in fields.items():
        if field.exclude or (field.exclude_if is not None and field.exclude_if(getattr(passed, name, None))):
            continue
        one, other = getattr(passed, name, None), getattr(read, name)
        if loss := _compare(one, other, f"{where}.{name}"):
            written, names = _written_name(name, field), _read_names(name, field, type(read))
            if written not in names:
                return f"{loss}. {_unread(name, written, names)}"
            return loss
    return None


def _is_same(passed: Any, read: Any) -> bool:
    with contextlib.suppress(Exception):  # A custom `__eq__` may raise; then the JSON forms are compared.
        if passed == read:
            return True
    if isinstance(passed, datetime) and isinstance(read, datetime):
        return False  # Different times can have equal texts, because an offset is written without its seconds.
    try:
        # A member that takes any type reads a tuple as a list and a time as text. For a page they are equal.
        return bool(to_jsonable_python(passed) == to_jsonable_python(read))
    except PydanticSerializationError:
        # Only the member's own serializer can write it. Without `__eq__`, equal types are all that can be compared.
        return type(passed) is type(read) and "__eq__" not in _names_defined_by(type(passed))


def _names_defined_by(kind: type) -> set[str]:
    return {name for base in kind.__mro__ if base is not object for name in vars(base)}


def _differs(passed: Any, read: Any, where: str) -> str:
    return f"{where}: {shorten(passed)} was passed, and a page would get {shorten(read)}"


def _find_long_integer(text: bytes) -> str | None:
    if not _LONG_NUMBER.search(text):
        return None
    found = next(_long_integers(json.loads(text), "data"), None)
    if found is None:
        return None
    where, number = found
    return (
        f"{where} is {number}, beyond 2^53 - 1: JavaScript may read another number. Declare it as str, "
        "and pass its text"
    )


def _long_integers(value: Any, where: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, int) and abs(value) > MAX_SAFE_INTEGER:
        yield where, value
    elif isinstance(value, dict):
        for name, member in value.items():
            yield from _long_integers(member, f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _long_integers(item, f"{where}[{index}]")


# The model itself


def check_model(model: type[EventData]) -> list[str]:
    """Returns why a model does not read back its own JSON: one line for each fault, with how to fix it.

    Names are compared one by one. Validators and serializers are code, so they are tried with samples. An empty list
    means that no fault was found.
    """
    faults = list(dict.fromkeys(_check_names(model.__pydantic_core_schema__, "")))
    return faults or _try_samples(model)


def zoneless_times(model: type[EventData]) -> list[str]:
    """The members that accept a time without a zone, as `Class.member`. Each browser reads such a time in its own zone.

    This is a warning, not a fault: a publisher may still pass the zone.
    """
    return sorted(set(_zoneless(model.__pydantic_core_schema__, "", "")))


def _zoneless(schema: Any, owner: str, member: str) -> Iterator[str]:
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from _zoneless(part, owner, member)
        return
    if not isinstance(schema, Mapping):
        return
    if schema.get("type") == "datetime" and "tz_constraint" not in schema:
        yield f"{owner}.{member}"
    if "cls" in schema and "fields" in schema.get("schema", {}):
        owner = schema["cls"].__name__
    for name, part in schema.items():
        if name == "fields" and isinstance(part, Mapping):
            for each, field in part.items():
                yield from _zoneless(field, owner, each)
        elif name not in ("metadata", "cls", "config"):
            yield from _zoneless(part, owner, member)


def _check_names(schema: Any, owner: str) -> Iterator[str]:
    """Yields the faults of all models, dataclasses and typed dicts in a pydantic core schema, including nested ones."""
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from _check_names(part, owner)
        return
    if not isinstance(schema, Mapping):
        return
    kind = schema.get("type")
    if kind in ("model", "dataclass", "typed-dict") and "cls" in schema:
        owner = schema["cls"].__name__
    if kind in ("model", "dataclass", "typed-dict"):
        yield from _check_fields(schema, owner)
    for name, part in schema.items():
        if name not in ("metadata", "cls", "config"):
            yield from _check_names(part, owner)


def _check_fields(schema: Mapping[str, Any], owner: str) -> Iterator[str]:
    config = schema.get("config", {})
    inner = schema if schema["type"] == "typed-dict" else schema["schema"]
    if "serialization" in schema:
        return  # The serializer of the whole model chooses the names; samples try it.
    while "fields" not in inner and isinstance(inner.get("schema"), Mapping):
        if inner.get("type") in ("function-before", "function-wrap", "function-plain"):
            return  # The validator of the whole model may read other names; samples try it.
        inner = inner["schema"]
    fields = inner.get("fields", {})
    pairs = fields.items() if isinstance(fields, Mapping) else ((field["name"], field) for field in fields)
    written_by: dict[str, str] = {}
    for name, field in pairs:
        where = f"{owner}.{name}" if owner else name
        is_required = field.get("required", field.get("schema", {}).get("type") != "default")
        if field.get("serialization_exclude"):
            if is_required:
                yield f"{where} is required, but exclude=True leaves it out of the JSON: give it a default"
            continue
        if field.get("serialization_exclude_if") and is_required:
            yield f"{where} is required, but exclude_if may leave it out of the JSON: give it a default"
        written = field.get("serialization_alias", name)
        if written in written_by:
            yield f"{where} and {owner}.{written_by[written]} are both written as {written!r}: rename one of them"
        written_by[written] = name
        names = _names_read(name, field.get("validation_alias"), config)
        if written not in names:
            yield f"{where}: {_unread(name, written, names)}"
    forbids = "forbid" in (inner.get("extra_behavior"), config.get("extra_fields_behavior"))
    for computed in inner.get("computed_fields", ()) if forbids else ():
        name = computed.get("alias", computed["property_name"])
        yield f"{owner}.{name} is computed and written, but extra='forbid' refuses it on reading: remove one of the two"


def _names_read(name: str, alias: Any, config: Mapping[str, Any]) -> tuple[str, ...]:
    names = {} if alias is None or config.get("validate_by_alias") is False else _of_alias(alias)
    if alias is None or config.get("validate_by_name") or config.get("populate_by_name"):
        names = {**names, name: None}
    return tuple(names)


def _of_alias(alias: Any) -> dict[str, None]:
    if isinstance(alias, str):
        return {alias: None}
    if alias and not isinstance(alias[0], list):
        alias = [alias]  # One path.
    # A path of several steps reads a member of another member. No field is ever written there.
    return {path[0]: None for path in alias if len(path) == 1}


def _written_name(name: str, field: FieldInfo) -> str:
    return field.serialization_alias or field.alias or name


def _read_names(name: str, field: FieldInfo, model: type[BaseModel]) -> tuple[str, ...]:
    alias: Any = field.validation_alias
    if alias is not None and not isinstance(alias, str):
        alias = alias.convert_to_aliases()
    return _names_read(name, alias, model.model_config)


def _unread(name: str, written: str, names: tuple[str, ...]) -> str:
    read = " or ".join(map(repr, names)) or "no name of its own"
    return (
        f"it is written as {written!r} and read as {read}: give both one name with alias={written!r}, "
        f"or take both with validation_alias=AliasChoices({written!r}, {name!r})"
    )


def _try_samples(model: type[EventData]) -> list[str]:
    try:
        schema = model.model_json_schema(by_alias=True, mode="validation")
    except Exception as error:  # noqa: BLE001 - pydantic raises several classes for a type without a JSON Schema.
        return [f"it has no JSON Schema: {error}"]
    for sample in samples(schema):
        try:
            data = model.model_validate_json(json.dumps(sample))
        except Exception:  # noqa: BLE001 - a validator of the team may refuse the sample, with any error.
            continue
        if fault := _try(model, data, sample):
            return [fault]
    return []


def _try(model: type[EventData], data: EventData, sample: Any) -> str | None:
    given = f"; tried with {shorten(sample)}"
    try:
        text = model.__pydantic_serializer__.to_json(data, by_alias=True)
    except Exception as error:  # noqa: BLE001 - a serializer of the team may raise any error.
        return f"the model cannot write the data that it read: {error}{given}"
    try:
        loss = find_loss(data, text)
    except ValidationError as error:
        return f"the model cannot read back its own JSON: {describe_faults(error)}{given}"
    except Exception as error:  # noqa: BLE001 - a validator of the team may raise any error.
        return f"the model cannot read back its own JSON: {type(error).__name__}: {error}{given}"
    return None if loss is None else f"the model reads back other data than it wrote: {loss}{given}"
