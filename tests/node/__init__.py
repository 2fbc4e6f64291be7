"""Runs programs in Node with the packages of `package.json`, which `make test` installs into `.run/node`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / ".run" / "node" / "node_modules"


def find_node() -> str:
    """The command of Node. A missing one fails a test; it does not skip it."""
    node = shutil.which("node")
    assert node, "Node is not installed: run deploy/local/ensure node"
    assert PACKAGES.is_dir(), "the packages of tests/node are not installed: make .run/node/.ready"
    return node


def link_packages(folder: Path) -> None:
    """Lets programs in a folder import the packages."""
    assert PACKAGES.is_dir(), "the packages of tests/node are not installed: make .run/node/.ready"
    (folder / "node_modules").symlink_to(PACKAGES)


def copy_script(script: str, folder: Path) -> Path:
    """Copies a script of this folder to where it finds the packages: Node looks for them beside the script."""
    if not (folder / "node_modules").exists():
        link_packages(folder)
    return Path(shutil.copy(Path(__file__).parent / script, folder / script))


def ask(script: str, question: Any, folder: Path, *arguments: str) -> Any:
    """What a script of this folder prints, as JSON, when it gets `question` as JSON by its standard input."""
    command = [find_node(), str(copy_script(script, folder)), *arguments]
    done = subprocess.run(command, cwd=folder, input=json.dumps(question), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
