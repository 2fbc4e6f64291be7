"""Scans of the log without a broker: which requests share one, and which entries and answers each reader gets."""

from __future__ import annotations

import gc
import weakref

import pytest

from bridge.service.broker.eventlog import MOST_SCANS, EventLog, Request, _Reading
from bridge.service.broker.scans import NEAR_ENTRIES, SCAN_COST, WINDOW_SECONDS, Scan
from bridge.service.streams.cursor import Anchor, digest
from bridge.service.streams.session import Replay


class Recorder:
    """Records the calls of a reader, which is full after `room` entries."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.calls: list[str | int] = []

    def found(self) -> None:
        self.calls.append("found")

    def not_found(self, reason: str) -> None:
        self.calls.append(reason)

    def read(self, offset: int, check: str, routing_key: str, body: bytes) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.calls.append(offset)
        return True

    def caught_up(self) -> None:
        self.calls.append("caught up")

    def read_tail(self, routing_key: str, body: bytes) -> None:
        self.calls.append("tail")

    def tail_ended(self) -> None:
        self.calls.append("tail ended")


def request(replay: Replay, recorder: Recorder, *, tail_only: bool = False) -> Request:
    return Request(replay, ["user.42."], recorder, user="42", tail_only=tail_only)


def begin_reading(requests: list[Request]) -> _Reading:
    return _Reading(Scan(requests, min(each.next for each in requests)))


def read(requests: list[Request], first: int, last: int, key: str = "user.42.x") -> None:
    reading = begin_reading(requests)
    for offset in range(first, last + 1):
        reading.on_entry(offset, key, b"%d" % offset)


def test_a_replay_is_from_after_the_position_to_the_watermark_and_a_tail_read_follows() -> None:
    recorder = Recorder()
    read([request(Replay(3, 6, digest(b"3")), recorder)], 0, 7)
    assert recorder.calls == ["found", 4, 5, 6, "caught up", "tail"]


@pytest.mark.contract("2.25", "5.47")
@pytest.mark.parametrize(("first", "check", "reason"), [(3, b"other", "unknown"), (5, b"3", "expired")])
def test_a_position_that_the_log_does_not_have(first: int, check: bytes, reason: str) -> None:
    recorder = Recorder()
    read([request(Replay(3, 9, digest(check)), recorder)], first, 9)
    assert recorder.calls == [reason]


def test_a_stopped_reader_is_notified_when_the_log_was_cut() -> None:
    recorder = Recorder()
    read([request(Replay(3, 9, None), recorder)], 5, 9)
    assert recorder.calls == ["expired"]


def test_a_full_reader_gets_no_more_entries() -> None:
    recorder = Recorder(room=2)
    asked = request(Replay(3, 9, digest(b"3")), recorder)
    read([asked], 3, 9)
    assert recorder.calls == ["found", 4, 5]
    assert asked.next == 6


def test_a_reader_does_not_get_the_entries_of_others() -> None:
    recorder = Recorder()
    read([request(Replay(3, 6, digest(b"3")), recorder)], 3, 7, key="user.43.x")
    assert recorder.calls == ["found", "caught up"]


def test_a_tail_read_gets_only_the_tail() -> None:
    recorder = Recorder()
    reading = begin_reading([request(Replay(3, 3, digest(b"3")), recorder, tail_only=True)])
    for offset in range(3, 6):
        reading.on_entry(offset, "user.42.x", b"%d" % offset)
    reading.end_tails(0)
    assert recorder.calls == ["tail", "tail"], "the second is not over"
    reading.end_tails(float("inf"))
    assert recorder.calls == ["tail", "tail", "tail ended"]
    assert not reading.active


def test_a_tail_read_ends_when_the_log_is_gone() -> None:
    replays, tails = Recorder(), Recorder()
    reading = begin_reading(
        [
            request(Replay(3, 6, digest(b"3")), replays),
            request(Replay(3, 3, digest(b"3")), tails, tail_only=True),
        ]
    )
    reading.refuse_all("no-log")
    assert (replays.calls, tails.calls) == (["no-log"], ["tail ended"])


@pytest.mark.parametrize("last", [5, 6, 7])
def test_a_scan_that_breaks_off_anywhere_begins_again_with_the_rest(last: int) -> None:
    """Also in the second after the watermark. A cluster needs that second most, when a node dies."""
    recorder = Recorder()
    asked = request(Replay(3, 6, digest(b"3")), recorder)
    read([asked], 3, last)
    asked.begin_again(last + 1)
    read([asked], asked.next, 8)
    assert [call for call in recorder.calls if call != "tail"] == ["found", 4, 5, 6, "caught up"]
    assert recorder.calls[-2:] == ["tail", "tail"], "7 and 8"


def test_another_scan_reads_the_rest_after_the_end_of_a_scan() -> None:
    """It does not read the entries of others again, and does not check the position a second time."""
    recorder = Recorder()
    asked = request(Replay(3, SCAN_COST + 9, digest(b"3")), recorder)
    reading = _Reading(Scan([asked], 3), may_go_on=lambda _: False)
    for offset in range(3, 3 + SCAN_COST + 5):
        reading.on_entry(offset, "user.42.x" if offset < 5 else "user.43.x", b"%d" % offset)
    assert reading.is_stopped
    assert reading.changed.is_set()
    asked.begin_again(reading.scan.position)
    assert asked.next == 3 + SCAN_COST
    read([asked], asked.next, SCAN_COST + 9)
    assert recorder.calls == ["found", 4, *range(SCAN_COST + 3, SCAN_COST + 10), "caught up"]


def test_a_reader_that_joins_a_scan_gets_entries_from_its_own_start() -> None:
    first, second = Recorder(), Recorder()
    reading = begin_reading([request(Replay(3, 9, digest(b"3")), first)])
    reading.on_entry(3, "user.42.x", b"3")
    late = request(Replay(5, 8, digest(b"5")), second)
    reading.scan.join(late)
    reading.add(late)
    for offset in range(4, 10):
        reading.on_entry(offset, "user.42.x", b"%d" % offset)
    assert first.calls == ["found", 4, 5, 6, 7, 8, 9, "caught up"]
    assert second.calls == ["found", 6, 7, 8, "caught up", "tail"]


def replay(log: EventLog, behind: int, user: str = "42") -> Request:
    asked = Replay(100_000 - behind, 100_000, "check")
    return log.replay(asked, [f"user.{user}."], Recorder(), user=user, since=0.0)


def begin(log: EventLog) -> list[Request]:
    """Begins a scan as `run` does. The scan never ends."""
    scan = log._choose(100.0)
    if scan is None:
        return []
    log._scans[scan] = _Reading(scan)
    return list(log._scans[scan].active)


async def test_a_tail_read_joins_a_near_scan_or_has_its_own(log: EventLog) -> None:
    alone = log.read_tail(Anchor(99_000, "abcdef"), ["user.43."], Recorder(), user="43")
    assert begin(log) == [alone]
    far = replay(log, NEAR_ENTRIES)
    along = log.read_tail(Anchor(100_000, "abcdef"), ["user.43."], Recorder(), user="43")
    assert begin(log) == [far], "not with a scan that reaches them after seconds"
    near = replay(log, 3, "44")
    just_before = log.read_tail(Anchor(99_900, "abcdef"), ["user.45."], Recorder(), user="45")
    assert set(begin(log)) == {near, along, just_before}
    assert min(each.start for each in log._scans) == 100_000 - NEAR_ENTRIES
    log.read_tail(Anchor(100_000, "abcdef"), ["user.43."], Recorder(), user="43")
    assert begin(log) == [], "they wait while enough scans run"


async def test_the_number_of_scans_is_limited(log: EventLog) -> None:
    for number in range(2 * MOST_SCANS):
        replay(log, number, str(number))
        for scan in [scan for scan in log._scans if not scan.is_far]:
            log._schedule.end(scan, 0.0)  # It is over, except for its tail read.
        begin(log)
    assert len(log._scans) == MOST_SCANS


async def test_a_request_that_is_cancelled_is_not_read(log: EventLog) -> None:
    for gone in (
        replay(log, NEAR_ENTRIES),
        replay(log, 5),
        log.read_tail(Anchor(1, "abcdef"), [], Recorder(), user="42"),
    ):
        gone.cancel()
    assert begin(log) == []
    assert log.waiting == 0


@pytest.mark.parametrize("asks", ["replay", "tail"])
async def test_a_reader_that_leaves_while_it_waits_is_freed(log: EventLog, asks: str) -> None:
    """The next request may arrive hours later. The log must not keep this reader until then."""
    recorder = Recorder()
    if asks == "tail":
        asked = log.read_tail(Anchor(1, "abcdef"), ["user.42."], recorder, user="42")
    else:
        asked = log.replay(Replay(1, 2, "abcdef"), ["user.42."], recorder, user="42", since=0.0)
    kept = weakref.ref(recorder)
    asked.cancel()
    del asked, recorder
    gc.collect()
    assert kept() is None


async def test_a_user_who_is_always_expected_delays_no_other(log: EventLog) -> None:
    log.expect("attacker", 20)
    far = replay(log, 50_000, "42")
    assert begin(log) == [far], f"it does not wait for {WINDOW_SECONDS} s"
