"""The spans of deliveries that a collector gets."""

from __future__ import annotations

import asyncio
import gzip
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conftest import OpenStream, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import ROOT

pytestmark = pytest.mark.any_rabbitmq

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = f"00-{TRACE}-00f067aa0ba902b7-01"
NOT_SAMPLED = f"00-{TRACE}-00f067aa0ba902b8-00"


class Collector:
    """The receiving end of OTLP over HTTP (OpenTelemetry protocol 1, POST /v1/traces, protobuf)."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            collector.services.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


async def test_a_traced_event_ends_in_a_span_for_each_stream(
    start: StartService, vhost: Vhost, connect: OpenStream, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "events")
    service = await start(TRACING="true", DRAIN_SECONDS="0")
    streams = [await connect(service), await connect(service)]
    events = [
        cloudevent("traced") | {"traceparent": SAMPLED, "tracestate": "vendor=1"},
        cloudevent("unsampled") | {"traceparent": NOT_SAMPLED},
        cloudevent("plain", result_url='"traceparent"'),
        cloudevent("odd") | {"traceparent": "not one"},
        # CloudEvents also allows numbers and booleans in an extension attribute; the library would raise.
        cloudevent("number") | {"traceparent": 5},
        cloudevent("boolean") | {"traceparent": True},
    ]
    ids = [event["id"] for event in events]
    await vhost.publish_all([("user.42.job.completed", event) for event in events])
    for stream in streams:
        assert await stream.ids(len(ids)) == ids
    cursor = streams[0].frames[0].id
    back = await connect(service, headers={"Last-Event-ID": cursor or ""})
    assert await back.ids(len(ids)) == ids
    assert await service.metric("bridge_events_delivered_total") == 3 * len(ids), "events from the log are counted, too"
    service.signal(signal.SIGTERM)
    assert await service.ended() == 0

    assert collector.services == {"events"}
    assert [span.name for span in collector.spans] == ["deliver job.completed"] * 3
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert {span.parent_span_id.hex() for span in collector.spans} == {"00f067aa0ba902b7"}
    assert {span.trace_state for span in collector.spans} == {"vendor=1"}
    assert len({span.span_id for span in collector.spans}) == 3
    from_log = []
    for span in collector.spans:
        values = {attribute.key: attribute.value for attribute in span.attributes}
        assert values["cloudevents.event_id"].string_value == "traced"
        assert values["cloudevents.event_type"].string_value == "job.completed"
        assert span.end_time_unix_nano >= span.start_time_unix_nano
        from_log.append(values["bridge.from_log"].bool_value)
    assert sorted(from_log) == [False, False, True]


async def test_a_collector_that_is_away_loses_no_event_and_delays_no_exit(
    start: StartService, vhost: Vhost, connect: OpenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    service = await start(TRACING="true", DRAIN_SECONDS="0")
    stream = await connect(service)
    await vhost.publish("user.42.job.completed", cloudevent("e") | {"traceparent": SAMPLED})
    assert await stream.ids(1) == ["e"]
    service.signal(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE):
        assert await service.ended() == 0


def test_without_tracing_the_library_is_not_imported() -> None:
    code = "import sys, bridge.service.main; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
