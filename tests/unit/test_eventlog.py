"""Who shares a pass, whose entries it hands to whom, and what it says when the log does not reach back. No broker."""

from __future__ import annotations

import gc
import weakref

import pytest

from bridge.service.broker.eventlog import MOST_SCANS, EventLog, Request, _Reading
from bridge.service.broker.scans import NEAR_ENTRIES, SCAN_COST, WINDOW_SECONDS, Scan
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

    def read_tail(self, routing_key: str, body: bytes) -> None:
        self.told.append("tail")

    def tail_ended(self) -> None:
        self.told.append("tail ended")


def request(replay: Replay, notes: Notes, *, tail_only: bool = False) -> Request:
    return Request(replay, ["user.42."], notes, user="42", tail_only=tail_only)


def begin_reading(requests: list[Request]) -> _Reading:
    return _Reading(Scan(requests, min(each.next for each in requests)))


def read(requests: list[Request], first: int, last: int, key: str = "user.42.x") -> None:
    reading = begin_reading(requests)
    for offset in range(first, last + 1):
        reading.on_entry(offset, key, b"%d" % offset)


def test_from_behind_the_anchor_to_the_watermark_and_a_little_on() -> None:
    notes = Notes()
    read([request(Replay(3, 6, digest(b"3")), notes)], 0, 7)
    assert notes.told == ["found", 4, 5, 6, "caught up", "tail"]


@pytest.mark.contract("2.25", "5.47")
@pytest.mark.parametrize(("first", "check", "reason"), [(3, b"other", "unknown"), (5, b"3", "expired")])
def test_an_anchor_that_is_not_there(first: int, check: bytes, reason: str) -> None:
    notes = Notes()
    read([request(Replay(3, 9, digest(check)), notes)], first, 9)
    assert notes.told == [reason]


def test_a_log_cut_while_a_slow_reader_was_stopped_is_told() -> None:
    notes = Notes()
    read([request(Replay(3, 9, None), notes)], 5, 9)
    assert notes.told == ["expired"]


def test_who_is_full_is_read_to_no_more() -> None:
    notes = Notes(room=2)
    asked = request(Replay(3, 9, digest(b"3")), notes)
    read([asked], 3, 9)
    assert notes.told == ["found", 4, 5]
    assert asked.next == 6


def test_others_entries_are_not_handed_out() -> None:
    notes = Notes()
    read([request(Replay(3, 6, digest(b"3")), notes)], 3, 7, key="user.43.x")
    assert notes.told == ["found", "caught up"]


def test_who_only_settles_is_told_nothing_else() -> None:
    notes = Notes()
    reading = begin_reading([request(Replay(3, 3, digest(b"3")), notes, tail_only=True)])
    for offset in range(3, 6):
        reading.on_entry(offset, "user.42.x", b"%d" % offset)
    reading.end_tails(0)
    assert notes.told == ["tail", "tail"], "a second is not over"
    reading.end_tails(float("inf"))
    assert notes.told == ["tail", "tail", "tail ended"]
    assert not reading.active


def test_who_settles_in_a_log_that_is_gone_is_let_go() -> None:
    replays, tails = Notes(), Notes()
    reading = begin_reading(
        [
            request(Replay(3, 6, digest(b"3")), replays),
            request(Replay(3, 3, digest(b"3")), tails, tail_only=True),
        ]
    )
    reading.refuse_all("no-log")
    assert (replays.told, tails.told) == (["no-log"], ["tail ended"])


@pytest.mark.parametrize("last", [5, 6, 7])
def test_a_pass_that_breaks_off_anywhere_is_begun_again_with_what_is_left(last: int) -> None:
    """Also in the second behind the watermark, which a cluster whose node dies needs most."""
    notes = Notes()
    asked = request(Replay(3, 6, digest(b"3")), notes)
    read([asked], 3, last)
    asked.begin_again(last + 1)
    read([asked], asked.next, 8)
    assert [told for told in notes.told if told != "tail"] == ["found", 4, 5, 6, "caught up"]
    assert notes.told[-2:] == ["tail", "tail"], "7 and 8"


