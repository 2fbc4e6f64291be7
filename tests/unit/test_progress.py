"""A client's cursor moves with each item."""

from __future__ import annotations

import pytest

from bridge.service.streams.cursor import DIGEST_CHARS, MAX_DIGESTS, NONE, VALUE_MASK, Anchor, Cursor, Unnamed
from bridge.service.streams.progress import (
    MANY_BEHIND,
    NEAR_MS,
    OVERLAP_MS,
    Entry,
    Forget,
    Live,
    Passed,
    Progress,
    Proof,
    Reached,
    Reset,
    Watermark,
)
from tests.events import make_event

FIRST, SECOND, THIRD = (Anchor(100 * number, f"anch{number:02}") for number in (1, 2, 3))


def live(number: int, at_ms: int = 0, *, shared: bool = False) -> Live:
    return Live(make_event(number), at_ms, shared)


def entry(number: int) -> Entry:
    return Entry(number, f"chk{number:03}", make_event(number))


def names(*numbers: int) -> tuple[str, ...]:
    return tuple(make_event(number).digest for number in numbers)


def total(*numbers: int) -> int:
    return sum(make_event(number).value for number in numbers) & VALUE_MASK


def test_the_last_sixteen_are_named_and_the_others_are_summed_by_queue() -> None:
    progress = Progress(FIRST)
    for number in range(1, 21):
        progress.move(live(number, shared=number in (2, 4)))
    cursor = progress.cursor(0)
    assert cursor.digests == names(*range(5, 21))
    assert cursor.unnamed == (Unnamed(2, total(1, 3)), Unnamed(2, total(2, 4)))
    assert progress.sent_behind == 20
    assert Cursor.parse(progress.text(0)) == cursor


def test_only_the_last_sixteen_passed_events_are_remembered() -> None:
    progress = Progress(FIRST)
    for number in range(1, 1_001):
        progress.move(entry(number) if number % 2 else Passed(make_event(number), False))
        assert len(progress._passed) <= MAX_DIGESTS * DIGEST_CHARS, "it would grow with each event"
    assert progress.cursor(0).passed == names(*range(985, 1_001))


def test_a_cursor_without_a_log_has_the_time() -> None:
    progress = Progress(None)
    progress.move(live(1))
    assert progress.cursor(1000) == Cursor(None, time_ms=1000)
    assert progress.text(1000) == "0.3e8"


def test_an_entry_of_the_log_moves_the_position() -> None:
    progress = Progress(FIRST)
    progress.move(live(1))
    progress.move(entry(105))
    cursor = progress.cursor(0)
    assert cursor.anchor == Anchor(105, "chk105")
    assert (cursor.digests, cursor.passed) == (names(1), names(105))


def test_names_up_to_the_position_fill_the_room_that_the_sent_ones_leave() -> None:
    progress = Progress(FIRST)
    for number in range(101, 121):
        progress.move(entry(number))
    for number in (1, 2, 3):
        progress.move(live(number))
    cursor = progress.cursor(0)
    assert (cursor.digests, cursor.passed) == (names(1, 2, 3), names(*range(108, 121)))
    assert Cursor.parse(progress.text(0)) == cursor


def test_a_watermark_becomes_the_position_with_its_proof() -> None:
    progress = Progress(FIRST)
    progress.move(live(1, 0))
    progress.move(Watermark(SECOND, 10_000))
    progress.move(live(2, 10_000 + NEAR_MS))
    assert progress.anchor == FIRST
    progress.move(Proof(THIRD))
    assert progress.anchor == FIRST, "the progress has not seen this watermark"
    progress.move(Proof(SECOND))
    cursor = progress.cursor(0)
    assert (cursor.anchor, cursor.digests, cursor.unnamed) == (SECOND, names(2), (NONE, NONE))


def test_an_event_just_before_a_watermark_stays_named() -> None:
    progress = Progress(FIRST)
    seen = 10_000
    for number, at_ms in ((1, seen - OVERLAP_MS - 1), (2, seen - OVERLAP_MS), (3, seen - NEAR_MS)):
        progress.move(live(number, at_ms))
    progress.move(Watermark(SECOND, seen))
    progress.move(Proof(SECOND))
    cursor = progress.cursor(0)
    assert (cursor.digests, cursor.unnamed) == (names(2, 3), (NONE, NONE))
    # It was sent before the watermark, so no sum has it when its name falls out.
    for number in range(4, 4 + MAX_DIGESTS):
        progress.move(live(number, seen + 1))
    assert progress.cursor(0).unnamed == (NONE, NONE)


@pytest.mark.contract("5.54")
@pytest.mark.parametrize("gap_ms", [NEAR_MS - 1, NEAR_MS])
@pytest.mark.parametrize("before", [True, False])
def test_a_stream_that_cannot_name_all_waits_for_a_watermark_without_near_events(gap_ms: int, before: bool) -> None:
    progress = Progress(FIRST)
    seen = 10_000
    progress.move(live(1, seen - (gap_ms if before else 5_000)))
    progress.move(Watermark(SECOND, seen))
    for number in range(2, 2 + MAX_DIGESTS + 1):
        progress.move(live(number, seen + (5_000 if before else gap_ms)))
    progress.move(Proof(SECOND))
    assert progress.anchor == (SECOND if gap_ms == NEAR_MS else FIRST)


def test_a_stream_that_can_name_all_takes_a_watermark_with_near_events() -> None:
    progress = Progress(FIRST)
    progress.move(Watermark(SECOND, 10_000))
    for number in range(MAX_DIGESTS):
        progress.move(live(number, 10_000))
    progress.move(Proof(SECOND))
    cursor = progress.cursor(0)
    assert (cursor.anchor, cursor.digests) == (SECOND, names(*range(MAX_DIGESTS)))


