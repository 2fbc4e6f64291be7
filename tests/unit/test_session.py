"""The table of a connection's life, one sentence at a time."""

from typing import Any

import pytest

from bridge.cursor import Cursor
from bridge.routing import TypeFilter
from bridge.session import CHUNK_BYTES, RECENT_IDS, Session, State
from tests.decoder import Decoder, Frame
from tests.events import make_event


def session(**changes: Any) -> Session:
    values: dict[str, Any] = {
        "user": "42",
        "types": TypeFilter(),
        "named": True,
        "last_event_id": None,
        "retry_ms": 3000,
        "heartbeat_seconds": 15,
        "max_events": 1000,
        "max_bytes": 1_000_000,
    }
    return Session(**{**values, **changes})


def live(**changes: Any) -> Session:
    made = session(**changes)
    made.bound(1000)
    made.take()
    return made


def frames(made: Session) -> list[Frame]:
    decoder = Decoder()
    found = []
    while chunk := made.take():
        found += decoder.feed(chunk)
    assert not decoder.phantoms
    return found


def test_ready_comes_first_and_what_was_held_after_it() -> None:
    made = session()
    made.offer(make_event(1), 990)
    assert made.take() == b""
    made.bound(1000)
    ready, event = frames(made)
    assert (ready.event, ready.retry, ready.id) == ("bridge.ready", 3000, str(Cursor(1000)))
    assert ready.json == {"user": "42", "resumed": False, "heartbeat_seconds": 15}
    assert event.json["id"] == "e1"
    # Ready's clock was later than the event's: a cursor never goes back.
    assert event.id == str(Cursor(1000, make_event(1).digest))


@pytest.mark.parametrize(
    ("last_event_id", "reason"),
    [("1.0.abcd", "no-log"), ("garbage", "unknown"), ("\0", "unknown"), ("é" * 500, "unknown")],
)
def test_a_client_that_comes_back_is_told_the_gap_straight_after_ready(last_event_id: str, reason: str) -> None:
    made = session(last_event_id=last_event_id)
    made.offer(make_event(1), 990)
    assert made.bound(1000) == reason
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "bridge.gap", "test.done"]


@pytest.mark.parametrize("last_event_id", [None, ""])
def test_a_client_that_comes_for_the_first_time_has_no_gap(last_event_id: str | None) -> None:
    made = session(last_event_id=last_event_id)
    assert made.bound(1000) is None
    assert [frame.event for frame in frames(made)] == ["bridge.ready"]


def test_each_event_has_the_cursor_of_a_client_that_got_this_far() -> None:
    made = live()
    for number in range(20):
        made.offer(make_event(number), 2000 + number)
    found = frames(made)
    digests = [make_event(number).digest for number in range(20)]
    for number, frame in enumerate(found):
        assert frame.id == str(Cursor(2000 + number, "".join(digests[max(0, number - 15) : number + 1])))


def test_without_names_a_plain_onmessage_gets_events_and_the_bridges_frames_keep_theirs() -> None:
    made = session(named=False)
    made.bound(1000)
    made.offer(make_event(1), 1000)
    made.end("rotate", 1)
    assert [frame.event for frame in frames(made)] == ["bridge.ready", "message", "bridge.bye"]


def test_an_id_that_was_just_offered_is_not_sent_again() -> None:
    made = live()
    for number in [1, 2, 1, 3, 2]:
        made.offer(make_event(number), 2000)
    assert [frame.json["id"] for frame in frames(made)] == ["e1", "e2", "e3"]
    made.offer(make_event(1), 2001)
    assert made.take() == b""
    assert (made.delivered, made.duplicates) == (3, 3)


def test_the_window_of_ids_is_as_long_as_it_says() -> None:
    made = live()
    for number in range(RECENT_IDS + 1):
        made.offer(make_event(number), 2000)
    frames(made)
    made.offer(make_event(1), 2000)
    assert made.take() == b""
    made.offer(make_event(0), 2000)
    assert frames(made)[0].json["id"] == "e0"


def test_more_events_than_the_backlog_takes_end_it_as_slow() -> None:
    made = live(max_events=3)
    for number in range(3):
        made.offer(make_event(number), 2000)
    assert made.state is State.LIVE
    made.offer(make_event(3), 2000)
    made.offer(make_event(4), 2000)
    assert [(frame.event, frame.json) for frame in frames(made)] == [("bridge.bye", {"reason": "slow"})]
    assert made.backlog_bytes == 0


def test_more_bytes_than_the_backlog_takes_end_it_as_slow() -> None:
    made = live(max_bytes=10_000)
    made.offer(make_event(1, size=9000), 2000)
    made.offer(make_event(2, size=1000), 2000)
    assert made.end_reason == "slow"


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


@pytest.mark.parametrize(
    ("reason", "flushed"), [("drain", True), ("rotate", True), ("expired", False), ("busy", False)]
)
def test_what_has_arrived_is_sent_before_a_planned_end(reason: Any, flushed: bool) -> None:
    made = live()
    made.offer(make_event(1), 2000)
    made.end(reason, 77)
    made.end("slow", 1)
    made.offer(make_event(2), 2000)
    *events, bye = frames(made)
    assert (bye.event, bye.json, bye.retry) == ("bridge.bye", {"reason": reason}, 77)
    assert len(events) == flushed


def test_an_end_before_ready_is_only_goodbye() -> None:
    made = session()
    made.offer(make_event(1), 900)
    made.end("drain", 5)
    assert made.bound(1000) is None
    assert [frame.event for frame in frames(made)] == ["bridge.bye"]


def test_a_loss_is_told_once_the_queues_are_back_and_not_before() -> None:
    made = live()
    made.offer(make_event(1), 2000)
    made.lost()
    made.lost()
    assert [frame.event for frame in frames(made)] == ["test.done"]
    made.offer(make_event(2), 3000)
    assert made.bound(3001) == "no-log"
    made.offer(make_event(3), 3002)
    assert [frame.event for frame in frames(made)] == ["test.done", "bridge.gap", "test.done"]


def test_losses_that_a_slow_client_has_not_read_of_do_not_pile_up() -> None:
    made = live()
    for now_ms in range(100):
        made.lost()
        made.bound(3000 + now_ms)
    assert [frame.event for frame in frames(made)] == ["bridge.gap"]


def test_a_position_moves_the_cursor_of_a_quiet_client() -> None:
    made = live()
    made.offer(make_event(1), 2000)
    frames(made)
    made.place(62_000)
    (frame,) = frames(made)
    assert (frame.event, frame.json, frame.id) == ("bridge.position", {}, str(Cursor(62_000, make_event(1).digest)))


def test_no_position_is_told_while_something_may_be_missing() -> None:
    made = live()
    made.lost()
    made.place(62_000)
    assert made.take() == b""


def test_a_heartbeat_is_a_comment_and_only_when_there_is_nothing_else() -> None:
    made = session()
    made.beat()
    assert made.take() == b""
    made.bound(1000)
    made.take()
    made.beat()
    assert made.take() == b":\n"
    made.offer(make_event(1), 2000)
    made.beat()
    assert made.take().startswith(b"id: ")


def test_one_take_is_bounded_and_ends_with_a_whole_frame() -> None:
    made = live(max_bytes=10_000_000)
    for number in range(200):
        made.offer(make_event(number, size=5000), 2000)
    chunk = made.take()
    assert CHUNK_BYTES <= len(chunk) < CHUNK_BYTES + 6000
    assert chunk.endswith(b"\n\n")
