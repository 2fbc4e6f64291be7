"""Look-ups of the console: which entries match, how many, and where the next look-up begins. No RabbitMQ."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bridge.amqp import BrokerUnavailable, NotFound
from bridge.event import Cut
from bridge.routing import Audience, TypeFilter
from bridge.service.broker import lookup
from bridge.service.broker.lookup import LogQuestion, LookUp, Matches
from bridge.service.broker.quarantine import RefusedMessage
from bridge.service.forms import MessageReader
from bridge.service.streams.cursor import Anchor
from deploy.local.node import free_ports
from tests.unit.loopback import BODY, CATALOGUE, KEY, until


@pytest.mark.parametrize(
    ("question", "key", "body", "matches"),
    [
        (LogQuestion(), "anything", b"\xff", True),
        (LogQuestion(audience=Audience.user("42")), "user.42.job.done", b"", True),
        (LogQuestion(audience=Audience.user("42")), "user.421.job.done", b"", False),
        (LogQuestion(types=TypeFilter.parse("job.*")), "all.job.done", b"", True),
        (LogQuestion(types=TypeFilter.parse("job.*")), "all.bill.done", b"", False),
        (LogQuestion(types=TypeFilter.parse("job.*")), "nothing", b"", False),
        (LogQuestion(search="ABC"), "user.abc.x", b"", True),
        (LogQuestion(search="abc"), "all.x", b'{"a": "xABCx"}', True),
        (LogQuestion(search="abc"), "all.x", b"ab", False),
        (LogQuestion(search="\u00e9"), "all.x", b'{"a": "\\u00E9"}', True),
        (LogQuestion(search="\u00e9"), "all.x", b'{"a": "\\u00e8"}', False),
        (LogQuestion(search="\u00e9"), "all.x", b"\\u00e9", False),
    ],
)
def test_an_entry_matches_a_question(question: LogQuestion, key: str, body: bytes, matches: bool) -> None:
    assert question.matches(key, body) is matches


def found(question: LogQuestion, *bodies: bytes, start: int = 0) -> Matches:
    matches = Matches(question, start=start, until=start + len(bodies), own_key="log")
    for offset, body in enumerate(bodies, start):
        assert matches.take(offset, "all.x", body) is (offset == start + len(bodies) - 1)
    return matches


def test_the_newest_matches_are_kept() -> None:
    matches = found(LogQuestion(limit=2), b"a", b"b", b"c")
    assert [body for _, _, body in matches.found] == [b"b", b"c"]
    assert matches.further == 1


def test_a_range_that_begins_with_the_log_has_nothing_further() -> None:
    assert found(LogQuestion(), b"a", b"b").further is None


def test_a_range_within_the_log_goes_on_before_its_start() -> None:
    assert found(LogQuestion(), b"a", start=100).further == 100
    # The log begins after the start of the range. RabbitMQ has deleted the entries before.
    matches = Matches(LogQuestion(), start=100, until=200, own_key="log")
    matches.take(150, "all.x", b"a")
    assert matches.further is None


def test_entries_outside_the_range_and_the_bridges_own_are_left_out() -> None:
    matches = Matches(LogQuestion(), start=10, until=20, own_key="log")
    assert not matches.take(9, "all.x", b"before")
    assert not matches.take(10, "log", b"the bridge's own")
    assert matches.take(20, "all.x", b"after")
    assert not matches.found


def test_the_bytes_of_an_answer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "MAX_ANSWER_BYTES", 4)
    matches = found(LogQuestion(), b"aa", b"bb", b"c")
    assert [body for _, _, body in matches.found] == [b"bb", b"c"]
    assert matches.further == 1
    assert [body for _, _, body in found(LogQuestion(), b"large").found] == [b"large"], "one entry in any case"


def look_up(log: Any = None) -> LookUp:
    (port,) = free_ports(1)
    return LookUp(
        [f"amqp://127.0.0.1:{port}/"],
        quarantine="q",
        log_name="log",
        log=lambda: log,
        messages=MessageReader(CATALOGUE, 65_536, "events"),
    )


class Log:
    """Answers each watermark with this position."""

    def __init__(self, anchor: Anchor | None) -> None:
        self.anchor = anchor

    def write_watermark(self, answer: Any) -> None:
        answer(self.anchor, 0)
        answer(self.anchor, 0)


async def test_the_error_says_that_the_log_or_the_broker_is_missing() -> None:
    with pytest.raises(NotFound, match="BRIDGE_LOG is empty"):
        await look_up().log(LogQuestion())
    with pytest.raises(BrokerUnavailable, match="the log does not answer"):
        await look_up(Log(None)).log(LogQuestion())
    with pytest.raises(BrokerUnavailable, match="connecting to"):
        await look_up(Log(Anchor(7, "abcdef"))).log(LogQuestion())
    with pytest.raises(BrokerUnavailable):
        await look_up().quarantine(5)


async def test_an_empty_log_is_read_without_a_connection() -> None:
    made = look_up(Log(Anchor(0, "abcdef")))
    assert await made.log(LogQuestion()) == {"entries": [], "further": None}
    assert await look_up(Log(Anchor(7, "abcdef"))).log(LogQuestion(before=0)) == {"entries": [], "further": None}


async def test_a_log_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "LOOK_SECONDS", 0.01)
    silent: Any = type("Silent", (), {"write_watermark": lambda self, answer: None})()
    with pytest.raises(BrokerUnavailable, match=r"within 0.01 s"):
        await look_up(silent).log(LogQuestion())


async def test_a_look_up_ends_properly_when_its_request_is_cancelled() -> None:
    answers: list[Any] = []
    log: Any = type("Late", (), {"write_watermark": lambda self, answer: answers.append(answer)})()
    made = look_up(log)
    asking = asyncio.create_task(made.log(LogQuestion()))
    await until(lambda: bool(answers))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(made._running) == 1
    answers[0](Anchor(0, "abcdef"), 0)
    await until(lambda: not made._running)


def test_an_entry_as_it_is_shown() -> None:
    made = look_up()
    assert made._shown_entry(7, KEY, BODY) == {
        "offset": 7,
        "routing_key": KEY,
        "audience": "user:42",
        "body": BODY.decode(),
        "bytes": len(BODY),
        "is_cut": False,
        "refused": None,
    }
    refused = made._shown_entry(8, "nothing", b"\xff")
    assert refused["audience"] is None
    assert refused["body"] == "\\xff"
    assert refused["refused"]["reason"] == "malformed"


def test_a_refused_message_as_it_is_shown() -> None:
    message = RefusedMessage(body=Cut(b"abc", 5_000), routing_key="all.x", reason="too-large", detail="d")
    shown = lookup._shown_refused(message)
    assert (shown["bytes"], shown["is_cut"], shown["audience"]) == (5_000, True, "all")
    assert shown["refused"] == {"reason": "too-large", "detail": "d"}