def test_of_a_scan_that_ends_the_rest_is_read_by_another() -> None:
    """The entries of others that were read need not be read again, and the anchor not be found a second time."""
    notes = Notes()
    asked = request(Replay(3, SCAN_COST + 9, digest(b"3")), notes)
    reading = _Reading(Scan([asked], 3), may_go_on=lambda _: False)
    for offset in range(3, 3 + SCAN_COST + 5):
        reading.on_entry(offset, "user.42.x" if offset < 5 else "user.43.x", b"%d" % offset)
    assert reading.is_stopped
    assert reading.changed.is_set()
    asked.begin_again(reading.scan.position)
    assert asked.next == 3 + SCAN_COST
    read([asked], asked.next, SCAN_COST + 9)
    assert notes.told == ["found", 4, *range(SCAN_COST + 3, SCAN_COST + 10), "caught up"]


def test_who_joins_a_scan_is_read_to_from_its_start() -> None:
    first, second = Notes(), Notes()
    reading = begin_reading([request(Replay(3, 9, digest(b"3")), first)])
    reading.on_entry(3, "user.42.x", b"3")
    late = request(Replay(5, 8, digest(b"5")), second)
    reading.scan.join(late)
    reading.add(late)
    for offset in range(4, 10):
        reading.on_entry(offset, "user.42.x", b"%d" % offset)
    assert first.told == ["found", 4, 5, 6, 7, 8, 9, "caught up"]
    assert second.told == ["found", 6, 7, 8, "caught up", "tail"]


def replay(log: EventLog, behind: int, user: str = "42") -> Request:
    asked = Replay(100_000 - behind, 100_000, "check")
    return log.replay(asked, [f"user.{user}."], Notes(), user=user, since=0.0)


def begin(log: EventLog) -> list[Request]:
    """Begins a scan that is never done, as `run` would."""
    scan = log._choose(100.0)
    if scan is None:
        return []
    log._scans[scan] = _Reading(scan)
    return list(log._scans[scan].active)


async def test_new_streams_settle_along_with_a_near_scan_or_by_themselves(log: EventLog) -> None:
    alone = log.read_tail(Anchor(99_000, "abcdef"), ["user.43."], Notes(), user="43")
    assert begin(log) == [alone]
    far = replay(log, NEAR_ENTRIES)
    along = log.read_tail(Anchor(100_000, "abcdef"), ["user.43."], Notes(), user="43")
    assert begin(log) == [far], "not with one that comes to them after seconds"
    near = replay(log, 3, "44")
    just_before = log.read_tail(Anchor(99_900, "abcdef"), ["user.45."], Notes(), user="45")
    assert set(begin(log)) == {near, along, just_before}
    assert min(each.start for each in log._scans) == 100_000 - NEAR_ENTRIES
    log.read_tail(Anchor(100_000, "abcdef"), ["user.43."], Notes(), user="43")
    assert begin(log) == [], "they gather while enough is read"


async def test_there_are_so_many_scans_at_most(log: EventLog) -> None:
    for number in range(2 * MOST_SCANS):
        replay(log, number, str(number))
        for scan in [scan for scan in log._scans if not scan.is_far]:
            log._schedule.end(scan, 0.0)  # All but the second behind the watermark.
        begin(log)
    assert len(log._scans) == MOST_SCANS


async def test_a_request_that_is_cancelled_is_not_read(log: EventLog) -> None:
    for gone in (replay(log, NEAR_ENTRIES), replay(log, 5), log.read_tail(Anchor(1, "abcdef"), [], Notes(), user="42")):
        gone.cancel()
    assert begin(log) == []
    assert log.waiting == 0


@pytest.mark.parametrize("asks", ["replay", "tail"])
async def test_who_goes_away_while_it_waits_is_kept_by_nobody(log: EventLog, asks: str) -> None:
    """No other request may follow for hours."""
    notes = Notes()
    if asks == "tail":
        asked = log.read_tail(Anchor(1, "abcdef"), ["user.42."], notes, user="42")
    else:
        asked = log.replay(Replay(1, 2, "abcdef"), ["user.42."], notes, user="42", since=0.0)
    kept = weakref.ref(notes)
    asked.cancel()
    del asked, notes
    gc.collect()
    assert kept() is None


async def test_one_user_who_is_always_expected_makes_nobody_wait(log: EventLog) -> None:
    log.expect("attacker", 20)
    far = replay(log, 50_000, "42")
    assert begin(log) == [far], f"and not for {WINDOW_SECONDS} s"
