"""The log's own rules."""

import structlog
from structlog.testing import capture_logs

from bridge.service.logs import REPEATED_LINE_SECONDS, RareLine


def test_a_line_that_anybody_can_cause_is_rare_and_counts_the_others() -> None:
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
