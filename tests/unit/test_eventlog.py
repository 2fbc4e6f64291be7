"""Who shares a pass, whose entries it hands to whom, and what it says when the log does not reach back. No broker."""

from __future__ import annotations

import contextlib

import pytest

from bridge.service.broker.eventlog import (
    LINE_SECONDS,
    LONGEST_LINE_SECONDS,
    MAX_PASSES,
    SPAN_ENTRIES,
    EventLog,
    Request,
    _Pass,
    is_worth_waiting,
)
from bridge.service.settings import LogSettings
from bridge.service.streams.cursor import Anchor, digest
from bridge.service.streams.session import Replay


class Notes:
    """A reader that notes what it is told; full after `room` entries."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.told: list[str | int] = []

    def found(self) -> None:
        self.told.append("found")

    def not_found(self, reason: str) -> None:
        self.told.append(reason)

    def read(self, offset: int, check: str, routing_key: str, body: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.told.append(offset)
        return True

    def caught_up(self) -> None:
        self.told.append("caught up")

    def settle(self, routing_key: str, body: bytes) -> None:
        self.told.append("settle")

    def settled(self) -> None:
        self.told.append("settled")


def read(requests: list[Request], first: int, last: int, key: str = "user.42.x") -> None:
    reading = _Pass(requests)
    for offset in range(first, last + 1):
        reading.on_entry(offset, key, b"%d" % offset)


def test_from_behind_the_anchor_to_the_tick_and_a_little_on() -> None:
    notes = Notes()
    read([Request(Replay(3, 6, digest(b"3")), ["user.42."], notes)], 0, 7)
    assert notes.told == ["found", 4, 5, 6, "caught up", "settle"]


@pytest.mark.parametrize(("first", "check", "reason"), [(3, b"other", "unknown"), (5, b"3", "expired")])
def test_an_anchor_that_is_not_there(first: int, check: bytes, reason: str) -> None:
    notes = Notes()
    read([Request(Replay(3, 9, digest(check)), ["user.42."], notes)], first, 9)
    assert notes.told == [reason]


def test_a_log_cut_while_a_slow_reader_was_stopped_is_told() -> None:
    notes = Notes()
    read([Request(Replay(3, 9, None), ["user.42."], notes)], 5, 9)
    assert notes.told == ["expired"]


def test_who_is_full_is_read_to_no_more() -> None:
    notes = Notes(room=2)
    request = Request(Replay(3, 9, digest(b"3")), ["user.42."], notes)
    read([request], 3, 9)
    assert notes.told == ["found", 4, 5]
    assert request.next == 6


def test_others_entries_are_not_handed_out() -> None:
    notes = Notes()
    read([Request(Replay(3, 6, digest(b"3")), ["user.42."], notes)], 3, 7, key="user.43.x")
    assert notes.told == ["found", "caught up"]


def test_who_only_settles_is_told_nothing_else() -> None:
    notes = Notes()
    reading = _Pass([Request(Replay(3, 3, digest(b"3")), ["user.42."], notes, only_settles=True)])
    for offset in range(3, 6):
        reading.on_entry(offset, "user.42.x", b"%d" % offset)
    reading.settle_until(0)
    assert notes.told == ["settle", "settle"], "a second is not over"
    reading.settle_until(float("inf"))
    assert notes.told == ["settle", "settle", "settled"]
    assert not reading.active


def test_who_settles_in_a_log_that_is_gone_is_let_go() -> None:
    replays, settles = Notes(), Notes()
    reading = _Pass(
        [
            Request(Replay(3, 6, digest(b"3")), ["user.42."], replays),
            Request(Replay(3, 3, digest(b"3")), ["user.42."], settles, only_settles=True),
        ]
    )
    reading.refuse_all("no-log")
    assert (replays.told, settles.told) == (["no-log"], ["settled"])


@pytest.mark.parametrize("last", [5, 6, 7])
def test_a_pass_that_breaks_off_anywhere_is_begun_again_with_what_is_left(last: int) -> None:
    """Also in the second behind the tick, which a cluster whose node dies needs most."""
    notes = Notes()
    request = Request(Replay(3, 6, digest(b"3")), ["user.42."], notes)
    read([request], 3, last)
    request.begin_again()
    read([request], request.next, 8)
    assert [told for told in notes.told if told != "settle"] == ["found", 4, 5, 6, "caught up"]
    assert notes.told[-2:] == ["settle", "settle"], "7 and 8"


@pytest.mark.parametrize(
    ("waited", "here", "expected", "worth"),
    [
        (0.0, 1, 0, False),
        (0.0, 1, 9_999, True),
        (LINE_SECONDS - 0.1, 1, 9_999, True),
        (LINE_SECONDS, 2_000, 1_000, False),  # As it looks, over at the 15th second.
        (LINE_SECONDS, 2_000, 999, True),
        (LONGEST_LINE_SECONDS - 0.1, 2_000, 1, True),
        (LONGEST_LINE_SECONDS, 2_000, 1, False),
    ],
)
def test_a_line_is_waited_for_while_it_moves(waited: float, here: int, expected: int, *, worth: bool) -> None:
    assert is_worth_waiting(waited, here, expected) is worth


@pytest.fixture
def log() -> EventLog:
    """Never run: asked for whom it would begin a pass."""
    return EventLog(
        ["amqp://nobody/"],
        log=LogSettings("events.log", "1h", 1_000),
        exchange="events",
        packet=contextlib.nullcontext(),
    )


def replay(log: EventLog, behind: int, *, since: float = 0.0) -> Request:
    return log.replay(Replay(100_000 - behind, 100_000, None), ["user.42."], Notes(), since=since)


def begin(log: EventLog, now: float) -> list[Request]:
    """Begins a pass that is never done, as `run` would."""
    chosen = log._choose(now)
    log._requests = [request for request in log._requests if request not in chosen]
    if chosen:
        log._passes[object()] = _Pass(chosen)  # type: ignore[index]
    return chosen


async def test_new_streams_and_near_readers_do_not_keep_the_far_ones_waiting(log: EventLog) -> None:
    log.expect(1)
    far = replay(log, SPAN_ENTRIES)
    for number in range(2 * MAX_PASSES):
        log.settle(Anchor(100_000, "abcdef"), ["user.43."], Notes())
        near = replay(log, number)
        if number < MAX_PASSES:
            assert near in begin(log, 1.0)
    log.expect(-1)
    log._passes.popitem()
    assert begin(log, 2.0) == [far], "before the near ones"


async def test_a_line_is_counted_from_when_its_first_began_to_wait(log: EventLog) -> None:
    log.expect(1_000)
    first = replay(log, 50_000, since=100.0)
    last = replay(log, 50_000 + SPAN_ENTRIES - 1, since=109.9)
    assert begin(log, 100.0 + LINE_SECONDS - 0.1) == []
    assert begin(log, 100.0 + LINE_SECONDS) == [first, last]


async def test_who_is_far_behind_others_reads_by_itself_and_not_for_ever_after_them(log: EventLog) -> None:
    hour, minute = replay(log, 90_000, since=1.0), replay(log, 30_000, since=2.0)
    assert begin(log, 3.0) == [hour]
    (reading,) = log._passes.values()
    assert begin(log, reading.began + LINE_SECONDS - 0.1) == []
    assert begin(log, reading.began + LINE_SECONDS) == [minute]
