"""Compares alerts and dashboard with the program, with the runbook, and with Prometheus' own checks."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.event import REASONS
from bridge.service.metrics import CLOSE_REASONS, GAP_REASONS, GUEST_ENDS, REPLAY_OUTCOMES, Metrics
from deploy.kubernetes.components.alerts import dashboard
from tests.deploy.manifests import named, render, settings
from tests.patience import PATIENCE

ROOT = Path(__file__).parent.parent.parent
ALERTS = ROOT / "deploy/kubernetes/components/alerts"
CASES = sorted(Path(__file__).parent.glob("*_test.yaml"))
RUNBOOK = "https://github.com/example/rabbitmq-sse-bridge/blob/main/docs/alerts.md"

MANIFEST = yaml.safe_load((ALERTS / "alerts.yaml").read_text())
RULES = {rule["alert"]: rule for group in MANIFEST["spec"]["groups"] for rule in group["rules"]}
DASHBOARD = json.loads((ALERTS / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

FROM_KUBERNETES = {
    "kube_deployment_spec_replicas",
    "kube_deployment_status_replicas_ready",
    "kube_horizontalpodautoscaler_spec_max_replicas",
    "kube_horizontalpodautoscaler_spec_min_replicas",
    "kube_horizontalpodautoscaler_status_desired_replicas",
    "kube_pod_container_resource_limits",
    "kube_pod_container_status_waiting_reason",
    "kube_pod_deletion_timestamp",
}
"""Metrics of kube-state-metrics. Check a new one in its documentation."""

FROM_PROMETHEUS = {"up", "ALERTS"}

NOT_WANTED = {
    "process_start_time_seconds": "only its changes are useful, and the dashboard shows those",
    "process_virtual_memory_bytes": "address space is not memory",
    "python_info": "it depends on the image only, and is the same for every pod",
    "python_gc_objects_collected_total": "the number of objects needs no action; the dashboard shows the collections",
    "python_gc_objects_uncollectable_total": "always 0 since Python 3.4",
}

LABELS: dict[tuple[str, str], set[str]] = {
    ("bridge_streams_ended_total", "reason"): set(CLOSE_REASONS),
    ("bridge_guests_ended_total", "reason"): set(GUEST_ENDS),
    ("bridge_events_invalid_total", "reason"): set(REASONS),
    ("bridge_gaps_total", "reason"): set(GAP_REASONS),
    ("bridge_replays_total", "outcome"): set(REPLAY_OUTCOMES),
    ("bridge_requests_refused_total", "code"): {
        code
        for name in ("claims", "web")
        for code in re.findall(
            r'\bcode = "([a-z-]+)"|Problem\(\s*\d+,\s*"([a-z-]+)"',
            (ROOT / f"bridge/service/http/{name}.py").read_text(),
        )
        for code in code
        if code
    },
}


def series() -> dict[str, str]:
    """The name of each series of the program, with the name of its metric."""
    found: dict[str, str] = {}
    for metric in Metrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        found |= {metric.name + suffix: metric.name for suffix in suffixes}
    return found


SERIES = series()


def selectors(expr: str) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """The metrics of a query, each with its matchers: label -> (operator, value)."""
    found = []
    for name, matchers in re.findall(r"\b([a-zA-Z_][a-zA-Z_0-9]*)\s*\{([^}]*)\}", expr):
        parts = re.findall(r'([a-z_]+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers)
        found.append((name, {label: (operator, value) for label, operator, value in parts}))
    return found


def names(expr: str) -> set[str]:
    """Everything in a query that looks like a metric, also without a selector."""
    bare = re.sub(r'"[^"]*"', "", expr)
    return set(re.findall(r"\b(?:bridge|process|python|kube|container)_[a-z_]+", bare))


def dashboard_queries() -> list[str]:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return queries + [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]


QUERIES = [rule["expr"] for rule in RULES.values()] + dashboard_queries()


def promtool(*arguments: str, cwd: Path) -> str:
    # Debian's package `prometheus`; deploy/local/ensure promtool installs it.
    done = subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases(path: Path) -> dict[str, Any]:
    """The cases of a file. A case has only the annotations that depend on it; the others are added from the rules."""
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    for test in document["tests"]:
        for case in test.get("alert_rule_test", []):
            for expected in case.get("exp_alerts", []):
                annotations = RULES[case["alertname"]]["annotations"]
                expected["exp_annotations"] = {**annotations, **expected["exp_annotations"]}
    return document


# The alerts.


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": MANIFEST["spec"]["groups"]}))
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "rules.yaml", cwd=tmp_path)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": MANIFEST["spec"]["groups"]}))
    (tmp_path / path.name).write_text(yaml.safe_dump(cases(path)))
    promtool("test", "rules", path.name, cwd=tmp_path)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires: set[str] = set()
    silent: set[str] = set()
    for path in CASES:
        for test in cases(path)["tests"]:
            for case in test.get("alert_rule_test", []):
                (fires if case.get("exp_alerts") else silent).add(case["alertname"])
    assert fires == set(RULES)
    assert silent == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_an_alert_has_a_severity_a_text_and_a_runbook(name: str) -> None:
    rule = RULES[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert "{{" not in rule["annotations"]["summary"]
    headings = re.findall(r"^###? (.+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}
    address, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert address == RUNBOOK
    assert anchor == name.lower()
    assert anchor in anchors
    # In a list of alerts, the first word of a name says to which program it belongs.
    assert name.startswith("Bridge")


def test_the_runbook_has_no_entry_for_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^### (Bridge\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)) == set(RULES)


def read_runbook() -> str:
    """The runbook as one line: a line may end within a name."""
    text = (ROOT / "docs/alerts.md").read_text()
    return " ".join(text[text.index("\n## Alerts\n") :].partition("\n## The dashboard\n")[0].split())


def test_log_lines_that_the_runbook_names_are_written_by_the_program() -> None:
    runbook = read_runbook()
    source = "".join(path.read_text() for path in (ROOT / "bridge").rglob("*.py"))
    written = set(re.findall(r'(?:_log\.\w+|RareLine)\(\s*"([^"]+)"', source))
    named = set(re.findall(r"logs? (?:says? )?`([a-z][^`]*)`", runbook))
    named |= set(re.findall(r"`([a-z]+(?: [a-z]+)+)`", runbook))
    commands = {text for text in named if text.startswith(("bridge ", "kubectl "))}
    assert len(named - commands) > 15
    assert named - commands <= written


def test_the_dashboard_has_the_panels_that_the_runbook_names() -> None:
    named = set(re.findall(r'"([A-Z][^"]+)"', read_runbook()))
    assert named
    assert named <= {panel["title"] for panel in DASHBOARD["panels"]}


# The queries of alerts and dashboard.


@pytest.mark.parametrize("expr", QUERIES)
def test_a_query_uses_only_metrics_that_exist(expr: str) -> None:
    assert names(expr) <= set(SERIES) | FROM_KUBERNETES
    assert {name for name, _ in selectors(expr)} <= set(SERIES) | FROM_KUBERNETES | FROM_PROMETHEUS
    for name, matchers in selectors(expr):
        # Processes of other programs also have a process_start_time_seconds.
        assert name not in SERIES or "job" in matchers
        for label in ("reason", "outcome", "code"):
            if label in matchers and name in SERIES:
                assert set(matchers[label][1].split("|")) <= LABELS[name, label]


def test_every_series_in_a_query_has_a_selector() -> None:
    for expr in QUERIES:
        assert names(expr) - {"kube_pod_deletion_timestamp"} <= {name for name, _ in selectors(expr)}, expr


def test_the_labels_in_the_tests_are_those_of_the_program() -> None:
    assert "origin-not-allowed" in LABELS["bridge_requests_refused_total", "code"]
    labels: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for metric in Metrics().registry.collect():
        for sample in metric.samples:
            for label, value in sample.labels.items():
                labels[sample.name, label].add(value)
    for (name, label), values in LABELS.items():
        assert (name, label) not in labels or labels[name, label] == values


# The dashboard.


def test_the_dashboard_is_the_one_that_its_source_makes() -> None:
    assert dashboard.dashboard() == DASHBOARD, "run `make exports` to write it again"


def test_the_dashboard_shows_every_metric_or_says_why_not() -> None:
    shown = {SERIES[name] for expr in dashboard_queries() for name in names(expr) if name in SERIES}
    unwanted = {SERIES[name] for name in NOT_WANTED}
    assert shown | unwanted == set(SERIES.values())


def test_prometheus_parses_the_dashboards_queries(tmp_path: Path) -> None:
    # Older versions of promtool cannot check an expression alone, so each becomes a rule.
    rules = []
    for index, expr in enumerate(dashboard_queries()):
        plain = expr.replace("$__rate_interval", "5m")
        assert "$" not in re.sub(r'"\$(namespace|job|pod)"', "", plain)
        rules.append({"record": f"panel:{index}", "expr": plain})
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "rules.yaml", cwd=tmp_path)


def test_panels_have_different_numbers_titles_and_positions() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    positions = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for position in positions:
        assert 0 <= position["x"] < position["x"] + position["w"] <= 24
    for one, two in combinations(positions, 2):
        beside = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        above = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert beside or above, (one, two)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_its_number_means_and_what_is_normal(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 60
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == {"type": "prometheus", "uid": "$datasource"}


def test_the_dashboard_works_for_another_namespace_and_job() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == [
        "datasource",
        "namespace",
        "job",
        "pod",
    ]
    # Flux and envsubst would replace it.
    assert "${" not in json.dumps(DASHBOARD)


# The component.


def test_the_component_ships_both() -> None:
    component = yaml.safe_load((ALERTS / "kustomization.yaml").read_text())
    assert (component["apiVersion"], component["kind"]) == ("kustomize.config.k8s.io/v1alpha1", "Component")
    assert component["resources"] == ["alerts.yaml"]
    (generated,) = component["configMapGenerator"]
    assert generated["options"] == {"disableNameSuffixHash": True, "labels": {"grafana_dashboard": "1"}}
    (entry,) = generated["files"]
    assert (ALERTS / entry.partition("=")[2]).exists()
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert MANIFEST["metadata"]["name"] == "bridge"
    # A ConfigMap may have one MiB in all.
    assert (ALERTS / "dashboard.json").stat().st_size < 500_000


def test_alerts_use_the_names_of_the_manifests() -> None:
    manifests = render("overlays/production")
    monitor = named(manifests, "ServiceMonitor", "bridge")["spec"]
    service = named(manifests, "Service", "bridge-internal")
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "bridge"
    names_by_label = {
        "job": service["metadata"]["labels"][monitor["jobLabel"]],
        "deployment": named(manifests, "Deployment", "bridge")["metadata"]["name"],
        "horizontalpodautoscaler": named(manifests, "HorizontalPodAutoscaler", "bridge")["metadata"]["name"],
        "container": named(manifests, "Deployment", "bridge")["spec"]["template"]["spec"]["containers"][0]["name"],
    }
    for expr in QUERIES:
        for _, matchers in selectors(expr):
            for label, name in names_by_label.items():
                assert label not in matchers or matchers[label][1] in (name, "$job")
    assert named(manifests, "PrometheusRule", "bridge")["metadata"]["namespace"] == service["metadata"]["namespace"]
    shipped = named(manifests, "ConfigMap", "bridge-dashboard")
    assert shipped["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(shipped["data"]["bridge.json"]) == DASHBOARD


def test_metrics_show_a_drain_and_an_ordinary_drain_is_no_alert() -> None:
    manifests = render("overlays/production")
    service = named(manifests, "Service", "bridge-internal")["spec"]
    assert service["publishNotReadyAddresses"], "without it, a pod is not scraped while it is being deleted"
    (endpoint,) = named(manifests, "ServiceMonitor", "bridge")["spec"]["endpoints"]
    assert endpoint["interval"] == "15s"
    pod = named(manifests, "Deployment", "bridge")["spec"]["template"]["spec"]
    pre_stop = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    ordinary = pre_stop + float(settings(manifests)["BRIDGE_DRAIN_SECONDS"]) + 5
    (margin,) = re.findall(r"- (\d+)\s*$", RULES["BridgeDrainTooLong"]["expr"])
    assert ordinary <= pod["terminationGracePeriodSeconds"] - int(margin)
