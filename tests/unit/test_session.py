"""The session: one rule a test. The last tests compare it with the table in docs/states.md."""

import re
from collections.abc import Callable
from typing import Any, get_args

import pytest

from bridge.routing import TypeFilter
from bridge.service.streams import sse
from bridge.service.streams.cursor import MAX_DIGESTS, NONE, VALUE_MASK, Anchor, Cursor, Unnamed
from bridge.service.streams.progress import MANY_BEHIND, OVERLAP_MS, Entry
from bridge.service.streams.recall import RECALL_BYTES, RECALL_EVENTS
from bridge.service.streams.session import (
    CHUNK_BYTES,
    RECENT_IDS,
    TABLE,
    UNREADABLE_MS,
    EventName,
    ReadTail,
    Replay,
    Session,
    State,
    Step,
    WriteWatermark,
    WrongState,
)
from bridge.service.streams.sse import GapReason
from tests.decoder import Decoder, Frame
from tests.events import make_event
from tests.service import ROOT


def session(**changes: Any) -> Session:
    values: dict[str, Any] = {
        "user": "42",
        "identity": "i",
        "types": TypeFilter(),
        "named": True,
        "last_event_id": None,
        "has_log": False,
        "retry_ms": 3000,
        "heartbeat_seconds": 15,
        "max_events": 1000,
        "max_bytes": 1_000_000,
    }
    return Session(**{**values, **changes})


def live(**changes: Any) -> Session:
    made = session(**changes)
    made.bound(1000, None)
    made.take()
    return made


def frames(made: Session) -> list[Frame]:
    decoder = Decoder()
    found = []
    while chunk := made.take():
        found += decoder.feed(chunk)
    assert not decoder.empty_blocks
    return found


@pytest.mark.contract("2.23")
def test_ready_is_first_and_buffered_events_follow() -> None:
    made = session()
    made.offer(make_event(1), 990)
    assert made.take() == b""
    made.bound(1000, None)
    ready, event = frames(made)
    assert (ready.event, ready.retry, ready.id) == ("bridge.ready", 3000, "0.3e8")
    assert ready.json == {"user": "42", "identity": "i", "resumed": False, "heartbeat_seconds": 15}
    assert event.json["id"] == "e1"


@pytest.mark.contract("2.25", "5.45")
@pytest.mark.parametrize(
    ("last_event_id", "reason"),
    [("2.0.AAAAAA.", "no-log"), ("garbage", "unknown"), ("\0", "unknown"), ("é" * 500, "unknown")],
)
def test_a_returning_client_gets_the_gap_directly_after_ready(last_event_id: str, reason: GapReason) -> None:
    made = session(last_event_id=last_event_id)
    made.offer(make_event(1), 990)
    assert made.bound(1000, None) == Step(gap=reason)
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "bridge.gap", "test.done"]


@pytest.mark.parametrize("last_event_id", [None, ""])
def test_a_new_client_gets_no_gap(last_event_id: str | None) -> None:
    made = session(last_event_id=last_event_id)
    assert made.bound(1000, None) == Step()
    assert [frame.event for frame in frames(made)] == ["bridge.ready"]


@pytest.mark.contract("2.8")
def test_without_names_a_plain_onmessage_gets_events_and_the_bridges_frames_keep_theirs() -> None:
    made = session(named=False)
    made.bound(1000, None)
    made.offer(make_event(1), 1000)
    made.end("rotate", 1)
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "message", "bridge.bye"]


@pytest.mark.contract("1.10")
def test_an_id_that_was_just_offered_is_not_sent_again() -> None:
    made = live()
    for number in [1, 2, 1, 3, 2]:
        made.offer(make_event(number), 2000)
    assert [frame.json["id"] for frame in frames(made)] == ["e1", "e2", "e3"]
    made.offer(make_event(1), 2001)
    assert made.take() == b""
    assert (made.delivered, made.duplicates) == (3, 3)


@pytest.mark.contract("5.52")
def test_the_window_of_ids_is_as_long_as_it_says() -> None:
    made = live()
    for number in range(RECENT_IDS + 1):
        made.offer(make_event(number), 2000)
    frames(made)
    made.offer(make_event(1), 2000)
    assert made.take() == b""
    made.offer(make_event(0), 2000)
    assert frames(made)[0].json["id"] == "e0"


@pytest.mark.contract("2.42")
def test_more_events_than_the_backlog_takes_end_it_as_slow() -> None:
    made = live(max_events=3)
    for number in range(3):
        made.offer(make_event(number), 2000)
    assert made.state is State.LIVE
    made.offer(make_event(3), 2000)
    made.offer(make_event(4), 2000)
    assert [(frame.event, frame.json) for frame in frames(made)] == [("bridge.bye", {"reason": "slow"})]


@pytest.mark.contract("2.42")
def test_more_bytes_than_the_backlog_takes_end_it_as_slow() -> None:
    made = live(max_bytes=10_000)
    made.offer(make_event(1, size=9000), 2000)
    made.offer(make_event(2, size=1000), 2000)
    assert made.end_reason == "slow"


@pytest.mark.contract("5.56")
def test_one_event_alone_always_fits() -> None:
    made = live(max_bytes=10_000)
    made.offer(make_event(1, size=20_000), 2000)
    assert [frame.json["id"] for frame in frames(made)] == ["e1"]


def test_bytes_that_were_taken_no_longer_count() -> None:
    made = live(max_bytes=10_000)
    for number in range(100):
        made.offer(make_event(number, size=9000), 2000)
        assert len(frames(made)) == 1
    assert made.state is State.LIVE


@pytest.mark.contract("2.29")
@pytest.mark.parametrize(
    ("reason", "flushed"), [("drain", True), ("rotate", True), ("expired", False), ("busy", False)]
)
def test_events_that_have_arrived_are_sent_before_a_planned_end(reason: Any, flushed: bool) -> None:
    made = live()
    made.offer(make_event(1), 2000)
    made.end(reason, 77)
    made.end("slow", 1)
    made.offer(make_event(2), 2000)
    *events, bye = frames(made)
    assert (bye.event, bye.json, bye.retry) == ("bridge.bye", {"reason": reason}, 77)
    assert len(events) == flushed


