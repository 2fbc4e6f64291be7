"""Some deliveries get a span: when, and with which attributes. Spans go to a collector on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from bridge.event import Event
from bridge.service import clock
from bridge.service.streams.streamevent import StreamEvent
from bridge.service.tracing import Tracing
from tests.patience import PATIENCE

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = f"00-{TRACE}-00f067aa0ba902b7-01"


def event(members: str = "") -> StreamEvent:
    return StreamEvent(Event(id="e1", source="/test", type="test.done", text=f'{{"id":"e1"{members}}}'.encode()))


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.names: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_spans:
            self.server.names += [each.value.string_value for each in resource.resource.attributes]
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{made.server_address[1]}")
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def spans(collector: Collector, *events: tuple[StreamEvent, int | None]) -> list[Span]:
    tracing = Tracing()
    tracing.delivered(events, 7)
    tracing.close(PATIENCE)
    return collector.spans


def test_a_delivery_is_a_child_of_the_publishers_context(collector: Collector) -> None:
    received = clock.now_ms() - 250
    (span,) = spans(collector, (event(f',"traceparent":"{SAMPLED}"'), received))
    assert span.name == "deliver test.done"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, "00f067aa0ba902b7")
    assert span.end_time_unix_nano - span.start_time_unix_nano >= 250 * 1_000_000
    values = {each.key: each.value for each in span.attributes}
    assert values["cloudevents.event_id"].string_value == "e1"
    assert (values["bridge.stream"].int_value, values["bridge.from_log"].bool_value) == (7, False)
    assert "rabbitmq-sse-bridge" in collector.names


def test_an_event_of_the_log_has_a_span_without_a_length(collector: Collector) -> None:
    (span,) = spans(collector, (event(f',"traceparent":"{SAMPLED}"'), None))
    assert span.start_time_unix_nano == span.end_time_unix_nano
    assert {each.key: each.value.bool_value for each in span.attributes}["bridge.from_log"]


@pytest.mark.parametrize(
    "members",
    [
        "",
        f',"traceparent":"{SAMPLED[:-1]}0"',  # Not sampled by the publisher.
        ',"traceparent":7',
        ',"traceparent":"nothing"',
        f',"data":{{"traceparent":"{SAMPLED}"}}',
    ],
)
def test_an_event_without_a_sampled_context_has_no_span(collector: Collector, members: str) -> None:
    assert spans(collector, (event(members), clock.now_ms())) == []


def test_a_tracestate_that_is_not_a_text_is_ignored(collector: Collector) -> None:
    (span,) = spans(collector, (event(f',"traceparent":"{SAMPLED}","tracestate":true'), clock.now_ms()))
    assert span.trace_state == ""