def test_an_event_sent_after_a_watermark_stays_named_however_early_it_arrived() -> None:
    """The session may keep an event back for seconds, while it reads the tail of the log."""
    progress = Progress(FIRST)
    progress.move(Watermark(SECOND, 10_000))
    progress.move(live(1, 10_000 - OVERLAP_MS - 1))
    progress.move(live(2, 10_100))
    progress.move(Proof(SECOND))
    assert progress.cursor(0).digests == names(1, 2)


@pytest.mark.parametrize("shared", [False, True])
def test_an_event_that_was_sent_long_before_a_watermark_is_in_no_sum(shared: bool) -> None:
    progress = Progress(FIRST)
    for number in range(MAX_DIGESTS + 3):
        progress.move(live(number, 0, shared=shared))
    progress.move(Watermark(SECOND, 10_000))
    progress.move(Proof(SECOND))
    assert progress.cursor(0) == Cursor(SECOND)


@pytest.mark.parametrize(("later", "taken"), [(3, True), (4, False)])
def test_four_watermarks_may_wait_for_their_proof(later: int, taken: bool) -> None:
    progress = Progress(FIRST)
    progress.move(Watermark(SECOND, 0))
    for number in range(later):
        progress.move(Watermark(Anchor(500 + number, "later0"), 0))
    progress.move(Proof(SECOND))
    assert progress.anchor == (SECOND if taken else FIRST)


def test_a_stream_with_very_many_events_after_its_position_takes_any_watermark() -> None:
    progress = Progress(FIRST)
    progress.move(Watermark(SECOND, 0))
    for number in range(MANY_BEHIND):
        progress.move(live(number, 1))
    progress.move(Proof(SECOND))
    assert progress.anchor == SECOND
    assert progress.sent_behind == MANY_BEHIND


def test_events_that_were_sent_after_the_watermark_are_counted_after_it() -> None:
    progress = Progress(FIRST)
    for number in range(1, 4):
        progress.move(live(number, 0))
    progress.move(Watermark(SECOND, 10_000))
    for number in range(10, 30):
        progress.move(live(number, 20_000, shared=number < 12))
    progress.move(Proof(SECOND))
    cursor = progress.cursor(0)
    assert cursor.digests == names(*range(14, 30))
    assert cursor.unnamed == (Unnamed(2, total(12, 13)), Unnamed(2, total(10, 11)))


def test_an_older_watermark_is_dropped_when_a_newer_one_is_proved() -> None:
    progress = Progress(FIRST)
    progress.move(Watermark(SECOND, 0))
    progress.move(Watermark(THIRD, 0))
    progress.move(Proof(THIRD))
    progress.move(Proof(SECOND))
    assert progress.anchor == THIRD


def test_reading_past_an_event_removes_it_from_the_sent_ones() -> None:
    progress = Progress(FIRST)
    for number in range(1, 19):
        progress.move(live(number))
    progress.move(Passed(make_event(1), False))
    progress.move(Passed(make_event(5), False))
    cursor = progress.cursor(0)
    assert cursor.unnamed == (Unnamed(1, total(2)), NONE)
    assert cursor.digests == names(3, 4, *range(6, 19))
    assert cursor.passed[0] == names(1, 5)[2 - len(cursor.passed)], "as many of the last as there is room for"
    progress.move(Passed(make_event(77), True))
    assert progress.cursor(0).unnamed[1] == NONE


def test_a_reset_forgets_all_that_was_sent() -> None:
    progress = Progress(FIRST)
    for number in range(20):
        progress.move(live(number))
    progress.move(Watermark(SECOND, 0))
    progress.move(Reset(THIRD))
    progress.move(Proof(SECOND))
    assert progress.cursor(0) == Cursor(THIRD)


def test_an_entry_that_was_reached_is_the_position_and_nothing_is_after_it() -> None:
    progress = Progress(FIRST)
    progress.move(entry(105))
    for number in range(20):
        progress.move(live(number))
    progress.move(Reached(SECOND))
    assert progress.cursor(0) == Cursor(SECOND, passed=names(105))


def test_forget_clears_the_count_of_one_queue() -> None:
    progress = Progress(FIRST, Cursor(FIRST, unnamed=(Unnamed(3, 9), None)))
    progress.move(Forget(True))
    assert progress.cursor(0).unnamed == (Unnamed(3, 9), NONE)
    progress.move(Forget(False))
    assert progress.cursor(0).unnamed == (NONE, NONE)


def test_it_begins_with_the_clients_cursor() -> None:
    cursor = Cursor(FIRST, names(1, 2), (Unnamed(1, 7), None), names(3))
    progress = Progress(FIRST, cursor, 500)
    assert progress.cursor(0) == cursor
    assert progress.text(0) == str(cursor)
    # The count of the shared queue is unknown. A name that falls out is not counted there.
    for number in range(10, 10 + MAX_DIGESTS + 1):
        progress.move(live(number, shared=True))
    assert progress.cursor(0).unnamed == (Unnamed(1, 7), None)


def test_a_copy_is_independent() -> None:
    progress = Progress(FIRST)
    progress.move(live(1))
    progress.move(Watermark(SECOND, 0))
    copy = progress.copy()
    assert copy.text(0) == progress.text(0)
    copy.move(live(2, 9_999))
    copy.move(Proof(SECOND))
    assert progress.cursor(0) == Cursor(FIRST, names(1))
    progress.move(Proof(SECOND))
    assert progress.anchor == SECOND