def test_an_end_before_ready_sends_only_a_bye() -> None:
    made = session()
    made.offer(make_event(1), 900)
    made.end("drain", 5)
    assert made.bound(1000, None) == Step()
    assert [frame.event for frame in frames(made)] == ["bridge.bye"]


@pytest.mark.contract("2.25", "5.45", "5.46")
def test_a_gap_is_sent_when_the_queues_are_back_and_not_before() -> None:
    made = live()
    made.offer(make_event(1), 2000)
    made.lost()
    made.lost()
    assert [frame.event for frame in frames(made)] == ["test.done"]
    made.offer(make_event(2), 3000)
    assert made.bound(3001, None) == Step(gap="no-log")
    made.offer(make_event(3), 3002)
    assert [frame.event for frame in frames(made)] == ["bridge.gap", "test.done", "test.done"]


def test_several_losses_are_one_gap_while_a_slow_client_does_not_read() -> None:
    made = live()
    for now_ms in range(100):
        made.lost()
        made.bound(3000 + now_ms, None)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]


@pytest.mark.contract("2.26")
def test_a_position_moves_the_cursor_of_a_quiet_client() -> None:
    made = live()
    made.offer(make_event(1), 2000)
    frames(made)
    made.send_position(62_000)
    (frame,) = frames(made)
    assert (frame.event, frame.json, frame.id) == ("bridge.position", {}, f"0.{62_000:x}")


def test_no_position_is_sent_while_an_event_may_be_missing() -> None:
    made = live()
    made.lost()
    made.send_position(62_000)
    assert made.take() == b""


def test_a_heartbeat_is_a_comment_and_only_when_there_is_nothing_else() -> None:
    made = session()
    made.heartbeat()
    assert made.take() == b""
    made.bound(1000, None)
    made.take()
    made.heartbeat()
    assert made.take() == b":\n"
    made.offer(make_event(1), 2000)
    made.heartbeat()
    assert made.take().startswith(b"id: ")


def test_no_heartbeat_is_sent_before_ready_while_the_log_is_read() -> None:
    made = session(has_log=True, last_event_id="2.7.abcdef.")
    made.bound(1000, Anchor(100, "TICKTI"))
    made.heartbeat()
    assert made.take() == b""


def test_one_take_is_bounded_and_ends_with_a_whole_frame() -> None:
    made = live(max_bytes=10_000_000)
    for number in range(200):
        made.offer(make_event(number, size=5000), 2000)
    chunk = made.take()
    assert CHUNK_BYTES <= len(chunk) < CHUNK_BYTES + 6000
    assert chunk.endswith(b"\n\n")


@pytest.mark.contract("2.52", "5.57")
def test_a_bye_before_ready_leaves_the_client_its_cursor() -> None:
    made = session(has_log=True, last_event_id="2.7.abcdef.")
    made.end("busy", 5)
    (bye,) = frames(made)
    assert (bye.event, bye.id) == ("bridge.bye", "3.7.abcdef...")


# With a log.

WATERMARK = Anchor(100, "TICKTI")


def entry(number: int, offset: int) -> Entry:
    return Entry(offset, f"ck{offset:04}", make_event(number))


def returning(cursor: Cursor, **changes: Any) -> Session:
    """A session that is bound, and whose position was found in the log."""
    made = session(has_log=True, last_event_id=str(cursor), **changes)
    assert isinstance(made.bound(5000, WATERMARK).action, Replay)
    made.found()
    return made


@pytest.mark.contract("5.48")
def test_a_new_client_begins_at_the_watermark() -> None:
    made = session(has_log=True)
    made.offer(make_event(1), 900)
    assert made.bound(1000, WATERMARK) == Step(ReadTail(WATERMARK))
    ready, event = frames(made)
    assert (ready.id, ready.json["resumed"]) == ("3.64.TICKTI...", False)
    assert event.id == f"3.64.TICKTI...{make_event(1).digest}"


@pytest.mark.contract("2.33")
def test_ready_of_a_resumed_stream_has_the_cursor_of_the_client() -> None:
    cursor = Cursor(Anchor(7, "abcdef"), (make_event(1).digest,))
    made = session(has_log=True, last_event_id=str(cursor))
    made.bound(5000, WATERMARK)
    assert made.state is State.REPLAYING
    assert made.replay == Replay(7, 100, "abcdef")
    assert made.take() == b"", "nothing is sent before the log was read"
    made.found()
    (ready,) = frames(made)
    assert (ready.id, ready.json["resumed"]) == (str(cursor), True)


@pytest.mark.contract("2.38")
def test_events_of_the_log_then_buffered_then_live_each_once() -> None:
    made = returning(Cursor(Anchor(7, "abcdef"), (make_event(1).digest,)))
    made.offer(make_event(4), 5001)
    made.offer(make_event(3), 5002)
    for number, offset in [(1, 8), (2, 9), (3, 50)]:
        assert made.replayed(entry(number, offset))
    assert made.caught_up(5003) == Step()
    made.offer(make_event(5), 5004)
    found = frames(made)[1:]
    assert [frame.json["id"] for frame in found] == ["e2", "e3", "e4", "e5"]
    sent = make_event(1).digest
    # In the log a cursor is exact. After the watermark, it has the watermark and the events sent since then.
    assert [frame.id for frame in found] == [
        f"3.9.ck0009....{sent}{make_event(2).digest}",
        f"3.32.ck0050....{sent}{make_event(2).digest}{make_event(3).digest}",
        f"3.64.TICKTI...{make_event(4).digest}",
        f"3.64.TICKTI...{make_event(4).digest}{make_event(5).digest}",
    ]


def unnamed(*numbers: int) -> Unnamed:
    return Unnamed(len(numbers), sum(make_event(number).value for number in numbers) & VALUE_MASK)


