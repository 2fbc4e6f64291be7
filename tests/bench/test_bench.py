"""A short run of the benchmark: it checks that the figures are plausible, not how good they are."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from deploy.local.node import Node
from tests.bench import cases, peers, report

pytestmark = pytest.mark.any_rabbitmq

BRIDGE = peers.PEERS[0]


def test_a_round_of_the_bridge_and_its_report(node: Node) -> None:
    peers.folder()
    bench = cases.Bench(node, seconds=1.0)
    figures = cases.users(bench, BRIDGE, count=20, rate=200)
    assert (figures["missing"], figures["twice"]) == (0, 0)
    assert figures["server_us"] > 0
    assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]
    results: report.Results = {"users": {"bridge": [figures]}, "idle": {"bridge": [{"server_kb": 7, "broker_kb": 25}]}}
    text = report.markdown(results) + report.verdicts(results)
    assert text.count("| bridge |") == 2
    ElementTree.fromstring(report.svg(results))


def test_it_warns_if_load_or_publisher_was_the_bottleneck() -> None:
    busy = {"load_share": 0.95, "publisher_share": 0.1, "publisher_late_s": 0.5, "missing": 3.0}
    assert report.warnings({"users": {"node": [busy]}}) == [
        "users/node: 3 events had not arrived at the end",
        "users/node: load was at 95% of a core",
        "users/node: the publisher was 0.50 s late",
    ]
