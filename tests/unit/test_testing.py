"""The fakes for users' tests behave as the real publishers do, without a broker."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol

import pytest

from bridge import (
    Audience,
    BlockingPublisher,
    EventData,
    EventRefused,
    ExchangeMissing,
    Publisher,
    PublishError,
    PublishForbidden,
    PublishTimeout,
)
from bridge.publisher import Item
from bridge.samples.jobs import JobCompleted, JobProgress
from bridge.sender import PIPELINE_EVENTS
from bridge.testing import FakeBlockingPublisher, FakePublisher
from tests.service import ROOT

DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)
USER = Audience.user("42")


class Fake(Protocol):
    """Both fakes, with one way to call them."""

    fake: FakePublisher | FakeBlockingPublisher

    async def call(self, name: str, *arguments: Any, **attributes: Any) -> Any: ...


class _Async:
    def __init__(self) -> None:
        self.fake = FakePublisher()

    async def call(self, name: str, *arguments: Any, **attributes: Any) -> Any:
        return await getattr(self.fake, name)(*arguments, **attributes)


class _Blocking:
    def __init__(self) -> None:
        self.fake = FakePublisher.blocking()

    async def call(self, name: str, *arguments: Any, **attributes: Any) -> Any:
        return getattr(self.fake, name)(*arguments, **attributes)


@pytest.fixture(params=[_Async, _Blocking], ids=["async", "blocking"])
async def made(request: pytest.FixtureRequest) -> AsyncIterator[Fake]:
    fake: Fake = request.param()
    yield fake
    await fake.call("close")


METHODS = ["__init__", "open", "close", "to_user", "to_group", "to_all", "publish", "publish_many"]


@pytest.mark.contract("4.17")
@pytest.mark.parametrize(
    ("real", "fake"),
    [(Publisher, FakePublisher), (BlockingPublisher, FakeBlockingPublisher)],
    ids=["async", "blocking"],
)
def test_the_methods_take_what_the_real_ones_take(real: type, fake: type) -> None:
    public = [name for name, _ in inspect.getmembers(real, callable) if not name.startswith("_")]
    assert set(METHODS) - {"__init__"} <= set(public)
    for name in [*public, "__enter__", "__exit__", "__aenter__", "__aexit__", "__init__"]:
        if not hasattr(real, name):
            continue
        one, other = inspect.signature(getattr(real, name)), inspect.signature(getattr(fake, name))
        assert [(parameter.name, parameter.kind, parameter.annotation) for parameter in one.parameters.values()] == [
            (parameter.name, parameter.kind, parameter.annotation) for parameter in other.parameters.values()
        ], name
        assert inspect.iscoroutinefunction(getattr(real, name)) == inspect.iscoroutinefunction(getattr(fake, name))
        for parameter in one.parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                assert other.parameters[parameter.name].default == parameter.default


def test_a_fake_may_be_passed_where_the_real_one_is_declared() -> None:
    assert isinstance(FakePublisher(), Publisher)
    assert isinstance(FakePublisher.blocking(), BlockingPublisher)


@pytest.mark.contract("4.17")
async def test_what_was_published_is_recorded(made: Fake) -> None:
    at = datetime(2026, 11, 26, 1, 2, 3, tzinfo=UTC)
    assert await made.call("to_user", 42, DONE, id="task:completed", time=at, subject="r-7") == "task:completed"
    second = await made.call("to_group", "ops", JobProgress(job_id="r-8", percent=5))
    third = await made.call("to_all", DONE)
    assert await made.call("publish", Audience.everyone(), DONE, id=uuid.UUID(int=7)) == str(uuid.UUID(int=7))
    one, two, *rest = made.fake.published
    assert (one.id, one.audience, one.type) == ("task:completed", USER, "job.completed")
    assert one.data is DONE
    assert one.attributes == {
        "specversion": "1.0",
        "id": "task:completed",
        "source": "/fake",
        "type": "job.completed",
        "time": "2026-11-26T01:02:03.000Z",
        "subject": "r-7",
    }
    assert one.event == {
        **one.attributes,
        "data": {"job_id": "r-7", "duration_seconds": 3.2, "result_url": None},
    }
    assert (two.id, two.audience, two.event["data"]["percent"]) == (second, Audience.group("ops"), 5)
    assert [event.id for event in rest] == [third, str(uuid.UUID(int=7))]


async def test_events_are_found_by_type_user_and_group(made: Fake) -> None:
    progress = JobProgress(job_id="r-7", percent=5)
    for name, arguments in [
        ("to_user", ("42", DONE)), ("to_user", (42, progress)), ("to_user", ("7", DONE)),
        ("to_group", ("42", DONE)), ("to_all", (DONE,)),
    ]:  # fmt: skip
        await made.call(name, *arguments)
    fake = made.fake

    def places(found: list[Any]) -> list[int]:
        return [fake.published.index(event) for event in found]

    assert places(fake.find()) == [0, 1, 2, 3, 4]
    assert places(fake.find(JobCompleted)) == places(fake.find("job.completed")) == [0, 2, 3, 4]
    assert places(fake.find(user=42)) == [0, 1]
    assert places(fake.find(JobProgress, user="42")) == [1]
    assert places(fake.find(group="42")) == [3]
    assert places(fake.find(user=7, group=42)) == [2, 3]
    assert places(fake.seen_by("42")) == [0, 1, 4]
    assert places(fake.seen_by(7, 42)) == [2, 3, 4]
    fake.clear()
    assert fake.published == []


@pytest.mark.contract("4.17")
async def test_the_same_id_twice_is_seen_once(made: Fake) -> None:
    await made.call("to_user", "42", DONE, id="one")
    await made.call("to_user", "42", JobCompleted(job_id="other", duration_seconds=1), id="one")
    await made.call("to_all", DONE, id="one")
    assert [(event.audience, event.data) for event in made.fake.published] == [
        (USER, DONE),
        (Audience.everyone(), DONE),
    ]
    assert [event.event["data"]["job_id"] for event in made.fake.repeats] == ["other"]
    assert len(made.fake.seen_by("42")) == 1, "a stream shows an id once, for any audience"
    made.fake.clear()
    assert made.fake.repeats == []
    await made.call("to_user", "42", DONE, id="one")
    assert len(made.fake.published) == 1


@pytest.mark.contract("4.17")
async def test_the_same_id_of_two_sources_is_two_events(made: Fake) -> None:
    for source in ("/workers/a", "/workers/b"):
        await made.call("to_user", "42", DONE, id="1", source=source)
    assert [event.event["source"] for event in made.fake.published] == ["/workers/a", "/workers/b"]
    assert (made.fake.repeats, len(made.fake.seen_by("42"))) == ([], 2)


class Wide(JobCompleted):
    more: str = "than the bridge knows"


REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("to_user", ("", DONE), {}),
    ("to_user", (None, DONE), {}),
    ("to_user", ("42", Wide(job_id="r-7", duration_seconds=1)), {}),
    ("to_user", ("42", JobCompleted.model_construct(job_id="r-7", duration_seconds=-1.0)), {}),
    ("to_user", ("42", {"job_id": "r-7"}), {}),
    ("to_user", ("42", DONE), {"type": "other"}),
    ("to_user", ("42", DONE), {"id": "no good"}),
    ("to_user", ("42", DONE), {"time": datetime(2026, 11, 26)}),
    ("publish", ("user:42", DONE), {}),
    ("to_all", (JobCompleted.model_construct(job_id="x" * 70_000, duration_seconds=1),), {}),
]


@pytest.mark.contract("4.17")
@pytest.mark.parametrize(("name", "arguments", "attributes"), REFUSED)
async def test_it_refuses_what_the_real_one_refuses_in_the_same_words(
    made: Fake, name: str, arguments: tuple[Any, ...], attributes: dict[str, Any]
) -> None:
    real = Publisher("amqp://127.0.0.1:9/", source="/fake")
    with pytest.raises(EventRefused) as expected:
        await getattr(real, name)(*arguments, **attributes)
    with pytest.raises(EventRefused) as caught:
        await made.call(name, *arguments, **attributes)
    assert str(caught.value) == str(expected.value)
    assert made.fake.published == []


@pytest.mark.contract("4.17")
@pytest.mark.parametrize("kind", [PublishTimeout, PublishForbidden, ExchangeMissing])
async def test_the_next_publish_raises(made: Fake, kind: type[PublishError]) -> None:
    made.fake.fail_next(kind, times=2)
    for _ in range(2):
        with pytest.raises(kind, match="fail_next") as caught:
            await made.call("to_user", "42", DONE, id="one")
        assert caught.value.id == "one"
    assert made.fake.published == []
    assert await made.call("to_user", "42", DONE, id="one") == "one"
    assert [event.id for event in made.fake.published] == ["one"]


async def test_a_timeout_has_the_id_to_publish_again_with(made: Fake) -> None:
    made.fake.fail_next(arrived=True)
    with pytest.raises(PublishTimeout) as caught:
        await made.call("to_user", "42", DONE)
    assert len(caught.value.id) == 36
    await made.call("to_user", "42", DONE, id=caught.value.id)
    assert [event.id for event in made.fake.published] == [caught.value.id], "pages see it once"
    assert len(made.fake.repeats) == 1


async def test_failures_are_raised_in_the_order_of_the_calls_and_can_be_cleared(made: Fake) -> None:
    made.fake.fail_next(after=1)
    made.fake.fail_next(PublishForbidden, after=1)
    outcomes: list[str] = []
    for _ in range(5):
        try:
            await made.call("to_all", DONE)
            outcomes.append("")
        except PublishError as error:
            outcomes.append(type(error).__name__)
    assert outcomes == ["", "PublishTimeout", "", "PublishForbidden", ""]
    made.fake.fail_next()
    made.fake.clear()
    await made.call("to_all", DONE)


@pytest.mark.parametrize(
    ("arguments", "attributes", "words"),
    [
        ((EventRefused,), {}, "fail_next cannot raise EventRefused"),
        ((ValueError,), {}, "PublishTimeout, PublishForbidden, ExchangeMissing"),
        ((), {"after": -1}, "after=-1"),
        ((), {"times": 0}, "times=0"),
        ((PublishForbidden,), {"arrived": True}, "RabbitMQ refused the event"),
    ],
)
def test_a_failure_that_cannot_happen_is_refused(arguments: Any, attributes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FakePublisher().fail_next(*arguments, **attributes)


# publish_many


def items(count: int, *, start: int = 0) -> Iterator[Item]:
    for number in range(start, start + count):
        yield USER, JobProgress(job_id=str(number), percent=1), {"id": f"e-{number}"}


def ids(made: Fake) -> list[str]:
    return [event.id for event in made.fake.published]


async def test_many_are_recorded_in_order(made: Fake) -> None:
    assert await made.call("publish_many", items(600)) == 600
    assert ids(made) == [f"e-{number}" for number in range(600)]


async def test_an_asynchronous_iterable_is_accepted() -> None:
    async def some() -> AsyncIterator[Item]:
        for item in items(3):
            yield item

    async with FakePublisher() as fake:
        assert await fake.publish_many(some()) == 3
    assert len(fake.published) == 3


@pytest.mark.parametrize("arrived", [False, True])
async def test_a_batch_that_fails_says_which_events_are_confirmed(made: Fake, arrived: bool) -> None:
    made.fake.fail_next(PublishTimeout, after=100, arrived=arrived)
    with pytest.raises(PublishTimeout, match=r"event 100 .*id e-100\).*\[100 before it are confirmed\]") as caught:
        await made.call("publish_many", items(600))
    error = caught.value
    assert (error.index, error.confirmed, error.id) == (100, 100, "e-100")
    assert error.unconfirmed == {number: f"e-{number}" for number in range(100, 100 + PIPELINE_EVENTS)}
    assert ids(made) == [f"e-{number}" for number in range(100 + (PIPELINE_EVENTS if arrived else 0))]
    await made.call("publish_many", items(600 - 100, start=100))
    assert ids(made) == [f"e-{number}" for number in range(600)]
    assert len(made.fake.repeats) == (PIPELINE_EVENTS if arrived else 0)


async def test_a_short_batch_fails_at_its_end(made: Fake) -> None:
    made.fake.fail_next(PublishForbidden, after=1)
    with pytest.raises(PublishForbidden, match="ACCESS_REFUSED") as caught:
        await made.call("publish_many", items(3))
    assert (caught.value.index, caught.value.confirmed) == (1, 1)
    assert caught.value.unconfirmed == {1: "e-1", 2: "e-2"}


async def test_a_bad_event_leaves_all_before_it_confirmed(made: Fake) -> None:
    def bad() -> Iterator[Any]:
        yield from items(3)
        yield Audience.user(""), DONE

    with pytest.raises(EventRefused, match=r"event 3: .*\[3 before it are confirmed\]") as caught:
        await made.call("publish_many", bad())
    assert (caught.value.index, caught.value.confirmed) == (3, 3)
    assert len(ids(made)) == 3


async def test_an_error_of_the_iterable_says_how_many_events_are_confirmed(made: Fake) -> None:
    def broken() -> Iterator[Item]:
        yield from items(3)
        raise LookupError("the database went away")

    with pytest.raises(LookupError) as caught:
        await made.call("publish_many", broken())
    assert caught.value.confirmed == 3  # type: ignore[attr-defined]
    assert caught.value.__notes__ == ["publish_many: 3 events are confirmed"]


# Open and close, event loops and threads, as with the real publishers


async def test_it_opens_and_closes(made: Fake) -> None:
    await made.call("open")
    await made.call("to_all", DONE)
    await made.call("close")
    with pytest.raises(RuntimeError, match=r"closed: call open\(\)"):
        await made.call("to_all", DONE)
    await made.call("open")
    await made.call("to_all", DONE)
    assert len(made.fake.published) == 2


def test_it_is_a_context_manager() -> None:
    async def use() -> FakePublisher:
        async with FakePublisher() as fake:
            await fake.to_all(DONE)
        return fake

    assert len(asyncio.run(use()).published) == 1
    with FakePublisher.blocking() as blocking:
        blocking.to_all(DONE)
    assert len(blocking.published) == 1


def test_another_event_loop_is_refused() -> None:
    fake = FakePublisher()

    def run(make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        asyncio.run(make())

    run(lambda: fake.to_all(DONE))
    with pytest.raises(RuntimeError, match="another event loop"):
        run(lambda: fake.to_all(DONE))


def test_threads_share_one_fake_and_an_iterable_runs_in_the_callers_thread() -> None:
    threads = set()

    def some() -> Iterator[Item]:
        threads.add(threading.current_thread())
        yield from items(3)

    with FakePublisher.blocking() as fake:
        others = [threading.Thread(target=fake.to_user, args=("42", DONE)) for _ in range(8)]
        for thread in others:
            thread.start()
        fake.publish_many(some())
        for thread in others:
            thread.join()
        assert len(fake.published) == 11
    assert threads == {threading.current_thread()}


def test_bad_arguments_raise_as_with_the_real_one() -> None:
    for make in (FakePublisher, FakePublisher.blocking):
        with pytest.raises(ValueError, match="source"):
            make(source="")
        with pytest.raises(ValueError, match="http"):
            make("http://example.com")


# Imports of a program's tests


@pytest.mark.contract("4.18")
def test_the_fakes_do_not_import_pytest_and_pytest_does_not_load_the_fixtures_unasked() -> None:
    code = "import sys, bridge.testing; sys.exit('pytest' in sys.modules or 'quart' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert "bridge.pytest_plugin" not in sys.modules
    assert list(importlib.metadata.distribution("rabbitmq-sse-bridge").entry_points.select(group="pytest11")) == []


class Unsent(EventData, type="unsent"):
    number: int


async def test_an_event_type_of_the_users_own_needs_no_catalogue(made: Fake) -> None:
    await made.call("to_user", "42", Unsent(number=1))
    assert made.fake.find(Unsent)[0].event["data"] == {"number": 1}