def shared(number: int, offset: int) -> Entry:
    return Entry(offset, f"ck{offset:04}", make_event(number), shared=True)


@pytest.mark.contract("5.50")
def test_sent_events_without_a_name_are_found_by_their_count_and_sum() -> None:
    named = (make_event(5).digest, make_event(6).digest)
    made = returning(Cursor(Anchor(7, "abcdef"), named, (unnamed(1, 2, 3), unnamed(101))))
    # e4 was not sent, although e5 and e6 were. The shared queue is behind: it delivered e101 only.
    log = [entry(1, 8), shared(101, 9), entry(2, 10), shared(102, 11), entry(3, 12), entry(4, 13), entry(5, 14),
           entry(6, 15), entry(7, 16)]  # fmt: skip
    for each in log:
        assert made.replayed(each)
    found = frames(made)[1:]
    assert [frame.json["id"] for frame in found] == ["e102", "e4", "e7"]
    # A client that is cut off here returns with a count of the sent events that are still after its position.
    assert Cursor.parse(found[0].id).unnamed == (unnamed(3), NONE)
    assert Cursor.parse(found[1].id).unnamed == (NONE, NONE)


@pytest.mark.contract("5.53")
@pytest.mark.parametrize("unsent", [(), (1,), (3,), (5,), (1, 2), (2, 5)])
def test_one_or_two_overtaken_events_are_found_by_the_difference_of_the_sums(unsent: tuple[int, ...]) -> None:
    sent = [number for number in range(1, 6) if number not in unsent]
    made = returning(Cursor(Anchor(7, "abcdef"), (), (unnamed(*sent), NONE)))
    # A publisher's retry is in the log twice.
    for offset, number in enumerate([1, 2, 2, 3, 4, 5, 1, 6, 7, 8], 8):
        assert made.replayed(entry(number, offset))
    assert [frame.json["id"] for frame in frames(made)[1:]] == [f"e{number}" for number in (*unsent, 6, 7, 8)]


@pytest.mark.contract("5.50")
@pytest.mark.parametrize("claimed", [unnamed(1, 2, 4), unnamed(1, 2, 3, 4, 5), None])
def test_events_that_the_log_does_not_confirm_as_sent_are_sent_again(claimed: Unnamed | None) -> None:
    """A duplicate is better than a loss: an event was not sent, the log has too few, or the count is unknown."""
    made = returning(Cursor(Anchor(7, "abcdef"), (make_event(9).digest,), (claimed, unnamed(101))))
    for each in [entry(1, 8), shared(101, 9), entry(2, 10), entry(9, 11), entry(3, 12)]:
        assert made.replayed(each)
    made.caught_up(5001)
    assert [frame.json["id"] for frame in frames(made)[1:]] == ["e1", "e2", "e3"]


def test_a_cursor_cannot_make_the_session_keep_back_more_than_a_backlog() -> None:
    made = returning(Cursor(Anchor(7, "abcdef"), (), (Unnamed(0xFFFF, 1), NONE)))
    made.replayed(entry(1, 8))
    assert [frame.json["id"] for frame in frames(made)[1:]] == ["e1"], "the session does not wait for so many"
    made = returning(Cursor(Anchor(7, "abcdef"), (), (Unnamed(1000, 1), NONE)), max_bytes=10 * RECALL_BYTES)
    number, taken = 0, b""
    while b"test.done" not in taken:
        number += 1
        made.replayed(Entry(7 + number, "abcdef", make_event(number, size=RECALL_BYTES // 10)))
        while chunk := made.take():
            taken += chunk
    # Without the decoder, which is slow with four million characters.
    assert re.findall(rb'"id":"(e[0-9]+)"', taken) == [b"e%d" % each for each in range(1, number + 1)]
    assert number < 12


@pytest.mark.parametrize("cursor", [Cursor(Anchor(101, "abcdef")), Cursor(None, time_ms=5)])
def test_a_position_that_cannot_be_in_this_log_is_unknown(cursor: Cursor) -> None:
    made = session(has_log=True, last_event_id=str(cursor))
    assert made.bound(5000, WATERMARK) == Step(ReadTail(WATERMARK), "unknown")
    ready, gap = frames(made)
    assert (ready.json["resumed"], ready.id, gap.json) == (False, "3.64.TICKTI...", {"reason": "unknown"})


def test_a_position_that_the_log_no_longer_has_is_a_gap_after_ready() -> None:
    made = session(has_log=True, last_event_id="2.7.abcdef.")
    made.bound(5000, WATERMARK)
    made.offer(make_event(1), 5001)
    assert made.not_found("expired") == Step(ReadTail(WATERMARK), "expired")
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "bridge.gap", "test.done"]


def test_a_slow_client_stops_the_read_of_the_log_and_is_not_ended() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=4)
    for offset in range(8, 12):
        assert made.replayed(entry(offset, offset))
    assert not made.replayed(entry(12, 12))
    assert not made.wants_more
    assert len(frames(made)) == 5
    assert made.wants_more
    made.read_on(12)
    assert made.replay == Replay(12, 100, None)
    assert made.replayed(entry(12, 12))


def test_events_beyond_the_buffer_are_read_from_the_log() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=3)
    for number in range(10):
        made.offer(make_event(number), 5001)
    assert made.state is State.REPLAYING
    assert made.caught_up(5002) == Step(WriteWatermark())
    made.extend(Anchor(200, "TOCKTO"))
    assert made.replay == Replay(101, 200, None)
    for number in range(10):
        assert made.replayed(entry(number, 110 + number))
        made.take()
    made.offer(make_event(10), 5003)
    made.caught_up(5003)
    assert [frame.json["id"] for frame in frames(made)] == ["e10"]


