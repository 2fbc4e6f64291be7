"""Measures the bridge and its peers, one after another on the same broker: `make bench`.

    python -m tests.bench [--rounds 3] [--seconds 10] [--cases users,idle] [--peers bridge,node] [--write docs]

It takes about half an hour. Compare ratios within a run: figures of different runs differ, even on the same machine.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deploy.local.node import Node
from tests.bench import cases, peers, report

Case = Callable[[cases.Bench, peers.Peer], cases.Figures]

COMPARED: dict[str, Case] = {
    "users": cases.users,
    "users-fast": lambda bench, peer: cases.users(bench, peer, rate=6_000),
    "broadcast": cases.broadcast,
    "idle": cases.idle,
    "open": cases.opening,
}
ALONE: dict[str, Case] = {
    "log": cases.log_reading,
    "back": cases.back,
    "restart": cases.restart,
    "killed": cases.killed,
    "big": lambda bench, peer: cases.users(bench, peer, count=10_000, rate=1_000, seconds=30),
}
GROWTH = (100, 500, 1_000, 3_000, 10_000)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of events in each measurement")
    parser.add_argument("--cases", default=",".join([*COMPARED, *ALONE, "growth"]))
    parser.add_argument("--peers", default=",".join(peer.name for peer in peers.PEERS))
    parser.add_argument("--write", type=Path, help="a folder for benchmark.md and benchmark.svg")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that all started processes are ended.
    chosen = options.cases.split(",")
    chosen_peers = [peer for peer in peers.PEERS if peer.name in options.peers.split(",")]
    peers.folder()
    results: report.Results = {}
    began = time.monotonic()

    def record(case: str, peer: str, figures: cases.Figures) -> None:
        results.setdefault(case, {}).setdefault(peer, []).append(figures)
        text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"[{time.monotonic() - began:5.0f} s] {case:10} {peer:12} {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="bridge-bench-") as folder:
        node = Node(Path(folder))
        node.start()
        try:
            bench = cases.Bench(node, options.seconds)
            for round_number in range(options.rounds):
                for case, run in COMPARED.items():
                    for peer in chosen_peers:
                        if case in chosen and case in peer.cases:
                            record(case, peer.name, run(bench, peer))
                for peer in chosen_peers if round_number == 0 else ():
                    if peer.name not in report.FEEDS.values():
                        continue
                    for case, run in ALONE.items():
                        if case in chosen:
                            record(case, peer.name, run(bench, peer))
                    for count in GROWTH if "growth" in chosen else ():
                        figures = cases.users(bench, peer, count=count, rate=1_000)
                        record("growth", peer.name, {"connections": count, **figures})
        except KeyboardInterrupt:
            print("interrupted; the results so far:", file=sys.stderr)
        finally:
            node.remove()

    text = report.markdown(results)
    if "bridge" in options.peers.split(","):
        text = report.verdicts(results) + "\n" + report.OTHERS + "\n" + text
    found = report.warnings(results)
    if found:
        text += "Warnings about the measurement:\n\n" + "\n".join(f"- {warning}" for warning in found) + "\n"
    print(text)
    if options.write is not None:
        (options.write / "benchmark.svg").write_text(report.svg(results))
        (options.write / "benchmark.md").write_text(report.HEADING + report.descriptions() + "\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
