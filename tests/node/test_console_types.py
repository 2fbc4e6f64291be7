"""TypeScript's compiler checks the types of the console's modules."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.node import ROOT, ask

CONSOLE = ROOT / "bridge" / "console"

# It has a fault of its own, and faults in its use of the client and of another module.
FAULTY = """// @ts-check
import { subscribe } from "/client.js";
import { clock } from "./dom.js";
subscribe({ url: 1 });
clock("now");
function f(untyped) { return untyped; }
"""


def test_the_console_has_no_type_error(tmp_path: Path) -> None:
    for file in CONSOLE.glob("*.js"):
        shutil.copy(file, tmp_path)
    (tmp_path / "faulty.js").write_text(FAULTY)
    files = sorted(map(str, tmp_path.glob("*.js")))
    paths = {"/client.js": [str(ROOT / "bridge" / "client" / "client.d.ts")]}
    errors = ask("checkjs.mjs", {"files": files, "paths": paths}, tmp_path)
    assert [error for error in errors if not error.startswith("faulty.js:")] == []
    assert [error.partition(": ")[0] for error in errors] == ["faulty.js:4", "faulty.js:5", "faulty.js:6"]


def test_every_module_enables_the_check() -> None:
    for file in CONSOLE.glob("*.js"):
        assert file.read_text().startswith("// @ts-check\n"), file.name