def test_events_between_the_request_for_a_later_watermark_and_its_answer_are_buffered() -> None:
    """Events and answers have different connections: e10 is after the watermark, and arrives before the answer."""
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=4)
    for number in range(10):
        made.offer(make_event(number), 5001)
    assert made.caught_up(5002) == Step(WriteWatermark())
    made.offer(make_event(10), 5003)
    made.extend(Anchor(200, "TOCKTO"))
    made.offer(make_event(11), 5004)
    for number in range(10):
        assert made.replayed(entry(number, 110 + number))
        frames(made)
    assert made.caught_up(5005) == Step()
    assert [frame.json["id"] for frame in frames(made)] == ["e10", "e11"]


def test_events_of_the_log_are_not_sent_again_however_many_are_buffered() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=2000)
    for number in range(1500):
        made.offer(make_event(number), 5001)
    for number in range(1500):
        assert made.replayed(entry(number, 10 + number))
    assert made.caught_up(5005) == Step()
    frames(made)
    assert made.delivered == 1500


def test_after_a_loss_the_log_is_read_from_the_position_without_a_gap() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.offer(make_event(1), 1001)
    made.lost()
    made.bound(2000, WATERMARK)
    assert made.replay == Replay(10, 100, "AAAAAA")
    made.found()
    made.replayed(entry(1, 11))
    made.replayed(entry(2, 12))
    made.caught_up(2001)
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "test.done", "test.done"]


def cursor_of(made: Session) -> Cursor:
    made.send_position(14_000)
    return Cursor.parse(frames(made)[-1].id)


def test_a_retry_of_an_event_before_the_position_is_not_sent_again_much_later() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")))
    made.replayed(entry(1, 8))
    made.caught_up(5001)
    made.tail_ended()
    for number in range(2, 1000):
        made.offer(make_event(number), 6000)
    assert len(frames(made)) == 1000
    made.lost()
    made.bound(9000, Anchor(5000, "BBBBBB"))
    made.found()
    # The publisher got no confirm of e1, and published it again after the watermark.
    for offset, number in enumerate([1, *range(2, 1000), 1000], 101):
        made.replayed(entry(number, offset))
    made.caught_up(9001)
    assert [frame.json["id"] for frame in frames(made)] == ["e1000"]


def test_a_newer_position_needs_fewer_names() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.offer(make_event(1), 1001)
    made.offer(make_event(2), 8500)
    frames(made)
    made.watermark(WATERMARK, 9000)
    assert cursor_of(made).anchor == Anchor(10, "AAAAAA"), "it is not proven yet"
    made.offer(make_event(3), 12_000)
    made.prove(WATERMARK)
    frames(made)
    # e2 arrived shortly before the watermark, so it may be after it in the log.
    assert cursor_of(made) == Cursor(WATERMARK, (make_event(2).digest, make_event(3).digest))


def test_a_watermark_that_was_never_written_here_is_not_taken() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.watermark(Anchor(50, "BBBBBB"), 9000)
    made.prove(WATERMARK)
    assert cursor_of(made).anchor == Anchor(10, "AAAAAA")
    made.prove(Anchor(50, "BBBBBB"))
    assert cursor_of(made).anchor == Anchor(50, "BBBBBB")


@pytest.mark.contract("5.49")
def test_events_that_fall_out_of_the_names_are_summed_by_queue() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    for number in range(MAX_DIGESTS + 4):
        made.offer(make_event(number), 2000, shared=number % 2 == 1)
    frames(made)
    cursor = cursor_of(made)
    assert cursor.unnamed == (unnamed(0, 2), unnamed(1, 3))
    assert len(cursor.digests) == MAX_DIGESTS


def test_events_sent_since_a_watermark_are_known_when_it_becomes_the_position() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    for number in range(100):
        made.offer(make_event(number), 2000, shared=number % 2 == 1)
    made.watermark(WATERMARK, 8000)
    for number in range(100, 120):
        made.offer(make_event(number), 9000, shared=number % 2 == 1)
    made.prove(WATERMARK)
    frames(made)
    cursor = cursor_of(made)
    assert cursor.anchor == WATERMARK
    assert cursor.digests == tuple(make_event(number).digest for number in range(104, 120))
    assert cursor.unnamed == (unnamed(100, 102), unnamed(101, 103))


@pytest.mark.contract("5.54")
@pytest.mark.parametrize(("count", "taken"), [(20, False), (MANY_BEHIND, True)])
def test_a_watermark_with_events_near_it_is_used_only_after_very_many_events(count: int, taken: bool) -> None:
    made = session(has_log=True, max_events=2 * MANY_BEHIND, max_bytes=10**8)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.watermark(WATERMARK, 9000)
    for number in range(count):
        made.offer(make_event(number), 9010)
    frames(made)
    made.prove(WATERMARK)
    assert (cursor_of(made).anchor == WATERMARK) is taken


def test_a_watermark_is_forgotten_when_the_queues_are_lost() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.watermark(WATERMARK, 9000)
    made.lost()
    made.bound(9500, Anchor(90, "BBBBBB"))
    made.found()
    made.caught_up(9600)
    made.prove(WATERMARK)
    assert cursor_of(made).anchor == Anchor(90, "BBBBBB")


@pytest.mark.contract("5.52")
def test_events_of_the_tail_read_are_not_sent_again_however_many_they_are() -> None:
    made = session(has_log=True, max_events=3000)
    made.bound(1000, WATERMARK)
    for number in range(2000):
        made.offer(make_event(number), 1001)
    for number in range(2000):
        made.offer_tail(make_event(number), 1500)
    made.offer_tail(make_event(5000), 1500)
    while made.take():
        pass
    assert made.delivered == 2000, "each once"
    for number in range(1500, 2000):  # The live queue may also be behind the log.
        made.offer(make_event(number), 1600)
    while made.take():
        pass
    assert made.delivered == 2000
    made.tail_ended()
    made.offer(make_event(5000), 1900)
    while made.take():
        pass
    assert made.delivered == 2001, "and the one that the live queue had missed"
    for number in range(6000, 9000):
        made.offer(make_event(number), 2000)
        made.take()
    assert len(made._recent) == RECENT_IDS, "the ids that were remembered meanwhile are forgotten"
    made.offer_tail(make_event(1), 2001)
    assert made.take() == b"", "the tail read is over"


