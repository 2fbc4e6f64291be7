"""Joining the log with live events, tested with a small model of everything around a session.

The model has several publishers, a log (a list), and live queues. Any queue may deliver next, however far behind the
others are. There are five variants:

    World           two queues, the client's own and the shared one, each in the log's order
    CrossingWorld   one queue for each publisher and audience: events of two publishers have another order in each queue
    RollingWorld    some events are of a type that only newer replicas can read; the client uses old and new replicas
    LogWorld        the feed `log`: no queues; one reader at the end of the log
    MixedWorld      the client uses replicas of both feeds

The client's connection breaks at any point. It has read any part of what was written, and returns to a new session with
the last id that it saw. What must hold, checked whenever nothing is on its way:

    nothing lost        it has every event written to the log after its first ready, unless it got a gap before
    nothing twice       no event came twice, where each queue was in the log's order and the watermarks were too
    in order            events of one publisher to one audience came as they were published
    none of others      it never saw an event that is not for it
    nothing hidden      what a replica could not read was sent by a newer one, or its page fetched its state since then
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bridge.routing import TypeFilter
from bridge.service.streams.cursor import Anchor, digest
from bridge.service.streams.progress import Entry
from bridge.service.streams.session import ReadTail, Replay, Session, State, Step, WriteWatermark
from bridge.service.streams.streamevent import StreamEvent
from tests.decoder import Decoder, Frame
from tests.events import make_event

PUBLISHERS = 3
AUDIENCES = ("user", "group", "other user")
MINE = ("user", "group")
MAX_EVENTS = 12
SOURCES = ("/a", "/b")


@dataclass(frozen=True)
class Published:
    number: int
    publisher: int
    audience: str
    is_new: bool = False
    """Of a type that only newer replicas can read."""


def event_of(number: int) -> StreamEvent:
    """Two sources use the same ids: the events 6 and 7 are both e3."""
    return make_event(number // 2, source=SOURCES[number % 2])


def number_of(event: dict[str, Any]) -> int:
    return 2 * int(event["id"][1:]) + SOURCES.index(event["source"])


@dataclass
class Mark:
    number: int


Key = tuple[int, str]

THE_LOG: Key = (0, "log")
"""The only queue of a replica whose feed is the log."""


class World(RuleBasedStateMachine):
    """Two queues, each in the log's order."""

    reads_log = False
    """Whether the replica's feed is the log."""

    repeats = False
    """Whether an event may come twice from the beginning on."""

    def queue_of(self, publisher: int, audience: str) -> Key:
        return 0, audience

    @initialize()
    def begin(self) -> None:
        self.log: list[Published | Mark] = []
        self.count = 0
        self.now_ms = 1_000_000
        self.session: Session | None = None
        self.queues: dict[Key, deque[Published]] = {}
        self.bound = False
        self.reading: int | None = None
        self.extending = False
        self.tail: int | None = None  # The next entry of the tail read.
        self.replayed = False  # Whether the log was read up to the watermark.
        self.asked: Anchor | None = None  # A watermark that is written, and not yet known to the bridge.
        self.anchors: list[tuple[Anchor, int]] = []
        self.decoder = Decoder()
        self.written: deque[Frame] = deque()
        self.last_id = ""
        self.since: int | None = None  # From this offset on the client must get everything.
        self.got: list[int] = []
        self.newest = 0
        self.may_repeat = self.repeats
        self.is_new = True
        self.state_at = 0  # The state that the page fetched last has all events up to this number.
        self.open()

    # The broker.

    def check(self, offset: int) -> str:
        item = self.log[offset]
        return digest(f"{type(item).__name__}{item.number}".encode())

    def write_mark(self) -> Anchor:
        self.count += 1
        self.log.append(Mark(self.count))
        return Anchor(len(self.log) - 1, self.check(len(self.log) - 1))

    @rule(publisher=st.integers(0, PUBLISHERS - 1), audience=st.sampled_from(AUDIENCES))
    def publish(self, publisher: int, audience: str) -> None:
        self.count += 1
        event = Published(self.count, publisher, audience)
        self.log.append(event)
        # It is not known whether a new stream's first events are before its watermark or after it.
        self.may_repeat = self.may_repeat or (self.bound and not self.last_id and not self.reads_log)
        self.route(event)

    def route(self, event: Published) -> None:
        if self.bound and event.audience in MINE:
            self.queues.setdefault(self.queue_of(event.publisher, event.audience), deque()).append(event)

    def waiting(self) -> list[Key]:
        """The queues from which an event may be delivered next."""
        return [key for key, queue in self.queues.items() if queue]

    @rule(publisher=st.integers(0, PUBLISHERS - 1))
    def publish_again(self, publisher: int) -> None:
        """A publisher that got no confirm repeats its last event: it is in the log twice."""
        last = self.log[-1] if self.log else None
        if isinstance(last, Published) and last.publisher == publisher:
            self.log.append(last)
            # One copy may be before an anchor, and the other after it.
            self.may_repeat = self.may_repeat or bool(self.anchors)
            self.route(last)

    def deliver_one(self, key: Key) -> None:
        event = self.queues[key].popleft()
        assert self.session is not None
        if event.is_new and not self.is_new:
            self.session.unreadable(self.now_ms)
            return
        self.session.offer(event_of(event.number), self.now_ms, shared=event.audience != "user")

    @precondition(lambda self: bool(self.waiting()))
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self.deliver_one(data.draw(st.sampled_from(self.waiting())))

    @rule(forward=st.integers(0, 3000))
    def pass_time(self, forward: int) -> None:
        """Time passes, while a live queue may be far behind."""
        self.now_ms += forward

    # What the hub does around a session.

    def open(self) -> None:
        self.session = Session(
            identity="",
            user="42",
            types=TypeFilter(),
            named=True,
            last_event_id=self.last_id,
            has_log=True,
            retry_ms=3000,
            heartbeat_seconds=15,
            max_events=MAX_EVENTS,
            max_bytes=1_000_000,
        )
        self.decoder = Decoder()

    @precondition(lambda self: not self.bound)
    @rule()
    def bind(self) -> None:
        self.bound = True
        self.queues = {}

    @precondition(
        lambda self: self.bound and self.session is not None and self.session.state in (State.OPENING, State.DETACHED)
    )
    @rule()
    def answer_watermark(self) -> None:
        assert self.session is not None
        step = self.session.bound(self.now_ms, self.find_position())
        self.carry_out(step)

    def find_position(self) -> Anchor:
        """An entry of the log from which on the feed has every event."""
        asked, self.asked = self.asked, None
        return asked or self.write_mark()

    @precondition(lambda self: self.awaits_watermark)
    @rule()
    def ask_for_watermark(self) -> None:
        """The answer arrives on another connection than events, at any time later."""
        if self.asked is None:
            self.asked = self.write_mark()

    @property
    def awaits_watermark(self) -> bool:
        assert self.session is not None
        return self.extending or (self.bound and self.session.state in (State.OPENING, State.DETACHED))

    @precondition(lambda self: self.extending)
    @rule()
    def answer_later_watermark(self) -> None:
        assert self.session is not None
        self.extending = False
        self.carry_out(self.session.extend(self.find_position()))

    def carry_out(self, step: Step) -> None:
        assert self.session is not None
        action = step.action
        if isinstance(action, WriteWatermark) and self.reads_log:
            self.carry_out(self.session.extend(self.find_position()))  # The position is known at once.
        elif isinstance(action, WriteWatermark):
            self.extending = True
        elif isinstance(action, ReadTail):
            self.start_tail(action.after, replayed=False)
        elif isinstance(action, Replay) and action.check is None:
            self.reading = action.start
        elif isinstance(action, Replay):
            if self.check(action.start) == action.check:
                self.session.found()
                self.reading = action.start + 1
            else:
                self.carry_out(self.session.not_found("unknown"))

    @precondition(lambda self: self.reading is not None)
    @rule(steps=st.integers(1, 8))
    def read_log(self, steps: int) -> None:
        assert self.session is not None
        for _ in range(steps):
            if self.reading is None or self.session.replay is None:
                return
            offset = self.reading
            item = self.log[offset]
            if isinstance(item, Published) and item.audience in MINE and item.is_new and not self.is_new:
                self.session.unreadable(self.now_ms, logged=True)
            elif isinstance(item, Published) and item.audience in MINE:
                entry = Entry(offset, self.check(offset), event_of(item.number), item.audience != "user")
                if not self.session.replayed(entry):
                    assert not self.session.wants_more, "it stopped, but wants more"
                    return
            if offset == self.session.replay.until:
                self.reading = None
                self.carry_out(self.session.caught_up(self.now_ms))
                if self.session.state is State.LIVE:
                    self.start_tail(Anchor(offset, self.check(offset)), replayed=True)
            else:
                self.reading = offset + 1

    def start_tail(self, after: Anchor, *, replayed: bool) -> None:
        if self.reads_log:
            assert self.session is not None
            self.session.tail_ended()
            return
        self.replayed = replayed
        self.tail = after.offset + 1

    @precondition(lambda self: self.tail is not None)
    @rule(steps=st.integers(1, 30))
    def read_tail(self, steps: int) -> None:
        """The tail read may be ahead of the live queues, or far behind them."""
        assert self.session is not None
        for _ in range(steps):
            if self.tail is None or self.tail >= len(self.log):
                return
            item = self.log[self.tail]
            if isinstance(item, Published) and item.audience in MINE and item.is_new and not self.is_new:
                self.session.unreadable(self.now_ms)
            elif isinstance(item, Published) and item.audience in MINE:
                self.session.offer_tail(event_of(item.number), self.now_ms, shared=item.audience != "user")
            self.tail += 1

    @precondition(lambda self: self.tail is not None)
    @rule()
    def end_tail(self) -> None:
        """A second later. If the log was not read up to the watermark, all live events arrive before this: later ones
        would be out of order."""
        assert self.session is not None
        while not self.replayed and (keys := self.waiting()):
            self.deliver_one(keys[0])
        self.tail = None
        self.session.tail_ended()

    @precondition(lambda self: self.bound)
    @rule()
    def write_watermark(self) -> None:
        assert self.session is not None
        self.now_ms += 1
        anchor = self.write_mark()
        self.anchors.append((anchor, self.count))
        # Events from before it that are still on their way are treated as later ones.
        self.may_repeat = self.may_repeat or any(self.queues.values())
        self.session.watermark(anchor, self.now_ms)

    @precondition(lambda self: bool(self.anchors))
    @rule()
    def prove_watermark(self) -> None:
        """The fences that were put into the queues after it have arrived, so everything published before it has too."""
        anchor, count = self.anchors.pop(0)
        if all(event.number > count for queue in self.queues.values() for event in queue):
            assert self.session is not None
            self.session.prove(anchor)

    @precondition(lambda self: self.bound)
    @rule()
    def lose_queues(self) -> None:
        assert self.session is not None
        self.bound = self.extending = False
        self.asked = self.tail = None
        self.queues = {}
        self.anchors = []
        self.reading = None
        self.session.lost()

    @rule()
    def heartbeat(self) -> None:
        assert self.session is not None
        self.session.heartbeat()
        self.session.send_position(self.now_ms)

    # The client.

    @rule()
    def write(self) -> None:
        assert self.session is not None
        while chunk := self.session.take():
            self.written.extend(self.decoder.feed(chunk))
        assert not self.decoder.empty_blocks

    @rule(count=st.integers(1, 20))
    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.written))):
            self.see(self.written.popleft())

    def see(self, frame: Frame) -> None:
        self.last_id = frame.id
        self.may_repeat = self.may_repeat or "~" in frame.id
        if frame.event == "bridge.ready":
            if self.since is None:
                self.since = int(frame.id.split(".")[1], 16) + 1
        elif frame.event == "bridge.gap":
            # Nothing here can make another gap: the log is never cut, and no cursor is bad.
            assert frame.json["reason"] == "not-readable"
            assert any(isinstance(item, Published) and item.is_new for item in self.log)
            self.state_at = self.count
        elif not frame.event.startswith("bridge."):
            self.got.append(number_of(frame.json))

    # The most important cases take several steps, which chance seldom puts in a row.

    @rule(count=st.integers(0, 3), later=st.integers(0, 3), delivered=st.booleans())
    def reconnect(self, count: int, later: int, delivered: bool) -> None:
        """Up to the read of the log. An event between the binding and the watermark arrives live and from the log."""
        self.cut()
        self.bind()
        self.publish_some(count, delivered)
        self.ask_for_watermark()
        self.publish_some(later, delivered)
        self.answer_watermark()

    def publish_some(self, count: int, delivered: bool) -> None:
        for number in range(count):
            publisher, audience = number % PUBLISHERS, MINE[number % 2]
            self.publish(publisher, audience)
            key = self.queue_of(publisher, audience)
            while delivered and key in self.waiting():
                self.deliver_one(key)
                self.write()

    @precondition(lambda self: self.bound)
    @rule(count=st.integers(1, 25))
    def burst(self, count: int) -> None:
        """Sometimes more events than a cursor can name."""
        self.publish_some(count, True)

    @rule(before=st.integers(1, 4), later=st.integers(1, 4), delivered=st.booleans())
    def fall_behind(self, before: int, later: int, delivered: bool) -> None:
        """More live events arrive during a replay than may be buffered, and more until the later watermark is known."""
        self.reconnect(0, 0, True)
        self.publish_some(MAX_EVENTS + before, True)
        self.read_until(lambda: self.extending)
        if self.extending:
            self.ask_for_watermark()
            self.publish_some(later, delivered)
            self.answer_later_watermark()

    def read_until(self, done: Callable[[], bool]) -> None:
        for _ in range(50):
            if done() or self.reading is None:
                return
            self.read_log(8)
            self.write()

    @precondition(lambda self: self.bound)
    @rule(before=st.integers(0, 20), behind=st.integers(0, 40))
    def watermark_under_load(self, before: int, behind: int) -> None:
        self.publish_some(before, True)
        self.anchors = []
        self.write_watermark()
        self.publish_some(behind, True)
        self.prove_watermark()

    @rule()
    def lose_and_bind_again(self) -> None:
        assert self.session is not None
        if self.bound and self.session.state is State.LIVE:
            self.lose_queues()
            self.publish(0, "user")
            self.bind()
            self.answer_watermark()

    @precondition(lambda self: self.count % 5 == 0)
    @rule()
    def cut(self) -> None:
        self.written.clear()
        self.bound = self.extending = False
        self.asked = self.tail = None
        self.queues = {}
        self.anchors = []
        self.reading = None
        self.open()

    @precondition(lambda self: self.session is not None and self.session.state is State.ENDED)
    @rule()
    def come_back(self) -> None:
        """Returns after `bridge.bye`, as after a cut. The client first reads what was written before it."""
        self.write()
        while self.written:
            self.see(self.written.popleft())
        self.cut()

    # What must hold.

    @invariant()
    def none_of_others_nothing_twice_in_order(self) -> None:
        events = {item.number: item for item in getattr(self, "log", []) if isinstance(item, Published)}
        got = getattr(self, "got", [])
        if not getattr(self, "may_repeat", False):
            assert len(set(got)) == len(got), "twice"
        got = list(dict.fromkeys(got))
        last: dict[tuple[int, str], int] = {}
        for number in got:
            event = events[number]
            assert event.audience in MINE
            if event.is_new:
                continue  # A newer replica may send it after later events; the page got a gap in time.
            key = (event.publisher, event.audience)
            assert last.get(key, 0) < number, "out of order"
            last[key] = number

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.deliver_everything()

    @rule()
    def deliver_everything(self) -> None:
        """Everything on its way arrives. Then nothing is missing."""
        for _ in range(400):
            assert self.session is not None
            if self.session.state is State.ENDED:
                self.come_back()
            elif not self.bound:
                self.bind()
            elif self.session.state in (State.OPENING, State.DETACHED):
                self.answer_watermark()
            elif self.extending:
                self.answer_later_watermark()
            elif self.reading is not None:
                self.read_log(50)
            elif keys := self.waiting():
                self.deliver_one(keys[0])
            self.write()
            self.read(len(self.written))
            if self.session.state is State.LIVE and not self.waiting():
                break
        assert self.session is not None
        assert self.session.state is State.LIVE
        assert self.since is not None
        expected = [item for item in self.log[self.since :] if isinstance(item, Published) and item.audience in MINE]
        first = {item.number for item in self.log[: self.since] if isinstance(item, Published)}
        numbers = {item.number for item in expected if not item.is_new}
        assert numbers - first <= set(self.got), "lost"
        self.session.heartbeat()
        self.write()
        self.read(len(self.written))
        hidden = {item.number for item in expected if item.is_new and item.number > self.state_at}
        assert hidden - first <= set(self.got), "hidden"
        self.none_of_others_nothing_twice_in_order()


