"""The comparison of a coverage report with the floors."""

from __future__ import annotations

from typing import Any

import pytest

from tests import coverage_floor
from tests.coverage_floor import PURE, compare


def report(covered: int, **others: int) -> dict[str, Any]:
    """A report of files with 100 lines each, of which `covered` are covered."""
    files = dict.fromkeys(PURE, covered) | {f"{name}.py": count for name, count in others.items()}
    summary = {"num_statements": 100, "num_branches": 0, "covered_branches": 0}
    return {
        "files": {
            f"bridge/{name}": {"summary": {**summary, "covered_lines": count, "percent_covered": count}}
            for name, count in files.items()
        }
    }


def test_a_floor_that_is_not_reached_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_floor, "PURE_FLOOR", 95)
    monkeypatch.setattr(coverage_floor, "OVERALL_FLOOR", 90)
    assert compare(report(95)) == []
    (fault,) = compare(report(94))
    assert fault.startswith("pure files: 94.0 % is below the floor of 95")
    (fault,) = compare(report(95, cli=0))
    percent = 95 * len(PURE) / (len(PURE) + 1)
    assert fault.startswith(f"all files: {percent:.1f} % is below the floor of 90; see first cli.py")


def test_a_pure_file_that_was_renamed_is_named() -> None:
    gone = report(95)
    del gone["files"]["bridge/event.py"]
    assert "event.py does not exist any more: change PURE" in compare(gone)
