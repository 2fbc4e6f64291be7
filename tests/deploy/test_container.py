"""Checks of the Dockerfiles. `make image` builds and runs the images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge import __version__
from tests.deploy.manifests import render

CONTAINER = Path(__file__).parents[2] / "deploy" / "container"


@pytest.mark.parametrize("name", ["Dockerfile", "catalogue.Dockerfile"])
def test_hadolint_reports_nothing(name: str) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, "--no-color", "--config", CONTAINER / "hadolint.yaml", CONTAINER / name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_the_build_gets_exactly_what_it_copies() -> None:
    """A file that the ignore file does not name does not exist for the build."""
    copied = {
        word.removeprefix("./")
        for line in (CONTAINER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    lines = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


def test_the_manifests_run_this_version() -> None:
    deployment = next(manifest for manifest in render("base") if manifest["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"rabbitmq-sse-bridge:{__version__}"
    assert f"rabbitmq-sse-bridge:{__version__}" in (CONTAINER / "catalogue.Dockerfile").read_text()
    assert f"rabbitmq-sse-bridge:{__version__}" in (CONTAINER.parent / "compose.yaml").read_text()
