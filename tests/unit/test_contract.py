"""Each promise of docs/contract.md has a test that names it: `@pytest.mark.contract("2.14")`."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONTRACT = ROOT / "docs" / "contract.md"
TESTS = ROOT / "tests"

# The list may only shrink. Each promise has the reason why no test checks it.
UNTESTED = {
    "2.32": "a permission for later bridges; no test sends the browser client a frame that it does not know",
    "5.31": "a fact about RabbitMQ 4.3; the test of a cluster waits for the node, and expects no timeout",
    "7.11": "needs a browser and a proxy that hides the header",
    "7.32": "a permission: a tab may get these events and need not",
}


def clauses() -> list[str]:
    """The numbers of the promises, in the order of the page."""
    return re.findall(r"\[(\d+\.\d+)\]", CONTRACT.read_text())


@cache
def markers() -> dict[str, list[str]]:
    """Each clause that a test names, with the tests."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.contract":
                    for clause in mark.args:
                        found[str(ast.literal_eval(clause))].append(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def number(clause: str) -> tuple[int, ...]:
    return tuple(map(int, clause.split(".")))


def test_promises_are_numbered_in_order_within_their_section() -> None:
    section = count = 0
    for line in CONTRACT.read_text().splitlines():
        if heading := re.match(r"## (\d+)\. ", line):
            section, count = int(heading[1]), 0
        for clause in re.findall(r"\[(\d+\.\d+)\]", line):
            count += 1
            assert clause == f"{section}.{count}", f"{clause} should be {section}.{count}: {line}"


def test_each_promise_of_a_list_or_a_table_has_a_number() -> None:
    """Except bullets inside a numbered bullet, which belong to it, and the table before section 1."""
    text = CONTRACT.read_text()
    text = re.sub(r"^```.*?^```", "", text[text.index("\n## 1. ") :], flags=re.MULTILINE | re.DOTALL)
    blocks = re.split(r"\n(?=- |\d+\. |\s*\||#|\n)", text)
    bare = [
        block.strip()
        for number, block in enumerate(blocks)
        if re.match(r"- |\d+\. |\s*\| (?!---)", block)
        and not re.search(r"\[\d+\.\d+\]", block)
        and not (number + 1 < len(blocks) and re.match(r"\s*\| ---", blocks[number + 1]))
    ]
    assert not bare, "without a number:\n" + "\n".join(bare)


def test_tests_name_promises_that_exist() -> None:
    unknown = {clause: tests for clause, tests in markers().items() if clause not in set(clauses())}
    assert not unknown, "docs/contract.md has no such promise:\n" + "\n".join(
        f"{clause}: {', '.join(tests)}" for clause, tests in unknown.items()
    )


def test_each_promise_has_a_test() -> None:
    missing = sorted(set(clauses()) - set(markers()) - set(UNTESTED), key=number)
    assert not missing, f"no test has the mark of {', '.join(missing)}: mark the test that would fail, or write one"


def test_the_list_of_untested_promises_only_shrinks() -> None:
    tested = {clause: tests for clause, tests in markers().items() if clause in UNTESTED}
    assert not tested, f"take them out of UNTESTED, they have tests: {tested}"
    unknown = sorted(set(UNTESTED) - set(clauses()), key=number)
    assert not unknown, f"take them out of UNTESTED, docs/contract.md has no such promise: {', '.join(unknown)}"
