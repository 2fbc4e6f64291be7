"""Log lines that are limited in number."""

import asyncio
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from bridge.service import logs
from bridge.service.logs import REPEATED_LINE_SECONDS, RareLine, summarise_rare_lines
from tests.patience import PATIENCE


def test_a_line_that_any_client_can_cause_is_rare_and_counts_the_others() -> None:
    now = 0.0
    line = RareLine("token not judged", structlog.get_logger().error, lambda: now)
    with capture_logs() as lines:
        for reason in "abc":
            line.log(error=reason)
        now = REPEATED_LINE_SECONDS
        line.log(error="d")
    assert [(found["event"], found["error"], found["left_out"]) for found in lines] == [
        ("token not judged", "a", 0),
        ("token not judged", "d", 2),
    ]


def test_lines_that_are_left_out_are_counted_by_a_fact() -> None:
    line = RareLine("refused", structlog.get_logger().warning, lambda: 0.0, by="reason", burst=2)
    with capture_logs() as lines:
        for number in range(10):
            line.log(reason="odd" if number % 2 else "even", number=number)
        line.summarise()
        line.summarise()
    assert [(found.get("number"), found["left_out"]) for found in lines] == [(0, 0), (1, 0), (None, 8)]
    assert lines[2]["left_out_by_reason"] == {"even": 4, "odd": 4}


async def test_lines_left_out_are_reported_without_another_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "REPEATED_LINE_SECONDS", 0.001)
    reported = asyncio.Event()
    found: list[int] = []

    def write(_: str, **facts: Any) -> None:
        found.append(facts["left_out"])
        if len(found) == 2:
            reported.set()

    line = RareLine("refused", write, lambda: 0.0)
    line.log()
    line.log()
    async with asyncio.timeout(PATIENCE):
        await reported.wait()
    assert found == [0, 1]


def test_at_the_end_all_lines_left_out_are_reported() -> None:
    line = RareLine("told at the end", structlog.get_logger().warning, lambda: 0.0)
    with capture_logs() as lines:
        line.log()
        line.log()
        summarise_rare_lines()  # It also writes those of other tests.
    assert [found["left_out"] for found in lines if found["event"] == "told at the end"] == [0, 1]
