"""The command line, called in this process: its output and its exit code. There is no RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jwt
import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from bridge import cli
from bridge.amqp import BrokerUnavailable
from bridge.service.broker.control import Kicked, Users, UserStreams
from bridge.service.http.auth import Authenticator
from bridge.testing import FakePublisher
from deploy.local.node import free_ports
from tests.service import SECRET, mint
from tests.unit.loopback import BODY, CATALOGUE, KEY, site, until

DONE = '{"job_id": "r-7", "duration_seconds": 3.2}'


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("BRIDGE_"):
            monkeypatch.delenv(name)
    (port,) = free_ports(1)
    monkeypatch.setenv("BRIDGE_AMQP_URL", f"amqp://127.0.0.1:{port}/")
    monkeypatch.setenv("BRIDGE_SCHEMAS", "bridge.samples")
    monkeypatch.setenv("BRIDGE_JWT_SECRET", SECRET)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def bridge(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, input=text)


def test_a_token_has_the_claims_and_the_signature_that_the_service_reads() -> None:
    done = bridge("token", "--user", "42", "--group", "ops", "--group", "dev", "--ttl", "60")
    assert done.exit_code == 0
    claims = jwt.decode(done.stdout.strip(), SECRET, ["HS256"])
    assert (claims["sub"], claims["groups"]) == ("42", ["ops", "dev"])
    reader = Authenticator(secret=SECRET)
    subscriber = asyncio.run(reader.authenticate_any([done.stdout.strip()], time.time()))
    assert (subscriber.user, subscriber.groups) == ("42", ("ops", "dev"))


def test_no_token_without_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIDGE_JWT_SECRET")
    monkeypatch.setenv("BRIDGE_JWKS", "/keys.json")
    done = bridge("token", "--user", "42")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "BRIDGE_JWT_SECRET is not set" in done.stderr


def test_all_faults_of_the_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_BIND", "8080")
    monkeypatch.setenv("BRIDGE_DRAIN_SECONDS", "soon")
    done = bridge("serve")
    assert done.exit_code == 2
    assert done.stderr.startswith("bridge: 2 setting(s) to fix:")


def test_a_missing_catalogue_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_SCHEMAS", "no.such.package")
    done = bridge("schemas", "export")
    assert done.exit_code == 2
    assert "'no.such.package' has 1 fault(s)" in done.stderr


def test_a_catalogue_in_the_working_directory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "catalogue_of_this_test.py").write_text(
        'from bridge import EventData\nclass Done(EventData, type="test.done"):\n    """Done."""\n'
    )
    monkeypatch.setenv("BRIDGE_SCHEMAS", "catalogue_of_this_test")
    assert list(json.loads(bridge("schemas", "export").stdout)) == ["test.done"]


@pytest.mark.parametrize("form", ["jsonschema", "asyncapi", "openapi"])
def test_exports_are_json(form: str) -> None:
    done = bridge("schemas", "export", "--format", form)
    assert done.exit_code == 0
    assert "job.completed" in json.dumps(json.loads(done.stdout))


def test_an_export_of_typescript() -> None:
    assert "export " in bridge("schemas", "export", "--format", "typescript").stdout


def test_a_diff_says_what_a_change_breaks(tmp_path: Path) -> None:
    now = bridge("schemas", "export").stdout
    (tmp_path / "now.json").write_text(now)
    same = bridge("schemas", "diff", "now.json")
    assert (same.exit_code, same.stdout) == (0, "no change\n")
    fewer = json.loads(now)
    del fewer["job.completed"]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    added = bridge("schemas", "diff", "fewer.json", "now.json")
    assert (added.exit_code, added.stdout.startswith("compatible")) == (0, True)
    removed = bridge("schemas", "diff", "now.json", "fewer.json")
    assert removed.exit_code == 1
    assert removed.stdout.startswith("breaks publishers")


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[]", "not an object"), ('{"a": 1}', "not an object")])
def test_a_file_that_is_not_an_export(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "old.json").write_text(text)
    done = bridge("schemas", "diff", "old.json")
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["--to", "user:42", "--type", "job.completed"], "", "no event"),
        (["--to", "user:42", "--type", "none.such", "--data", "{}"], None, "has no type 'none.such'"),
        (["--to", "nobody", "--type", "job.completed", "--data", DONE], None, "--data: "),
        (["--type", "job.completed", "--data", DONE], None, "the audience is missing"),
        (["--to", "all"], "{", "line 1: not JSON"),
        (["--to", "all"], '{"type": "job.completed"}', "line 1: without --type, a line must be an object"),
        (["--to", "all", "--type", "job.completed", "--data", DONE, "--file", "-"], "", "cannot be combined"),
        (["--to", "all", "--id", "e"], f"{DONE}\n{DONE}\n", "--id needs exactly one event"),
    ],
)
def test_events_that_are_not_published(arguments: list[str], text: str | None, words: str) -> None:
    done = bridge("publish", *arguments, text=text)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr


def test_ids_are_printed_once_events_are_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "Publisher", FakePublisher)
    done = bridge("publish", "--to", "all", "--type", "job.completed", "--data", DONE, "--id", "e-1")
    assert (done.exit_code, done.stdout) == (0, "e-1\n")
    lines = bridge("publish", "--to", "all", "--type", "job.completed", text=f"{DONE}\n\n{DONE}\n")
    assert (lines.exit_code, len(lines.stdout.split())) == (0, 2)


def test_an_event_that_the_publisher_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "Publisher", FakePublisher)
    done = bridge("publish", "--to", "all", "--type", "job.completed", "--data", DONE, "--id", "a b")
    assert done.exit_code == 2
    assert "id must be" in done.stderr


def test_a_line_may_name_its_audience() -> None:
    line = json.dumps({"to": "user:42", "type": "job.completed", "data": json.loads(DONE)})
    audience, event = cli._read_line(line, None, None, CATALOGUE)
    assert (str(audience), event.event_type) == ("user:42", "job.completed")


def test_without_rabbitmq_a_command_fails_with_1() -> None:
    done = bridge("publish", "--to", "all", "--type", "job.completed", "--data", DONE, "--timeout", "0.1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no connection within 0.1 s" in done.stderr
    assert bridge("quarantine", "list").exit_code == 1
    replayed = bridge("quarantine", "replay")
    assert replayed.exit_code == 1
    assert "0 published again before this error" in replayed.stderr


def test_check_reports_everything_that_it_can_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_JWTSECRET", "x")
    done = bridge("check")
    assert done.exit_code == 1
    ok, broker = done.stdout.rpartition("  !! ")[::2]
    assert "ok settings" in ok
    assert "BRIDGE_JWTSECRET" in ok
    assert "ok catalogue 'bridge.samples'" in ok
    assert "ok file descriptors for" in ok
    assert "connecting to amqp://127.0.0.1" in broker


def test_check_names_an_invalid_key_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{}")
    monkeypatch.setenv("BRIDGE_JWKS", str(tmp_path / "keys.json"))
    done = bridge("check")
    assert done.exit_code == 1
    assert "!! the key set" in done.stdout


def test_check_names_times_without_a_zone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zoneless_of_this_test.py").write_text(
        "from datetime import datetime\nfrom bridge import EventData\n"
        'class Done(EventData, type="test.done"):\n    """Done."""\n    at: datetime\n'
    )
    monkeypatch.setenv("BRIDGE_SCHEMAS", "zoneless_of_this_test")
    assert "allows times without a zone" in bridge("check").stdout


def test_serve_ends_with_the_services_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.service.logs.configure", lambda: None)
    monkeypatch.setattr("bridge.service.main.run", lambda settings, catalogue: 7 if "job.completed" in catalogue else 0)
    assert bridge("serve").exit_code == 7


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quart", None)
    done = bridge("serve")
    assert done.exit_code == 2
    assert "quart is not installed: pip install 'rabbitmq-sse-bridge[server]'" in done.stderr
    monkeypatch.delitem(sys.modules, "quart")


def test_tracing_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGE_TRACING", "true")
    monkeypatch.setitem(sys.modules, "bridge.service.tracing", None)
    done = bridge("serve")
    assert done.exit_code == 2
    assert "pip install 'rabbitmq-sse-bridge[tracing]'" in done.stderr


@pytest.fixture
def quiet() -> Iterator[None]:
    """The service's log lines would be in the command's output."""
    with capture_logs():
        yield


@pytest.mark.usefixtures("quiet")
async def test_listen_prints_events_to_output_and_frames_to_error(tmp_path: Path) -> None:
    async with site() as here:
        (tmp_path / "token").write_text(mint("42") + "\n")
        arguments = ("listen", "--url", f"{here.url}/events", "--token", f"@{tmp_path / 'token'}", "--count", "1")
        listening = asyncio.create_task(asyncio.to_thread(bridge, *arguments, "--types", "job.*"))
        await until(lambda: len(here.queues.made) == 1)
        here.queues.made[0].on_delivery(KEY, BODY)
        done = await listening
    assert done.exit_code == 0
    assert json.loads(done.stdout)["id"] == "e1"
    assert done.stderr.startswith("bridge.ready ")


async def test_listen_ends_with_1_where_it_is_refused() -> None:
    async with site() as here:
        done = await asyncio.to_thread(bridge, "listen", "--url", f"{here.url}/events", "--token", "x.y.z")
    assert done.exit_code == 1
    assert done.stderr.startswith("bridge: 401: ")


@pytest.mark.contract("3.4")
@pytest.mark.usefixtures("quiet")
async def test_listen_resumes_after_a_cut_with_its_cursor() -> None:
    async with site(retry_seconds=0.1) as here:
        arguments = ("listen", "--url", f"{here.url}/events", "--token", mint("42"), "--count", "1")
        listening = asyncio.create_task(asyncio.to_thread(bridge, *arguments))
        await until(lambda: len(here.queues.made) == 1)
        (connection,) = here.hub._connections
        await until(lambda: connection.session.is_ready)
        connection.session.end("rotate", 100)
        connection.wake()
        await until(lambda: len(here.queues.made) == 2)
        (again,) = here.hub._connections
        assert again.request.last_event_id, "the cursor of the first stream"
        here.queues.made[1].on_delivery(KEY, BODY)
        done = await listening
    assert json.loads(done.stdout)["id"] == "e1"
    assert "bridge.bye" in done.stderr


def test_a_refused_message_as_it_is_shown() -> None:
    message: Any = type("Message", (), {"reason": "schema", "detail": "d", "routing_key": "all.x", "body": b"\xff"})
    shown = json.loads(cli._shown(message))
    assert shown == {"reason": "schema", "detail": "d", "routing_key": "all.x", "body": "\\xff"}


def test_a_reader_that_closes_the_pipe_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "dup2", lambda one, other: closed.append((one, other)))

    async def write() -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", type("Output", (), {"fileno": lambda self: 1})())
    with pytest.raises(SystemExit) as caught:
        cli._runs(write)()
    assert caught.value.code == 0
    assert closed[0][1] == 1
    os.close(closed[0][0])


def test_ctrl_c_ends_a_command_without_a_traceback() -> None:
    async def wait() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli._runs(wait)()
    assert caught.value.code == 130


async def test_the_module_is_the_command() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bridge",
        "--version",
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(cli.__file__).parent.parent,
    )
    out, _ = await process.communicate()
    assert out.startswith(b"bridge, version ")


class Replicas:
    """Stands for the questions to all replicas."""

    answer: ClassVar[dict[str, int]] = {"a": 1, "b": 0}

    def __init__(self, *_: Any, **__: Any) -> None: ...

    async def kick(self, user: str, **_: Any) -> Kicked:
        assert user == "42"
        return Kicked(self.answer)

    async def users(self, *, after: str, limit: int) -> Users:
        return Users(list(self.answer), [{"user": after or "1", "streams": limit}], further=True)

    async def streams(self, user: str) -> UserStreams:
        if user == "away":
            raise BrokerUnavailable("away")
        return UserStreams(list(self.answer), [{"session": "a.1"}])


@pytest.mark.contract("9.1", "9.5")
def test_who_and_kick_print_what_the_replicas_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.service.broker.control.ControlClient", Replicas)
    listed = bridge("who", "--limit", "5")
    assert (listed.exit_code, json.loads(listed.stdout)) == (0, {"user": "1", "streams": 5})
    assert "2 replica(s) answered: a, b" in listed.stderr
    assert "more: --after 1" in listed.stderr
    assert json.loads(bridge("who", "--user", "42").stdout) == {"session": "a.1"}
    assert bridge("who", "--user", "away").exit_code == 1
    assert bridge("kick", "--user", "42").stdout == "replica a: 1 ended\nreplica b: 0 ended\n"
    assert bridge("kick", "--user", "42", "--until", "soon").exit_code == 2
    monkeypatch.setattr(Replicas, "answer", {})
    assert "no replica has answered" in bridge("kick", "--user", "42", "--until", "now").stderr
    monkeypatch.setenv("BRIDGE_CONTROL", "")
    assert bridge("who").exit_code == 2


@pytest.mark.contract("3.22")
def test_a_sample_is_checked_without_a_connection(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(DONE)
    shown = bridge("check", "--sample", "one.json", "--routing-key", "all.job.completed")
    assert (shown.exit_code, "refused as no-id" in shown.stdout) == (1, True)
    assert bridge("check", "--sample", "one.json").exit_code == 2
    event = {"specversion": "1.0", "id": "1", "source": "/t", "type": "job.completed", "data": json.loads(DONE)}
    (tmp_path / "two.json").write_text(json.dumps(event))
    shown = bridge("check", "--sample", "two.json", "--routing-key", "all.job.completed")
    assert (shown.exit_code, "shown to all as {" in shown.stdout) == (0, True)
