"""The Grafana dashboard: prints dashboard.json, which `make exports` writes beside it.

Here stand the questions and their queries. Places, ids and all that Grafana wants to read a hundred times are made, so
that a change is a line in a diff and no panel lies over another. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 24
"""Of Grafana's grid."""

DATASOURCE = {"type": "prometheus", "uid": "$datasource"}

OURS = 'namespace="$namespace",job="$job",pod=~"$pod"'
"""Chooses series that the bridge itself tells."""

THEIRS = 'namespace="$namespace",pod=~"$pod",container="bridge"'
"""Chooses series that kube-state-metrics tells of its containers."""

RATE = "[$__rate_interval]"

Kind = Literal["timeseries", "stat", "heatmap"]


@dataclass(frozen=True)
class Panel:
    """One question. `queries` are pairs of PromQL and legend; `description` says what is normal."""

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
    """Where it turns red."""
    good: float | None = None
    """The other way round: red below this."""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", extra: str = "") -> str:
    """The rate of a counter of ours, summed over pods."""
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
        "Who is connected",
        (
            Panel(
                "Open streams",
                "Browsers that are connected now, each tab without the bridge's own client counted apart. It follows "
                "the day; a step downwards that does not come back within a minute is people without events.",
                ((f"sum({gauge('bridge_connections')})", ""),),
                kind="stat",
                width=4,
                height=4,
            ),
            Panel(
                "Pods that take streams",
                "How many pods say that they are ready. Normal is as many as the Deployment has, less those that "
                "drain. None: nobody can open a stream.",
                ((f"sum({gauge('bridge_ready')})", ""),),
                kind="stat",
                width=4,
                height=4,
                good=1,
            ),
            Panel(
                "Pods with RabbitMQ",
                "How many pods consume from RabbitMQ. Normal is all of them. A pod without has streams that are open "
                "and silent; what they miss they get when it is back.",
                ((f"sum({gauge('bridge_broker_connected')})", ""),),
                kind="stat",
                width=4,
                height=4,
                good=1,
            ),
            Panel(
                "Pods with a log",
                "How many pods have a log that answers. Normal is all of them. Without one, whoever comes back is "
                "told a gap. Empty where BRIDGE_LOG is.",
                ((f"sum({gauge('bridge_log_answers')} >= 0)", ""),),
                kind="stat",
                width=4,
                height=4,
                good=1,
            ),
            Panel(
                "Version",
                "What runs, and in how many pods. Two versions at once are a rollout that is under way, or stuck.",
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
                "Who holds whom. New streams go to whoever the Service picks and stay there for up to an hour, so a "
                "young pod has few for a while; one that stays empty gets no traffic.",
                ((gauge("bridge_connections"), "{{pod}}"),),
                width=12,
                stacked=True,
            ),
            Panel(
                "Opened and ended a second",
                "Streams that became ready, and streams that ended for whatever reason. Each lives for 48 to 60 "
                "minutes, so a steady thousand open and end at 0.3 a second. Both high at once: reconnects.",
                ((rate("bridge_streams_opened_total"), "opened"), (rate("bridge_streams_ended_total"), "ended")),
                unit="cps",
                width=12,
            ),
        ),
    ),
    Row(
        "What flows",
        (
            Panel(
                "Events a second",
                "Taken from RabbitMQ, and written to streams. A broadcast is taken once by each pod and written once "
                "for each of its streams, so written may be far above taken, or far below where pages ask for few "
                "types.",
                (
                    (rate("bridge_events_received_total"), "taken from RabbitMQ"),
                    (rate("bridge_events_delivered_total"), "written to streams"),
                ),
                unit="cps",
            ),
            Panel(
                "Written for each that was taken",
                "How far an event fans out: 1 where every event is one user's with one tab, a pod's streams where all"
                " are broadcasts. It changes with what is published, not with load.",
                ((f"{rate('bridge_events_delivered_total')} / {rate('bridge_events_received_total')}", "fan-out"),),
            ),
            Panel(
                "Repeated events not written",
                "Events whose id the same stream had just been sent: publishers' retries, and what log and live both "
                "gave. Counted as a stream ends. Normal is near none, with a peak after a restart of RabbitMQ.",
                ((rate("bridge_events_duplicate_total"), "repeated"),),
                unit="cps",
            ),
            Panel(
                "Clients that came back",
                "Streams that were resumed, by whether the log had all that they had missed. A `gap` is a page that "
                "fetches its state afresh: a few in a hundred, after nights, are normal.",
                ((rate("bridge_replays_total", "outcome"), "{{outcome}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "What resuming reads",
                "Entries of the log that are read for those who come back, by all pods together. About the rate of "
                "all events, times the seconds that clients were away, once for each pass.",
                ((rate("bridge_log_entries_read"), "entries"),),
                unit="cps",
            ),
            Panel(
                "Passes over the log",
                "One pass serves all who wait at that moment. A few a minute are normal; many a second for long mean "
                "that streams are cut again and again.",
                ((rate("bridge_log_passes"), "passes"),),
                unit="cps",
            ),
            Panel(
                "Replays that wait",
                "Clients that came back and for whom the log is not read yet. Short peaks after a deploy are normal. "
                "`for budget` is users who have had more of the log read than `BRIDGE_LOG_ENTRIES_PER_USER` allows; "
                "normal is none.",
                (
                    (f"sum ({gauge('bridge_log_waiting')})", "all"),
                    (f"sum ({gauge('bridge_log_waiting_for_budget')})", "for budget"),
                ),
                width=12,
            ),
            Panel(
                "Wait of a replay for its first scan",
                "The slowest in a hundred. Up to 15 s in a wave of thousands, which one scan serves; else below 2 s.",
                ((quantile(0.99, "bridge_log_wait_seconds"), "p99"),),
                unit="s",
                width=12,
            ),
        ),
    ),
    Row(
        "What is refused, and why",
        (
            Panel(
                "Refused messages",
                "Messages that do not fit, by reason, within each step of the graph. They stand in the quarantine. "
                "Normal is none: each is a publisher's mistake, or a catalogue that is behind.",
                (
                    (
                        f"sum by (reason) (increase(bridge_events_invalid_total{{{OURS}}}{RATE}))",
                        "{{reason}}",
                    ),
                    (
                        f"sum (increase(bridge_quarantine_dropped_total{{{OURS}}}{RATE}))",
                        "not even quarantined",
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
                "By code. After one of these an EventSource does not come back by itself. `missing-token` are "
                "scanners and people who are logged out; a step in any other is a deploy of pages or of logins that "
                "went wrong.",
                ((rate("bridge_requests_refused_total", "code"), "{{code}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Gaps told",
                "Pages that were told to fetch their state afresh, within each step of the graph. `expired` is who "
                "was away for longer than the log reaches; `not-readable` is a catalogue that is behind; `unknown` and "
                "`no-log` are never normal.",
                ((f"sum by (reason) (increase(bridge_gaps_total{{{OURS}}}{RATE}))", "{{reason}}"),),
                stacked=True,
            ),
            Panel(
                "Clients sent away",
                "Streams that were told `busy`: a cap is reached, or RabbitMQ or the token keys are away. Each of "
                "them comes back after 10 s, so ten times this is how many stand outside. Those that were refused at "
                "once are shown by cause, too. Normal is none.",
                (
                    (rate("bridge_streams_ended_total", extra=',reason="busy"'), "busy"),
                    (rate("bridge_streams_refused_total", "cause"), "at once: {{cause}}"),
                ),
                unit="cps",
                width=12,
            ),
            Panel(
                "Clients cut off",
                "Streams that ended as `slow` (too far behind) or `stalled` (took no byte for 30 s), and those that "
                "broke by a fault of the bridge's (`error`, normal is none). Phones that lose their network stall now"
                " and then.",
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
        "How late",
        (
            Panel(
                "From RabbitMQ to the socket",
                "How long the oldest event of each write was in the bridge. Normal is a p99 below 100 ms; a single "
                "slow client shows in the p99 where little else is written.",
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
                "How long a new stream waits for its queue and its tick of the log. Normal is 10 to 100 ms. Seconds "
                "mean that RabbitMQ is busy making queues, as just after its restart; at 20 s a stream is sent away.",
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
                "How late each process comes to its timers, a look at each scrape. Normal is below 10 ms with single "
                "peaks; above 0.1 s for long a pod has more to do than one core can.",
                ((gauge("bridge_loop_lag_seconds"), "{{pod}}"),),
                unit="s",
                line=0.1,
            ),
            Panel(
                "Writes by how late they were",
                "The same as the first panel, all of it: two bands are two kinds of clients, a band that moves "
                "upwards is the bridge getting slower for all.",
                ((f"sum by (le) (increase(bridge_delivery_seconds_bucket{{{OURS}}}{RATE}))", "{{le}}"),),
                unit="s",
                width=24,
                kind="heatmap",
            ),
        ),
    ),
    Row(
        "How near the limits",
        (
            Panel(
                "Streams of the cap",
                "Open streams of BRIDGE_MAX_CONNECTIONS, or of what the limit of open files allows, each pod. The "
                "autoscaler should hold it near two thirds; a pod at 1 sends new streams away.",
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
                "Connections that are no streams",
                "Public HTTP connections that ask, are answered, or wait for another request, of the most allowed. A "
                "proxy keeps some. At 1 the quietest are ended when others come.",
                ((f"{gauge('bridge_guests')} / {gauge('bridge_guests_limit')}", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Connections ended before a stream",
                "By reason: no whole request in 10 s, no further one in 75 s, an answer not taken in 60 s, or room "
                "for others; and the times that the system had no descriptor for a new one. Idle ones are normal.",
                (
                    (rate("bridge_guests_ended_total", "reason"), "{{reason}}"),
                    (rate("bridge_accept_failures_total"), "no descriptor"),
                ),
            ),
            Panel(
                "Memory of the limit",
                "Resident memory of what the container may have. It grows with streams (some 10 KB each) and with "
                "what waits for slow ones, and should come down with them. At 1 the kernel kills the process.",
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
                "CPU of each process. It uses one core at the most, so 1 is the end; above 0.7 for long the lag grows.",
                ((f"rate(process_cpu_seconds_total{{{OURS}}}{RATE})", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Files of those allowed",
                "Open file descriptors of the process's limit: one for each stream and a few dozen. The bridge "
                "keeps 64 for probes and RabbitMQ, so a limit of 1,024 is full at 0.94.",
                ((f"{gauge('process_open_fds')} / {gauge('process_max_fds')}", "{{pod}}"),),
                unit="percentunit",
                most=1,
                line=0.8,
            ),
            Panel(
                "Queues that RabbitMQ refused",
                "Refused for a limit of the virtual host or the cluster, in five minutes. Normal is 0; otherwise new "
                "streams are sent away, and streams whose connection was lost wait.",
                ((f"delta(bridge_broker_queues_refused{{{OURS}}}[5m])", "{{pod}}"),),
            ),
            Panel(
                "Autoscaler",
                "How many pods it wants, and what it may have (kube-state-metrics). Wanted at the maximum for long: "
                "more clients make each pod fuller.",
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
        "What a deploy did",
        (
            Panel(
                "Pods that drain",
                "Pods that say goodbye to their streams. In a rollout one or two at a time, each for half a minute; "
                "one that is here for longer is about to be killed.",
                ((f"{gauge('bridge_draining')} == 1", "{{pod}}"),),
                stacked=True,
            ),
            Panel(
                "Streams ended, by reason",
                "`drain` is the rollout, spread over the drain's seconds; `rotate` and `client` are every day; "
                "`stalled` in a drain are phones that had gone already. A peak of `client` with a pod's end is a pod "
                "that was killed, or a proxy that restarts.",
                ((rate("bridge_streams_ended_total", "reason"), "{{reason}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Streams opened, by pod",
                "Where those went who were told goodbye: to all pods that are ready, within seconds. In a rollout an "
                "old pod that takes many of them will send them on once more.",
                ((rate("bridge_streams_opened_total", "pod"), "{{pod}}"),),
                unit="cps",
                stacked=True,
            ),
            Panel(
                "Pods by version",
                "How the new version takes over. Two for longer than pods times minReadySeconds: the rollout is stuck.",
                ((f"count by (version) ({gauge('bridge_build_info')})", "{{version}}"),),
                stacked=True,
            ),
            Panel(
                "Left when a pod was last seen",
                "Seconds from a draining pod's last answer to the moment when Kubernetes kills it "
                "(kube-state-metrics). Its lowest point is what was left of the grace period: about 15 s are normal, "
                "below 10 the grace period is too short for the drain.",
                (
                    (
                        f'max by (pod) (kube_pod_deletion_timestamp{{namespace="$namespace",pod=~"$pod"}}) '
                        # Of the series itself: `timestamp` of a comparison is the time of the question.
                        f"- max by (pod) (timestamp({gauge('bridge_draining')}) and {gauge('bridge_draining')} == 1)",
                        "{{pod}}",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Restarts and reconnects",
                "Processes that began anew in the same pod, and connections to RabbitMQ that were made again, within "
                "each step of the graph. Normal is none but for a restart of RabbitMQ, once for each pod. "
                "Messages that RabbitMQ dropped from the bridge's queues were read from the log; a policy on "
                "bridge.* is the usual cause.",
                (
                    (f"sum (changes(process_start_time_seconds{{{OURS}}}{RATE}))", "process began anew"),
                    (f"sum (changes(bridge_broker_connects{{{OURS}}}{RATE}))", "RabbitMQ connected anew"),
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
                "Cores that all pods use together. Divided by the events written it is the price of one, which should"
                " not change from one version to the next.",
                ((rate("process_cpu_seconds_total"), "all pods"),),
                width=6,
            ),
            Panel(
                "CPU of one event",
                "Seconds of CPU for each event written. 0.1 to 0.6 ms are normal under load; with little load it is "
                "higher and means nothing, since to be woken costs more than an event.",
                ((f"{rate('process_cpu_seconds_total')} / {rate('bridge_events_delivered_total')}", "each event"),),
                unit="s",
                width=6,
            ),
            Panel(
                "Memory",
                "Resident memory of each process: 60 to 80 MB with no streams. What grows for days with the same "
                "number of streams is a leak.",
                ((gauge("process_resident_memory_bytes"), "{{pod}}"),),
                unit="bytes",
                width=6,
            ),
            Panel(
                "Garbage collections",
                "Python's, by generation. The oldest generation walks everything and is what the others wait for: "
                "well below one a minute is normal, since what lives for good is frozen at the start.",
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
        "refresh": 2,  # With the time range: pods come and go.
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
        # Not the list of those that there are: a rollout's new pods belong to it at once.
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
    """From left to right, and a new line where the next panel has no room."""
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
        "description": "Who is connected, what flows, what is refused, how late it is, and how near the limits.",
        "tags": ["bridge", "rabbitmq", "sse"],
        "schemaVersion": 38,  # Grafana 10's; later ones bring it up to theirs.
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
