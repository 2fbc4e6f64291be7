"""Finds the event models of a package, and reports all of their faults at once.

The import of a team's package is the only impure step. No type is registered by hand: each model class with a type is
found.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from bridge.catalogue import dialects, facts
from bridge.event import EventData, describe_faults
from bridge.roundtrip import check_model
from bridge.routing import InvalidType

EVENTSOURCE_NAMES = ("open", "error")
"""An EventSource itself fires events of these names (WHATWG HTML, sections 9.2.2 and 9.2.3). An event of the type
`error` would call a page's `onerror`."""


class InvalidCatalogue(Exception):
    """The catalogue cannot be used. `faults` has one line for each fault, with the class and how to fix it."""

    def __init__(self, package: str, faults: list[str]) -> None:
        self.package = package
        self.faults = faults
        super().__init__(f"the event catalogue {package!r} has {len(faults)} fault(s): " + "; ".join(faults))


class Catalogue(Mapping[str, type[EventData]]):
    """A mapping from event type to model, sorted by type.

    Args:
        models: event type to model.
        places: the folders of the package, or the file of a single module.
        notes: classes and folders that seem to belong to the catalogue but do not, each with the reason and how to add
            it.
    """

    def __init__(
        self,
        models: Mapping[str, type[EventData]],
        *,
        places: Iterable[str] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self._models = dict(sorted(models.items()))
        self.places = tuple(places)
        self.notes = tuple(notes)

    def __getitem__(self, event_type: str) -> type[EventData]:
        return self._models[event_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def parse(self, event_type: str, data: str) -> EventData:
        """Reads the data of an event from JSON.

        Raises:
            ValueError: the catalogue has no such type, or the data is invalid. The message names the members.
        """
        if event_type not in self:
            raise ValueError(f"the catalogue has no type {event_type[:128]!r}; it has {', '.join(self)}")
        try:
            return self[event_type].model_validate_json(data)
        except ValidationError as error:
            raise ValueError(describe_faults(error)) from None

    def json_schema(self, event_type: str) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of the data of one type, as a publisher must write it; see `facts.py`.

        Raises:
            KeyError: the catalogue has no such type.
        """
        return dialects.standard(facts.describe(self[event_type]))


def load_catalogue(package: str) -> Catalogue:
    """Imports the package with all its modules, and collects its models.

    A class counts if a module of the package defines it or lists it in `__all__`. Other imported classes do not count:
    a module may import them as base classes or for annotations.

    Raises:
        InvalidCatalogue: names all faults, not only the first:
            - a module cannot be imported, or the package has no model;
            - two models name one type, or a model names no type or a reserved one;
            - a model passes undeclared members on, or cannot read back its own JSON.
    """
    faults: list[str] = []
    if not all(part.isidentifier() for part in package.split(".")):
        fault = (
            f"{package!r} (BRIDGE_SCHEMAS) is not a name that Python can import: write a module name such as "
            "acme.events, without slashes, hyphens or .py"
        )
        raise InvalidCatalogue(package, [fault])
    modules = _import_all(package, faults)
    classes, imported = _find_classes(modules)
    models: dict[str, type[EventData]] = {}
    for found in classes:
        where = f"{found.__module__}.{found.__qualname__}"
        if not found.declares_type():
            if not any(found in other.__mro__ for other in classes if other is not found):
                faults.append(f'{where} has no type: write `class {found.__name__}(EventData, type="...")`')
            continue
        event_type = found.event_type
        if event_type in EVENTSOURCE_NAMES:
            faults.append(
                f"{where}: type {event_type!r} is reserved, an EventSource fires its own {event_type!r} events: "
                "choose another type"
            )
        if event_type in models:
            other = models[event_type]
            both = f"{where} and {other.__module__}.{other.__qualname__} both have the type {event_type!r}"
            faults.append(f"{both}: change one of them")
        try:
            found.model_rebuild()
        except Exception as error:  # noqa: BLE001 - an annotation may name anything.
            faults.append(f"{where} has an annotation that cannot be resolved: {error}")
            continue
        if _allows_extra(found.__pydantic_core_schema__):
            faults.append(
                f"{where} has extra='allow', which would send undeclared members to pages: declare them, "
                "or declare one dict field for them"
            )
        else:
            faults += [f"{where}: {fault}" for fault in check_model(found)]
        models[event_type] = found
    notes = [
        f"{module} imports {found.__module__}.{found.__qualname__} (type {found.event_type!r}), which is "
        f"not in the catalogue: to add it, list {name!r} in `__all__` of {module}"
        for found, (module, name) in imported.items()
        if found.declares_type() and not any(found in other.__mro__ for other in classes)
    ]
    places = _places_of(modules)
    notes += _unused_folders(package, places)
    if not models and not faults:
        where = f" ({', '.join(places)})" if places else ""
        faults.append(f'{package}{where} has no event model: add one, `class JobDone(EventData, type="job.done")`')
        faults += notes
    if faults:
        raise InvalidCatalogue(package, faults)
    return Catalogue(models, places=places, notes=notes)


def _find_classes(
    modules: list[ModuleType],
) -> tuple[dict[type[EventData], None], dict[type[EventData], tuple[str, str]]]:
    """The classes that count, and the classes that are only imported, each with its first module and name."""
    ours = {module.__name__ for module in modules}
    classes: dict[type[EventData], None] = {}
    imported: dict[type[EventData], tuple[str, str]] = {}
    for module in modules:
        exported = getattr(module, "__all__", ())
        for name, found in inspect.getmembers(module, inspect.isclass):
            if not issubclass(found, EventData) or found is EventData:
                continue
            if found.__module__ in ours or (name in exported and found.declares_type()):
                classes[found] = None
            else:
                imported.setdefault(found, (module.__name__, name))
    return classes, {found: where for found, where in imported.items() if found not in classes}


def _places_of(modules: list[ModuleType]) -> list[str]:
    if not modules:
        return []
    file = modules[0].__file__
    return list(getattr(modules[0], "__path__", [file] if file else []))


def _unused_folders(package: str, places: list[str]) -> list[str]:
    """Notes about folders with Python files that Python does not use, because `__init__.py` is missing."""
    notes = []
    parent, _, name = package.rpartition(".")
    roots = getattr(sys.modules.get(parent), "__path__", ()) if parent else sys.path
    used = {str(Path(place).resolve()) for place in places}
    for root in roots:
        folder = Path(root or ".").resolve() / name
        if str(folder) in used:
            break  # Python stops here too: later folders are not used, for example an installed package.
        if _lacks_init(folder):
            notes.append(
                f"the folder {folder} is not used: it has no __init__.py, so {package!r} of "
                f"{', '.join(places)} comes first; add an empty __init__.py"
            )
        if str(folder.with_suffix(".py")) in used:
            break
    for place in places:
        inner = sorted(Path(place).iterdir()) if Path(place).is_dir() else []
        notes += [
            f"the folder {folder} is not in the catalogue: it has no __init__.py; to add its modules, add an empty one"
            for folder in inner
            if folder.name.isidentifier() and _lacks_init(folder)
        ]
    return notes


def _lacks_init(folder: Path) -> bool:
    return folder.is_dir() and not (folder / "__init__.py").exists() and any(folder.glob("*.py"))


def _import_all(package: str, faults: list[str]) -> list[ModuleType]:
    modules: list[ModuleType] = []
    pending = [package]
    while pending:
        name = pending.pop(0)
        try:
            module = importlib.import_module(name)
        except InvalidType as error:  # Raised while the class is defined, so only its module is known.
            faults.append(f"{name}: {error}")
            continue
        except ModuleNotFoundError as error:
            # The package or one of its parents is missing. Any other name is a failed import inside the package.
            if name == package and error.name and f"{package}.".startswith(f"{error.name}."):
                faults.append(_missing(package, error.name))
            else:
                faults.append(f"{name} cannot be imported: {error}")
            continue
        except Exception as error:  # noqa: BLE001 - a team's module may raise any error; each is reported.
            faults.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
            continue
        modules.append(module)
        pending += [f"{name}.{found.name}" for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return modules


def _missing(package: str, missing: str) -> str:
    """The fault for a package that Python does not find.

    Args:
        missing: the package itself, or its parent that Python did not find.
    """
    parent = sys.modules.get(missing.rpartition(".")[0])
    if parent is not None:
        where = f"in {', '.join(_places_of([parent]))}"
    else:
        where = f"looked in {', '.join(place or '.' for place in sys.path)}"
    return (
        f"there is no package {package!r} (BRIDGE_SCHEMAS; {missing!r} not found, {where}): start the bridge "
        "in the folder that contains it, add that folder to PYTHONPATH, or install the package; or set "
        "BRIDGE_SCHEMAS to another package, or to the samples with BRIDGE_SCHEMAS=bridge.samples"
    )


def _allows_extra(schema: object) -> bool:
    """Whether any model or typed dict in a pydantic core schema keeps members that it does not declare."""
    if isinstance(schema, dict):
        if schema.get("extra_behavior") == "allow" or schema.get("extra_fields_behavior") == "allow":
            return True
        return any(_allows_extra(part) for name, part in schema.items() if name not in ("metadata", "cls"))
    if isinstance(schema, list | tuple):
        return any(_allows_extra(part) for part in schema)
    return False
