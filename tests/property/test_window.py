"""Many messages go through a broker that loses connections and nacks: what a reader sees, and in which order."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pamqp.commands import Basic

from bridge.sender import Message, Window, WindowEntry

SIZE = 5


def message(number: int) -> Message:
    return Message(str(number), b"", "events", "all.x", Basic.Properties())


class Batch(RuleBasedStateMachine):
    """The window's caller, a broker that reads a connection in order, and a reader that drops repeated ids."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window(SIZE)
        self.in_flight: list[WindowEntry] = []
        self.arrived: list[int] = []
        """In the order of arrival, with repeats."""
        self.certain: set[int] = set()
        self.nacked = False

    @precondition(lambda self: not self.window.is_full)
    @rule()
    def add(self) -> None:
        self.window.add(message(self.window.added), 0.0)

    @rule()
    def send(self) -> None:
        taken = self.window.take_unsent()
        assert not self.in_flight or not taken or taken[0].index > self.in_flight[-1].index or self.nacked
        self.in_flight += taken

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        """The broker takes a prefix of what is on its way, and the confirms of it come in any order."""
        count = data.draw(st.integers(1, len(self.in_flight)))
        taken, self.in_flight = self.in_flight[:count], self.in_flight[count:]
        self.arrived += [entry.index for entry in taken]
        for entry in data.draw(st.permutations(taken)):
            self.window.confirm(entry)
            self.certain.add(entry.index)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """The connection breaks: the broker has a prefix of what was on its way, and no confirm comes."""
        count = data.draw(st.integers(0, len(self.in_flight)))
        self.arrived += [entry.index for entry in self.in_flight[:count]]
        self.in_flight = []
        self.window.go_back()

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def nack(self, data: st.DataObject) -> None:
        """One is nacked, and all others that were on their way are confirmed."""
        lost = data.draw(st.sampled_from(self.in_flight))
        for entry in self.in_flight:
            if entry is not lost:
                self.arrived.append(entry.index)
                self.window.confirm(entry)
                self.certain.add(entry.index)
        self.in_flight = []
        self.nacked = True
        self.window.go_back()

    @invariant()
    def all_before_the_head_are_confirmed(self) -> None:
        window = self.window
        assert set(range(window.confirmed)) <= self.certain
        assert window.confirmed + len(window) == window.added
        assert [entry.index for entry in window.unconfirmed] == sorted(set(range(window.added)) - self.certain)
        assert len(window) <= SIZE

    @invariant()
    def a_reader_sees_the_order_of_the_calls(self) -> None:
        if not self.nacked:
            seen = list(dict.fromkeys(self.arrived))
            assert seen == list(range(len(seen)))

    def teardown(self) -> None:
        # The broker works again: everything arrives.
        self.window.go_back()
        for entry in self.window.take_unsent():
            self.arrived.append(entry.index)
            self.window.confirm(entry)
        assert set(self.arrived) >= set(range(self.window.added))
        assert (len(self.window), self.window.confirmed) == (0, self.window.added)


TestBatch = Batch.TestCase
TestBatch.settings = settings(max_examples=200, stateful_step_count=40)