def test_an_event_is_overtaken_when_the_cursor_drops_names() -> None:
    world = World()
    world.begin()
    world.fall_behind(before=1, later=1, delivered=False)
    world.write_watermark()
    world.prove_watermark()
    for publisher in (0, 0, 1):
        world.publish(publisher, "user")
    world.watermark_under_load(before=3, behind=3)  # The last of the three is still on its way.
    world.lose_queues()
    world.deliver_everything()


def test_an_event_of_the_tail_read_waits_for_live_events_from_before_the_watermark() -> None:
    world = World()
    world.begin()
    world.reconnect(count=1, later=1, delivered=False)
    world.read_tail(1)
    world.deliver_everything()


class CrossingWorld(World):
    """A queue for each publisher and audience: live order is any order."""

    repeats = True

    def queue_of(self, publisher: int, audience: str) -> Key:
        return publisher, audience


class RollingWorld(World):
    """Replicas of two versions. The newer one can read more types."""

    repeats = True

    @precondition(lambda self: self.count % 5 == 0)
    @rule()
    def roll(self) -> None:
        self.cut()
        self.is_new = not self.is_new

    @rule(publisher=st.integers(0, PUBLISHERS - 1), audience=st.sampled_from(AUDIENCES))
    def publish_new(self, publisher: int, audience: str) -> None:
        self.count += 1
        event = Published(self.count, publisher, audience, is_new=True)
        self.log.append(event)
        self.route(event)


