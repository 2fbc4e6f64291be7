"""What needs no request. The routes are tried over HTTP, in tests/integration/test_http.py."""

from structlog.testing import capture_logs

from bridge.service.http.web import REPEATED_LINE_SECONDS, RareLine


def test_a_line_that_anybody_can_cause_is_rare_and_counts_the_others() -> None:
    now = 0.0
    line = RareLine("token not judged", lambda: now)
    with capture_logs() as lines:
        for reason in "abc":
            line.log(reason)
        now = REPEATED_LINE_SECONDS
        line.log("d")
    assert [(found["event"], found["error"], found["left_out"]) for found in lines] == [
        ("token not judged", "a", 0),
        ("token not judged", "d", 2),
    ]
