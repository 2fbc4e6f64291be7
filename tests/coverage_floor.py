"""Compares the branch coverage of the unit tests with two floors: `python -m tests.coverage_floor REPORT`.

REPORT is coverage's JSON report. The floors only rise: if coverage is two points above one, raise it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PURE = [
    "event.py",
    "routing.py",
    "service/budgets.py",
    "service/broker/gathering.py",
    "service/broker/scans.py",
    "service/http/claims.py",
    "service/http/headers.py",
    "service/http/requesthead.py",
    "service/streams/cursor.py",
    "service/streams/deadlines.py",
    "service/streams/progress.py",
    "service/streams/recall.py",
    "service/streams/session.py",
    "service/streams/sse.py",
    "service/streams/streamevent.py",
]
"""Files of pure logic: without I/O and without waiting."""

PURE_FLOOR = 99
OVERALL_FLOOR = 86
"""Percent of the lines and branches. The integration tests cover the code around RabbitMQ (`live.py`, `topology.py`,
`eventlog.py`). They are not measured: tracing would change their timing."""


def percent(summaries: list[dict[str, int]]) -> float:
    covered = sum(each["covered_lines"] + each["covered_branches"] for each in summaries)
    return 100 * covered / sum(each["num_statements"] + each["num_branches"] for each in summaries)


def compare(report: dict[str, dict[str, dict[str, dict[str, int]]]]) -> list[str]:
    """The faults, as sentences; none if both floors hold."""
    by_file = {name.removeprefix("bridge/"): each["summary"] for name, each in report["files"].items()}
    missing = [name for name in PURE if name not in by_file]
    faults = [f"{name} does not exist any more: change PURE" for name in missing]
    pure = percent([by_file[name] for name in PURE if name in by_file])
    overall = percent(list(by_file.values()))
    for what, reached, floor in (("pure files", pure, PURE_FLOOR), ("all files", overall, OVERALL_FLOOR)):
        print(f"branch coverage of the unit tests, {what}: {reached:.1f} % (floor {floor})")
        if reached < floor:
            files = [name for name in by_file if what == "all files" or name in PURE]
            worst = sorted(files, key=lambda name: by_file[name]["percent_covered"])
            faults.append(f"{what}: {reached:.1f} % is below the floor of {floor}; see first {', '.join(worst[:3])}")
        if reached >= floor + 2:
            print(f"  raise the floor to {int(reached)}")
    return faults


if __name__ == "__main__":
    if found := compare(json.loads(Path(sys.argv[1]).read_text())):
        sys.exit("\n".join(found))
