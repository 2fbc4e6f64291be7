"""Makes tables and a plot of the rounds: medians with their spread, ratios, and warnings about the measurement."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.bench.cases import Figures
from tests.bench.peers import PEERS, python

Results = dict[str, dict[str, list[Figures]]]
"""By case, by peer: the figures of each round."""

HEADING = """# The bridge beside its peers

Reference, for readers who choose or change the bridge: CPU, memory and latency, beside comparable
programs. `make bench` writes this page. Compare ratios within a run, not figures of different runs.
[speed.md](speed.md) says where an event's time goes.

![benchmark](benchmark.svg)

"""

BUSY_SHARE = 0.8
LATE_SECONDS = 0.1


def median(rounds: Sequence[Figures], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def spread(rounds: Sequence[Figures], name: str, *, digits: int = 0) -> str:
    values = [figures[name] for figures in rounds]
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(results: Results, case: str, name: str, peer: str, *, of: str = "bridge") -> float | None:
    rounds = results.get(case, {})
    if of not in rounds or peer not in rounds:
        return None
    return median(rounds[of], name) / median(rounds[peer], name)


def machine() -> str:
    """A description of the machine, for readers of the figures."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    node, servers_python = (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.strip()
        for command in ("node", python())
    )
    return (
        f"{os.cpu_count()} processors ({processor}), shared by broker, server, load and publisher. "
        f"Linux {platform.release()}, Node {node}, {servers_python}."
    )


_COLUMNS = {
    "users": [("server_us", "CPU µs/event", 0), ("broker_us", "broker µs/event", 0), ("p50_ms", "p50 ms", 1),
              ("p99_ms", "p99 ms", 1), ("missing", "missing", 0)],
    "idle": [("server_kb", "KB/connection", 1), ("broker_kb", "broker KB/connection", 1)],
    "open": [("seconds", "seconds", 2), ("server_us", "CPU µs each", 0), ("broker_us", "broker µs each", 0)],
}  # fmt: skip
_COLUMNS["users-fast"] = _COLUMNS["broadcast"] = _COLUMNS["users"]

_TITLES = {
    "users": "500 users with one connection each, 2,000 events a second",
    "users-fast": "The same at 6,000 events a second",
    "broadcast": "10 broadcasts a second to 1,000 connections (an event is one delivery)",
    "idle": "Memory of each idle connection: the slope from 500 to 2,500, opened one by one",
    "open": "2,000 connections opened at once, until each is ready",
}

_ALONE = {
    "big": "10,000 connections, 1,000 events a second",
    "back": "2,000 clients return at once, each 30 s behind at 1,000 events a second",
    "log": "One client resumes from a log of 300,000 entries, nearly none of them its own",
    "restart": "RabbitMQ is killed and started again with 3,000 open streams",
    "killed": "A process with 5,000 streams is killed while a publisher waits for each confirm",
}


