"""The metrics for Prometheus. All metrics of the program are defined here, in a separate registry."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from bridge import __version__
from bridge.event import REASONS
from bridge.service.streams.sse import END_REASONS, GapReason

CLOSE_REASONS = (*END_REASONS, "client", "stalled", "error")
"""Why a stream ended: the reason of its `bridge.bye`, or `client` (it disconnected), `stalled`, `error` (a bug)."""

REPLAY_OUTCOMES = ("complete", "gap")
LOGIN_OUTCOMES = ("accepted", "remembered", "refused", "unavailable")

GuestEnd = Literal["header-timeout", "idle", "answer-timeout", "room"]
"""Why the bridge ended a connection that is not a stream: three deadlines, or room for others (`http.entrance`)."""

GUEST_ENDS: tuple[GuestEnd, ...] = get_args(GuestEnd)

GAP_REASONS: tuple[GapReason, ...] = ("expired", "unknown", "no-log", "not-readable")

_DELIVERY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ATTACH_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Tally(Collector):
    """A counter for the hot path. Callers add to `value`, at a tenth of the cost of the library's counter."""

    def __init__(self, name: str, about: str, *, registry: CollectorRegistry) -> None:
        self.value = 0
        self._name = name
        self._about = about
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._about, value=self.value)


class Timings(Collector):
    """A histogram for the hot path."""

    def __init__(self, name: str, about: str, *, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name = name
        self._about = about
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._about, buckets=buckets, sum_value=self._sum)