def test_a_client_that_has_just_caught_up_is_not_ended_for_buffered_events() -> None:
    """When the log has been read, its events that wait and the buffered events are one backlog."""
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=10)
    for number in range(6):
        assert made.replayed(entry(number, 10 + number))
        made.offer(make_event(100 + number), 5001)
    assert made.caught_up(5002) == Step(WriteWatermark()), "the rest is in the log"
    made.extend(Anchor(200, "TOCKTO"))
    frames(made)
    for number in range(6):
        assert made.replayed(entry(100 + number, 110 + number))
    assert made.caught_up(5003) == Step()
    made.offer_tail(make_event(105), 5004)
    assert [frame.json["id"] for frame in frames(made)] == [f"e{100 + number}" for number in range(6)]


# Events that arrive as entries of the log.


def logged(number: int) -> Anchor:
    return Anchor(number, f"{number:06}")


def test_an_event_that_arrives_as_an_entry_is_the_position_of_its_cursor() -> None:
    made = live()
    made.offer(make_event(1), 2000, anchor=logged(300))
    made.offer(make_event(2), 2000, anchor=logged(305))
    made.offer(make_event(2), 2001, anchor=logged(306))  # A publisher's retry.
    assert [Cursor.parse(frame.id).anchor for frame in frames(made)] == [logged(300), logged(305)]
    assert made.delivered == 2


def test_an_entry_is_not_needed_before_the_stream_is_attached() -> None:
    made = session(has_log=True)
    made.offer(make_event(1), 900, anchor=logged(90))
    made.bound(1000, WATERMARK)
    made.lost()
    made.offer(make_event(2), 2000, anchor=logged(200))
    assert [frame.event for frame in frames(made)] == ["bridge.ready"]


def test_a_stream_that_has_everything_needs_no_read_of_the_log() -> None:
    made = live()
    made.offer(make_event(1), 2000, anchor=logged(300))
    made.reached(logged(310))
    made.lost()
    assert made.bound(3000, logged(310)) == Step()
    assert made.state is State.LIVE
    made.offer(make_event(2), 3001, anchor=logged(311))
    assert [frame.json["id"] for frame in frames(made)] == ["e1", "e2"]
    assert made._overlapping is False


def test_a_stream_whose_buffer_was_too_small_reads_the_log() -> None:
    made = session(has_log=True, max_events=2)
    made.bound(1000, WATERMARK)
    made.reached(logged(310))
    made.lost()
    for number in range(3):
        made.offer(make_event(number), 2000)
    assert isinstance(made.bound(3000, logged(310)).action, Replay)


def test_a_stream_that_misses_something_reads_the_log() -> None:
    made = live()
    made.reached(logged(310))
    made.lost()
    assert made.bound(3000, logged(312)) == Step(Replay(310, 312, "000310"))


def test_a_stream_that_was_sent_events_after_its_position_reads_the_log() -> None:
    made = session(has_log=True)
    made.bound(1000, WATERMARK)
    made.offer(make_event(1), 1001)
    made.lost()
    assert made.bound(2000, WATERMARK) == Step(Replay(100, 100, "TICKTI"))


def test_a_quiet_stream_moves_with_the_log() -> None:
    made = live()
    made.offer(make_event(1), 2000)
    frames(made)
    made.reached(logged(400))
    made.send_position(2001)
    *_, position = frames(made)
    assert Cursor.parse(position.id) == Cursor(logged(400))


def test_until_its_gap_is_sent_an_unreadable_event_stays_after_the_position() -> None:
    made = session(has_log=True)
    made.bound(1000, WATERMARK)
    made.unreadable(2000)
    frames(made)
    made.unreadable(2001)
    made.offer(make_event(1), 2002, anchor=logged(300))
    made.reached(logged(310))
    (event,) = frames(made)
    assert Cursor.parse(event.id).anchor == WATERMARK
    made.offer(make_event(2), 2000 + UNREADABLE_MS, anchor=logged(320))
    assert next(frame.event for frame in frames(made)) == "bridge.gap"
    made.offer(make_event(3), 2001 + UNREADABLE_MS, anchor=logged(321))
    assert Cursor.parse(frames(made)[-1].id) == Cursor(logged(321), passed=(make_event(3).digest,))


def test_entries_that_arrive_while_the_log_is_read_follow_it() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")))
    made.offer(make_event(50), 5000, anchor=logged(150))
    assert made.replayed(entry(1, 8))
    assert made.caught_up(5001) == Step()
    made.tail_ended()
    assert [frame.json["id"] for frame in frames(made) if frame.event != "bridge.ready"] == ["e1", "e50"]


@pytest.mark.contract("5.53")
def test_a_retry_of_an_event_that_the_cursor_names_is_not_sent_again() -> None:
    made = returning(Cursor(Anchor(7, "abcdef"), (make_event(1).digest,)))
    assert made.replayed(entry(1, 8))
    assert made.caught_up(5001) == Step()
    made.offer(make_event(1), 5002)
    made.offer(make_event(2), 5003)
    assert [frame.json["id"] for frame in frames(made)[1:]] == ["e2"]


@pytest.mark.contract("2.27", "2.30")
def test_a_client_gets_one_status_when_nothing_can_arrive_and_one_when_events_can_arrive_again() -> None:
    made = live()
    made.heartbeat()
    assert made.take() == sse.HEARTBEAT
    made.lost()
    made.heartbeat()
    assert made.take() == b'event: bridge.status\ndata: {"receiving":false}\n\n'
    made.heartbeat()
    assert made.take() == sse.HEARTBEAT, "the status is sent once"
    made.bound(2000, None)
    back, gap = frames(made)
    assert (back.event, back.json) == ("bridge.status", {"receiving": True})
    assert gap.event == "bridge.gap"


@pytest.mark.contract("2.27")
def test_queues_that_are_back_before_a_heartbeat_cause_no_status() -> None:
    made = live()
    made.lost()
    made.bound(2000, None)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]


