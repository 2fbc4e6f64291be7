"""A batch with failures of every kind: what is confirmed, what the error says, and the order that a page sees."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator

import aio_pika
import pytest

from bridge import Audience, EventRefused, Publisher, PublishError, PublishForbidden, PublishTimeout
from bridge.publisher import Item
from bridge.samples.jobs import JobCompleted, JobProgress
from bridge.sender import PIPELINE_EVENTS
from deploy.local.node import Node
from tests.proxy import Proxy
from tests.rabbit import Vhost

USER = Audience.user("42")


def event(number: int) -> JobProgress:
    return JobProgress(job_id=str(number), percent=1)


def items(count: int, *, start: int = 0) -> Iterator[Item]:
    for number in range(start, start + count):
        yield USER, event(number), {"id": f"e-{number}"}


async def arrived(queue: aio_pika.abc.AbstractQueue) -> list[int]:
    """The numbers of the events in the queue, with repeats."""
    found = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        found.append(int(json.loads(message.body)["data"]["job_id"]))
    return found


@pytest.mark.contract("4.14")
async def test_a_bad_event_leaves_all_before_it_confirmed(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    def bad() -> Iterator[Item]:
        yield from items(100)
        yield Audience.user(""), event(100), {"id": "e-100"}
        yield from items(99, start=101)

    async with Publisher(vhost.url, source="/t") as publisher:
        with pytest.raises(EventRefused, match=r"event 100: .*empty.*\[100 before it are confirmed\]") as caught:
            await publisher.publish_many(bad())
    assert (caught.value.confirmed, caught.value.index) == (100, 100)
    assert caught.value.unconfirmed == {}
    assert await arrived(queue) == list(range(100))


@pytest.mark.contract("4.15")
async def test_an_iterable_that_raises_leaves_all_before_it_confirmed(
    vhost: Vhost, queue: aio_pika.abc.AbstractQueue
) -> None:
    async def broken() -> AsyncIterator[Item]:
        for item in items(100):
            yield item
        raise LookupError("the database went away")

    async with Publisher(vhost.url, source="/t") as publisher:
        with pytest.raises(LookupError, match="database") as caught:
            await publisher.publish_many(broken())
    assert caught.value.confirmed == 100  # type: ignore[attr-defined]
    assert caught.value.__notes__ == ["publish_many: 100 events are confirmed"]
    assert await arrived(queue) == list(range(100))


@pytest.mark.contract("4.15")
async def test_a_cancelled_batch_says_what_is_confirmed(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    reached = asyncio.Event()

    async def endless() -> AsyncIterator[Item]:
        for item in items(100):
            yield item
        reached.set()
        await asyncio.Event().wait()

    async with Publisher(vhost.url, source="/t") as publisher:
        task = asyncio.create_task(publisher.publish_many(endless()))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert caught.value.__notes__ == ["publish_many: 100 events are confirmed"]
        assert await publisher.to_user("42", event(100)), "the publisher still works"
    assert await arrived(queue) == list(range(101))


@pytest.mark.contract("4.14")
async def test_a_batch_that_times_out_can_continue_where_it_stopped(
    vhost: Vhost, proxy: Proxy, queue: aio_pika.abc.AbstractQueue
) -> None:
    async def cut_off() -> AsyncIterator[Item]:
        for number, item in enumerate(items(2_000)):
            if number == 1_000:
                await proxy.refuse()
                proxy.cut()
            yield item

    async with Publisher(vhost.url_at(proxy.port), source="/t", timeout=5) as publisher:
        with pytest.raises(PublishTimeout, match=r"event \d+ .* id e-\d+") as caught:
            await publisher.publish_many(cut_off())
        error = caught.value
        assert error.confirmed == error.index
        assert error.confirmed is not None
        assert error.id == f"e-{error.index}"
        assert 1_000 - PIPELINE_EVENTS <= error.confirmed <= 1_000
        assert error.unconfirmed[error.index] == error.id  # type: ignore[index]
        assert all(identity == f"e-{index}" for index, identity in error.unconfirmed.items())
        before = await arrived(queue)
        assert set(before) >= set(range(error.confirmed)), "an event that is reported as confirmed is missing"
        await proxy.open()
        assert await publisher.publish_many(items(2_000 - error.confirmed, start=error.confirmed)) == (
            2_000 - error.confirmed
        )
    seen = list(dict.fromkeys(before + await arrived(queue)))
    assert seen == list(range(2_000))


@pytest.mark.contract("4.13")
async def test_the_order_is_kept_over_lost_connections(
    vhost: Vhost, proxy: Proxy, queue: aio_pika.abc.AbstractQueue
) -> None:
    async def through_cuts() -> AsyncIterator[Item]:
        for number, item in enumerate(items(3_000)):
            if number % 500 == 499:
                proxy.cut()
            yield item

    async with Publisher(vhost.url_at(proxy.port), source="/t") as publisher:
        assert await publisher.publish_many(through_cuts()) == 3_000
    numbers = await arrived(queue)
    assert proxy.accepted >= 6
    assert list(dict.fromkeys(numbers)) == list(range(3_000)), "a reader that drops repeats sees the order"


@pytest.mark.contract("4.14")
async def test_a_forbidden_event_is_found_among_unconfirmed_ones(
    vhost: Vhost, node: Node, queue: aio_pika.abc.AbstractQueue
) -> None:
    vhost.add_user("batch-test")
    try:
        vhost.grant("batch-test", configure="", write="events", read="")
        node.ctl("set_topic_permissions", "-p", vhost.name, "batch-test", "events", r"^user\..*\.job\.progress$", "")

        def with_one_forbidden() -> Iterator[Item]:
            yield from items(100)
            yield USER, JobCompleted(job_id="100", duration_seconds=1), {"id": "e-100"}
            yield from items(400, start=101)

        url = vhost.url_at(node.port, user="batch-test", password="secret-batch-test")
        async with Publisher(url, source="/t") as publisher:
            with pytest.raises(PublishForbidden, match=r"event 100 .*ACCESS_REFUSED") as caught:
                await publisher.publish_many(with_one_forbidden())
        assert (caught.value.confirmed, caught.value.index, caught.value.id) == (100, 100, "e-100")
        assert list(dict.fromkeys(await arrived(queue)))[:100] == list(range(100))
    finally:
        vhost.delete_user("batch-test")


# The blocking form


@pytest.mark.contract("4.10")
def test_the_iterable_runs_in_the_callers_thread(vhost: Vhost) -> None:
    vhost.add_everything()
    rows = sqlite3.connect(":memory:")  # SQLite's cursors refuse any other thread.
    rows.execute("create table job (id)")
    rows.executemany("insert into job values (?)", [(number,) for number in range(300)])
    threads = set()

    def from_rows() -> Iterator[Item]:
        for (number,) in rows.execute("select id from job order by id"):
            threads.add(threading.current_thread())
            yield USER, event(number)

    with Publisher.blocking(vhost.url, source="/t") as publisher:
        assert publisher.publish_many(from_rows()) == 300
    assert threads == {threading.current_thread()}
    rows.close()


def test_a_generator_may_also_publish(vhost: Vhost) -> None:
    vhost.add_everything()
    with Publisher.blocking(vhost.url, source="/t") as publisher:

        def generator() -> Iterator[Item]:
            for number in range(2 * PIPELINE_EVENTS):
                if number % 100 == 0:
                    publisher.to_user("42", event(number))
                yield USER, event(number)

        assert publisher.publish_many(generator()) == 2 * PIPELINE_EVENTS


async def test_a_slow_iterable_does_not_delay_earlier_events(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    """Each event is sent when the iterable gives it, not when a number of them is complete."""
    loop = asyncio.get_running_loop()
    came = threading.Event()

    async def first() -> None:
        async with queue.iterator(no_ack=True) as messages:
            await anext(messages)
        came.set()

    def generator() -> Iterator[Item]:
        yield USER, event(0)
        assert came.wait(60), "the first must arrive before the second is made"
        yield USER, event(1)

    def publish() -> int:
        with Publisher.blocking(vhost.url, source="/t") as publisher:
            return publisher.publish_many(generator())

    reading = loop.create_task(first())
    assert await asyncio.to_thread(publish) == 2
    await reading


def test_failures_in_the_blocking_form(vhost: Vhost) -> None:
    vhost.add_everything()

    def bad() -> Iterator[Item]:
        yield from items(100)
        yield USER, "no event"  # type: ignore[misc]

    def broken() -> Iterator[Item]:
        yield from items(100)
        raise LookupError("the database went away")

    with Publisher.blocking(vhost.url, source="/t") as publisher:
        with pytest.raises(EventRefused, match="event 100: str is not an event") as refused:
            publisher.publish_many(bad())
        assert (refused.value.confirmed, refused.value.index) == (100, 100)
        with pytest.raises(LookupError) as caught:
            publisher.publish_many(broken())
        assert caught.value.confirmed == 100  # type: ignore[attr-defined]


async def test_a_timeout_in_the_blocking_form(vhost: Vhost, proxy: Proxy, queue: aio_pika.abc.AbstractQueue) -> None:
    loop = asyncio.get_running_loop()

    async def away() -> None:
        await proxy.refuse()
        proxy.cut()

    def cut_off() -> Iterator[Item]:
        for number, item in enumerate(items(1_000)):
            if number == 500:
                asyncio.run_coroutine_threadsafe(away(), loop).result()
            yield item

    def publish() -> PublishError:
        with Publisher.blocking(vhost.url_at(proxy.port), source="/t", timeout=5) as publisher:
            with pytest.raises(PublishTimeout) as caught:
                publisher.publish_many(cut_off())
            return caught.value

    error = await asyncio.to_thread(publish)
    assert error.confirmed is not None
    assert error.confirmed == error.index
    assert error.id == f"e-{error.index}"
    assert set(await arrived(queue)) >= set(range(error.confirmed))


class Ours(PublishTimeout):
    """An exception class of the caller, with another constructor."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


