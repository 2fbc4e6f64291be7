"""The active OpenTelemetry span of a publisher is the parent in the event that a page gets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags, TraceState, use_span

from bridge import Audience, Publisher
from bridge.publisher import Item
from bridge.samples.jobs import JobCompleted, JobProgress
from tests.client import Stream
from tests.conftest import OpenStream
from tests.rabbit import Vhost
from tests.service import Service

pytestmark = pytest.mark.any_rabbitmq

TRACER = TracerProvider().get_tracer("tests")
DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)
USER = Audience.user("42")
OTHER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def parent(span: Span) -> str:
    """As in W3C Trace Context, section 3.2. OpenTelemetry sets the flag for random ids too."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


@pytest.fixture
async def stream(service: Service, connect: OpenStream) -> Stream:
    return await connect(service, "42")


async def parents(stream: Stream, count: int) -> list[str | None]:
    return [(await stream.next_event()).get("traceparent") for _ in range(count)]


@pytest.mark.contract("4.7")
async def test_the_async_publisher_names_the_active_span(vhost: Vhost, stream: Stream) -> None:
    async with Publisher(vhost.url, source="/t") as publisher:
        await publisher.to_user("42", DONE)
        with TRACER.start_as_current_span("outer") as outer:
            await publisher.to_user("42", DONE)
            with TRACER.start_as_current_span("inner") as inner:
                await publisher.to_user("42", DONE)
                await publisher.to_user("42", DONE, traceparent=OTHER)
                await publisher.to_user("42", DONE, traceparent=None)
        await publisher.to_user("42", DONE)
    expected = [None, parent(outer), parent(inner), OTHER, parent(inner), None]
    assert await parents(stream, 6) == expected


async def test_tasks_have_spans_of_their_own(vhost: Vhost, stream: Stream) -> None:
    spans = {}

    async def publish(publisher: Publisher, number: int) -> None:
        with TRACER.start_as_current_span("task") as span:
            spans[str(number)] = parent(span)
            await asyncio.sleep(0)
            await publisher.to_user("42", JobProgress(job_id=str(number), percent=1))

    async with Publisher(vhost.url, source="/t") as publisher:
        await asyncio.gather(*(publish(publisher, number) for number in range(20)))
    events = [await stream.next_event() for _ in range(20)]
    assert {event["data"]["job_id"]: event["traceparent"] for event in events} == spans


@pytest.mark.contract("4.7")
async def test_the_blocking_publisher_names_the_span_of_the_calling_thread(vhost: Vhost, stream: Stream) -> None:
    publisher = Publisher.blocking(vhost.url, source="/t")
    spans: dict[str, str] = {}
    together = threading.Barrier(3)

    def publish(name: str) -> None:
        if name == "none":
            together.wait()
            publisher.to_user("42", JobProgress(job_id=name, percent=1))
            return
        with TRACER.start_as_current_span(name) as span:
            spans[name] = parent(span)
            together.wait()
            publisher.to_user("42", JobProgress(job_id=name, percent=1))

    # The publisher's own thread starts under a span, which later events must not get.
    with TRACER.start_as_current_span("first") as first:
        await asyncio.to_thread(publisher.to_user, "42", DONE)
    assert await parents(stream, 1) == [parent(first)]
    await asyncio.gather(*(asyncio.to_thread(publish, name) for name in ("one", "two", "none")))
    events = [await stream.next_event() for _ in range(3)]
    await asyncio.to_thread(publisher.close)
    assert {event["data"]["job_id"]: event.get("traceparent") for event in events} == {**spans, "none": None}


def blocking(url: str, make: Callable[[], Iterator[Item]]) -> None:
    with Publisher.blocking(url, source="/t") as publisher, TRACER.start_as_current_span("batch"):
        publisher.publish_many(make())


async def not_blocking(url: str, make: Callable[[], Iterator[Item]]) -> None:
    async def each() -> AsyncIterator[Item]:
        for item in make():
            yield item

    async with Publisher(url, source="/t") as publisher:
        with TRACER.start_as_current_span("batch"):
            await publisher.publish_many(each())


@pytest.mark.parametrize("form", ["async", "blocking"])
async def test_each_event_of_a_batch_names_the_span_that_is_active_when_it_is_read(
    vhost: Vhost, stream: Stream, form: str
) -> None:
    expected = []

    def items() -> Iterator[Item]:
        from opentelemetry.trace import get_current_span

        expected.append(parent(get_current_span()))
        yield USER, DONE
        expected.append(OTHER)
        yield USER, DONE, {"traceparent": OTHER}
        for _ in range(2):
            with TRACER.start_as_current_span("item") as span:
                expected.append(parent(span))
                yield USER, DONE

    if form == "async":
        await not_blocking(vhost.url, items)
    else:
        await asyncio.to_thread(blocking, vhost.url, items)
    assert await parents(stream, 4) == expected
    assert len(set(expected)) == 4


async def test_the_trace_state_is_sent_only_with_its_own_parent(vhost: Vhost, stream: Stream) -> None:
    context = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1), trace_state=TraceState([("vendor", "1")]))
    async with Publisher(vhost.url, source="/t") as publisher:
        with use_span(NonRecordingSpan(context)):
            await publisher.to_user("42", DONE)
            await publisher.to_user("42", DONE, traceparent=OTHER)
            await publisher.to_user("42", DONE, traceparent=OTHER, tracestate="other=2")
    events: list[dict[str, Any]] = [await stream.next_event() for _ in range(3)]
    assert [(event["traceparent"], event.get("tracestate")) for event in events] == [
        (f"00-{7:032x}-{8:016x}-01", "vendor=1"),
        (OTHER, None),
        (OTHER, "other=2"),
    ]


async def test_a_span_that_is_not_sampled_is_named_as_such(vhost: Vhost, stream: Stream) -> None:
    tracer = TracerProvider(sampler=ALWAYS_OFF).get_tracer("tests")
    async with Publisher(vhost.url, source="/t") as publisher:
        with tracer.start_as_current_span("quiet") as span:
            await publisher.to_user("42", DONE)
    assert not span.get_span_context().trace_flags.sampled
    assert await parents(stream, 1) == [parent(span)]
