"""OpenTelemetry spans for deliveries: the last part of a trace that began with the publish.

If an event has a `traceparent` (CloudEvents, distributed tracing extension), each stream that it is written to makes a
span `deliver <type>`. The span lasts from the receipt from RabbitMQ to the write. It is a child of the event's context,
and exists only if that context is sampled. So the publisher decides which events are traced, and the bridge itself
cannot flood a backend. An event without a context makes no span.

The library is imported only with BRIDGE_TRACING. OpenTelemetry's own variables set the destination and the service
name: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME and others.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from functools import lru_cache

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from bridge import __version__
from bridge.service import clock
from bridge.service.streams.streamevent import StreamEvent

_PROPAGATOR = TraceContextTextMapPropagator()


@lru_cache(maxsize=16)  # One event is written to its streams one after another.
def _context_of(event: StreamEvent) -> Context | None:
    """The trace context of an event, or None.

    Only text is passed to the library: an extension attribute may also be a number or a boolean, for which the library
    raises. An error here would end the stream, and would end it again after each read of the event from the log.
    """
    if b'"traceparent"' not in event.plain:
        return None
    envelope = json.loads(event.text)
    carrier = {name: envelope.get(name) for name in ("traceparent", "tracestate")}
    context = _PROPAGATOR.extract({name: value for name, value in carrier.items() if isinstance(value, str)})
    return context or None


class Tracing:
    """Makes the spans. A thread of the library sends them in batches, and drops spans when its queue is full."""

    def __init__(self) -> None:
        resource = Resource({SERVICE_NAME: "rabbitmq-sse-bridge", SERVICE_VERSION: __version__})
        self._provider = TracerProvider(
            resource=resource.merge(OTELResourceDetector().detect()),
            sampler=ParentBased(root=ALWAYS_OFF),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("bridge", __version__)

    def delivered(self, events: Sequence[tuple[StreamEvent, int | None]], stream: int) -> None:
        """Makes a span for each event with a sampled context.

        Args:
            events: the events just written, each with the time of its live receipt in ms by `clock`, or None if it was
                read from the log.
            stream: the stream's number, as in log lines.
        """
        now = time.time_ns()
        for event, received_ms in events:
            context = _context_of(event)
            if context is None:
                continue
            span = self._tracer.start_span(
                f"deliver {event.type}",
                context=context,
                kind=SpanKind.CONSUMER,
                start_time=now if received_ms is None else now - (clock.now_ms() - received_ms) * 1_000_000,
                attributes={
                    "messaging.system": "rabbitmq",
                    "messaging.operation.name": "deliver",
                    "cloudevents.event_id": event.id,
                    "cloudevents.event_type": event.type,
                    "bridge.stream": stream,
                    "bridge.from_log": received_ms is None,
                },
            )
            span.end(end_time=now)

    def close(self, seconds: float) -> None:
        """Sends the waiting spans. Blocks for at most `seconds`, because the collector may not answer."""
        # The library's shutdown may take as long as the exporter's retries.
        ending = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        ending.start()
        ending.join(seconds)
