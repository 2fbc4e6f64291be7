"""The command line as a subprocess: what it prints, what it exits with."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import OpenStream
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import ROOT, SAMPLES, SECRET, Service, bare_environment, mint

ONE = '{"job_id": "r-7", "duration_seconds": 3.2}'


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


async def run(
    *args: str,
    stdin: str | None = None,
    cwd: Path = ROOT,
    amqp_url: str | None = None,
    descriptors: int | None = None,
    **settings: str,
) -> Result:
    """
    Args:
        descriptors: the hard limit of file descriptors.
    """
    given = {f"BRIDGE_{name}": value for name, value in settings.items()}
    environment = {**bare_environment(), "BRIDGE_SCHEMAS": SAMPLES, **given}
    if amqp_url is not None:
        environment["BRIDGE_AMQP_URL"] = amqp_url
    limited = [] if descriptors is None else ["prlimit", f"--nofile={descriptors}:{descriptors}"]
    process = await asyncio.create_subprocess_exec(
        *limited,
        str(Path(sys.executable).parent / "bridge"),
        *args,
        env=environment,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate((stdin or "").encode()), PATIENCE)
    return Result(process.returncode or 0, out.decode(), err.decode())


@pytest.mark.contract("3.2")
async def test_publish_one(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service, "a b", "ops")
    for to in ["user:a b", "group:ops", "all"]:
        done = await run("publish", "--to", to, "--type", "job.completed", "--data", ONE, amqp_url=vhost.url)
        assert done.code == 0, done.err
        assert (await stream.next_event())["id"] == done.out.strip()


@pytest.mark.contract("3.2")
async def test_publish_one_event_per_line(service: Service, vhost: Vhost, connect: OpenStream, tmp_path: Path) -> None:
    stream = await connect(service)
    lines = "\n".join(json.dumps({"job_id": str(n), "duration_seconds": n}) for n in range(5)) + "\n\n"
    done = await run("publish", "--to", "user:42", "--type", "job.completed", stdin=lines, amqp_url=vhost.url)
    assert done.code == 0, done.err
    assert done.out.split() == await stream.ids(5)

    file = tmp_path / "events.jsonl"
    mixed = [
        {"type": "notification", "data": {"title": "x"}, "to": "all"},
        {"type": "job.completed", "data": json.loads(ONE), "to": "user:42"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in mixed))
    done = await run("publish", "--file", str(file), amqp_url=vhost.url)
    assert done.code == 0, done.err
    assert set(done.out.split()) == set(await stream.ids(2))


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["--type", "job.completed", "--data", ONE], "", "the audience is missing"),
        (["--to", "me", "--type", "job.completed", "--data", ONE], "", "is not an audience"),
        (["--to", "user:1", "--type", "no.such", "--data", ONE], "", "no type 'no.such'"),
        (["--to", "user:1", "--type", "job.completed", "--data", "{"], "", "Invalid JSON"),
        (["--to", "user:1", "--type", "job.completed", "--data", "{}"], "", "data.job_id: Field required"),
        (["--to", "user:1", "--type", "job.completed"], f"{ONE}\n{{}}\nnope\n", "line 2: data.job_id"),
        (["--to", "user:1", "--type", "job.completed"], f"{ONE}\n{{}}\nnope\n", "line 3: "),
        (["--to", "user:1"], '{"data": {}}\n', "without --type, a line must be"),
        (["--to", "user:1", "--type", "job.completed"], "", "no event"),
    ],
)
async def test_bad_input_is_named_and_nothing_is_published(args: list[str], stdin: str, words: str) -> None:
    # There is no broker at this address: the command must not connect before it has checked the input.
    done = await run("publish", *args, stdin=stdin, amqp_url="amqp://127.0.0.1:1/")
    assert done.code == 2
    assert words in done.err
    assert "nothing was published" in done.err
    assert done.out == ""


@pytest.mark.contract("3.2")
async def test_publish_without_a_confirm_fails(vhost: Vhost) -> None:
    args = ["publish", "--to", "all", "--type", "job.completed", "--data", ONE]
    done = await run(*args, "--timeout", "1", amqp_url="amqp://u:s3cret@127.0.0.1:1/")
    assert done.code == 1
    assert "no connection within 1 s" in done.err
    assert "s3cret" not in done.err
    assert "Traceback" not in done.err
    done = await run(*args, amqp_url=vhost.url)
    assert done.code == 1
    assert "no exchange 'events'" in done.err


@pytest.mark.contract("4.2")
async def test_a_team_uses_its_own_catalogue(vhost: Vhost, service: Service, tmp_path: Path) -> None:
    (tmp_path / "our_events").mkdir()
    (tmp_path / "our_events/__init__.py").write_text(
        'from bridge import EventData\nclass Shipped(EventData, type="parcel.shipped"):\n    parcel: int\n'
    )
    done = await run("schemas", "export", cwd=tmp_path, SCHEMAS="our_events")
    assert list(json.loads(done.out)) == ["parcel.shipped"]
    args = ["publish", "--to", "all", "--type", "parcel.shipped", "--data", '{"parcel": 1}']
    done = await run(*args, cwd=tmp_path, amqp_url=vhost.url, SCHEMAS="our_events")
    assert done.code == 0, done.err


@pytest.mark.contract("3.7", "3.13", "3.15", "3.18")
async def test_schemas_diff_names_what_breaks(tmp_path: Path) -> None:
    package = tmp_path / "our_events"
    package.mkdir()
    shipped = 'from bridge import EventData\nclass Shipped(EventData, type="parcel.shipped"):\n    parcel: int\n'
    (package / "__init__.py").write_text(shipped)
    old = tmp_path / "old.json"
    old.write_text((await run("schemas", "export", cwd=tmp_path, SCHEMAS="our_events")).out)
    done = await run("schemas", "diff", str(old), cwd=tmp_path, SCHEMAS="our_events")
    assert (done.code, done.out) == (0, "no change\n")
    (package / "__init__.py").write_text(shipped + "    weight: float\n    note: str = ''\n")
    done = await run("schemas", "diff", str(old), cwd=tmp_path, SCHEMAS="our_events")
    assert done.code == 1
    assert done.out.splitlines() == [
        "compatible        parcel.shipped data.note: a new member that may be left out",
        "breaks publishers parcel.shipped data.weight: a new member that must be given: events without it are refused",
    ]
    done = await run("schemas", "diff", str(old), str(package / "__init__.py"))
    assert done.code == 2
    assert "not JSON" in done.err


@pytest.mark.contract("3.1")
async def test_serve_names_every_bad_setting_and_exits_2() -> None:
    done = await run("serve", HEARTBEAT_SECONDS="soon", BIND="x", JWT_SECRET="too-short-s3cret")
    assert done.code == 2
    assert "3 setting(s) to fix" in done.err
    for name in ["BRIDGE_HEARTBEAT_SECONDS", "BRIDGE_BIND", "BRIDGE_JWT_SECRET"]:
        assert name in done.err
    assert "s3cret" not in done.err
    assert "Traceback" not in done.err


async def test_serve_names_every_fault_of_the_catalogue_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "bad_events").mkdir()
    (tmp_path / "bad_events/__init__.py").write_text(
        "from bridge import EventData\n"
        'class A(EventData, type="x"): pass\nclass B(EventData, type="x"): pass\nclass C(EventData): pass\n'
    )
    done = await run("serve", cwd=tmp_path, SCHEMAS="bad_events", JWT_SECRET=SECRET)
    assert done.code == 2
    assert "has 2 fault(s)" in done.err
    assert "both have the type 'x'" in done.err
    assert "C has no type" in done.err


@pytest.mark.contract("3.5")
async def test_a_token_from_the_command_line_opens_a_stream(service: Service) -> None:
    from tests.client import Stream

    done = await run("token", "--user", "42", "--group", "ops", "--group", "dev", "--ttl", "60", JWT_SECRET=SECRET)
    assert done.code == 0
    async with Stream(service.public, done.out.strip()) as stream:
        assert (await stream.ready()).json["user"] == "42"


@pytest.mark.contract("3.3")
async def test_listen_prints_events_and_comes_back_after_a_cut(service: Service, vhost: Vhost, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(mint("42") + "\n")
    url = f"{service.public}/events"
    listening = asyncio.create_task(run("listen", "--url", url, "--token", f"@{file}", "--count", "2"))
    await service.logged("stream opened")
    await _publish_until_delivered(service, vhost, "e1")
    await _publish_until_delivered(service, vhost, "e2")
    done = await listening
    assert done.code == 0, done.err
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == ["e1", "e2"]
    assert "bridge.ready" in done.err
    bad = await run("listen", "--url", url, "--token", "x.y.z")
    assert bad.code == 1
    assert "401" in bad.err


async def _publish_until_delivered(service: Service, vhost: Vhost, event_id: str) -> None:
    before = await service.metric("bridge_events_delivered_total")
    async with asyncio.timeout(PATIENCE):
        while await service.metric("bridge_events_delivered_total") == before:
            # The stream may not be bound yet; the same id is the same event.
            await vhost.publish("user.42.job.completed", cloudevent(event_id))


@pytest.mark.contract("3.8")
async def test_check_prints_what_is_right_and_what_is_wrong(vhost: Vhost) -> None:
    done = await run("check", amqp_url=vhost.url, JWT_SECRET=SECRET, ALLOWED_ORIGIN="x")
    assert done.code == 0, done.out
    assert "did you mean BRIDGE_ALLOWED_ORIGINS?" in done.out
    assert "a live queue can be made, bound and consumed" in done.out
    assert [name for name in vhost.queues() if name.startswith("bridge.")] == []

    done = await run("check", amqp_url="amqp://u:s3cret@127.0.0.1:1/", JWT_SECRET=SECRET)
    assert done.code == 1
    assert "!! connecting to amqp://u:***@127.0.0.1:1/" in done.out

    vhost.add_user("check-test")
    try:
        vhost.grant("check-test", configure=r"^bridge\.", write=r"^bridge\.", read=r"^(bridge\.|events\.log$)")
        url = vhost.url_at(vhost.node.port, user="check-test", password="secret-check-test")
        done = await run("check", amqp_url=url, JWT_SECRET=SECRET)
        assert done.code == 1
        assert "right to read the exchange" in done.out
    finally:
        vhost.delete_user("check-test")

    done = await run("check", amqp_url=vhost.url, JWKS="/no/such/file")
    assert done.code == 1
    assert "/no/such/file cannot be used" in done.out


@pytest.mark.contract("8.8")
async def test_check_tries_what_the_feed_needs(vhost: Vhost) -> None:
    done = await run("check", amqp_url=vhost.url, JWT_SECRET=SECRET, FEED="log")
    assert done.code == 0, done.out
    assert "the feed 'log' fits" in done.out
    assert "live queue" not in done.out
    user = f"reader-{vhost.name}"
    vhost.add_user(user)
    try:
        vhost.grant(user, configure="^$", write=r"^amq\.default$", read=r"^events\.log$")
        url = vhost.url_at(vhost.node.port, user=user, password="secret-" + user)
        assert (await run("check", amqp_url=url, JWT_SECRET=SECRET, FEED="log")).code == 0
        done = await run("check", amqp_url=url, JWT_SECRET=SECRET)
        assert done.code == 1
        assert "BRIDGE_FEED=log, which needs no queues" in done.out
        vhost.grant(user, configure="^$", write="^$", read=r"^events\.log$")
        done = await run("check", amqp_url=url, JWT_SECRET=SECRET, FEED="log")
        assert done.code == 1
        assert "right to write to amq.default" in done.out
    finally:
        vhost.delete_user(user)


@pytest.mark.contract("3.9")
async def test_quarantine_is_listed_and_replayed(service: Service, vhost: Vhost, connect: OpenStream) -> None:
    stream = await connect(service)
    good = cloudevent("fixed")
    await vhost.publish("user.42.job.completed", b"hopeless \xff")
    await vhost.publish("user.42.job.completed", cloudevent("bad", duration_seconds=-1))
    # A message that is good now, as after the catalogue has got a new type.
    import aio_pika

    connection = await aio_pika.connect(vhost.url)
    async with connection:
        channel = await connection.channel()
        # Wait for both refused ones: the bridge writes to streams before it writes to the quarantine.
        async with asyncio.timeout(PATIENCE):
            while (await channel.declare_queue("events.invalid", passive=True)).declaration_result.message_count != 2:
                pass
        message = aio_pika.Message(
            json.dumps(good).encode(),
            headers={"x-reason": "schema", "x-detail": "then", "x-routing-key": "user.42.job.completed"},
        )
        await channel.default_exchange.publish(message, "events.invalid")

    listed = await run("quarantine", "list", amqp_url=vhost.url)
    assert listed.code == 0, listed.err
    rows = [json.loads(line) for line in listed.out.splitlines()]
    assert [row["reason"] for row in rows] == ["malformed", "schema", "schema"]
    assert rows[0]["body"] == "hopeless \\xff"

    replayed = await run("quarantine", "replay", amqp_url=vhost.url)
    assert replayed.code == 1
    assert "1 published again, 2 still refused" in replayed.err
    assert await stream.ids(1) == ["fixed"]
    rows = [json.loads(line) for line in (await run("quarantine", "list", amqp_url=vhost.url)).out.splitlines()]
    assert [row["reason"] for row in rows] == ["malformed", "schema"]


@pytest.mark.contract("3.22")
async def test_check_says_what_becomes_of_a_sample(tmp_path: Path) -> None:
    file = tmp_path / "message.json"
    file.write_text(json.dumps({"job_id": "r-7", "duration_seconds": 1}))
    done = await run("check", "--sample", str(file), "--routing-key", "user.42.job.completed")
    assert (done.code, "refused as no-id" in done.out) == (1, True)
    done = await run("check", "--sample", str(file), "--routing-key", "user.42.job.completed", FEED="log")
    assert (done.code, "shown to user:42 as {" in done.out) == (0, True)
    done = await run("check", "--sample", str(file))
    assert (done.code, "--routing-key" in done.err) == (2, True)
    captured = {"payload": file.read_text(), "routing_key": "all.job.completed", "properties": {"message_id": "7"}}
    file.write_text(json.dumps([captured, captured | {"properties": []}]))
    done = await run("check", "--sample", str(file))
    assert (done.code, done.out.count("ok message 1"), done.out.count("!! message 2")) == (1, 1, 1)


async def test_help_of_every_command() -> None:
    for command in [[], ["serve"], ["publish"], ["listen"], ["token"], ["schemas", "export"], ["check"],
                    ["quarantine", "list"], ["quarantine", "replay"]]:  # fmt: skip
        done = await run(*command, "--help")
        assert done.code == 0
        assert "Usage: bridge" in done.out


@pytest.mark.any_rabbitmq
async def test_check_says_how_many_streams_there_are_descriptors_for(vhost: Vhost) -> None:
    done = await run("check", amqp_url=vhost.url, JWT_SECRET=SECRET, descriptors=400)
    assert done.code == 0, done.out
    assert re.search(r"ok file descriptors for 2\d\d streams", done.out)
    assert re.search(r"\?  the limit is 9,?7\d\d below what BRIDGE_MAX_CONNECTIONS needs", done.out)
    assert re.search(r"ok RabbitMQ allows \d+ channels in a connection, and the bridge uses 20\n", done.out)
    done = await run("check", amqp_url=vhost.url, JWT_SECRET=SECRET, descriptors=60)
    assert done.code == 1
    assert "!! the limit of file descriptors is 60" in done.out


@pytest.mark.contract("5.75")
async def test_check_says_where_the_catalogue_is_and_what_is_not_in_it(vhost: Vhost, tmp_path: Path) -> None:
    (tmp_path / "our_events").mkdir()
    (tmp_path / "our_events/__init__.py").write_text(
        "from bridge import EventData\nfrom bridge.samples.jobs import JobCompleted\n"
        'class Shipped(EventData, type="parcel.shipped"):\n    parcel: int\n'
    )
    done = await run("check", cwd=tmp_path, amqp_url=vhost.url, SCHEMAS="our_events", JWT_SECRET=SECRET)
    assert f"catalogue 'our_events' of {tmp_path / 'our_events'}: parcel.shipped\n" in done.out
    assert "our_events imports bridge.samples.jobs.JobCompleted (type 'job.completed')" in done.out
