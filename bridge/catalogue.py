"""The event catalogue: finds the models of a package and says everything that is wrong with them at once.

Importing a team's package is the only thing done here that is not pure. Nothing is registered by hand: a type exists
because a class exists.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from bridge.event import EventData, describe_faults
from bridge.roundtrip import check_model
from bridge.routing import InvalidType

EVENTSOURCE_NAMES = ("open", "error")
"""An EventSource fires events of these names itself; one of ours would call a page's `onerror` (9.2.2, 9.2.3)."""


class InvalidCatalogue(Exception):
    """The catalogue cannot be used. `faults` names everything found, each with its class and how to mend it."""

    def __init__(self, package: str, faults: list[str]) -> None:
        self.package = package
        self.faults = faults
        super().__init__(f"the event catalogue {package!r} has {len(faults)} fault(s): " + "; ".join(faults))


class Catalogue(Mapping[str, type[EventData]]):
    """Event type to model, in the order of the types."""

    def __init__(self, models: Mapping[str, type[EventData]]) -> None:
        self._models = dict(sorted(models.items()))

    def __getitem__(self, event_type: str) -> type[EventData]:
        return self._models[event_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def parse(self, event_type: str, data: str) -> EventData:
        """The data of an event, from JSON.

        Raises:
            ValueError: no such type, or what is wrong with which member.
        """
        if event_type not in self:
            raise ValueError(f"the catalogue has no type {event_type[:128]!r}; it has {', '.join(self)}")
        try:
            return self[event_type].model_validate_json(data)
        except ValidationError as error:
            raise ValueError(describe_faults(error)) from None

    def json_schema(self, event_type: str) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of the data of one type, as a publisher must write it.

        Raises:
            KeyError: no such type.
        """
        schema = self[event_type].model_json_schema(by_alias=True, mode="validation")
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def load_catalogue(package: str) -> Catalogue:
    """Imports the package with all its modules and collects the models in it.

    Raises:
        InvalidCatalogue: a module does not import, two models name one type, a model names none or a reserved one, a
            model lets undeclared members through or does not read what it writes, or there is no model at all. All
            faults are named, not the first.
    """
    faults: list[str] = []
    modules = _import_all(package, faults)
    classes = {
        found: None
        for module in modules
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, EventData) and found is not EventData and found.__module__ == module.__name__
    }
    models: dict[str, type[EventData]] = {}
    for found in classes:
        where = f"{found.__module__}.{found.__qualname__}"
        if not found.declares_type():
            if not any(found in other.__mro__ for other in classes if other is not found):
                faults.append(f'{where} names no type: write `class {found.__name__}(EventData, type="...")`')
            continue
        event_type = found.event_type
        if event_type in EVENTSOURCE_NAMES:
            faults.append(
                f"{where}: type {event_type!r} is reserved, an EventSource fires its own {event_type!r} events"
            )
        if event_type in models:
            other = models[event_type]
            faults.append(f"{where} and {other.__module__}.{other.__qualname__} both name the type {event_type!r}")
        try:
            found.model_rebuild()
        except Exception as error:  # noqa: BLE001 - an annotation may name anything.
            faults.append(f"{where} has an annotation that means nothing: {error}")
            continue
        if _allows_extra(found.__pydantic_core_schema__):
            faults.append(
                f"{where} has extra='allow', which would show browsers members that nobody declared; declare them, "
                "or one dict field for them"
            )
        else:
            faults += [f"{where}: {fault}" for fault in check_model(found)]
        models[event_type] = found
    if not models and not faults:
        faults.append(f'{package} has no event model: add one, `class JobDone(EventData, type="job.done")`')
    if faults:
        raise InvalidCatalogue(package, faults)
    return Catalogue(models)


def _import_all(package: str, faults: list[str]) -> list[ModuleType]:
    modules: list[ModuleType] = []
    pending = [package]
    while pending:
        name = pending.pop(0)
        try:
            module = importlib.import_module(name)
        except InvalidType as error:  # Raised where the class is made, so its module is all that is known.
            faults.append(f"{name}: {error}")
            continue
        except ModuleNotFoundError as error:
            if error.name == package.partition(".")[0]:
                places = ", ".join(place or "." for place in sys.path[:4])
                faults.append(f"there is no package {package!r} (BRIDGE_SCHEMAS); looked in {places}, ...")
            else:
                faults.append(f"{name} does not import: {error}")
            continue
        except Exception as error:  # noqa: BLE001 - any module of a team's may fail in any way; each is named.
            faults.append(f"{name} does not import: {type(error).__name__}: {error}")
            continue
        modules.append(module)
        pending += [f"{name}.{found.name}" for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return modules


def _allows_extra(schema: object) -> bool:
    """Whether any model or typed dict in a pydantic core schema keeps members that it does not declare."""
    if isinstance(schema, dict):
        if schema.get("extra_behavior") == "allow" or schema.get("extra_fields_behavior") == "allow":
            return True
        return any(_allows_extra(part) for name, part in schema.items() if name not in ("metadata", "cls"))
    if isinstance(schema, list | tuple):
        return any(_allows_extra(part) for part in schema)
    return False
