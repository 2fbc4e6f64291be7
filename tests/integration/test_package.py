"""The wheel: which top-level names it installs, and that a user's `schemas/` works beside it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.service import ROOT, bare_environment

MODEL = 'from bridge import EventData\nclass {0}(EventData, type="{1}"):\n    number: int = 0\n'


def pip(*args: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, args)]
    subprocess.run(command, check=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # No index: the build packages are installed here.
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, ROOT)
    (made,) = folder.glob("*.whl")
    return made


class Installed:
    """A virtual environment with the wheel. Its dependencies are those of the tests."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.wheel = wheel
        self.python = folder / "bin" / "python"
        self.bridge = folder / "bin" / "bridge"
        (self.site,) = (folder / "lib").glob("python*/site-packages")
        self.pip("install", "--no-index", "--no-deps", wheel)
        # The tests' site-packages come after its own. Python reads no path files in a folder that is added so;
        # otherwise the path file there would add this repository.
        (self.site / "dependencies.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")

    def pip(self, *args: str | Path) -> None:
        pip("--python", self.python, *args)

    def run(self, *command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        without = {name: value for name, value in bare_environment().items() if name != "PYTHONPATH"}
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env={**without, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def types(self, cwd: Path, **variables: str) -> list[str]:
        done = self.run(self.bridge, "schemas", "export", cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))


@pytest.fixture
def installed(tmp_path: Path, wheel: Path) -> Installed:
    return Installed(tmp_path / "venv", wheel)


def write(folder: Path, name: str, event_type: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").touch()
    file = folder / f"{name.lower()}.py"
    file.write_text(MODEL.format(name, event_type))
    return file


@pytest.mark.contract("4.3")
def test_the_wheel_installs_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"bridge"}
    samples = {name for name in names if name.startswith("bridge/samples/")}
    assert "bridge/samples/jobs.py" in samples
    assert {Path(name).suffix for name in samples} == {".py"}
    assert "bridge/py.typed" in names


@pytest.mark.contract("5.73")
def test_the_users_catalogue_is_found_and_is_not_overwritten(installed: Installed, tmp_path: Path) -> None:
    """In the target folder itself, where an installed `schemas` would overwrite it."""
    file = write(installed.site / "schemas", "Jobs", "mine.installed")
    text = file.read_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert installed.types(empty) == ["mine.installed"]
    assert "job.completed" in installed.types(empty, BRIDGE_SCHEMAS="bridge.samples")
    # A folder on PYTHONPATH comes before an installed package, and the working directory before both.
    write(tmp_path / "path" / "schemas", "Jobs", "mine.path")
    write(tmp_path / "here" / "schemas", "Jobs", "mine.here")
    path = str(tmp_path / "path")
    assert installed.types(empty, PYTHONPATH=path) == ["mine.path"]
    assert installed.types(tmp_path / "here", PYTHONPATH=path) == ["mine.here"]
    done = installed.run(installed.python, "-m", "bridge", "schemas", "export", cwd=tmp_path / "here", PYTHONPATH=path)
    assert list(json.loads(done.stdout)) == ["mine.here"]
    # PYTHONSAFEPATH leaves the working directory out, as for Python itself.
    assert installed.types(tmp_path / "here", PYTHONSAFEPATH="1", PYTHONPATH=path) == ["mine.path"]

    installed.pip("install", "--no-index", "--no-deps", "--force-reinstall", installed.wheel)
    assert file.read_text() == text
    installed.pip("uninstall", "--yes", "rabbitmq-sse-bridge")
    assert not (installed.site / "bridge").exists()
    assert file.read_text() == text


def test_without_a_catalogue_it_says_what_to_do(installed: Installed, tmp_path: Path) -> None:
    done = installed.run(installed.bridge, "schemas", "export", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no package 'schemas' (BRIDGE_SCHEMAS" in done.stderr
    assert str(tmp_path) in done.stderr
    assert "BRIDGE_SCHEMAS=bridge.samples" in done.stderr


@pytest.mark.contract("5.73")
def test_files_in_the_working_directory_replace_no_module_of_the_bridge(installed: Installed, tmp_path: Path) -> None:
    """The command imports its own modules first. A command that needs no catalogue loads none."""
    for name in ["secrets", "hmac", "quart", "jwt", "structlog", "bridge"]:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the {name} of the working directory')\n")
    write(tmp_path / "schemas", "Jobs", "mine.here")
    assert installed.types(tmp_path) == ["mine.here"]
    secret = "a-secret-of-the-tests-0123456789abcdef"
    done = installed.run(installed.bridge, "token", "--user", "42", cwd=tmp_path, BRIDGE_JWT_SECRET=secret)
    assert done.returncode == 0, done.stderr
