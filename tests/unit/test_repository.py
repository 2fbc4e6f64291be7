"""Rules for the files themselves: the direction of imports, the contents of lock files, the promises of docs."""

from __future__ import annotations

import ast
import gzip
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck

from bridge.service.metrics import Metrics
from bridge.service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent.parent
BRIDGE = ROOT / "bridge"

# Lowest first; a file imports only from the lines above its own. Three parts: SDK, catalogue, service.
LAYERS = [
    ["routing", "amqp", "trial"],
    ["event"],
    ["roundtrip", "sender"],
    ["publisher"],
    ["blocking"],
    ["testing"],
    ["pytest_plugin"],
    ["catalogue.dialects", "catalogue.evolution"],
    ["catalogue.facts"],
    ["catalogue.load"],
    ["catalogue.exports"],
    ["service.broker.properties"],
    [
        "service.health",
        "service.clock",
        "service.budgets",
        "service.descriptors",
        "service.http.claims",
        "service.broker.deliveries",
        "service.broker.gathering",
        "service.forms",
        "service.captured",
        "service.revocations",
    ],
    ["service.logs", "service.http.requesthead"],
    ["service.streams.sse", "service.streams.cursor", "service.streams.deadlines"],
    [
        "service.streams.streamevent",
        "service.http.headers",
        "service.http.keys",
        "service.http.login",
        "service.broker.consumer",
    ],
    ["service.broker.scans", "service.streams.progress"],
    ["service.streams.recall"],
    ["service.streams.session", "service.settings", "service.metrics", "service.http.auth", "service.http.openapi"],
    ["service.broker.topology"],
    ["service.broker.eventlog", "service.broker.feed", "service.broker.quarantine", "service.http.entrance"],
    ["service.broker.live", "service.broker.tail", "service.broker.control"],
    ["service.streams.reader", "service.broker.lookup"],
    ["service.streams.hub"],
    ["service.tracing"],
    ["service.streams.writer"],
    ["service.http.web"],
    ["service.http.http1"],
    ["service.main"],
    ["cli"],
    ["__main__"],
]
PURE = [
    *("routing", "event", "trial", "catalogue.dialects", "catalogue.evolution", "catalogue.exports"),
    *("service.health", "service.broker.deliveries", "service.budgets", "service.broker.scans"),
    *(
        "service.broker.gathering",
        "service.broker.properties",
        "service.forms",
        "service.captured",
        "service.revocations",
    ),
    *("service.http.claims", "service.http.headers", "service.http.openapi", "service.http.requesthead"),
    *("service.streams.sse", "service.streams.cursor", "service.streams.deadlines"),
    *("service.streams.streamevent", "service.streams.progress", "service.streams.recall", "service.streams.session"),
]
IMPURE = {"asyncio", "time", "random", "logging", "structlog", "os", "socket", "secrets", "datetime", "threading"}
FILES = {
    ".".join(path.relative_to(BRIDGE).with_suffix("").parts): path
    for path in BRIDGE.rglob("*.py")
    if path.stem != "__init__" and "samples" not in path.parts
}