@pytest.mark.parametrize(("complete_from", "gap"), [(7, None), (8, "no-log"), (100, "no-log")])
def test_events_from_before_the_log_was_bound_again_are_a_gap(complete_from: int, gap: GapReason | None) -> None:
    made = session(has_log=True, last_event_id=str(Cursor(Anchor(7, "abcdef"))))
    assert made.bound(5000, WATERMARK, complete_from=complete_from).gap == gap


def test_queues_that_are_lost_again_before_a_heartbeat_cause_no_status_either() -> None:
    made = live()
    made.lost()
    made.heartbeat()
    made.bound(2000, None)
    frames(made)
    made.lost()
    made.bound(3000, None)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]


@pytest.mark.contract("2.42")
@pytest.mark.parametrize("bound_first", [True, False])
@pytest.mark.parametrize(("spare", "state"), [(0, "kept"), (-1, "slow")])
def test_the_backlog_takes_as_many_bytes_as_it_says(*, bound_first: bool, spare: int, state: str) -> None:
    made = session(max_bytes=2 * len(make_event(1).named) + spare)
    if bound_first:
        made.bound(1000, None)
    for number in (1, 2):
        made.offer(make_event(number), 2000)
    assert (made.end_reason or "kept") == state


BIG = 40_000
"""The size of an event. `take` returns two such events at once."""


@pytest.mark.parametrize(("limit", "count"), [("max_events", 4), ("max_bytes", 4 * len(make_event(1, size=BIG).named))])
def test_a_read_that_stopped_goes_on_when_half_of_the_backlog_was_taken(limit: str, count: int) -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), **{limit: count})
    made.take()
    for number in range(1, 5):
        assert made.replayed(Entry(7 + number, "abcdef", make_event(number, size=BIG)))
    assert not made.replayed(Entry(12, "abcdef", make_event(5, size=BIG)))
    assert not made.wants_more
    made.take()
    assert made.delivered == 2
    assert made.wants_more


def test_a_position_at_the_watermark_itself_is_in_this_log() -> None:
    made = session(has_log=True, last_event_id=str(Cursor(WATERMARK)))
    assert made.bound(5000, WATERMARK) == Step(Replay(100, 100, "TICKTI"))


def test_after_a_loss_the_log_is_read_from_after_the_entries_that_still_wait() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")))
    made.replayed(entry(1, 8))
    made.lost()
    assert made.bound(6000, WATERMARK) == Step(Replay(8, 100, "ck0008"))


def test_an_ended_stream_does_not_stop_the_read_of_others() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")))
    made.end("drain", 1)
    assert made.replayed(entry(1, 8))


def test_a_bye_has_a_cursor_only_before_ready() -> None:
    made = session()
    made.end("drain", 5)
    assert b"id:" not in made.take(), "the client had no cursor"
    made = returning(Cursor(Anchor(7, "abcdef")))
    frames(made)
    made.end("drain", 5)
    assert b"id:" not in made.take(), "it would move the client back to its first cursor"


def test_only_events_that_were_taken_no_longer_count() -> None:
    made = live(max_events=3)
    for number in (1, 2):
        made.offer(make_event(number), 2000)
    frames(made)
    for number in (3, 4, 5):
        made.offer(make_event(number), 2000)
    assert made.state is State.LIVE
    made.offer(make_event(6), 2000)
    assert made.end_reason == "slow"
    assert repr(made) == "<Session ended backlog=0 delivered=2>"


def test_a_watermark_between_two_events_does_not_separate_them() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.offer(make_event(1), 2000)
    made.watermark(WATERMARK, 2000)
    made.offer(make_event(2), 2000)
    assert len([frame for frame in Decoder().feed(made.take()) if frame.event == "test.done"]) == 2


def test_when_events_arrived_is_known_while_they_wait_and_when_they_are_taken() -> None:
    made = live()
    for number, now_ms in ((1, 2000), (2, 3000)):
        made.offer(make_event(number), now_ms)
    assert [(event.id, received_ms) for event, received_ms in made.waiting()] == [("e1", 2000), ("e2", 3000)]
    made.take()
    assert made.oldest_ms == 2000
    made.take()
    assert made.oldest_ms is None
    made = returning(Cursor(Anchor(7, "abcdef")))
    made.replayed(entry(1, 8))
    assert [(event.id, received_ms) for event, received_ms in made.waiting()] == [("e1", None)]
    made.take()
    assert made.oldest_ms is None


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_count_that_the_log_does_not_confirm_leaves_the_cursor(is_shared: bool) -> None:
    wrong, right = unnamed(1, 2, 4), unnamed(101)
    claimed = (right, wrong) if is_shared else (wrong, right)
    made = returning(Cursor(Anchor(7, "abcdef"), (), claimed))
    for number, offset in [(1, 8), (2, 9), (3, 10), (101, 11)]:
        made.replayed(Entry(offset, "abcdef", make_event(number), shared=is_shared != (number == 101)))
    made.caught_up(5001)
    first = frames(made)[1]
    assert first.json["id"] == "e1"
    assert Cursor.parse(first.id).unnamed == ((right, NONE) if is_shared else (NONE, right))


def test_entries_that_waited_for_a_sum_are_sent_although_the_backlog_is_full() -> None:
    made = returning(Cursor(Anchor(7, "abcdef"), (), (Unnamed(3, 1), NONE)), max_events=2)
    for number in range(1, 6):
        assert made.replayed(entry(number, 7 + number))
    assert [frame.json["id"] for frame in frames(made)[1:]] == [f"e{number}" for number in range(1, 6)]


def test_entries_are_kept_back_up_to_the_limit_of_a_recall() -> None:
    cursor = Cursor(Anchor(7, "abcdef"), (), (Unnamed(1000, 1), NONE))
    rest = RECALL_BYTES - len(make_event(1).named)
    for size, count in ((rest, 0), (rest + 1, 1)):
        made = returning(cursor)
        made.replayed(Entry(8, "abcdef", make_event(1, size=size)))
        assert len(made.waiting()) == count
    made = returning(cursor)
    again = entry(1, 8)  # A publisher's retry is an entry, too.
    for _ in range(RECALL_EVENTS):
        made.replayed(again)
    assert made.waiting() == []
    made.replayed(again)
    assert len(made.waiting()) == 1