class LogWorld(RollingWorld):
    """The feed `log`: its reader takes every entry in the log's order. No event comes twice, except a publisher's."""

    reads_log = True
    repeats = False

    @initialize()
    def begin(self) -> None:
        self.read_at = -1  # The last entry that the replica's reader has read.
        super().begin()

    def queue_of(self, publisher: int, audience: str) -> Key:
        return THE_LOG if self.reads_log else super().queue_of(publisher, audience)

    def route(self, event: Published) -> None:
        if not self.reads_log:
            super().route(event)

    def waiting(self) -> list[Key]:
        if not self.reads_log:
            return super().waiting()
        return [THE_LOG] if self.bound and self.read_at < len(self.log) - 1 else []

    def deliver_one(self, key: Key) -> None:
        if not self.reads_log:
            super().deliver_one(key)
            return
        assert self.session is not None
        self.read_at += 1
        item = self.log[self.read_at]
        if not isinstance(item, Published) or item.audience not in MINE:
            return
        if item.is_new and not self.is_new:
            self.session.unreadable(self.now_ms)
        else:
            event, anchor = event_of(item.number), Anchor(self.read_at, self.check(self.read_at))
            self.session.offer(event, self.now_ms, shared=item.audience != "user", anchor=anchor)

    @property
    def reached(self) -> Anchor | None:
        return Anchor(self.read_at, self.check(self.read_at)) if self.read_at >= 0 else None

    def find_position(self) -> Anchor:
        if not self.reads_log:
            return super().find_position()
        assert self.session is not None
        self.asked = None
        if self.last_id and not self.session.is_ready:
            # Another replica may be ahead of this one's reader.
            mark = self.write_mark()
            while self.read_at < mark.offset:
                self.deliver_one(THE_LOG)
        if self.reached is None:
            self.write_mark()
            self.deliver_one(THE_LOG)
        assert self.reached is not None
        return self.reached

    def take_reached(self) -> None:
        if self.reads_log and self.reached is not None:
            assert self.session is not None
            self.session.reached(self.reached)

    @rule()
    def heartbeat(self) -> None:
        self.take_reached()
        super().heartbeat()

    @precondition(lambda self: self.bound)
    @rule()
    def lose_queues(self) -> None:
        self.take_reached()
        super().lose_queues()

    @precondition(lambda self: bool(self.anchors) and not self.reads_log)
    @rule()
    def prove_watermark(self) -> None:
        if not self.reads_log:
            super().prove_watermark()

    @rule(publisher=st.integers(0, PUBLISHERS - 1))
    def publish_again(self, publisher: int) -> None:
        self.may_repeat = True  # A cursor has only the names of the last events.
        super().publish_again(publisher)


class MixedWorld(LogWorld):
    """A fleet of both feeds, as while an installation changes its feed."""

    repeats = True

    @precondition(lambda self: self.count % 5 == 0)
    @rule()
    def change_feed(self) -> None:
        self.cut()
        self.reads_log = not self.reads_log
        self.read_at = max(self.read_at, len(self.log) - 1)  # A replica's reader begins at the end of the log.


World.TestCase.settings = settings(max_examples=400, stateful_step_count=80)
TestWorld = World.TestCase
CrossingWorld.TestCase.settings = World.TestCase.settings
TestCrossingWorld = CrossingWorld.TestCase
RollingWorld.TestCase.settings = World.TestCase.settings
TestRollingWorld = RollingWorld.TestCase
LogWorld.TestCase.settings = World.TestCase.settings
TestLogWorld = LogWorld.TestCase
MixedWorld.TestCase.settings = World.TestCase.settings
TestMixedWorld = MixedWorld.TestCase