def markdown(results: Results) -> str:
    # In the case `growth`, each size was measured once.
    compared = [peers for case, peers in results.items() if case != "growth"]
    rounds = max((len(measured) for peers in compared for measured in peers.values()), default=0)
    lines = [f"Medians of {rounds} rounds (smallest to largest)." if rounds > 1 else "One round.", machine(), ""]
    for case, title in _TITLES.items():
        if case not in results:
            continue
        columns = _COLUMNS[case]
        first = columns[0][0]
        lines += [f"**{title}**", ""]
        lines += [f"| | {' | '.join(name for _, name, _ in columns)} | ratio to node |"]
        lines += ["| --- |" + " ---: |" * (len(columns) + 1)]
        for peer, measured in results[case].items():
            cells = [spread(measured, name, digits=digits) for name, _, digits in columns]
            of_node = ratio(results, case, first, "node", of=peer)
            lines.append(f"| {peer} | {' | '.join(cells)} | {'' if of_node is None else f'{of_node:.2f}'} |")
        lines.append("")
    for case, title in _ALONE.items():
        for peer, measured in results.get(case, {}).items():
            lines += [f"**{title}** ({peer})", ""]
            lines += [f"- {name}: {spread(measured, name, digits=2)}" for name in measured[0]]
            lines.append("")
    for peer, grown in results.get("growth", {}).items():
        lines += [f"**Growth, at 1,000 events a second** ({peer})", "", "| connections | CPU µs/event | p99 ms | MB |"]
        lines += ["| ---: | ---: | ---: | ---: |"]
        for figures in grown:
            lines.append(
                f"| {figures['connections']:.0f} | {figures['server_us']:.0f} | {figures['p99_ms']:.1f} | "
                f"{figures['resident_mb']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines) + "\n"


FEEDS = {"queues": "bridge", "log": "bridge-log"}
"""The peer for each `BRIDGE_FEED`."""

TARGETS: list[tuple[str, str, str, str | None, tuple[float | None, float | None]]] = [
    ("2,000/s: CPU, ratio to node", "users", "server_us", "node", (1.0, 0.6)),
    ("2,000/s: p50 ms", "users", "p50_ms", None, (3, 3)),
    ("2,000/s: CPU of RabbitMQ, ratio to node", "users", "broker_us", "node", (1.0, 0.6)),
    ("6,000/s: CPU, ratio to node", "users-fast", "server_us", "node", (0.9, 0.6)),
    ("6,000/s: CPU of RabbitMQ, ratio to node", "users-fast", "broker_us", "node", (1.0, 0.6)),
    ("broadcast: CPU, ratio to node-shared", "broadcast", "server_us", "node-shared", (1.0, 1.0)),
    ("broadcast: CPU, ratio to nchan", "broadcast", "server_us", "nchan", (None, 1.0)),
    ("idle connection: KB", "idle", "server_kb", None, (6, 5)),
    ("opening 2,000: seconds, ratio to node", "open", "seconds", "node", (0.8, 0.1)),
    ("RabbitMQ killed: all of 3,000 live, s", "restart", "all_live_s", None, (3, 1)),
    ("a replica with 5,000 streams killed: longest wait of a publisher, ms", "killed", "stall_ms", None, (None, 50)),
    ("10,000 connections: CPU, ratio to 500", "growth", "of_500", None, (1.2, 1.2)),
    ("10,000 connections: p99 ms", "big", "p99_ms", None, (250, 250)),
    ("10,000 connections: missing", "big", "missing", None, (0, 0)),
    ("10,000 connections: longest silence, s", "big", "longest_silence_s", None, (16, 16)),
    ("2,000 clients return: all live, s", "back", "all_live_s", None, (15, 15)),
    ("2,000 clients return: p99 ms of the others", "back", "live_p99_ms", None, (1_000, 1_000)),
    ("2,000 clients return: missing", "back", "missing", None, (0, 0)),
    ("the log: entries for each CPU second", "log", "entries_per_cpu_s", None, (-50_000, -50_000)),
]
"""Title, case, figure, peer for a ratio, and the limits for both feeds: the highest allowed value, the lowest one if it
is negative, or none."""

OTHERS = """\
Published by others, on other machines, so not comparable with the figures here. Centrifugo: one million
WebSocket connections with 30 million deliveries a minute, on "hardware comparable to one modern server
machine" ([its description](https://sourceforge.net/projects/centrifugo.mirror/)). Mercure: about 40,000
concurrent connections on a t3.micro ([cited here](https://github.com/dunglas/mercure/discussions/1167)).
"""


def measured(results: Results, case: str, name: str, peer: str | None, bridge: str) -> float | None:
    found = results.get(case, {}).get(bridge)
    if not found:
        return None
    if name == "of_500":
        cost = {figures["connections"]: figures["server_us"] for figures in found}
        return cost[10_000] / cost[500] if {500, 10_000} <= cost.keys() else None
    return median(found, name) if peer is None else ratio(results, case, name, peer, of=bridge)


def verdicts(results: Results) -> str:
    """The table of targets, with two columns for each feed."""
    lines = [f"| target |{''.join(f' {feed} | |' for feed in FEEDS)}", "| --- |" + " ---: | --- |" * len(FEEDS)]
    for title, case, name, peer, limits in TARGETS:
        cells = []
        for bridge, limit in zip(FEEDS.values(), limits, strict=True):
            value = measured(results, case, name, peer, bridge)
            if value is None:
                cells.append(" | |")
            elif limit is None:
                cells.append(f" {value:.4g} | no target |")
            else:
                is_met = value <= limit if limit >= 0 else value >= -limit
                sign = "at most" if limit >= 0 else "at least"
                cells.append(f" {value:.4g} | {'' if is_met else '**not** '}{sign} {abs(limit):,g} |")
        if any(cell != " | |" for cell in cells):
            lines.append(f"| {title} |{''.join(cells)}")
    return "\n".join(lines) + "\n"


def warnings(results: Results) -> list[str]:
    """Cases in which load or publisher may have been the bottleneck."""
    found = []
    for case, peers in results.items():
        for peer, rounds in peers.items():
            for figures in rounds:
                for instrument in ("load_share", "publisher_share"):
                    if figures.get(instrument, 0) > BUSY_SHARE:
                        share = figures[instrument]
                        found.append(f"{case}/{peer}: {instrument.partition('_')[0]} was at {share:.0%} of a core")
                if figures.get("publisher_late_s", 0) > LATE_SECONDS:
                    found.append(f"{case}/{peer}: the publisher was {figures['publisher_late_s']:.2f} s late")
                if figures.get("missing", 0) > 0:
                    found.append(f"{case}/{peer}: {figures['missing']:.0f} events had not arrived at the end")
    return sorted(set(found))


_COLOURS = dict.fromkeys(FEEDS.values(), "#1a6fb4")


def svg(results: Results) -> str:
    """Bars for each case of CPU and memory, and the bridge's cost by the number of connections."""
    charts = [
        (title, [(peer, median(rounds, "server_us")) for peer, rounds in results[case].items()])
        for case, title in (
            ("users", "CPU µs for each event, 2,000/s"),
            ("users-fast", "CPU µs for each event, 6,000/s"),
            ("broadcast", "CPU µs for each delivery of a broadcast"),
        )
        if case in results
    ]
    if "idle" in results:
        charts.append(
            ("KB for each idle connection", [(peer, median(r, "server_kb")) for peer, r in results["idle"].items()])
        )
    if grown := results.get("growth", {}).get("bridge"):
        charts.append(
            ("CPU µs for each event by connections", [(f"{f['connections']:.0f}", f["server_us"]) for f in grown])
        )
        charts.append(("Resident MB by connections", [(f"{f['connections']:.0f}", f["resident_mb"]) for f in grown]))
    parts, top = [], 10
    for title, bars in charts:
        parts.append(f'<text x="10" y="{top + 14}" font-weight="bold">{title}</text>')
        top += 24
        longest = max(value for _, value in bars)
        for name, value in bars:
            width = max(1.0, 420 * value / longest)
            colour = _COLOURS.get(name, "#8a94a0")
            parts.append(f'<text x="110" y="{top + 13}" text-anchor="end">{name}</text>')
            parts.append(f'<rect x="118" y="{top + 2}" width="{width:.0f}" height="14" fill="{colour}"/>')
            parts.append(f'<text x="{124 + width:.0f}" y="{top + 13}">{value:.3g}</text>')
            top += 19
        top += 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 {top}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="620" height="{top}" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def descriptions() -> str:
    return "\n".join(f"- `{peer.name}`: {peer.about}" for peer in PEERS) + "\n"
