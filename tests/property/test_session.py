"""A connection against a model of a few lines: any history of offers, losses, reads and ends.

The model is a list: what was offered, each id once. Laws: what comes out is that list, in that order, never anything
before ready, a gap for each loss before what followed it, and after a goodbye nothing at all.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from bridge.cursor import Cursor
from bridge.routing import TypeFilter
from bridge.session import Session, State
from tests.decoder import Decoder, Frame
from tests.events import make_event

MAX_EVENTS = 30


class Stream(RuleBasedStateMachine):
    events = Bundle("events")

    @initialize(named=st.booleans(), last_event_id=st.sampled_from([None, "1.0.", "x"]))
    def open(self, named: bool, last_event_id: str | None) -> None:
        self.session = Session(
            user="42",
            types=TypeFilter(),
            named=named,
            last_event_id=last_event_id,
            retry_ms=3000,
            heartbeat_seconds=15,
            max_events=MAX_EVENTS,
            max_bytes=1_000_000,
        )
        self.decoder = Decoder()
        self.now_ms = 1000
        self.count = 0
        self.expected: list[str] = []
        if last_event_id is not None:
            self.first_gap = ["gap"]
        else:
            self.first_gap = []
        self.opened = False
        self.unread = 0
        self.got: list[str] = []
        self.cursors: list[Cursor] = []
        self.ended: str | None = None

    @rule(forward=st.integers(-50, 5000))
    def pass_time(self, forward: int) -> None:
        self.now_ms = max(0, self.now_ms + forward)

    @rule(target=events)
    def offer_new(self) -> int:
        self.count += 1
        self._offer(self.count)
        return self.count

    def _offer(self, number: int) -> None:
        self.session.offer(make_event(number), self.now_ms)
        if self.ended is None and f"e{number}" not in self.expected:
            self.expected.append(f"e{number}")
            self.unread += 1
            if self.unread > MAX_EVENTS:
                self.ended = "slow"

    @rule(number=events)
    def offer_again(self, number: int) -> None:
        self._offer(number)

    @precondition(lambda self: self.session.state in (State.OPENING, State.DETACHED))
    @rule()
    def bind(self) -> None:
        gap = self.session.bound(self.now_ms)
        if self.opened:
            assert gap == "no-log"
            if self.expected[-1:] != ["gap"] or self.unread == 0:
                self.expected.append("gap")
                self.unread += 1
        else:
            self.opened = True
            self.expected[:0] = ["ready", *self.first_gap]

    @rule()
    def lose(self) -> None:
        self.session.lost()

    @rule()
    def beat(self) -> None:
        self.session.beat()

    @rule()
    def place(self) -> None:
        self.session.place(self.now_ms)

    @rule(reason=st.sampled_from(["drain", "rotate", "expired"]))
    def end(self, reason: str) -> None:
        self.session.end(reason, 10)  # type: ignore[arg-type]
        self.ended = self.ended or reason

    @rule()
    def read(self) -> None:
        while chunk := self.session.take():
            for frame in self.decoder.feed(chunk):
                self._see(frame)
        if self.opened:
            self.unread = 0

    def _see(self, frame: Frame) -> None:
        assert self.got[-1:] != ["bye"], "nothing follows a goodbye"
        if frame.event == "bridge.position":
            self.cursors.append(Cursor.parse(frame.id))
        elif frame.event.startswith("bridge."):
            self.got.append(frame.event.removeprefix("bridge."))
            assert frame.event != "bridge.ready" or len(self.got) == 1
        else:
            self.got.append(frame.json["id"])
            self.cursors.append(Cursor.parse(frame.id))
            assert self.cursors[-1].digests.endswith(make_event(int(frame.json["id"][1:])).digest)

    @invariant()
    def what_comes_out_is_what_went_in(self) -> None:
        got = [name for name in self.got if name != "bye"]
        assert got == self.expected[: len(got)]
        assert not self.decoder.phantoms

    @invariant()
    def a_cursor_never_goes_back(self) -> None:
        times = [cursor.time_ms for cursor in self.cursors]
        assert times == sorted(times)

    def teardown(self) -> None:
        if not hasattr(self, "session"):
            return
        self.read()
        got = [name for name in self.got if name != "bye"]
        if self.ended is None:
            assert got == (self.expected if self.opened else [])
        else:
            assert self.got[-1] == "bye"
            if self.ended in ("drain", "rotate") and self.opened:
                assert got == self.expected


Stream.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestStream = Stream.TestCase
