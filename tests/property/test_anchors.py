"""A stream takes its anchors late, when something next happens to it. That has to come to the same as at once."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import hub
from bridge.cursor import Anchor
from bridge.hub import ANCHOR_SECONDS, ARRIVAL_SECONDS, Connection, Hub, StreamRequest
from bridge.metrics import Metrics
from bridge.pacing import Pace
from bridge.routing import TypeFilter
from bridge.session import Session
from tests.events import make_event

LENGTH = 120.0

times = st.floats(0, LENGTH)
bursts = st.builds(
    lambda start, gap, count: [start + gap * number for number in range(count)],
    times,
    st.floats(0.001, 3),
    st.integers(1, 40),
)


def new_session() -> Session:
    made = Session(
        user="42",
        types=TypeFilter(),
        named=True,
        last_event_id=None,
        has_log=True,
        retry_ms=3000,
        heartbeat_seconds=15,
        max_events=1000,
        max_bytes=1_000_000,
    )
    made.bound(0, Anchor(1, "AAAAAA"))
    made.settled()
    return made


def new_connection(session: Session) -> Connection:
    nothing: Any = None
    made = Hub(
        models={}, limits=nothing, metrics=Metrics(), quarantine=nothing, make_broker=lambda _: nothing, log=None
    )
    subscriber: Any = type("Subscriber", (), {"user": "42", "groups": ()})
    request = StreamRequest(subscriber, TypeFilter(), named=True, last_event_id=None, keys=())
    return Connection(made, request, session, nothing, lambda: None, 0.0)


def at(seconds: float) -> Anchor:
    return Anchor(2 + int(seconds * 1000), "BBBBBB")


@settings(max_examples=500)
@given(st.lists(bursts, max_size=4), st.lists(times, max_size=4), st.lists(times, max_size=2))
def test_late_is_as_good_as_at_once(events: list[list[float]], places: list[float], losses: list[float]) -> None:
    eager = new_session()
    late = new_connection(new_session())
    moments: list[tuple[float, str, float]] = [
        *((time, "event", 0.0) for burst in events for time in burst),
        *((time, "place", 0.0) for time in places),
        *((time, "loss", 0.0) for time in losses),
    ]
    for number in range(1, int(LENGTH / ANCHOR_SECONDS)):
        written = number * ANCHOR_SECONDS
        moments += [(written + seconds, "anchor", written) for seconds in ARRIVAL_SECONDS]
    for number, (now, what, written) in enumerate(sorted(moments)):
        now_ms = int(now * 1000)
        match what:
            case "event":
                event = make_event(number)
                eager.offer(event, now_ms)
                late.offer(event, now_ms)
            case "anchor":
                eager.anchor(at(written), int(written * 1000))
                late._hub._offer(int(written), at(written), int(written * 1000))
            case "place":
                eager.place(now_ms)
                with patch.object(hub, "_now_ms", lambda ms=now_ms: ms):
                    late.pace = Pace(-math.inf, heartbeat_seconds=math.inf, ends_at=math.inf, expires_at=math.inf)
                    late.advance(now)
            case "loss":
                eager.lost()
                late.on_lost()
                for session in eager, late.session:
                    session.bound(now_ms, at(now))
                assert late.session.replay == eager.replay
                for session in eager, late.session:
                    session.found()
                    session.caught_up(now_ms)
                    session.settled()
        assert late.session.take() == eager.take(), (now, what)
