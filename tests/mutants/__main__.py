"""`python -m tests.mutants [NAME...]`: applies each mutant in a copy of the tree, and shows whether its test fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent.parent


def survives(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in ("bridge", "schemas", "tests", "deploy", "pyproject.toml"):
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        file = Path(folder) / mutant.file
        text = file.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: its text is not in {mutant.file} any more"
        file.write_text(text.replace(mutant.old, mutant.new))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "--hypothesis-profile=mutants",
                mutant.killer,
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):
            sys.exit(f"{mutant.name}: pytest failed to run\n{done.stdout}{done.stderr}")
        return done.returncode == 0


def main() -> None:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    survivors = []
    for mutant in chosen:
        alive = survives(mutant)
        survivors += [mutant.name] if alive else []
        print(f"{'SURVIVED' if alive else 'caught  '}  {mutant.name:40} {mutant.harm}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    sys.exit(1 if survivors else 0)


main()
