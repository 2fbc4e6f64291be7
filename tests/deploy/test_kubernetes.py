"""The manifests, as a cluster would get them. A server's schema finds few of the usual mistakes; the tests here find
others."""

from __future__ import annotations

import filecmp
import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from bridge.service.health import CHECKS
from bridge.service.metrics import Metrics
from bridge.service.settings import PREFIX, Settings
from tests.deploy.manifests import (
    KUBERNETES,
    OVERLAYS,
    Manifest,
    bridge,
    containers,
    named,
    of_kind,
    render,
    settings,
)

ROOT = KUBERNETES.parents[1]
VERSIONS = ["1.30", "1.31", "1.33", "1.35", "1.37"]
"""Versions of Kubernetes. 1.30 is the first whose preStop can sleep without a shell."""

CUSTOM = json.loads((Path(__file__).parent / "custom_resources.json").read_text())
"""Schemas by API group and kind. They have only the members that the manifests use, so that a misspelt one is found."""

REGISTRY = {"rabbitmq:4"}
"""Images of other projects."""

everywhere = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture
def manifests(overlay: str) -> list[Manifest]:
    return render(f"overlays/{overlay}")


def custom_name(manifest: Manifest) -> str:
    return f"{manifest['apiVersion']} {manifest['kind']}"


@everywhere
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_them(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        if custom_name(manifest) not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


@everywhere
def test_operators_accept_them(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if custom_name(manifest) in CUSTOM:
            jsonschema.validate(manifest, CUSTOM[custom_name(manifest)])


def test_every_component_is_in_some_overlay() -> None:
    used = set()
    for overlay in OVERLAYS:
        kustomization = yaml.safe_load((KUBERNETES / "overlays" / overlay / "kustomization.yaml").read_text())
        used |= {Path(component).name for component in kustomization.get("components", [])}
    assert used == {path.name for path in (KUBERNETES / "components").iterdir()}


@everywhere
def test_names_are_unique(manifests: list[Manifest]) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))


