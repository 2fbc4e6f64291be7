"""A count and a sum show which entries of the log a client was sent."""

from __future__ import annotations

import pytest

from bridge.service.streams.cursor import NONE, VALUE_MASK, BySource, Unnamed
from bridge.service.streams.progress import Entry
from bridge.service.streams.recall import RECALL_EVENTS, Recall
from tests.events import make_event


def entry(number: int, *, shared: bool = False) -> Entry:
    return Entry(number, "abcdef", make_event(number), shared)


def total(*numbers: int) -> int:
    return sum(make_event(number).value for number in numbers) & VALUE_MASK


def sent(*numbers: int) -> BySource:
    return (Unnamed(len(numbers), total(*numbers)), NONE)


def seen(unnamed: BySource, *numbers: int, named: tuple[int, ...] = ()) -> tuple[Recall, list[int]]:
    """Also returns the numbers of the entries that are known as sent."""
    recall = Recall(unnamed)
    for number in numbers:
        recall.see(entry(number), named=number in named)
    return recall, [each.offset for each in recall.entries if recall.was_sent(each)]


@pytest.mark.contract("5.50", "5.53")
@pytest.mark.parametrize(
    ("were_sent", "in_log", "found"),
    [
        ((1, 2, 3), (1, 2, 3, 4, 5), [1, 2, 3]),
        ((1, 3, 4), (1, 2, 3, 4, 5), [1, 3, 4]),  # One of the log was not sent.
        ((1, 4), (1, 2, 3, 4), [1, 4]),  # Two were not.
        ((1, 5), (1, 2, 3, 4, 5), []),  # Three were not: no entry counts as sent.
        ((1, 2), (1, 1, 2), [1, 1, 2]),  # A publisher's retry counts once.
        ((1, 3, 4), (1, 2, 3, 4), [1, 3, 4]),  # One was not: the last entry shows which.
        ((1, 2), (7, 8, 9, 10), []),  # None of them is in the log.
    ],
)
def test_sent_entries_are_found(were_sent: tuple[int, ...], in_log: tuple[int, ...], found: list[int]) -> None:
    recall, were = seen(sent(*were_sent), *in_log)
    assert recall.is_over
    assert were == found


def test_named_entries_are_not_counted() -> None:
    recall, were = seen(sent(2, 3), 1, 2, 3, named=(1,))
    assert recall.is_over
    assert were == [2, 3]


def test_each_queue_has_its_own_count() -> None:
    recall = Recall((Unnamed(1, total(1)), Unnamed(1, total(2))))
    recall.see(entry(1), named=False)
    assert (recall.is_over, recall.is_sent) == (False, [True, None])
    recall.see(entry(2, shared=True), named=False)
    assert recall.is_over
    assert all(map(recall.was_sent, recall.entries))
    assert not recall.was_sent(entry(2)), "by the other queue"


def test_entries_after_the_last_sent_one_are_unsent_while_the_other_queue_is_searched() -> None:
    recall = Recall((Unnamed(1, total(1)), Unnamed(1, total(9))))
    for number in (1, 2, 3, 4, 9):
        recall.see(entry(number, shared=number == 9), named=False)
    assert recall.is_over
    assert [each.offset for each in recall.entries if recall.was_sent(each)] == [1, 9]


def test_a_recall_is_open_until_it_has_seen_enough_entries() -> None:
    recall, were = seen(sent(1, 2, 3), 1, 2)
    assert (recall.is_over, were) == (False, [])
    recall.give_up()
    assert recall.is_over
    assert not any(map(recall.was_sent, recall.entries))


def test_a_recall_stays_open_while_entries_are_missing_even_if_the_sum_fits() -> None:
    """Any client may send a count that fits no sum."""
    recall, were = seen((Unnamed(3, 0), NONE), 1, 2)
    assert (recall.is_over, were) == (False, [])


def test_nothing_to_find() -> None:
    assert Recall((NONE, NONE)).is_over
    unknown = Recall((None, NONE))
    assert (unknown.is_over, unknown.is_sent) == (True, [False, True])


def test_a_count_beyond_the_bound_is_not_looked_for() -> None:
    assert Recall((Unnamed(RECALL_EVENTS, 1), NONE)).is_sent[0] is None
    assert Recall((Unnamed(RECALL_EVENTS + 1, 1), NONE)).is_sent[0] is False


def test_the_bytes_that_wait_are_counted() -> None:
    recall, _ = seen(sent(1, 2), 1, 2)
    assert recall.size == sum(len(each.event.named) for each in recall.entries)
