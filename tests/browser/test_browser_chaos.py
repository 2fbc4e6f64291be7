"""The short version of `make browser-chaos`, and tests of its oracle."""

import json

import pytest

from deploy.local.node import Installation
from tests.browser.chaos import PageRecord, chaos, judge
from tests.browser.engines import Engine


@pytest.mark.any_rabbitmq
async def test_two_users_and_seven_tabs(rabbitmq: Installation, engine: Engine) -> None:
    report, wrong, _ = await chaos(engine, seed=7, seconds=20, rabbitmq=rabbitmq)
    assert not wrong, "\n".join([json.dumps(report), *wrong])
    assert report["seen"] > 0


PUBLISHED = {"user.42": 3, "user.43": 1, "group.ops": 0, "group.dev": 1, "all": 0}
GOOD = [["user", "42"], ["event", "user.42:0"], ["event", "user.42:1"], ["event", "user.42:2"]]


@pytest.mark.parametrize(
    ("log", "word"),
    [
        (GOOD, None),
        ([*GOOD, ["user", "43"], ["gap", "other-user"], ["event", "user.43:0"]], None),
        ([*GOOD, ["event", "user.43:0"]], "while it is 42"),
        ([*GOOD, ["user", "43"], ["event", "user.42:2"]], "while it is 43"),
        ([*GOOD[:2], GOOD[3]], "missed"),
        (GOOD[:3], "ends before"),
        ([GOOD[0], *GOOD[2:]], "was expected"),
        ([*GOOD, GOOD[3]], "again"),
        ([*GOOD, ["gap", "unknown"]], "gap unknown"),
        ([*GOOD, ["event", "group.ops:0"], ["event", "group.dev:0"]], "has seen group.ops"),
        ([GOOD[0], ["event", "group.dev:0"], ["gap", "other-groups"], *GOOD[1:]], None),
    ],
)
def test_the_oracle_finds_each_fault(log: list[list[str | None]], word: str | None) -> None:
    record = PageRecord(
        "page", log=log, expected_from={"user.42": 0}, at_end="43" if ["user", "43"] in log else "42 in ops"
    )
    found = judge([record], PUBLISHED)
    assert (not found) if word is None else word in "\n".join(found)