@everywhere
def test_selectors_match_the_right_objects(manifests: list[Manifest]) -> None:
    pods = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in of_kind(manifests, "Deployment")]

    def found(selector: dict[str, str]) -> int:
        return sum(selector.items() <= labels.items() for labels in pods)

    for deployment in of_kind(manifests, "Deployment"):
        assert found(deployment["spec"]["selector"]["matchLabels"]) == 1
        for spread in deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert found(spread["labelSelector"]["matchLabels"]) == 1
    for service in of_kind(manifests, "Service"):
        assert found(service["spec"]["selector"]) == 1, service["metadata"]["name"]
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert found(budget["spec"]["selector"]["matchLabels"]) == 1
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert found(policy["spec"]["podSelector"]["matchLabels"]) == 1
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = [s for s in of_kind(manifests, "Service") if wanted <= s["metadata"].get("labels", {}).items()]
        assert [service["metadata"]["name"] for service in services] == ["bridge-internal"]
        ports = {port["name"] for port in services[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


@everywhere
def test_every_object_that_is_named_exists(manifests: list[Manifest]) -> None:
    exists = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    for secret in of_kind(manifests, "ExternalSecret"):
        exists.add(("Secret", secret["spec"]["target"]["name"]))
    for deployment, container in containers(manifests):
        pod = deployment["spec"]["template"]["spec"]
        if "serviceAccountName" in pod:
            assert ("ServiceAccount", pod["serviceAccountName"]) in exists
        for source in container.get("envFrom", []):
            assert ("ConfigMap", source["configMapRef"]["name"]) in exists
        for variable in container.get("env", []):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            if secret and not secret.get("optional"):
                assert ("Secret", secret["name"]) in exists
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in exists
    for scaler in [*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")]:
        assert ("Deployment", scaler["spec"]["scaleTargetRef"]["name"]) in exists
    for user in of_kind(manifests, "User"):
        if "importCredentialsSecret" in user["spec"]:
            assert ("Secret", user["spec"]["importCredentialsSecret"]["name"]) in exists
    users = {user["metadata"]["name"] for user in of_kind(manifests, "User")}
    for permission in [*of_kind(manifests, "Permission"), *of_kind(manifests, "TopicPermission")]:
        assert permission["spec"]["userReference"]["name"] in users


@everywhere
def test_secret_keys_exist(manifests: list[Manifest]) -> None:
    keys = {secret["metadata"]["name"]: set(secret["data"]) for secret in of_kind(manifests, "Secret")}
    for secret in of_kind(manifests, "ExternalSecret"):
        made = secret["spec"]["target"].get("template", {}).get("data", {})
        keys[secret["spec"]["target"]["name"]] = set(made) | {
            entry["secretKey"] for entry in secret["spec"].get("data", [])
        }
    for _, container in containers(manifests):
        for variable in container.get("env", []):
            wanted = variable.get("valueFrom", {}).get("secretKeyRef")
            if wanted and wanted["name"] in keys:
                assert wanted["key"] in keys[wanted["name"]]
    for user in of_kind(manifests, "User"):
        if "importCredentialsSecret" in user["spec"]:
            assert keys[user["spec"]["importCredentialsSecret"]["name"]] == {"username", "password"}


def test_the_base_has_no_secret() -> None:
    for folder in ["base", "overlays/production", "overlays/production-keda"]:
        assert not of_kind(render(folder), "Secret")
    assert "password" not in json.dumps(render("base")).lower()


@everywhere
def test_ports_are_there_and_well_named(manifests: list[Manifest]) -> None:
    ports = {}
    for deployment, container in containers(manifests):
        names = [port["name"] for port in container["ports"]]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,14}", name) for name in names)
        ports[deployment["metadata"]["name"]] = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"]:
            asked = container.get(probe, {})
            action = asked.get("httpGet") or asked.get("tcpSocket")
            if action:
                assert action["port"] in names, f"{probe} asks a port that nothing listens on"
    for service in of_kind(manifests, "Service"):
        owner = service["spec"]["selector"]["app.kubernetes.io/name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports[owner]
    services = {
        service["metadata"]["name"]: {p["name"]: p["port"] for p in service["spec"]["ports"]}
        for service in of_kind(manifests, "Service")
    }
    for route in of_kind(manifests, "HTTPRoute"):
        for backend in [backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]]:
            assert backend["port"] in services[backend["name"]].values()
            assert backend["name"] != "bridge-internal"
    for ingress in of_kind(manifests, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                assert service["port"]["name"] in services[service["name"]]
                assert service["name"] != "bridge-internal"


@everywhere
def test_the_program_listens_where_the_manifests_say(manifests: list[Manifest]) -> None:
    _, container = bridge(manifests)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    given = settings(manifests)
    assert given["BRIDGE_BIND"] == f"0.0.0.0:{ports['http']}"
    assert given["BRIDGE_INTERNAL_BIND"] == f"0.0.0.0:{ports['internal']}"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    path, _, query = container["readinessProbe"]["httpGet"]["path"].partition("?")
    assert path == "/readyz"
    assert {part.removeprefix("exclude=") for part in query.split("&")} == CHECKS
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"]:
        assert container[probe]["httpGet"]["port"] == "internal"


@everywhere
def test_every_setting_exists_and_is_valid(manifests: list[Manifest]) -> None:
    _, container = bridge(manifests)
    named_here = dict(settings(manifests))
    named_here |= {variable["name"]: variable.get("value", "") for variable in container["env"]}
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert {name for name in named_here if name.startswith(PREFIX)} <= known
    values = {name.removeprefix(PREFIX).lower(): value for name, value in settings(manifests).items()}
    Settings(**values)  # type: ignore[arg-type]  # As the environment would give them: text.


def _quantity(text: str) -> float:
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    match = re.fullmatch(r"(\d+)(m|Ki|Mi|Gi)?", text)
    assert match is not None, text
    return int(match[1]) * units.get(match[2] or "", 1)


@everywhere
def test_containers_have_only_the_rights_that_they_need(manifests: list[Manifest]) -> None:
    for deployment, container in containers(manifests):
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        for resource, amount in container["resources"]["limits"].items():
            assert _quantity(container["resources"]["requests"][resource]) <= _quantity(amount)
        assert "memory" in container["resources"]["limits"]
    _, container = bridge(manifests)
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert "cpu" not in container["resources"]["limits"], "throttling delays heartbeats"


@everywhere
def test_a_pod_has_the_time_that_a_drain_needs(manifests: list[Manifest]) -> None:
    deployment = named(manifests, "Deployment", "bridge")["spec"]
    pod, container = bridge(manifests)
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(settings(manifests)["BRIDGE_DRAIN_SECONDS"])
    readiness = container["readinessProbe"]
    unready = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert pre_stop >= 5, "proxies must remove the pod before it stops"
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + drain + 5 + 10
    assert deployment["minReadySeconds"] >= pre_stop + 2 * drain, (
        "otherwise clients of one drain return during the next"
    )
    startup = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert deployment["progressDeadlineSeconds"] > startup + deployment["minReadySeconds"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > 5 * unready, "readiness is fast, liveness slow"


@everywhere
def test_a_drain_does_not_return_more_clients_than_a_broker_can_take(manifests: list[Manifest]) -> None:
    """Streams end evenly over the drain, and pauses are evenly spread up to the same length. So the rate of returning
    clients is highest in the middle of the two. A client that waits longer than 20 s gets `busy`."""
    if named(manifests, "Deployment", "bridge")["spec"].get("replicas") == 1:
        return
    given = settings(manifests)
    drain = float(given["BRIDGE_DRAIN_SECONDS"])
    highest = int(given["BRIDGE_MAX_CONNECTIONS"]) / drain
    takes = 200  # Queues a second of a busy broker: measured were 185 to 345 (docs/benchmark.md, 2,000 opened at once).
    too_many = max(0.0, highest - takes)
    behind = too_many * drain * too_many / highest
    assert behind / takes < 15


@everywhere
def test_budget_and_autoscaler_make_sense(manifests: list[Manifest]) -> None:
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert ("maxUnavailable" in budget["spec"]) != ("minAvailable" in budget["spec"])
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    replicas = named(manifests, "Deployment", "bridge")["spec"].get("replicas")
    limit = int(settings(manifests)["BRIDGE_MAX_CONNECTIONS"])
    scalers = [*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")]
    assert (replicas is None) == bool(scalers), "one owner of the number of pods"
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        assert 3 <= scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
        wanted = scaler["spec"]["metrics"][0]["pods"]["target"]["averageValue"]
        assert 0.6 <= int(wanted) / limit <= 0.7
    for scaler in of_kind(manifests, "ScaledObject"):
        assert 3 <= scaler["spec"]["minReplicaCount"] < scaler["spec"]["maxReplicaCount"]
        trigger, processor = scaler["spec"]["triggers"]
        assert processor["type"] == "cpu"
        assert 0.6 <= int(trigger["metadata"]["threshold"]) / limit <= 0.7
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert scaler["spec"]["minReplicaCount"] <= scaler["spec"]["fallback"]["replicas"]
        assert f'namespace="{scaler["metadata"]["namespace"]}"' in trigger["metadata"]["query"]


@everywhere
def test_the_network_policy_allows_only_what_is_named(manifests: list[Manifest]) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    own = {"app.kubernetes.io/name", "app.kubernetes.io/part-of"}
    for rule in policy["spec"]["egress"]:
        assert rule["to"], "a rule without `to` allows every address"
        assert rule["ports"]
        for peer in rule["to"]:
            # Kustomize's `includeSelectors` also writes the bridge's labels into peers, which do not have them.
            assert not own & set(peer.get("podSelector", {}).get("matchLabels", {}))
            if "ipBlock" in peer:
                whole = ipaddress.ip_network(peer["ipBlock"]["cidr"])
                assert all(
                    ipaddress.ip_network(part).subnet_of(whole)  # type: ignore[arg-type]
                    for part in peer["ipBlock"].get("except", [])
                )
    for rule in policy["spec"]["ingress"]:
        ports = {port["port"] for port in rule["ports"]}
        assert "internal" not in ports or rule["from"], "metrics are not open to every pod"


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, path)
    else:
        yield path, value


@everywhere
def test_what_must_be_text_is_text(manifests: list[Manifest]) -> None:
    """YAML reads `off` as a boolean and 60 as a number. A server then refuses the object, or uses a wrong value."""
    for manifest in manifests:
        for path, value in _texts(manifest):
            if re.search(r"\.(labels|annotations|matchLabels|data)\.[^.]+", path) or path.endswith(".env.value"):
                assert isinstance(value, str), f"{manifest['kind']} {path}: {value!r}"
            if path.endswith((".cpu", ".memory")):
                assert isinstance(value, str)


@everywhere
def test_images_have_a_version(manifests: list[Manifest]) -> None:
    for _, container in containers(manifests):
        image = container["image"]
        assert image in REGISTRY or re.fullmatch(r"\S+:\d\S+", image), image
        assert not image.endswith(":latest")


@everywhere
def test_metrics_exist(manifests: list[Manifest]) -> None:
    real = {sample.name for metric in Metrics().registry.collect() for sample in metric.samples}
    text = json.dumps([m for m in manifests if m["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")])
    assert set(re.findall(r"\bbridge_[a-z_]+", text)) <= real


def test_the_catalogue_is_the_example_of_the_repository() -> None:
    """Kustomize reads no files from outside its folder, so the example is a copy."""
    copy = KUBERNETES / "base" / "catalogue"
    names = sorted(path.name for path in (ROOT / "schemas").glob("*.py"))
    assert sorted(path.name for path in copy.iterdir()) == names
    assert filecmp.cmpfiles(copy, ROOT / "schemas", names, shallow=False)[0] == names
    assert set(named(render("base"), "ConfigMap", "bridge-catalogue")["data"]) == set(names)
    _, container = bridge(render("base"))
    (mount,) = container["volumeMounts"]
    path = next(variable["value"] for variable in container["env"] if variable["name"] == "PYTHONPATH")
    assert mount["mountPath"] == f"{path}/schemas"


@everywhere
def test_the_log_is_declared_as_the_settings_say(manifests: list[Manifest]) -> None:
    """With the shipped rights the bridge uses the log that exists: it may not compare it with its settings."""
    defaults = Settings.model_fields
    given = settings(manifests)
    for queue in of_kind(manifests, "Queue"):
        if queue["spec"]["type"] == "stream":
            assert queue["spec"]["name"] == given.get("BRIDGE_LOG", defaults["log"].default)
            arguments = queue["spec"]["arguments"]
            assert arguments["x-max-age"] == given.get("BRIDGE_LOG_MAX_AGE", defaults["log_max_age"].default)
            size = given.get("BRIDGE_LOG_MAX_BYTES", defaults["log_max_bytes"].default)
            assert arguments["x-max-length-bytes"] == int(size)


def test_with_an_identity_provider_no_secret_signs_tokens() -> None:
    manifests = render("overlays/production-keda")
    assert "BRIDGE_JWKS" in settings(manifests)
    _, container = bridge(manifests)
    assert "BRIDGE_JWT_SECRET" not in {variable["name"] for variable in container["env"]}
    assert "bridge-jwt" not in {manifest["metadata"]["name"] for manifest in manifests}


def test_with_a_catalogue_in_the_image_nothing_is_mounted() -> None:
    manifests = render("overlays/production-keda")
    _, container = bridge(manifests)
    assert "PYTHONPATH" not in {variable["name"] for variable in container["env"]}
    assert not container.get("volumeMounts")
    assert [m for m in of_kind(manifests, "ConfigMap") if "catalogue" in m["metadata"]["name"]] == []


def test_the_numbers_in_kubernetes_md_are_those_of_the_manifests() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    manifests = render("base")
    pod, container = bridge(manifests)
    deployment = named(manifests, "Deployment", "bridge")["spec"]
    drain = settings(manifests)["BRIDGE_DRAIN_SECONDS"]
    for what in [
        f"preStop {container['lifecycle']['preStop']['sleep']['seconds']} s",
        f"drain {drain} s",
        f"grace period {pod['terminationGracePeriodSeconds']} s",
        f"minReadySeconds {deployment['minReadySeconds']}",
    ]:
        assert what in page, what
