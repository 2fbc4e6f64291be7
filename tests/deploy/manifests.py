"""Renders the overlays, as `kubectl apply -k` would send them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))

Manifest = dict[str, Any]


@cache
def render(folder: str) -> list[Manifest]:
    """The objects of `overlays/local`, `base` and so on."""
    # If the machine has no kubectl, or too old a one, deploy/local/ensure has installed one in this folder.
    path = os.pathsep.join([str(KUBERNETES.parents[1] / ".run" / "tools"), os.environ["PATH"]])
    kubectl = shutil.which("kubectl", path=path)
    assert kubectl is not None, "kubectl is missing: deploy/local/ensure kubectl"
    done = subprocess.run([kubectl, "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object; names that Kustomize gave a hash are found without it."""
    found = [
        manifest
        for manifest in of_kind(manifests, kind)
        if manifest["metadata"]["name"] == name or manifest["metadata"]["name"].rpartition("-")[0] == name
    ]
    assert len(found) == 1, (kind, name, [manifest["metadata"]["name"] for manifest in of_kind(manifests, kind)])
    return found[0]


def containers(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each Deployment with each of its containers."""
    for deployment in of_kind(manifests, "Deployment"):
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            yield deployment, container


def bridge(manifests: list[Manifest]) -> tuple[Manifest, Manifest]:
    """The bridge's pod and container."""
    pod = named(manifests, "Deployment", "bridge")["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def settings(manifests: list[Manifest]) -> dict[str, str]:
    data: dict[str, str] = named(manifests, "ConfigMap", "bridge-settings")["data"]
    return data