def test_an_event_that_the_cursor_names_is_one_duplicate() -> None:
    made = returning(Cursor(Anchor(7, "abcdef"), (make_event(1).digest,)))
    made.replayed(entry(1, 8))
    assert made.duplicates == 1


def test_each_of_two_watermarks_behind_an_event_can_be_proved() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.offer(make_event(1), 2000)
    made.watermark(WATERMARK, 9000)
    made.watermark(Anchor(200, "TOCKTO"), 9001)
    made.prove(WATERMARK)
    frames(made)
    assert cursor_of(made) == Cursor(WATERMARK)


def test_a_position_replaces_only_the_position_just_before_it() -> None:
    made = live()
    made.offer(make_event(1, size=CHUNK_BYTES), 2000)
    made.reached(logged(310))
    made.offer(make_event(2), 2000)
    made.take()
    made.reached(logged(320))
    (event,) = frames(made)
    assert event.json["id"] == "e2"


@pytest.mark.parametrize("limits", [{"max_events": 4}, {"max_bytes": 4 * len(make_event(1).named)}])
def test_half_a_buffer_is_kept_when_a_later_watermark_is_asked_for(limits: dict[str, int]) -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), **limits)
    for number in range(10):
        made.offer(make_event(number), 5001)
    assert made.caught_up(5002) == Step(WriteWatermark())
    made.extend(Anchor(200, "TOCKTO"))
    assert made.caught_up(5003) == Step()
    assert [frame.json["id"] for frame in frames(made)[1:]] == ["e8", "e9"]


def test_the_buffer_keeps_events_that_may_be_behind_a_later_watermark() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=4)
    for number, before_ms in enumerate([2000, 2000, 2000, OVERLAP_MS + 1, OVERLAP_MS]):
        made.offer(make_event(number), 9000 - before_ms)
    assert made.caught_up(9000) == Step(WriteWatermark())
    made.extend(Anchor(200, "TOCKTO"))
    assert made.caught_up(9001) == Step()
    assert [frame.json["id"] for frame in frames(made)[1:]] == ["e4"]


def test_an_event_that_arrives_live_after_a_later_part_of_the_log_gave_it_is_not_sent_again() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=3)
    for number in range(4):
        made.offer(make_event(number), 5001)
    assert made.caught_up(5002) == Step(WriteWatermark())
    made.extend(Anchor(20_000, "TOCKTO"))
    for number in range(2 * RECENT_IDS):
        assert made.replayed(entry(number, 101 + number))
        made.take()
    made.offer(make_event(5), 5003)
    made.caught_up(5004)
    assert frames(made) == []


def test_an_event_of_the_tail_waits_for_its_end_or_for_many_others() -> None:
    made = session(has_log=True, max_events=2)
    made.bound(1000, WATERMARK)
    made.take()
    made.offer_tail(make_event(1), 1001)
    made.offer_tail(make_event(2), 1001)
    assert made.waiting() == []
    made.offer_tail(make_event(3), 1001)
    assert [frame.json["id"] for frame in frames(made)] == ["e1"]
    made.tail_ended()
    assert [frame.json["id"] for frame in frames(made)] == ["e2", "e3"]


@pytest.mark.parametrize(
    ("has_log", "last_event_id", "is_ready", "reason"),
    [
        (True, "2.7.abcdef.", False, None),
        (True, None, False, "slow"),
        (True, None, True, None),
        (False, None, True, "slow"),
    ],
)
def test_a_full_buffer_ends_a_stream_that_cannot_read_the_log(
    has_log: bool, last_event_id: str | None, is_ready: bool, reason: str | None
) -> None:
    made = session(has_log=has_log, last_event_id=last_event_id, max_events=2)
    if is_ready:
        made.bound(1000, None)
        made.lost()
    for number in range(3):
        made.offer(make_event(number), 2000)
    assert made.end_reason == reason


@pytest.mark.parametrize(("spare", "reason"), [(0, None), (-1, "slow")])
def test_a_buffer_that_a_loss_emptied_takes_as_many_bytes_again(spare: int, reason: str | None) -> None:
    made = session(max_bytes=2 * len(make_event(1).named) + spare)
    made.offer(make_event(1), 900)
    made.lost()
    for number in (2, 3):
        made.offer(make_event(number), 901)
    assert made.end_reason == reason


def test_the_time_of_a_cursor_moves_with_the_events_and_never_back() -> None:
    made = live()
    made.offer(make_event(1), 2000)
    (first,) = frames(made)
    made.offer(make_event(2), 1500)
    (second,) = frames(made)
    assert (first.id, second.id) == (f"0.{2000:x}", f"0.{2000:x}")


# Events that this bridge's catalogue cannot read.


@pytest.mark.contract("5.59")
def test_a_live_stream_has_one_gap_in_five_seconds_for_events_that_cannot_be_read() -> None:
    made = live()
    assert made.unreadable_gaps == 0
    made.unreadable(2000)
    (gap,) = frames(made)
    assert (gap.event, gap.json, made.unreadable_gaps) == ("bridge.gap", {"reason": "not-readable"}, 1)
    made.unreadable(3000)
    made.offer(make_event(1), 6999)
    assert [frame.event for frame in frames(made)] == ["test.done"], "not five seconds yet"
    made.offer(make_event(2), 7000)
    assert [frame.event for frame in frames(made)] == ["bridge.gap", "test.done"]
    made.offer(make_event(3), 20_000)
    assert [frame.event for frame in frames(made)] == ["test.done"], "nothing more was unreadable"
    made.unreadable(20_000)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]
    assert made.unreadable_gaps == 3