async def test_what_the_iterable_raises_is_raised_as_it_is(vhost: Vhost, queue: aio_pika.abc.AbstractQueue) -> None:
    async with Publisher(vhost.url, source="/t") as publisher:

        async def nested() -> AsyncIterator[Item]:
            for item in items(5):
                yield item
            await publisher.publish_many([(Audience.user(""), event(0))])

        def own() -> Iterator[Item]:
            yield from items(3)
            raise Ours(1, 2) from KeyError("why")

        with pytest.raises(EventRefused, match=r"event 0: .*\[0 before it are confirmed\]") as inner:
            await publisher.publish_many(nested())
        assert inner.value.confirmed == 5
        with pytest.raises(Ours, match="1 and 2") as caught:
            await publisher.publish_many(own())
        assert (caught.value.confirmed, repr(caught.value.__cause__)) == (3, "KeyError('why')")


def test_a_signal_handler_may_publish(vhost: Vhost) -> None:
    vhost.add_everything()
    came = []
    with Publisher.blocking(vhost.url, source="/t") as publisher:

        def on_signal(*_: object) -> None:
            came.append(publisher.to_user("42", event(0)))

        before = signal.signal(signal.SIGUSR1, on_signal)
        try:
            for _ in range(100):  # At any point of a running call.
                timer = threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGUSR1))
                timer.start()
                publisher.to_user("42", event(1))
                timer.join()
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert came
