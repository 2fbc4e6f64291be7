"""Catalogues as teams write them, and the faults that a catalogue can have."""

from pathlib import Path
from textwrap import dedent

import pytest

from bridge.catalogue.load import InvalidCatalogue, load_catalogue


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


def test_the_samples_of_the_bridge_are_a_catalogue() -> None:
    catalogue = load_catalogue("bridge.samples")
    assert {"job.started", "job.progress", "job.completed", "approval.requested", "report.ready"} <= set(catalogue)
    assert {"billing.notice", "notification"} <= set(catalogue)
    schema = catalogue.json_schema("job.completed")
    assert schema["required"] == ["job_id", "duration_seconds"]
    assert schema["$schema"].startswith("https://json-schema.org/")


@pytest.mark.contract("4.2", "5.69")
def test_a_class_in_any_module_is_found(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", 'class A(EventData, type="a"):\n  x: int')
    write(folder, "deep/__init__.py", "")
    write(folder, "deep/b.py", f"from {name}.a import A\nclass B(A, type='b'):\n  y: int")
    catalogue = load_catalogue(name)
    assert list(catalogue) == ["a", "b"]
    assert set(catalogue["b"].model_fields) == {"x", "y"}


def test_a_base_without_a_type_is_not_an_event(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", 'class Base(EventData):\n  x: int\nclass A(Base, type="a"):\n  y: int')
    assert list(load_catalogue(name)) == ["a"]


@pytest.mark.contract("5.70", "5.71")
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
        "both have the type 'same'",
        "a.Nameless has no type",
        "'error' is reserved",
        "a.Open has extra='allow'",
        "a.Nested has extra='allow'",
        "'bridge.mine' is reserved",
        "'Upper.Case' is not lower-case",
        "d cannot be imported: No module named 'no_such_module'",
        "e cannot be imported: ZeroDivisionError",
    ]:
        assert words in found, words
    assert len(faults(name)) == 9


def test_no_package_of_that_name() -> None:
    (fault,) = faults("no_such_events")
    assert "there is no package 'no_such_events'" in fault
    assert "BRIDGE_SCHEMAS=bridge.samples" in fault


def test_a_missing_submodule_is_not_a_missing_package(package: tuple[str, Path]) -> None:
    name, folder = package
    (fault,) = faults(f"{name}.billing")
    assert f"there is no package '{name}.billing'" in fault
    assert f"in {folder})" in fault
    write(folder, "a.py", f"import {name}.nope")
    (fault,) = faults(name)
    assert fault == f"{name}.a cannot be imported: No module named '{name}.nope'"


def test_an_import_of_another_missing_package_is_named(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "__init__.py", "import no_such_events.jobs")
    assert faults(name) == [f"{name} cannot be imported: No module named 'no_such_events'"]


@pytest.mark.parametrize("name", ["./events", "events/", "acme-events", "events.py/x", ".events", "acme..events"])
def test_a_name_that_python_cannot_import(name: str) -> None:
    assert faults(name)[0].startswith(f"{name!r} (BRIDGE_SCHEMAS) is not a name that Python can import")


MODEL = 'class {0}(EventData, type="{1}"): pass'


@pytest.mark.contract("5.74")
def test_a_plain_folder_is_a_package(package: tuple[str, Path]) -> None:
    name, folder = package
    (folder / "__init__.py").unlink()
    write(folder, "a.py", MODEL.format("A", "a"))
    catalogue = load_catalogue(name)
    assert (list(catalogue), catalogue.places, catalogue.notes) == (["a"], (str(folder),), ())


@pytest.mark.contract("5.74")
def test_a_single_module_is_a_catalogue(package: tuple[str, Path]) -> None:
    name, folder = package
    (folder / "__init__.py").unlink()
    folder.rmdir()
    write(folder.parent, f"{name}.py", MODEL.format("A", "a"))
    catalogue = load_catalogue(name)
    assert (list(catalogue), catalogue.places) == (["a"], (f"{folder}.py",))
    assert f"'{name}.jobs' not found, in {folder}.py" in faults(f"{name}.jobs")[0]


@pytest.mark.contract("5.75")
def test_a_plain_folder_that_python_does_not_use_is_named(
    package: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python prefers a package with an `__init__.py`, even if its folder is later in `sys.path`."""
    name, folder = package
    write(folder, "a.py", MODEL.format("A", "a"))
    users = folder.parent / "first" / name
    write(users, "b.py", MODEL.format("B", "b"))
    monkeypatch.syspath_prepend(str(users.parent))
    catalogue = load_catalogue(name)
    assert list(catalogue) == ["a"]
    (note,) = catalogue.notes
    assert f"the folder {users} is not used" in note
    assert "add an empty __init__.py" in note


def test_the_first_of_two_packages_counts(package: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder = package
    write(folder, "a.py", MODEL.format("A", "a"))
    users = folder.parent / "first" / name
    write(users, "__init__.py", MODEL.format("B", "b"))
    monkeypatch.syspath_prepend(str(users.parent))
    catalogue = load_catalogue(name)
    assert (list(catalogue), catalogue.places, catalogue.notes) == (["b"], (str(users),), ())


def test_a_plain_folder_inside_is_named(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", MODEL.format("A", "a"))
    write(folder, "billing/b.py", MODEL.format("B", "b"))
    write(folder, "..data/c.py", MODEL.format("C", "c"))  # As in the volume of a ConfigMap.
    catalogue = load_catalogue(name)
    assert list(catalogue) == ["a"]
    (note,) = catalogue.notes
    assert f"the folder {folder / 'billing'} is not in the catalogue" in note


@pytest.mark.contract("5.74")
def test_a_class_from_elsewhere_counts_when_all_lists_it(package: tuple[str, Path]) -> None:
    name, folder = package
    write(
        folder,
        "__init__.py",
        """
        from bridge.samples.billing import BillingNotice as Bill
        from bridge.samples.jobs import JobCompleted
        __all__ = ["Bill", "EventData", "JobCompleted"]
        """,
    )
    catalogue = load_catalogue(name)
    assert (list(catalogue), catalogue.notes) == (["billing.notice", "job.completed"], ())


def test_classes_from_elsewhere_alone_are_named_with_what_to_do(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "__init__.py", "from bridge.samples.jobs import JobCompleted as Done")
    none, note = faults(name)
    assert "has no event model" in none
    assert f"{name} imports bridge.samples.jobs.JobCompleted (type 'job.completed')" in note
    assert f"list 'Done' in `__all__` of {name}" in note


@pytest.mark.contract("5.75")
def test_a_base_from_elsewhere_does_not_count(package: tuple[str, Path]) -> None:
    name, folder = package
    write(
        folder,
        "a.py",
        """
        from bridge.samples.jobs import JobCompleted, JobFailed
        class Deployed(JobCompleted, type="deployed"):
            version: str
        """,
    )
    catalogue = load_catalogue(name)
    assert list(catalogue) == ["deployed"]
    (note,) = catalogue.notes
    assert "JobFailed" in note


def test_an_empty_package(package: tuple[str, Path]) -> None:
    assert "has no event model" in faults(package[0])[0]


@pytest.mark.contract("5.72")
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


def test_an_annotation_that_cannot_be_resolved_is_a_fault(package: tuple[str, Path]) -> None:
    name, folder = package
    write(folder, "a.py", 'class A(EventData, type="a"):\n  x: "NoSuchThing"')
    (fault,) = faults(name)
    assert "NoSuchThing" in fault


def test_the_example_of_a_teams_own_catalogue() -> None:
    catalogue = load_catalogue("schemas")
    assert (list(catalogue), catalogue.notes) == (["parcel.shipped"], ())
    text = '{"parcel_id": "p-1", "arrives_at": "2026-11-26T12:00:00"}'
    with pytest.raises(ValueError, match="arrives_at: Input should have timezone info"):
        catalogue.parse("parcel.shipped", text)


def test_the_samples_take_times_with_a_zone_only() -> None:
    text = '{"approval_id": "a", "job_id": "j", "question": "?", "expires_at": "2026-11-26T12:00:00"}'
    with pytest.raises(ValueError, match="expires_at: Input should have timezone info"):
        load_catalogue("bridge.samples").parse("approval.requested", text)
