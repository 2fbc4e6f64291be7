"""Spans for deliveries, by OpenTelemetry: the last piece of a trace that began where the event was published.

An event that carries a `traceparent` (CloudEvents, distributed tracing extension) gives a span `deliver <type>` for
each stream that it is written to, from its receipt from RabbitMQ to the write, as a child of that context and only
where that was sampled. So the publisher decides what is traced, and nothing here can flood a backend by itself. An
event without a context gives none.

Only with BRIDGE_TRACING, and only then is the library imported. Where spans go and how they are called is set by
OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME and so on.
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


@lru_cache(maxsize=16)  # The streams that get the same event get it one after another.
def _context_of(event: StreamEvent) -> Context | None:
    """The context that it was published in, if it carries one.

    An extension attribute may be a number or a boolean too; the library takes text alone and raises over anything else,
    and what raises here would end the stream, again and again, each time that the event is read for it from the log.
    """
    if b'"traceparent"' not in event.plain:
        return None
    envelope = json.loads(event.text)
    carrier = {name: envelope.get(name) for name in ("traceparent", "tracestate")}
    context = _PROPAGATOR.extract({name: value for name, value in carrier.items() if isinstance(value, str)})
    return context or None


class Tracing:
    """Spans are sent by a thread of the library's own, in batches; one that waits too long is dropped there."""

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
        """
        Args:
            events: what has just been written, each with when it was received live, in ms by `clock`; None for what was
                read from the log.
            stream: the stream's number, as the log has it.
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
        """Sends what waits, for so long at the most; blocks. A collector that is away must not keep the process."""
        # Its own shutdown may take as long as the exporter's retries do.
        ending = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        ending.start()
        ending.join(seconds)
