"""`python -m tests.mutants.mutation [NAME...]`: a tool's mutants of the pure files, and those that no test detects.

Each mutant is one edit in a copy of the tree: another operator, another number, a reversed condition.
docs/mutants.md lists the survivors that are equivalent to the code.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / ".run/mutation/bin"

FILES = {
    "deadlines": ("bridge/service/streams/deadlines.py", "tests/unit/test_deadlines.py"),
    "sse": ("bridge/service/streams/sse.py", "tests/unit/test_sse.py"),
    "gathering": ("bridge/service/broker/gathering.py", "tests/unit/test_gathering.py"),
    "budgets": ("bridge/service/budgets.py", "tests/unit/test_budgets.py"),
    "recall": ("bridge/service/streams/recall.py", "tests/unit/test_recall.py"),
    "requesthead": ("bridge/service/http/requesthead.py", "tests/unit/test_requesthead.py"),
    "headers": ("bridge/service/http/headers.py", "tests/unit/test_headers.py"),
    "streamevent": ("bridge/service/streams/streamevent.py", "tests/unit/test_streamevent.py"),
    "cursor": ("bridge/service/streams/cursor.py", "tests/unit/test_cursor.py"),
    "progress": ("bridge/service/streams/progress.py", "tests/unit/test_progress.py"),
    "scans": ("bridge/service/broker/scans.py", "tests/unit/test_scans.py"),
    "claims": ("bridge/service/http/claims.py", "tests/unit/test_claims.py"),
    "routing": ("bridge/routing.py", "tests/unit/test_routing.py"),
    "event": ("bridge/event.py", "tests/unit/test_event.py"),
    "session": ("bridge/service/streams/session.py", "tests/unit/test_session.py"),
}
"""Each pure file with the unit file that must notice its mutants."""

OPERATORS = (
    "ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Mod_Mul|LShift_RShift|RShift_LShift|BitAnd_BitXor)",
    "ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt)",
    "ReplaceComparisonOperator_(Is_IsNot|IsNot_Is)",
    "ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceUnaryOperator_Delete_Not",
    "ReplaceBreakWithContinue|ReplaceContinueWithBreak|AddNot|NumberReplacer|ZeroIterationForLoop",
)
"""One of each kind of the tool's operators. `|` is left out: nearly all are in annotations, which nothing evaluates."""

CONFIG = """\
[cosmic-ray]
module-path = {path}
timeout = 60.0
excluded-modules = []
test-command = {command}

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = [{excluded}]
"""


def run(folder: Path, *arguments: str) -> str:
    return subprocess.run(arguments, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def survivors(folder: Path, path: str, tests: str) -> tuple[int, list[str]]:
    """How many mutants there were, and those that survived, each with its line."""
    command = f"{sys.executable} -m pytest -q -x -n0 -p no:cacheprovider --hypothesis-profile=mutants {tests}"
    run(folder, *command.split())  # Without a mutant the tests pass, or every mutant would seem noticed.
    excluded = json.dumps(f"core/(?!({'|'.join(OPERATORS)})$).*")
    text = CONFIG.format(path=json.dumps(path), command=json.dumps(command), excluded=excluded)
    (folder / "mutation.toml").write_text(text)
    (folder / "session.sqlite").unlink(missing_ok=True)
    run(folder, str(TOOL / "cosmic-ray"), "init", "mutation.toml", "session.sqlite")
    run(folder, str(TOOL / "cr-filter-operators"), "session.sqlite", "mutation.toml")
    run(folder, str(TOOL / "cosmic-ray"), "exec", "mutation.toml", "session.sqlite")
    count, survived = 0, []
    for line in run(folder, str(TOOL / "cosmic-ray"), "dump", "session.sqlite").splitlines():
        item, result = json.loads(line)
        if result is None or result.get("worker_outcome") == "skipped" or " *," in changed(result):
            continue  # The tool treats the `*` before keyword-only arguments as a multiplication.
        count += 1
        if result["test_outcome"] == "survived":
            survived += [f"line {each['start_pos'][0]}:\n{changed(result)}" for each in item["mutations"]]
    return count, survived


def changed(result: dict[str, Any]) -> str:
    """The lines of the edit."""
    lines = (result.get("diff") or "").splitlines()
    return "\n".join(f"    {line}" for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def main() -> None:
    chosen = sys.argv[1:] or list(FILES)
    with tempfile.TemporaryDirectory(prefix="mutation-") as made:
        folder = Path(made)
        for name in ("bridge", "schemas", "tests", "deploy", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for name in chosen:
            path, tests = FILES[name]
            count, survived = survivors(folder, path, tests)
            print(f"{name}: {count - len(survived)} of {count} noticed", flush=True)
            for each in survived:
                print(f"  {path}, {each}", flush=True)


if __name__ == "__main__":
    main()