def imports_of(node: ast.AST) -> set[str]:
    """The modules that a tree imports, by their full names."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom) and inner.module:
            found.add(inner.module)
            if inner.module.partition(".")[0] == "bridge":
                found |= {f"{inner.module}.{alias.name}" for alias in inner.names}
    return found


@cache
def imports(name: str) -> set[str]:
    return imports_of(ast.parse(FILES[name].read_text()))


def test_a_class_name_is_used_once_in_the_package() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "bridge").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name.lstrip("_"), []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_every_file_has_its_layer() -> None:
    assert set(FILES) == {name for layer in LAYERS for name in layer}


def test_imports_point_one_way() -> None:
    height = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    for name, level in height.items():
        for imported in imports(name):
            target = imported.removeprefix("bridge.")
            if (name, target) == ("publisher", "blocking"):
                continue  # `Publisher.blocking` imports it when it is called.
            if imported.startswith("bridge.") and target in height:
                assert height[target] < level or name == target, f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(name for name in FILES if not name.startswith("service.")))
def test_nothing_outside_the_service_imports_it(name: str) -> None:
    """The command line imports it when a command runs: the installation of a worker does not have the service."""
    tree = ast.parse(FILES[name].read_text())
    if name == "cli":
        at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = set().union(*map(imports_of, at_import))
    else:
        found = imports_of(tree)
    assert not {imported for imported in found if imported.startswith("bridge.service")}


@pytest.mark.parametrize("name", PURE)
def test_pure_files_have_no_clock_no_chance_and_no_io(name: str) -> None:
    assert not {found.partition(".")[0] for found in imports(name)} & IMPURE


TESTED_ELSEWHERE = {
    "__main__": "one line; test_cli.py runs it as a process",
    "catalogue.load": "its file is test_catalogue.py",
}
"""Modules without a unit file of their own name, each with the reason."""


def test_every_module_has_a_unit_file() -> None:
    found = {path.stem.removeprefix("test_") for path in (ROOT / "tests/unit").glob("test_*.py")}
    missing = {name for name in FILES if name.rpartition(".")[2] not in found}
    assert missing == set(TESTED_ELSEWHERE)


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("quart", {"service.http.web", "service.http.http1", "cli"}),
        ("hypercorn", {"service.http.http1", "cli"}),
        ("pydantic_settings", {"service.settings"}),
        ("jwt", {"service.http.auth", "service.http.keys"}),
        ("opentelemetry", {"service.tracing", "publisher"}),
        ("aio_pika.exceptions", {"amqp", "sender"}),
        ("aiormq.exceptions", {"amqp"}),
    ],
)
def test_each_library_has_its_file(library: str, owners: set[str]) -> None:
    users = {
        name for name in FILES if any(found == library or found.startswith(library + ".") for found in imports(name))
    }
    assert users <= owners


DISTRIBUTIONS = {"jwt": "pyjwt", "opentelemetry": "opentelemetry-sdk", "prometheus_client": "prometheus-client"}
"""Packages whose distribution has another name."""


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    server, tracing = project["optional-dependencies"]["server"], project["optional-dependencies"]["tracing"]
    names = {re.match(r"[a-z0-9-]+", each)[0] for each in [*project["dependencies"], *server, *tracing]}  # type: ignore[index]
    for name in FILES:
        used = {found.partition(".")[0] for found in imports(name)} - sys.stdlib_module_names - {"bridge"}
        if name == "pytest_plugin":
            used -= {"pytest"}  # pytest loads it.
        assert {DISTRIBUTIONS.get(each, each.replace("_", "-")) for each in used} <= names, name


def test_only_settings_reads_the_environment() -> None:
    readers = {name for name, path in FILES.items() if re.search(r"os\.(environ|getenv)", path.read_text())}
    assert readers == {"service.settings"}


def test_lock_files_hold_hashes_and_no_address() -> None:
    peers = "tests/bench/peers"
    hashes = {
        "requirements.lock": 100,
        "requirements-dev.lock": 100,
        f"{peers}/requirements.lock": 10,
        "tests/mutants/mutation.lock": 10,
    }
    for name, least in hashes.items():
        text = (ROOT / name).read_text()
        assert "://" not in text
        assert "--index" not in text
        assert text.count("--hash=sha256:") > least
    for folder in (peers, "tests/node"):
        text = (ROOT / folder / "package-lock.json").read_text()
        assert "://" not in text
        assert text.count('"integrity"') > 20


def test_no_code_of_others_is_in_the_repository() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in files if "node_modules" in name or "site-packages" in name] == []


def test_the_page_names_every_setting_with_its_default() -> None:
    text = (ROOT / "docs/settings.md").read_text()
    rows = dict(re.findall(r"^\| `(BRIDGE_[A-Z_]+)` \| (.*?) \|", text, re.MULTILINE))
    fields = {PREFIX + name.upper(): field for name, field in Settings.model_fields.items()}
    assert set(rows) == set(fields)
    for name, field in fields.items():
        default = field.default
        if isinstance(default, bool):
            assert rows[name] == f"`{str(default).lower()}`"
        elif isinstance(default, int | float):
            assert rows[name] == f"`{default:g}`" or rows[name] == f"`{default}`"


def test_the_docs_name_only_metrics_that_exist_and_all_of_them() -> None:
    real = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in Metrics().registry.collect()
        if metric.name.startswith("bridge_")
    }
    text = (ROOT / "docs/metrics.md").read_text()
    assert set(re.findall(r"`(bridge_[a-z_]+)", text)) - {"bridge_token"} == real


def test_the_page_of_log_lines_names_every_line_of_the_service() -> None:
    real = set()
    for path in (BRIDGE / "service").rglob("*.py"):
        for name, call in calls(path):
            if name == "RareLine" or re.fullmatch(r"_log\.(info|warning|error|exception)", name):
                event = call.args[0]
                choices = (event.body, event.orelse) if isinstance(event, ast.IfExp) else (event,)
                real |= {ast.literal_eval(choice) for choice in choices if isinstance(choice, ast.Constant)}
    rows = re.findall(r"^\| (`.*?`) \| (?:info|warning|error)", (ROOT / "docs/logs.md").read_text(), re.MULTILINE)
    named = {event for row in rows for event in re.findall(r"`([^`]+)`", row)}
    # One line is left out: its event contains a variable.
    assert named - {f"the {what} differs, and fits" for what in ("exchange", "quarantine", "log")} == real


def test_the_page_of_attacks_names_tests_constants_and_settings_that_exist() -> None:
    page = (ROOT / "docs/attacks.md").read_text()
    tests = re.findall(r"`(tests/[^`]+)`", page)
    assert len(tests) > 25
    for test in tests:
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test
    constants = re.findall(r"`([a-z]+)\.([A-Z_]+)`", page)
    assert len(constants) > 20
    for module, constant in constants:
        (path,) = [path for name, path in FILES.items() if name.rpartition(".")[2] == module]
        assert re.search(rf"^{constant}\b.* = ", path.read_text(), re.MULTILINE), f"{module}.{constant}"
    settings = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(re.findall(r"`(BRIDGE_[A-Z_]+)`", page)) <= settings


# The suite passes on any machine, at any speed (CONTRIBUTING.md).

TESTS = ROOT / "tests"
SUITE = sorted(path for path in TESTS.rglob("*.py") if "bench" not in path.parts)
"""All tests except the benchmark, which measures the machine's speed."""


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Each call in a file, with the text of the function that is called."""
    tree = ast.parse(path.read_text())
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


@pytest.mark.parametrize("path", SUITE, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_depends_on_the_machines_speed(path: Path) -> None:
    lines = path.read_text().splitlines()
    faults = []
    for name, call in calls(path):
        where = f"{path.relative_to(ROOT)}:{call.lineno}"
        no_time = bool(call.args) and is_number(call.args[0]) and ast.literal_eval(call.args[0]) == 0
        reason = "#" in lines[call.lineno - 1] or lines[call.lineno - 2].lstrip().startswith("#")
        if name in ("time.sleep", "asyncio.sleep", "page.wait_for_timeout") and not no_time and not reason:
            faults.append(f"{where}: a sleep; wait for a signal, or say in a comment why no signal exists")
        if name == "asyncio.timeout" and is_number(call.args[0]):
            faults.append(f"{where}: a limit of its own; use PATIENCE of tests/patience.py")
        given = {keyword.arg for keyword in call.keywords}
        if name.endswith("settings") and given & {"deadline", "suppress_health_check"}:
            faults.append(f"{where}: Hypothesis' limits are set once, in tests/conftest.py")
        if name == "pytest.mark.timeout" and path.name != "long_proxies.py":
            faults.append(f"{where}: one limit for all tests is enough, in pyproject.toml")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            if re.search(r"<=? *[\d.]+", text) and re.search(r"monotonic|perf_counter|elapsed|seconds'\]", text):
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: an upper limit on elapsed time")
    assert not faults, "\n".join(faults)


def test_hypothesis_fails_no_test_for_a_slow_moment_or_an_unlucky_draw() -> None:
    now = hypothesis.settings()
    assert now.deadline is None
    by_chance = {HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much}
    assert by_chance <= set(now.suppress_health_check)


def read_pages_of_workers() -> str:
    return "".join((ROOT / "docs" / name).read_text() for name in ("workers.md", "sdk.md", "test-workers.md"))


def test_the_code_on_the_pages_of_workers_is_that_of_the_examples() -> None:
    page = read_pages_of_workers()
    programs = [path.read_text() for path in (ROOT / "docs/examples/workers").rglob("*.py")]
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 10
    for block in blocks:
        assert any(block in program for program in programs), f"in no example:\n{block}"


def test_the_pages_of_workers_name_each_example() -> None:
    page = read_pages_of_workers()
    named = set(re.findall(r"\(examples/workers/([a-z]+)", page))
    assert named == {path.name for path in (ROOT / "docs/examples/workers").iterdir() if path.is_dir()}
    for link in re.findall(r"\]\((examples/[^)#]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """It leads to a file, and to a heading in it. The anchor of a heading is as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}: there is no such heading"


def test_unit_tests_need_nothing_but_the_virtual_environment() -> None:
    for path in (ROOT / "tests/unit").glob("*.py"):
        imported = re.findall(r"^(?:from|import) (tests\.\w+)", path.read_text(), re.MULTILINE)
        assert not {"tests.node", "tests.browser"} & set(imported), path.name


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 110


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()
    decisions = (ROOT / "docs/decisions/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md")}
    assert {name for name in pages if f"({name})" not in decisions} == set()


def test_the_client_is_as_small_as_the_page_says() -> None:
    page = (ROOT / "docs/pages.md").read_text()
    said = re.search(r"compressed \((\d+) KB as the bridge serves it", page)
    assert said is not None
    served = gzip.compress((BRIDGE / "client" / "client.js").read_bytes())
    assert len(served) <= int(said[1]) * 1024


def test_the_way_of_an_event_in_contributing_names_what_exists() -> None:
    rows = re.findall(r"^\| `((?:broker|streams)/\w+\.py)` \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(rows) >= 8
    for file, names in rows:
        source = (BRIDGE / "service" / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            owner, _, method = name.partition(".")
            (made,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == owner]
            assert not method or any(getattr(node, "name", "") == method for node in ast.iter_child_nodes(made)), name
