"""The JSON Schema of an event type, with facts that JSON Schema cannot express.

`bridge schemas diff` compares two exports without their classes. So an export must contain everything that determines
what a model accepts and writes. JSON Schema cannot express strict mode, a time zone, a second alias or a validator's
code. Such facts are in `$comment`, which every validator ignores. The schema of the data that a page receives is in
`$defs`, under the name `RECEIVED`.

Owns pydantic's core schema: no other file reads one for this purpose. An unknown fact is written unchanged, so that
`schemas diff` sees a difference in it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticOmit

from bridge.catalogue import dialects
from bridge.catalogue.evolution import MARK, RECEIVED

Schema = dict[str, Any]

_STRICT_MATTERS = frozenset(
    {"int", "float", "bool", "date", "datetime", "time", "timedelta", "decimal", "complex", "lax-or-strict"}
)
"""Kinds for which strict mode refuses JSON that lax mode accepts. For a text, a list or null the modes are equal."""

_WRAPPERS = frozenset(
    {"nullable", "default", "model", "model-field", "model-fields", "typed-dict", "typed-dict-field", "dataclass",
     "dataclass-args", "dataclass-field", "definitions", "definition-ref", "union", "tagged-union", "json-or-python",
     "lax-or-strict", "chain", "function-before", "function-after", "function-wrap", "function-plain",
     "computed-field"}
)  # fmt: skip

# Kinds that a JSON Schema node without facts expresses completely.
_PLAIN = frozenset(
    {"int", "float", "str", "bool", "none", "any", "list", "dict", "literal", "enum", "datetime", "date", "time",
     "timedelta", "uuid", "url", "bytes", "tuple"}
)  # fmt: skip

# Keys of a core schema that JSON Schema expresses, that nested nodes express, or that have no effect on JSON.
_SAID_ALWAYS = frozenset({"type", "ref", "metadata", "serialization", "strict", "config", "custom_error_type",
                          "custom_error_message", "custom_error_context"})  # fmt: skip
_NUMBER = frozenset({"ge", "gt", "le", "lt", "multiple_of", "allow_inf_nan"})
_ITEMS = frozenset({"items_schema", "min_length", "max_length", "fail_fast"})
_SAID: Mapping[str, frozenset[str]] = {
    "int": _NUMBER,
    "float": _NUMBER,
    "str": frozenset({"min_length", "max_length", "pattern", "strip_whitespace", "to_lower", "to_upper",
                      "coerce_numbers_to_str", "regex_engine"}),
    "bytes": frozenset({"min_length", "max_length"}),
    "list": _ITEMS,
    "set": _ITEMS,
    "frozenset": _ITEMS,
    "tuple": _ITEMS | {"variadic_item_index"},
    "dict": frozenset({"keys_schema", "values_schema", "min_length", "max_length", "fail_fast"}),
    "literal": frozenset({"expected"}),
    "enum": frozenset({"cls", "members", "missing", "sub_type"}),
    "decimal": frozenset({"allow_inf_nan"}),
    "datetime": frozenset({"microseconds_precision"}),
    "time": frozenset({"microseconds_precision"}),
    "timedelta": frozenset({"microseconds_precision"}),
    "nullable": frozenset({"schema"}),
    "union": frozenset({"choices", "auto_collapse", "mode"}),
    "tagged-union": frozenset({"choices", "from_attributes", "discriminator"}),
    "default": frozenset({"schema", "default", "default_factory", "default_factory_takes_data", "copy_default",
                          "validate_default"}),
    "model": frozenset({"schema", "cls", "frozen", "post_init", "custom_init", "root_model", "generic_origin",
                        "revalidate_instances", "extra_behavior"}),
    "model-fields": frozenset({"fields", "computed_fields", "model_name", "from_attributes", "extra_behavior"}),
    "model-field": frozenset({"schema", "serialization_exclude", "serialization_exclude_if", "validation_alias",
                              "serialization_alias", "frozen"}),
    "typed-dict": frozenset({"fields", "computed_fields", "cls", "cls_name", "total", "extra_behavior"}),
    "typed-dict-field": frozenset({"schema", "required", "serialization_exclude", "serialization_exclude_if",
                                   "validation_alias", "serialization_alias"}),
    "dataclass": frozenset({"schema", "cls", "cls_name", "fields", "frozen", "slots", "post_init", "generic_origin",
                            "revalidate_instances"}),
    "dataclass-args": frozenset({"fields", "computed_fields", "dataclass_name", "collect_init_only",
                                 "extra_behavior"}),
    "dataclass-field": frozenset({"name", "schema", "kw_only", "frozen", "serialization_exclude",
                                  "serialization_exclude_if", "validation_alias", "serialization_alias"}),
    "definitions": frozenset({"schema", "definitions"}),
    "definition-ref": frozenset({"schema_ref"}),
    "json-or-python": frozenset({"json_schema", "python_schema"}),
    "lax-or-strict": frozenset({"lax_schema", "strict_schema"}),
    "chain": frozenset({"steps"}),
    "function-before": frozenset({"schema", "function", "json_schema_input_schema"}),
    "function-after": frozenset({"schema", "function", "json_schema_input_schema"}),
    "function-wrap": frozenset({"schema", "function", "json_schema_input_schema"}),
    "function-plain": frozenset({"function", "json_schema_input_schema"}),
}  # fmt: skip

# Config that JSON Schema expresses, that is written at each text, or that has no effect on JSON.
_CONFIG_SAID = frozenset(
    {"title", "strict", "str_strip_whitespace", "str_to_lower", "str_to_upper", "str_min_length", "str_max_length",
     "coerce_numbers_to_str", "regex_engine", "extra_fields_behavior", "from_attributes", "loc_by_alias",
     "hide_input_in_errors", "validation_error_cause", "revalidate_instances", "cache_strings", "frozen",
     "validate_default", "allow_inf_nan", "serialize_by_alias", "validate_by_name", "validate_by_alias"}
)  # fmt: skip

_ANNOTATIONS = frozenset({"title", "description", "examples", "deprecated"})

_HIDE_NOTHING = ("BaseModel.__get_pydantic_json_schema__", "GenerateSchema._enum_schema.<locals>.get_json_schema")
"""Functions of pydantic that make a node's JSON Schema without hiding anything inside the node."""