class Metrics:
    def __init__(self) -> None:
        # The `_created` series would double each counter, only to report when the process began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

        build = Gauge("bridge_build_info", "1, labelled with the bridge's version", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        self.ready = Gauge("bridge_ready", "1 while the bridge accepts new streams, as /readyz", registry=self.registry)
        self.connections = Gauge("bridge_connections", "Open streams", registry=self.registry)
        self.connections_limit = Gauge("bridge_connections_limit", "The most open streams", registry=self.registry)
        self.connections_wanted = Gauge(
            "bridge_connections_wanted",
            "BRIDGE_MAX_CONNECTIONS; above the limit if file descriptors allow fewer streams",
            registry=self.registry,
        )
        self.guests = Gauge("bridge_guests", "Public HTTP connections that are not streams", registry=self.registry)
        self.guests_limit = Gauge(
            "bridge_guests_limit", "The most public HTTP connections that are not streams", registry=self.registry
        )
        self.guests_ended = Counter(
            "bridge_guests_ended_total",
            "Public HTTP connections that were not streams and that the bridge ended, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.accept_failures = Counter(
            "bridge_accept_failures_total",
            "Failures to accept a connection because the system had no file descriptor or memory",
            registry=self.registry,
        )
        self.draining = Gauge("bridge_draining", "1 while the process ends its streams to stop", registry=self.registry)
        self.broker_connected = Gauge(
            "bridge_broker_connected", "1 while the bridge consumes from RabbitMQ", registry=self.registry
        )
        self.broker_connects = Gauge(
            "bridge_broker_connects",
            "Connections made to RabbitMQ since the start, including the first",
            registry=self.registry,
        )
        self.broker_dropped = Gauge(
            "bridge_broker_dropped",
            "Messages that RabbitMQ dropped from the bridge's queues since the start; streams read them from the log",
            registry=self.registry,
        )
        self.queues_refused = Gauge(
            "bridge_broker_queues_refused",
            "Live queues that RabbitMQ refused because of a limit, since the start",
            registry=self.registry,
        )
        self.loop_lag_seconds = Gauge(
            "bridge_loop_lag_seconds", "Delay of the event loop's last measured timer", registry=self.registry
        )
        self.streams_opened = Counter(
            "bridge_streams_opened_total", "Streams that became ready", registry=self.registry
        )
        self.streams_ended = Counter(
            "bridge_streams_ended_total", "Streams ended, by reason", ["reason"], registry=self.registry
        )
        self.streams_refused = Counter(
            "bridge_streams_refused_total",
            "Streams that got only `bridge.bye`, by cause",
            ["cause"],
            registry=self.registry,
        )
        self.refused = Counter(
            "bridge_requests_refused_total",
            "Requests for a stream answered with an error, by code",
            ["code"],
            registry=self.registry,
        )
        self.events_received = Tally(
            "bridge_events_received_total", "Messages taken from RabbitMQ", registry=self.registry
        )
        self.events_delivered = Tally(
            "bridge_events_delivered_total", "Events written to streams, one for each stream", registry=self.registry
        )
        self.events_duplicate = Counter(
            "bridge_events_duplicate_total",
            "Events not written because the stream had just got them",
            registry=self.registry,
        )
        self.events_invalid = Counter(
            "bridge_events_invalid_total", "Messages refused, by reason", ["reason"], registry=self.registry
        )
        self.quarantine_dropped = Counter(
            "bridge_quarantine_dropped_total",
            "Refused messages that could not be put into the quarantine",
            registry=self.registry,
        )
        self.log_unreadable = Counter(
            "bridge_log_unreadable_total",
            "Entries of the event log that could not be read, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.gaps = Counter(
            "bridge_gaps_total", "bridge.gap frames sent to clients, by reason", ["reason"], registry=self.registry
        )
        self.replays = Counter(
            "bridge_replays_total",
            "Streams that read missed events from the log after a reconnect or a lost queue, by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.delivery_seconds = Timings(
            "bridge_delivery_seconds",
            "Seconds from the receipt of a message to its write, for the oldest message of each write",
            buckets=_DELIVERY_BUCKETS,
            registry=self.registry,
        )
        self.attach_seconds = Histogram(
            "bridge_attach_seconds",
            "Seconds from a stream's request to its bridge.ready",
            buckets=_ATTACH_BUCKETS,
            registry=self.registry,
        )
        self.log_passes = Gauge("bridge_log_passes", "Scans of the log since the start", registry=self.registry)
        self.log_entries = Gauge(
            "bridge_log_entries_read", "Entries of the log read in scans since the start", registry=self.registry
        )
        self.log_waiting = Gauge(
            "bridge_log_waiting", "Replays that wait for a scan of the log", registry=self.registry
        )
        self.log_waiting_for_budget = Gauge(
            "bridge_log_waiting_for_budget",
            "Replays that wait because their user has used up the budget of log entries",
            registry=self.registry,
        )
        self.log_wait_seconds = Histogram(
            "bridge_log_wait_seconds",
            "Seconds that replays waited for their first scan",
            buckets=_ATTACH_BUCKETS,
            registry=self.registry,
        )
        self.log_answers = Gauge(
            "bridge_log_answers",
            "1 while the log answers, so that clients can resume; 0 while it does not; NaN without a log",
            registry=self.registry,
        )
        self.log_answers.set(math.nan)
        self.kicked = Counter("bridge_kicked_total", "Streams that operators have ended", registry=self.registry)
        self.control_answers = Gauge(
            "bridge_control_answers",
            "1 while orders to all replicas reach this one; 0 while they do not; NaN without control",
            registry=self.registry,
        )
        self.control_answers.set(math.nan)
        self.logins = Counter(
            "bridge_logins_total",
            "Requests judged by the application, by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.login_seconds = Histogram(
            "bridge_login_seconds",
            "Seconds until the application answered whose a request is",
            buckets=_ATTACH_BUCKETS,
            registry=self.registry,
        )
        # Create all label values at the start: a rate over a series that appears with its first event misses it.
        for reason in CLOSE_REASONS:
            self.streams_ended.labels(reason)
        for why in GUEST_ENDS:
            self.guests_ended.labels(why)
        for reason in REASONS:
            self.events_invalid.labels(reason)
            self.log_unreadable.labels(reason)
        for login in LOGIN_OUTCOMES:
            self.logins.labels(login)
        for gap in GAP_REASONS:
            self.gaps.labels(gap)
        for outcome in REPLAY_OUTCOMES:
            self.replays.labels(outcome)

    def record_login(self, outcome: str, seconds: float) -> None:
        """A request was judged by the application."""
        self.logins.labels(outcome).inc()
        if outcome != "remembered":
            self.login_seconds.observe(seconds)
