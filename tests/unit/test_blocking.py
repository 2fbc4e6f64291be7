"""The thread of a blocking publisher: it starts once, ends with `close`, and no call waits forever.

Real brokers and forks are in tests/integration/test_blocking.py.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from bridge import Audience, BlockingPublisher, EventRefused, Publisher, PublishTimeout, blocking
from bridge.publisher import PublishError
from bridge.samples.jobs import JobCompleted
from bridge.testing import FakePublisher
from deploy.local.node import free_ports

DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)


def publisher(timeout: float = 0.05) -> BlockingPublisher:
    """A publisher to a port on which nothing listens."""
    (port,) = free_ports(1)
    return Publisher.blocking(f"amqp://127.0.0.1:{port}/", source="/t", timeout=timeout)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bridge-publisher"]


def test_it_connects_with_the_first_event_and_ends_its_thread_with_close() -> None:
    made = publisher()
    assert made._workers == {}
    with pytest.raises(PublishTimeout):
        made.to_user("42", DONE)
    (worker,) = made._workers.values()
    assert worker._thread in threads()
    made.close()
    assert not worker._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        made.to_user("42", DONE)
    made.close()


def test_after_close_it_may_be_opened_again() -> None:
    made = publisher()
    made.close()
    with pytest.raises(PublishTimeout):
        made.open()
    with pytest.raises(PublishTimeout):
        made.to_all(DONE)
    made.close()


def test_a_with_statement_that_cannot_connect_leaves_no_thread() -> None:
    made = publisher()
    with pytest.raises(PublishTimeout), made:
        raise AssertionError("not reached")
    assert made._workers == {}


def test_a_refused_event_starts_no_thread() -> None:
    made = publisher()
    with pytest.raises(EventRefused):
        made.to_group("", DONE)
    assert made._workers == {}


@pytest.mark.contract("4.9")
def test_a_thread_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "MARGIN_SECONDS", 0.01)
    made = publisher(timeout=0.01)
    worker = made._worker()
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        leave.wait()

    worker.loop.call_soon_threadsafe(hold)
    held.wait()
    try:
        with pytest.raises(PublishTimeout, match=r"did not answer within 0\.01 s"):
            made.to_user("42", DONE, id="e-1")
    finally:
        leave.set()
        made.close()


def test_a_thread_that_does_not_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking._Worker, "_run", lambda self: None)
    made = publisher(timeout=0.01)
    with pytest.raises(PublishTimeout, match=r"did not start within 0\.01 s"):
        made.to_user("42", DONE)
    for worker in made._workers.values():
        worker.loop.close()
    made._workers.clear()


def test_a_batch_that_fails_names_the_event() -> None:
    made = publisher()
    with pytest.raises(PublishError) as caught:
        made.publish_many([(Audience.user("42"), DONE), (Audience.everyone(), DONE)])
    assert (caught.value.confirmed, caught.value.index) == (0, 0)
    made.close()


@pytest.fixture
def fake() -> Any:
    """The real blocking publisher over a publisher that confirms without a broker."""
    made = publisher(timeout=60)
    made._make = lambda: FakePublisher(source="/t")
    made._writer = FakePublisher(source="/t")._writer
    yield made
    made.close()


def published(made: BlockingPublisher) -> list[str]:
    (worker,) = made._workers.values()
    fake: Any = worker.publisher
    return [event.id for event in fake.published]


def test_events_of_many_threads_are_confirmed(fake: BlockingPublisher) -> None:
    workers = [threading.Thread(target=lambda at=at: fake.to_user("42", DONE, id=f"e-{at}")) for at in range(8)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert sorted(published(fake)) == [f"e-{at}" for at in range(8)]
    assert len(fake._workers) == 1


def test_a_batch_may_publish_by_itself(fake: BlockingPublisher) -> None:
    def items() -> Any:
        for at in range(3):
            fake.to_all(DONE, id=f"own-{at}")
            yield Audience.user("42"), DONE, {"id": f"e-{at}"}

    assert fake.publish_many(items()) == 3
    assert {f"e-{at}" for at in range(3)} | {f"own-{at}" for at in range(3)} == set(published(fake))


def test_an_iterable_that_fails_loses_no_event_before_its_failure(fake: BlockingPublisher) -> None:
    def items() -> Any:
        yield Audience.user("42"), DONE, {"id": "e-1"}
        raise KeyError("of the caller")

    with pytest.raises(KeyError):
        fake.publish_many(items())
    assert published(fake) == ["e-1"]


def test_an_item_that_is_refused_ends_the_batch(fake: BlockingPublisher) -> None:
    bad: Any = [(Audience.user("42"), DONE), "nothing"]
    with pytest.raises(EventRefused, match="event 1: "):
        fake.publish_many(bad)
    assert len(published(fake)) == 1


def test_the_end_of_the_program_stops_the_thread(fake: BlockingPublisher) -> None:
    fake.to_user("42", DONE)
    (worker,) = fake._workers.values()
    fake._finalizer()
    assert worker._thread is not None
    assert not worker._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(_nothing())


async def _nothing() -> None: ...
