"""Catalogues as teams write them, and every way in which one can be broken."""

from pathlib import Path
from textwrap import dedent

import pytest

from bridge.catalogue import InvalidCatalogue, load_catalogue


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[str, Path]:
    name = f"events_{abs(hash(request.node.nodeid))}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name, folder


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("from bridge import EventData\nfrom typing import Any\n" + dedent(text))


def faults(name: str) -> list[str]:
    with pytest.raises(InvalidCatalogue) as caught:
        load_catalogue(name)
    return caught.value.faults


def test_the_catalogue_that_comes_with_the_bridge() -> None:
    catalogue = load_catalogue("schemas")
    assert {"job.started", "job.progress", "job.completed", "approval.requested", "report.ready"} <= set(catalogue)
    assert {"billing.notice", "notification"} <= set(catalogue)
    schema = catalogue.json_schema("job.completed")
    assert schema["required"] == ["job_id", "duration_seconds"]
    assert schema["$schema"].startswith("https://json-schema.org/")


def test_a_class_in_any_module_is_found(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", 'class A(EventData, type="a"):\n  x: int')
    write(folder, "deep/__init__.py", "")
    write(folder, "deep/b.py", f"from {name}.a import A\nclass B(A, type='b'):\n  y: int")
    catalogue = load_catalogue(name)
    assert list(catalogue) == ["a", "b"]
    assert set(catalogue["b"].model_fields) == {"x", "y"}


def test_a_base_without_a_type_is_no_event(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", 'class Base(EventData):\n  x: int\nclass A(Base, type="a"):\n  y: int')
    assert list(load_catalogue(name)) == ["a"]


def test_all_faults_are_named_at_once(package: tuple[str, Path]) -> None:
    name, folder = package
    write(
        folder,
        "a.py",
        """
        from pydantic import BaseModel
        class One(EventData, type="same"): pass
        class Two(EventData, type="same"): pass
        class Nameless(EventData): pass
        class Fires(EventData, type="error"): pass
        class Open(EventData, type="leaks", extra="allow"): pass
        class Part(BaseModel, extra="allow"): pass
        class Nested(EventData, type="leaks.too"):
            parts: list[Part]
        """,
    )
    write(folder, "b.py", 'class B(EventData, type="bridge.mine"): pass')
    write(folder, "c.py", 'class C(EventData, type="Upper.Case"): pass')
    write(folder, "d.py", "import no_such_module")
    write(folder, "e.py", "1/0")
    found = "\n".join(faults(name))
    for words in [
        "a.Two and",
        "both name the type 'same'",
        "a.Nameless names no type",
        "'error' is reserved",
        "a.Open has extra='allow'",
        "a.Nested has extra='allow'",
        "'bridge.mine' is reserved",
        "'Upper.Case' is not lower-case",
        "d does not import: No module named 'no_such_module'",
        "e does not import: ZeroDivisionError",
    ]:
        assert words in found, words
    assert len(faults(name)) == 9


def test_no_package_of_that_name() -> None:
    assert "there is no package 'no_such_events'" in faults("no_such_events")[0]


def test_an_empty_package(package: tuple[str, Path]) -> None:
    assert "has no event model" in faults(package[0])[0]


def test_a_model_that_does_not_read_what_it_writes_is_a_fault(package: tuple[str, Path]) -> None:
    name, folder = package
    write(
        folder,
        "a.py",
        """
        from pydantic import Field
        class Shipped(EventData, type="parcel.shipped"):
            parcel_id: str
            carrier: str | None = Field(None, serialization_alias="carrierName")
        """,
    )
    (fault,) = faults(name)
    assert fault.startswith(f"{name}.a.Shipped: Shipped.carrier: it is written as 'carrierName' and read as 'carrier'")


def test_an_annotation_that_means_nothing_is_a_fault(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", 'class A(EventData, type="a"):\n  x: "NoSuchThing"')
    (fault,) = faults(name)
    assert "NoSuchThing" in fault