@pytest.mark.parametrize("sent_with", ["heartbeat", "position"])
def test_a_gap_that_waits_is_sent_with_the_next_heartbeat_or_position(sent_with: str) -> None:
    made = live()
    made.unreadable(2000)
    made.unreadable(3000)
    frames(made)
    made.heartbeat() if sent_with == "heartbeat" else made.send_position(4000)
    found = {frame.event for frame in frames(made)}
    assert found == {"bridge.gap"} | ({"bridge.position"} if sent_with == "position" else set())
    made.heartbeat()
    assert made.take() == sse.HEARTBEAT


@pytest.mark.contract("5.60")
def test_no_watermark_is_taken_before_the_gap_for_an_event_was_sent() -> None:
    made = session(has_log=True)
    made.bound(1000, Anchor(10, "AAAAAA"))
    made.unreadable(2000)
    made.unreadable(3000)
    made.watermark(WATERMARK, 4000)
    made.prove(WATERMARK)
    frames(made)
    assert cursor_of(made).anchor == Anchor(10, "AAAAAA")
    made.prove(WATERMARK)
    assert cursor_of(made).anchor == WATERMARK


@pytest.mark.contract("5.59")
def test_one_gap_is_for_all_unreadable_events_of_a_read_of_the_log() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")))
    frames(made)
    for _ in range(3):
        made.unreadable(5001, logged=True)
    made.unreadable(5002)  # It arrived live, so the page's state may be older.
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]
    made.caught_up(5003)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]
    assert made.unreadable_gaps == 2


def test_an_event_that_cannot_be_read_in_a_later_part_of_the_log_has_its_own_gap() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")), max_events=1)
    made.unreadable(5001, logged=True)
    for number in (1, 2):
        made.offer(make_event(number), 5001)
    assert made.caught_up(5002) == Step(WriteWatermark())
    made.extend(Anchor(200, "TOCKTO"))
    frames(made)
    made.unreadable(5003, logged=True)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]


def test_an_unreadable_event_before_ready_needs_no_gap_of_its_own() -> None:
    made = session()
    made.unreadable(900)
    made.bound(1000, None)
    made.offer(make_event(1), 9000)
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "test.done"]


def test_a_gap_in_the_read_of_the_log_is_for_its_later_unreadable_events_too() -> None:
    made = returning(Cursor(Anchor(7, "abcdef")))
    for _ in range(2):
        made.unreadable(5001, logged=True)
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "bridge.gap"]
    made.caught_up(5002)
    assert frames(made) == []


def test_five_seconds_after_a_gap_the_next_one_is_sent_at_once() -> None:
    made = live()
    made.unreadable(2000)
    frames(made)
    made.unreadable(2000 + UNREADABLE_MS)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]


# The table of states and events.


def in_state(state: State) -> Session:
    """A session in this state. With REPLAYING, `bridge.ready` has been sent."""
    cursor = Cursor(Anchor(7, "abcdef"))
    made = session(has_log=True, last_event_id=str(cursor) if state is State.REPLAYING else None)
    match state:
        case State.OPENING:
            pass
        case State.REPLAYING:
            made.bound(1000, WATERMARK)
            made.found()
        case State.LIVE:
            made.bound(1000, WATERMARK)
        case State.DETACHED:
            made.bound(1000, WATERMARK)
            made.lost()
        case State.ENDED:
            made.end("drain", 1)
    made.take()
    assert made.state is state
    return made


EVENTS: dict[EventName, Callable[[Session], object]] = {
    "bound": lambda made: made.bound(2000, WATERMARK),
    "lost": lambda made: made.lost(),
    "found": lambda made: made.found(),
    "not_found": lambda made: made.not_found("expired"),
    "replayed": lambda made: made.replayed(entry(1, 8)),
    "read_on": lambda made: made.read_on(9),
    "caught_up": lambda made: made.caught_up(2000),
    "extend": lambda made: made.extend(Anchor(200, "TOCKTO")),
    "offer": lambda made: made.offer(make_event(2), 2000),
    "offer_tail": lambda made: made.offer_tail(make_event(3), 2000),
    "tail_ended": lambda made: made.tail_ended(),
    "unreadable": lambda made: made.unreadable(2000),
    "watermark": lambda made: made.watermark(Anchor(300, "abcabc"), 2000),
    "prove": lambda made: made.prove(Anchor(300, "abcabc")),
    "heartbeat": lambda made: made.heartbeat(),
    "send_position": lambda made: made.send_position(2000),
    "reached": lambda made: made.reached(WATERMARK),
    "end": lambda made: made.end("rotate", 1),
    "take": lambda made: made.take(),
}


def everything_of(made: Session) -> dict[str, str]:
    """Each attribute, so that two sessions can be compared."""
    held = {name: getattr(made, name) for name in Session.__slots__}
    progress = held.pop("_progress")
    return {name: repr(value) for name, value in held.items()} | {"cursor": progress.text(0)}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", EVENTS)
def test_each_event_does_in_each_state_as_the_table_says(event: EventName, state: State) -> None:
    made = in_state(state)
    before = everything_of(made)
    cell = TABLE[event][state]
    if cell == "wrong":
        with pytest.raises(WrongState, match=f"{event} in the state {state.value}"):
            EVENTS[event](made)
        assert everything_of(made) == before
    elif cell == "ignored":
        EVENTS[event](made)
        assert everything_of(made) == before
    else:
        EVENTS[event](made)
        assert made.state in cell


def test_the_table_is_complete() -> None:
    assert set(TABLE) == set(EVENTS) == set(get_args(EventName))
    assert all(set(cells) == set(State) for cells in TABLE.values())


def test_the_page_about_states_has_this_table() -> None:
    rows = {
        cells[0].strip(" `"): [cell.strip() for cell in cells[1:]]
        for line in (ROOT / "docs" / "states.md").read_text().splitlines()
        if line.startswith("| `") and len(cells := line.strip("|").split("|")) == 1 + len(State)
    }
    for event, by_state in TABLE.items():
        words = [
            cell if isinstance(cell, str) else ", ".join(state.value for state in cell) for cell in by_state.values()
        ]
        assert rows[event] == words, event
