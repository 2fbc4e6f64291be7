"""The Grafana dashboard: prints dashboard.json, which `make exports` writes beside it.

This file has the panels and their queries. It computes positions, ids and repeated options, so that a change is one
line of a diff and no panel covers another. It uses the standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 24
"""The width of Grafana's grid."""

DATASOURCE = {"type": "prometheus", "uid": "$datasource"}

OURS = 'namespace="$namespace",job="$job",pod=~"$pod"'
"""Selects series of the bridge itself."""

THEIRS = 'namespace="$namespace",pod=~"$pod",container="bridge"'
"""Selects series of kube-state-metrics about the bridge's containers."""

RATE = "[$__rate_interval]"

Kind = Literal["timeseries", "stat", "heatmap"]


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are pairs of PromQL and legend; `description` says what is normal."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    width: int = 8
    height: int = 7
    kind: Kind = "timeseries"
    stacked: bool = False
    most: float | None = None
    """The upper end of the axis."""
    line: float | None = None
    """The value from which it is red."""
    good: float | None = None
    """The value below which it is red."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", extra: str = "") -> str:
    """The rate of a counter of the bridge, summed over pods."""
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({metric}{{{OURS}{extra}}}{RATE}))"


def quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{OURS}}}{RATE})))"


def mean(metric: str) -> str:
    return f"{rate(metric + '_sum')} / {rate(metric + '_count')}"


def gauge(metric: str) -> str:
    return f"{metric}{{{OURS}}}"


ROWS = (
    Row(
        "Connections",
        (
            Panel(
                "Open streams",
                "Browsers that are connected now; each tab without the bridge's own client counts separately. The "
                "number follows the day. A drop that does not recover within a minute is users without events.",
                ((f"sum({gauge('bridge_connections')})", ""),),
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                "Pods that take streams",
                "Pods that are ready. Normal is all pods of the Deployment, without those that drain. With none, no "
                "client can open a stream.",
                ((f"sum({gauge('bridge_ready')})", ""),),
                kind="stat",
                width=4,
                height=4,
                good=1,
            ),
            Panel(
                "Pods with RabbitMQ",
                "Pods that consume from RabbitMQ. Normal is all of them. Streams of the others are open and silent; "
                "they get the missed events when RabbitMQ is back.",
                ((f"sum({gauge('bridge_broker_connected')})", ""),),
                kind="stat",
                width=4,
                height=4,
                good=1,
            ),
            Panel(
                "Pods with a log",
                "Pods whose event log answers. Normal is all of them. Without it, clients that resume are sent a gap. "
                "Empty if BRIDGE_LOG is empty.",
                ((f"sum({gauge('bridge_log_answers')} >= 0)", ""),),
                kind="stat",
                width=4,
                height=4,
                good=1,
            ),
            Panel(
                "Version",
                "The versions that run, and in how many pods. Two versions at once are a rollout in progress, or a "
                "rollout that is stuck.",
                ((f"count by (version) ({gauge('bridge_build_info')})", "{{version}}"),),
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                "Alerts that fire",
                "Alerts of the bridge in this namespace. Normal is none; docs/alerts.md has an entry for each.",
                (
                    (
                        'count(ALERTS{alertname=~"Bridge.*",alertstate="firing",namespace="$namespace"}) or vector(0)',
                        "",
                    ),
                ),
                kind="stat",
                width=4,
                height=4,
                line=1,
            ),
            Panel(
                "Open streams of each pod",
                "New streams go to the pod that the Service selects, and stay there for up to an hour. So a new pod "
                "has few streams for a while. A pod that stays empty gets no traffic.",
                ((gauge("bridge_connections"), "{{pod}}"),),
                width=12,
                stacked=True,
            ),
            Panel(
                "Opened and ended a second",
                "Streams that became ready, and streams that ended for any reason. Each lives for 48 to 60 minutes, "
                "so a steady thousand open and end at 0.3 a second. Both high at once: reconnects.",
                ((rate("bridge_streams_opened_total"), "opened"), (rate("bridge_streams_ended_total"), "ended")),
                unit="cps",
                width=12,
            ),
        ),
    ),
    Row(
        "Events",
        (
            Panel(
                "Events a second",
                "Events from RabbitMQ, and events written to streams. Each pod takes a broadcast once and writes it "
                "once for each of its streams. So written may be far above taken, or far below if pages ask for few "
                "types.",
                (
                    (rate("bridge_events_received_total"), "taken from RabbitMQ"),
                    (rate("bridge_events_delivered_total"), "written to streams"),
                ),
                unit="cps",
            ),
            Panel(
                "Events written for each taken",
                "How far an event fans out: 1 if every event is for one user with one tab, the streams of a pod if "
                "all are broadcasts. It changes with the published events, not with load.",
                ((f"{rate('bridge_events_delivered_total')} / {rate('bridge_events_received_total')}", "fan-out"),),
            ),
            Panel(
                "Repeated events not written",
                "Events whose id the same stream had just got: publishers' retries, and events from both the log and "
                "the live queue. Counted when a stream ends. Normal is nearly none, with a peak after a restart of "
                "RabbitMQ.",
                ((rate("bridge_events_duplicate_total"), "repeated"),),
                unit="cps",
            ),
            Panel(
                "Clients that resumed",
                "Streams that resumed, by whether the log had all missed events. With `gap` the page fetches its "
                "state again: a few in a hundred, after nights, are normal.",
                ((rate("bridge_replays_total", "outcome"), "{{outcome}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Log entries read",
                "Entries of the log that are read for clients that resume, by all pods. Normal is about the rate of "
                "all events, times the seconds that clients were away, once for each scan.",
                ((rate("bridge_log_entries_read"), "entries"),),
                unit="cps",
            ),
            Panel(
                "Scans of the log",
                "One scan serves all clients that wait at that moment. A few a minute are normal. Many a second for "
                "long mean that streams are cut again and again.",
                ((rate("bridge_log_passes"), "passes"),),
                unit="cps",
            ),
            Panel(
                "Replays that wait",
                "Clients that resumed and for which the log is not read yet. Short peaks after a deploy are normal. "
                "`for budget`: their users have used up `BRIDGE_LOG_ENTRIES_PER_USER`; normal is none.",
                (
                    (f"sum ({gauge('bridge_log_waiting')})", "all"),
                    (f"sum ({gauge('bridge_log_waiting_for_budget')})", "for budget"),
                ),
                width=12,
            ),
            Panel(
                "Wait of a replay for its first scan",
                "The slowest in a hundred. Up to 15 s in a wave of thousands, which one scan serves; otherwise below "
                "2 s.",
                ((quantile(0.99, "bridge_log_wait_seconds"), "p99"),),
                unit="s",
                width=12,
            ),
        ),
    ),
    Row(
        "Refusals and their reasons",
        (
            Panel(
                "Refused messages",
                "Messages that are not valid events, by reason, in each step of the graph. They are in the "
                "quarantine. Normal is none: the cause is a publisher's mistake, or a catalogue that is behind.",
                (
                    (
                        f"sum by (reason) (increase(bridge_events_invalid_total{{{OURS}}}{RATE}))",
                        "{{reason}}",
                    ),
                    (
                        f"sum (increase(bridge_quarantine_dropped_total{{{OURS}}}{RATE}))",
                        "not quarantined",
                    ),
                    (
                        f"sum by (reason) (increase(bridge_log_unreadable_total{{{OURS}}}{RATE}))",
                        "{{reason}}, in the log",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Requests answered with an error",
                "By code. After one of these, an EventSource does not reconnect. `missing-token` are scanners and "
                "users who are logged out. A step in any other code is a faulty deploy of pages or of logins.",
                ((rate("bridge_requests_refused_total", "code"), "{{code}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Gaps sent",
                "Gaps, after which pages fetch their state again, in each step of the graph. `expired`: away for "
                "longer than the log reaches. `not-readable`: a catalogue that is behind. `unknown` and `no-log` are "
                "never normal.",
                ((f"sum by (reason) (increase(bridge_gaps_total{{{OURS}}}{RATE}))", "{{reason}}"),),
                stacked=True,
            ),
            Panel(
                "Clients answered busy",
                "Streams that were answered `busy`: a cap is reached, or RabbitMQ or the token keys are away. Each "
                "client returns after 10 s, so ten times this is the number of waiting clients. Streams refused at "
                "once are also shown by cause. Normal is none.",
                (
                    (rate("bridge_streams_ended_total", extra=',reason="busy"'), "busy"),
                    (rate("bridge_streams_refused_total", "cause"), "at once: {{cause}}"),
                ),
                unit="cps",
                width=12,
            ),
            Panel(
                "Clients cut off",
                "Streams that ended as `slow` (too far behind), `stalled` (took no byte for 30 s) or `error` (a fault "
                "of the bridge; normal is none). Phones that lose their network stall now and then.",
                (
                    (
                        rate("bridge_streams_ended_total", "reason", ',reason=~"slow|stalled|error"'),
                        "{{reason}}",
                    ),
                ),
                unit="cps",
                width=12,
                stacked=True,
            ),
        ),
    ),
    Row(
        "Logins and control",
        (
            Panel(
                "Requests judged by the application",
                "With BRIDGE_AUTH_URL. `refused`: nobody is logged in. `remembered`: without a question. Normal is no "
                "`unavailable`: the application is away, or answers what the bridge cannot use.",
                ((rate("bridge_logins_total", "outcome"), "{{outcome}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "The application's answer",
                "How long a question to the application takes. Each new stream waits for it.",
                (
                    (quantile(0.99, "bridge_login_seconds"), "p99"),
                    (quantile(0.5, "bridge_login_seconds"), "p50"),
                    (mean("bridge_login_seconds"), "mean"),
                ),
                unit="s",
            ),
            Panel(
                "Orders reach the pod",
                "1 while `bridge kick` and `bridge who` reach a pod. A pod at 0 carries a kick out when it is back.",
                ((gauge("bridge_control_answers"), "{{pod}}"),),
            ),
            Panel(
                "Streams ended by operators",
                "With `bridge kick`, in each step of the graph. The pods' logs say who did it, and why.",
                ((f"sum (increase(bridge_kicked_total{{{OURS}}}{RATE}))", "kicked"),),
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "From RabbitMQ to the socket",
                "How long the oldest event of each write was in the bridge. Normal is a p99 below 100 ms. If little "
                "else is written, a single slow client shows in the p99.",
                (
                    (quantile(0.99, "bridge_delivery_seconds"), "p99"),
                    (quantile(0.5, "bridge_delivery_seconds"), "p50"),
                    (mean("bridge_delivery_seconds"), "mean"),
                ),
                unit="s",
                line=0.5,
            ),
            Panel(
                "From a request to its ready",
                "How long a new stream waits for its queue and its watermark in the log. Normal is 10 to 100 ms. "
                "Seconds mean that RabbitMQ is busy declaring queues, as after its restart. At 20 s a stream is "
                "answered `busy`.",
                (
                    (quantile(0.99, "bridge_attach_seconds"), "p99"),
                    (quantile(0.5, "bridge_attach_seconds"), "p50"),
                    (mean("bridge_attach_seconds"), "mean"),
                ),
                unit="s",
                line=2.5,
            ),
            Panel(
                "Loop lag",
                "How late the timers of each process are, measured every 0.5 s. Normal is below 10 ms with single "
                "peaks. Above 0.1 s for long, a pod has more work than one core can do.",
                ((gauge("bridge_loop_lag_seconds"), "{{pod}}"),),
                unit="s",
                line=0.1,
            ),
            Panel(
                "Writes by how late they were",
                "All writes behind the first panel. Two bands are two kinds of clients. A band that moves upwards is "
                "a bridge that gets slower for all.",
                ((f"sum by (le) (increase(bridge_delivery_seconds_bucket{{{OURS}}}{RATE}))", "{{le}}"),),
                unit="s",
                width=24,
                kind="heatmap",
            ),
        ),
    ),
    Row(
        "Limits",
        (
            Panel(
                "Streams of the cap",
                "Open streams as a share of BRIDGE_MAX_CONNECTIONS, or of what open files allow, for each pod. Normal "
                "with an autoscaler is up to two thirds. A pod at 1 answers new streams `busy`.",
                ((f"{gauge('bridge_connections')} / {gauge('bridge_connections_limit')}", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Streams that open files do not allow",
                "BRIDGE_MAX_CONNECTIONS less the streams that the process takes. Above 0 its limit of open files is "
                "too low for the setting.",
                ((f"{gauge('bridge_connections_wanted')} - {gauge('bridge_connections_limit')}", "{{pod}}"),),
            ),
            Panel(
                "Connections that are not streams",
                "Public HTTP connections with a request, an answer, or between two requests, as a share of the limit. "
                "A proxy keeps some. At 1, the bridge closes the quietest when other clients connect.",
                ((f"{gauge('bridge_guests')} / {gauge('bridge_guests_limit')}", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Connections ended before a stream",
                "By reason: no complete request in 10 s, no further one in 75 s, an answer not taken in 60 s, or room "
                "for others. Also the times that there was no descriptor for a new connection. Idle ones are normal.",
                (
                    (rate("bridge_guests_ended_total", "reason"), "{{reason}}"),
                    (rate("bridge_accept_failures_total"), "no descriptor"),
                ),
            ),
            Panel(
                "Memory of the limit",
                "Resident memory as a share of the container's limit. It grows with streams (about 10 KB each) and "
                "with the backlogs of slow clients, and should fall with them. At 1 the kernel kills the process.",
                (
                    (
                        f"max by (pod) ({gauge('process_resident_memory_bytes')}) / max by (pod) "
                        f'(kube_pod_container_resource_limits{{{THEIRS},resource="memory"}})',
                        "{{pod}}",
                    ),
                ),
                unit="percentunit",
                most=1,
                line=0.85,
            ),
            Panel(
                "Core of the one it can use",
                "CPU of each process. A process uses one core at most, so 1 is the limit. Above 0.7 for long, the lag "
                "grows.",
                ((f"rate(process_cpu_seconds_total{{{OURS}}}{RATE})", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Files of those allowed",
                "Open file descriptors as a share of the process's limit: one for each stream, and a few dozen. The "
                "bridge reserves 64 for probes and RabbitMQ, so a limit of 1,024 is full at 0.94.",
                ((f"{gauge('process_open_fds')} / {gauge('process_max_fds')}", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Queues that RabbitMQ refused",
                "Refused for a limit of the virtual host or the cluster, in five minutes. Normal is 0. Otherwise new "
                "streams are answered `busy`, and streams that lost their queue wait.",
                ((f"delta(bridge_broker_queues_refused{{{OURS}}}[5m])", "{{pod}}"),),
            ),
            Panel(
                "Autoscaler",
                "The number of pods that it wants, and its limits (kube-state-metrics). Wanted at the maximum for "
                "long: each further client makes the pods fuller.",
                tuple(
                    (
                        f'kube_horizontalpodautoscaler_{name}_replicas{{namespace="$namespace",'
                        'horizontalpodautoscaler="bridge"}',
                        legend,
                    )
                    for name, legend in [("status_desired", "wanted"), ("spec_max", "most"), ("spec_min", "least")]
                ),
                width=16,
            ),
        ),
    ),
    Row(
        "Deploys",
        (
            Panel(
                "Pods that drain",
                "Pods that end their streams. In a rollout, normal is one or two at a time, each for half a minute. A "
                "pod that is here for longer is about to be killed.",
                ((f"{gauge('bridge_draining')} == 1", "{{pod}}"),),
                stacked=True,
            ),
            Panel(
                "Streams ended, by reason",
                "`drain` is the rollout, spread over the drain's seconds; `rotate` and `client` are normal. `stalled` "
                "in a drain are phones that had lost their network. A peak of `client` at a pod's end is a killed "
                "pod, or a proxy that restarts.",
                ((rate("bridge_streams_ended_total", "reason"), "{{reason}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Streams opened, by pod",
                "The pods to which drained clients return. Normal is all pods that are ready, within seconds. In a "
                "rollout, an old pod that takes many of them will drain them once more.",
                ((rate("bridge_streams_opened_total", "pod"), "{{pod}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Pods by version",
                "How the new version takes over. Two versions for longer than pods times minReadySeconds: the rollout "
                "is stuck.",
                ((f"count by (version) ({gauge('bridge_build_info')})", "{{version}}"),),
                stacked=True,
            ),
            Panel(
                "Left when a pod was last seen",
                "Seconds from a draining pod's last answer until Kubernetes kills it (kube-state-metrics). The lowest "
                "point is the rest of the grace period. Normal is about 15 s. Below 10 s, the grace period is too "
                "short for the drain.",
                (
                    (
                        f'max by (pod) (kube_pod_deletion_timestamp{{namespace="$namespace",pod=~"$pod"}}) '
                        # `timestamp` must have the series itself: for a comparison it returns the time of the query.
                        f"- max by (pod) (timestamp({gauge('bridge_draining')}) and {gauge('bridge_draining')} == 1)",
                        "{{pod}}",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Restarts and reconnects",
                "Processes that were restarted in the same pod, and new connections to RabbitMQ, in each step of the "
                "graph. Normal is none, or one for each pod when RabbitMQ restarts. Messages that RabbitMQ dropped "
                "from the bridge's queues were read from the log; a policy on bridge.* is the usual cause.",
                (
                    (f"sum (changes(process_start_time_seconds{{{OURS}}}{RATE}))", "process restarted"),
                    (f"sum (changes(bridge_broker_connects{{{OURS}}}{RATE}))", "RabbitMQ connected again"),
                    (f"sum (changes(bridge_broker_dropped{{{OURS}}}{RATE}))", "RabbitMQ dropped messages"),
                ),
            ),
        ),
    ),
    Row(
        "The process",
        (
            Panel(
                "CPU",
                "Cores that all pods use together. Divided by the events written it is the cost of one event, which "
                "should not change between versions.",
                ((rate("process_cpu_seconds_total"), "all pods"),),
                width=6,
            ),
            Panel(
                "CPU of one event",
                "Seconds of CPU for each event written. Normal under load is 0.1 to 0.6 ms. With little load it is "
                "higher and means nothing, because waking the process costs more than an event.",
                ((f"{rate('process_cpu_seconds_total')} / {rate('bridge_events_delivered_total')}", "each event"),),
                unit="s",
                width=6,
            ),
            Panel(
                "Memory",
                "Resident memory of each process: 60 to 80 MB without streams. Memory that grows for days with the "
                "same number of streams is a leak.",
                ((gauge("process_resident_memory_bytes"), "{{pod}}"),),
                unit="bytes",
                width=6,
            ),
            Panel(
                "Garbage collections",
                "Python's, by generation. A collection of the oldest generation checks all objects, and everything "
                "else waits for it. Normal is well below one a minute, because objects that live as long as the "
                "process are excluded at the start.",
                ((rate("python_gc_collections_total", "generation"), "generation {{generation}}"),),
                unit="cps",
                width=6,
            ),
        ),
    ),
)

ANNOTATIONS = (("A pod drains", f"max by (pod) ({gauge('bridge_draining')}) == 1", "{{pod}}"),)


def variable(name: str, label: str, query: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # At each change of the time range, because pods change.
        "sort": 1,
        "hide": 0,
        **more,
    }


VARIABLES = [
    {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0},
    variable("namespace", "Namespace", "label_values(bridge_connections, namespace)"),
    variable("job", "Job", 'label_values(bridge_connections{namespace="$namespace"}, job)'),
    variable(
        "pod",
        "Pod",
        'label_values(bridge_connections{namespace="$namespace",job="$job"}, pod)',
        multi=True,
        includeAll=True,
        # Not the list of existing pods, so that a rollout's new pods are included at once.
        allValue=".*",
        current={"selected": True, "text": ["All"], "value": ["$__all"]},
    ),
]


def thresholds(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.line is not None:
        steps.append({"color": "red", "value": panel.line})
    if panel.good is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.good}]
    return {"mode": "absolute", "steps": steps}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": thresholds(panel), "color": {"mode": "thresholds"}}
    options: dict[str, Any]
    if panel.kind == "stat":
        options = {
            "colorMode": "value" if panel.line is not None or panel.good is not None else "none",
            "graphMode": "area" if len(panel.queries) == 1 and not panel.queries[0][1] else "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value_and_name" if panel.queries[0][1] else "value",
        }
    elif panel.kind == "heatmap":
        options = {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"unit": panel.unit},
            "cellGap": 1,
            "tooltip": {"mode": "single", "yHistogram": False},
        }
        defaults = {}
    else:
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        defaults["color"] = {"mode": "palette-classic"}
        defaults["min"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.line is None else "dashed"},
        }
    if panel.most is not None:
        defaults["max"] = panel.most
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": expr,
            "legendFormat": legend or "__auto",
            "range": True,
            **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
        }
        for index, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def lay_out() -> list[dict[str, Any]]:
    """Places panels from left to right, and begins a new line if the next panel has no room."""
    made: list[dict[str, Any]] = []
    number, y = 1, 0
    for row in ROWS:
        made.append(
            {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }
        )
        number, y, x, height = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            made.append(panel_json(panel, number, x, y))
            number, x, height = number + 1, x + panel.width, max(height, panel.height)
        y += height
    return made


def dashboard() -> dict[str, Any]:
    return {
        "uid": "rabbitmq-sse-bridge",
        "title": "Bridge: RabbitMQ to browsers",
        "description": "Connections, events, refusals, latency and limits.",
        "tags": ["bridge", "rabbitmq", "sse"],
        "schemaVersion": 38,  # Grafana 10's. Later versions convert it.
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "",
        "links": [
            {
                "title": "Runbook",
                "type": "link",
                "icon": "doc",
                "targetBlank": True,
                "url": "https://github.com/example/rabbitmq-sse-bridge/blob/main/docs/alerts.md#alerts",
            }
        ],
        "templating": {"list": VARIABLES},
        "annotations": {
            "list": [
                {
                    "name": name,
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": "blue",
                    "expr": expr,
                    "titleFormat": name,
                    "textFormat": text,
                    "step": "15s",
                }
                for name, expr, text in ANNOTATIONS
            ]
        },
        "panels": lay_out(),
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2, ensure_ascii=False))