_LONGEST = 300
"""The most characters of a fact. A longer fact is written as its digest: it is only compared as a whole."""


def describe(model: type[BaseModel]) -> Schema:
    """The JSON Schema of a model's data as a publisher writes it. In `$defs` it also has the data as a page receives
    it."""
    published = model.model_json_schema(by_alias=True, mode="validation", schema_generator=_PublishedFacts)
    received = model.model_json_schema(
        by_alias=True,
        mode="serialization",
        schema_generator=_ReceivedFacts,
        ref_template=f"#/$defs/{RECEIVED}/$defs/{{model}}",
    )
    definitions = {**published.pop("$defs", {}), RECEIVED: received}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **published, "$defs": definitions}


class _WithFacts(dialects.Generator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configs: list[Mapping[str, Any]] = [{}]
        self._omitted: list[Any] = []
        self._recorded: set[str] = set()

    def generate_inner(self, schema: Any) -> Schema:
        if "config" in schema:
            self._configs.append(schema["config"] or {})
        omitted = len(self._omitted)
        try:
            result = super().generate_inner(schema)
            facts = self._facts(schema, self._configs[-1])
        except PydanticOmit as error:  # SkipJsonSchema: the model still accepts it. The enclosing node gets the fact.
            if not getattr(error, "is_recorded", False):
                error.is_recorded = True  # type: ignore[attr-defined]
                self._omitted.append(_short(_canonical(schema)))
            raise
        finally:
            if "config" in schema:
                self._configs.pop()
        if hidden := self._omitted[omitted:]:
            del self._omitted[omitted:]
            facts["hidden"] = hidden
        reference = schema.get("ref")
        if not facts or reference in self._recorded:
            return result
        if reference is not None:
            self._recorded.add(reference)
        # Several places use a definition, so its facts are in the definition, not beside one `$ref`.
        home = self.get_schema_from_definitions(result["$ref"]) if reference and "$ref" in result else None
        _add_facts(result if home is None else home, facts)
        return result

    def _facts(self, core: Any, config: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class _PublishedFacts(_WithFacts):
    """The data that a publisher may send."""

    def _facts(self, core: Any, config: Mapping[str, Any]) -> dict[str, Any]:
        kind: str = core["type"]
        facts: dict[str, Any] = {}
        if _hides_itself(core.get("metadata", {})):
            facts["schema"] = _short(_canonical(core))
        if kind not in _WRAPPERS and kind not in _PLAIN:
            facts["kind"] = [kind]
        said = _SAID.get(kind, frozenset()) | _SAID_ALWAYS
        for name, value in core.items():
            if name not in said and value is not None and value is not False:
                facts["inside" if name == "schema" else name] = _short(_canonical(value))
        strict = core.get("strict", config.get("strict", False))
        if strict and kind in _STRICT_MATTERS:
            facts["strict"] = True
        if own := getattr(self, "_facts_of_" + kind.replace("-", "_"), None):
            facts |= own(core, config, strict)
        if "config" in core:
            rest = {name: _canonical(value) for name, value in (core["config"] or {}).items()
                    if name not in _CONFIG_SAID and not name.startswith("ser_")}  # fmt: skip
            if rest:
                facts["config"] = rest
        return facts

    def _facts_of_str(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        def get(name: str, setting: str) -> Any:
            return core.get(name, config.get(setting))

        facts = {
            "strip": get("strip_whitespace", "str_strip_whitespace"),
            "lower": get("to_lower", "str_to_lower"),
            "upper": get("to_upper", "str_to_upper"),
            "numbers": get("coerce_numbers_to_str", "coerce_numbers_to_str") and not strict,
            "least": None if "min_length" in core else config.get("str_min_length"),
            "most": None if "max_length" in core else config.get("str_max_length"),
            "flags": core["pattern"].flags & ~re.UNICODE if isinstance(core.get("pattern"), re.Pattern) else None,
            "pattern": dialects.unsayable(core.get("pattern")),
            "engine": get("regex_engine", "regex_engine") if "pattern" in core else None,
        }
        return {name: value for name, value in facts.items() if value}

    def _facts_of_enum(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if core.get("sub_type") in ("int", "float") and not strict:
            facts["kind"] = ["numbers by conversion"]  # An IntEnum accepts "1", a Literal[1] does not.
        missing = vars(core["cls"]).get("_missing_")
        if missing is not None:
            facts = _merged(facts, _code("missing", missing))
        return facts

    def _facts_of_dict(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        keys = core.get("keys_schema", {"type": "any"})
        settled = {name: config[name] for name in sorted(config) if name.startswith("str_") or name == "strict"}
        plain = keys.get("type") in ("str", "any") and keys.keys() <= {"type", "metadata"} and not settled
        return {} if plain else {"keys": _short([_canonical(keys), _canonical(settled)])}

    def _facts_of_chain(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        return {"steps": _short(_canonical(core["steps"][1:]))}

    def _facts_of_tagged_union(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        tag = core["discriminator"]
        return _code("tag", tag) if callable(tag) else {"tag": _canonical(tag)}

    def _facts_of_model(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        # These methods run during validation and may refuse the data. Pydantic's own methods are not facts.
        found: dict[str, Any] = {}
        cls = core["cls"]
        post_init = core.get("post_init")  # The method's name for a model, True for a dataclass.
        names = ["__post_init__" if post_init is True else post_init, "__init__" if core.get("custom_init") else None]
        for name in names:
            function = getattr(cls, name, None) if name else None
            if function is not None and not _is_pydantics(function):
                found = _merged(found, _code(str(name), function))
        return found

    _facts_of_dataclass = _facts_of_model

    def _facts_of_model_fields(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        by_alias, by_name = config.get("validate_by_alias", True), config.get("validate_by_name", False)
        fields = core["fields"]
        named = fields.items() if isinstance(fields, dict) else [(field["name"], field) for field in fields]
        names = {}
        for name, field in named:
            shown = self._get_alias_name(field, name)
            alias = field.get("validation_alias")
            taken: list[Any] = []
            if alias is None or by_name:
                taken.append(name)
            if alias is not None and by_alias:
                nested = isinstance(alias, list) and all(isinstance(path, list) for path in alias)
                taken += alias if nested else [alias]
            taken = [path[0] if isinstance(path, list) and len(path) == 1 else path for path in taken]
            if taken != [shown]:
                names[shown] = sorted(taken, key=json.dumps)
        return {"names": names} if names else {}

    _facts_of_typed_dict = _facts_of_model_fields
    _facts_of_dataclass_args = _facts_of_model_fields

    def _facts_of_function_before(self, core: Any, config: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        return _code(core["type"].removeprefix("function-"), core["function"]["function"])

    _facts_of_function_after = _facts_of_function_before
    _facts_of_function_wrap = _facts_of_function_before
    _facts_of_function_plain = _facts_of_function_before


class _ReceivedFacts(_WithFacts, dialects.Received):
    """The data that a page receives."""

    def _facts(self, core: Any, config: Mapping[str, Any]) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if core["type"] in ("datetime", "time") and core.get("tz_constraint") is not None:
            facts["tz_constraint"] = _canonical(core["tz_constraint"])
        writer = core.get("serialization", {})
        if "function" in writer and writer.get("return_schema") is None and not _is_pydantics(writer["function"]):
            facts |= _code("writes", writer["function"])
        if _hides_itself(core.get("metadata", {})):
            facts["schema"] = _short(_canonical(core))
        if "config" in core:
            rest = {name: _canonical(value) for name, value in (core["config"] or {}).items()
                    if name.startswith("ser_")}  # fmt: skip
            if rest:
                facts["config"] = rest
        return facts


def _hides_itself(metadata: Mapping[str, Any]) -> bool:
    """Whether the JSON Schema of a node is handwritten, and so may differ from what the node accepts."""
    for extra in (metadata.get("pydantic_js_updates"), metadata.get("pydantic_js_extra")):
        if callable(extra) or (extra and not set(extra) <= _ANNOTATIONS):
            return True
    functions = [
        *metadata.get("pydantic_js_functions", ()),
        *metadata.get("pydantic_js_annotation_functions", ()),
    ]
    return any(not _is_pydantics(function) or _name(function) not in _HIDE_NOTHING for function in functions)


def _short(fact: Any) -> Any:
    text = json.dumps(fact, sort_keys=True)
    return fact if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()[:12]


def _add_facts(schema: Schema, facts: Mapping[str, Any]) -> None:
    comment = str(schema.get("$comment", ""))
    text, mark, known = comment.partition(MARK)
    merged = _merged(json.loads(known) if mark else {}, facts)
    schema["$comment"] = text + MARK + json.dumps(merged, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the facts of two core nodes that are one node in JSON Schema, the inner node first."""
    found = dict(one)
    for name, value in other.items():
        if name not in found:
            found[name] = value
        elif isinstance(found[name], list) and isinstance(value, list):
            found[name] = found[name] + value
        elif isinstance(found[name], dict) and isinstance(value, dict):
            found[name] = _merged(found[name], value)
        elif found[name] != value:
            found[name] = [found[name], value]
    return found


# Code


def _code(role: str, function: Callable[..., Any]) -> dict[str, Any]:
    if _is_pydantics(function):
        return {"kind": [f"{role} {_name(function)}{_arguments(function)}"]}
    return {"code": [f"{role} {_digest(function)}"]}


def _unwrapped(function: Any) -> Any:
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType | staticmethod | classmethod):
            function = function.__func__
        else:
            return function


def _is_pydantics(function: Any) -> bool:
    module = getattr(_unwrapped(function), "__module__", None) or ""
    return module.partition(".")[0] in ("pydantic", "pydantic_core", "annotated_types")


def _name(function: Any) -> str:
    found = _unwrapped(function)
    return getattr(found, "__qualname__", None) or type(found).__qualname__


def _arguments(function: Any) -> str:
    if not isinstance(function, functools.partial):
        return ""
    return json.dumps([_canonical(function.args), _canonical(function.keywords)])


def _digest(function: Any) -> str:
    """Digest of a function's code, without comments and layout, and of the code that it uses from its own package.

    It does not cover code of other packages, nor data that the function reads when it runs.
    """
    parts: list[Any] = []
    _collect(function, parts, set(), package=None)
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _collect(function: Any, parts: list[Any], seen: set[int], package: str | None) -> None:
    found = _unwrapped(function)
    if id(found) in seen:
        return
    seen.add(id(found))
    parts.append(_arguments(function))
    if not isinstance(found, types.FunctionType):
        if isinstance(found, type) or not callable(found) or isinstance(found, types.BuiltinFunctionType):
            parts.append(_name(found))
            if isinstance(found, type):
                parts.append(_source(found))
            return
        parts += [_name(found), _canonical(getattr(found, "__dict__", {}))]
        call = vars(type(found)).get("__call__")
        if isinstance(call, types.FunctionType):
            _collect(call, parts, seen, package)
        return
    home = package or found.__module__.partition(".")[0]
    parts += [_source(found), _canonical(found.__defaults__), _canonical(found.__kwdefaults__)]
    uses = inspect.getclosurevars(found)
    for name, value in sorted({**uses.globals, **uses.nonlocals}.items()):
        if isinstance(value, types.ModuleType):
            parts.append([name, value.__name__])
        elif isinstance(_unwrapped(value), types.FunctionType | type):
            parts.append(name)
            if (getattr(_unwrapped(value), "__module__", None) or "").partition(".")[0] == home:
                _collect(value, parts, seen, home)
            else:
                parts.append(_name(value))
        else:
            parts.append([name, _canonical(value)])


def _source(thing: Any) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        return f"{code.co_code.hex()} {_canonical(code.co_consts)} {code.co_names}" if code else _name(thing)
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:  # A lambda: only its line is known, which may be a part of a statement.
        return " ".join(text.split())


def _canonical(value: Any, depth: int = 0) -> Any:
    """The value as JSON, equal in every process: it does not depend on the order of sets or on object addresses."""
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if depth > 20:
        return "..."
    if isinstance(value, Enum):
        return _canonical(value.value, depth + 1)
    if isinstance(value, Mapping):
        skipped = ("metadata", "ref", "serialization") if "type" in value else ()
        pairs = [(str(_canonical(name, depth + 1)), _canonical(part, depth + 1)) for name, part in value.items()
                 if name not in skipped]  # fmt: skip
        return dict(sorted(pairs, key=lambda pair: pair[0]))
    if isinstance(value, list | tuple):
        return [_canonical(part, depth + 1) for part in value]
    if isinstance(value, set | frozenset):
        return sorted((_canonical(part, depth + 1) for part in value), key=json.dumps)
    if isinstance(value, re.Pattern):
        return [value.pattern, value.flags]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), _canonical(value.co_consts, depth + 1), list(value.co_names)]
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(_unwrapped(value), types.FunctionType | types.BuiltinFunctionType):
        return f"{_name(value)}{_arguments(value)}" if _is_pydantics(value) else _digest(value)
    if not isinstance(value, Iterable) and " at 0x" not in (text := str(value)):  # A Decimal, a date, a UUID.
        return text
    inside = getattr(value, "__dict__", None)
    return [type(value).__qualname__, _canonical(inside, depth + 1) if inside else None]
