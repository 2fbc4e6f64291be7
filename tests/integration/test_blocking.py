"""The blocking publisher in real programs: forks, threads, and a broker that is away, silent or refuses."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bridge import BlockingPublisher, Publisher, PublishForbidden, PublishTimeout
from bridge.samples.jobs import JobCompleted
from deploy.local.node import Node, free_ports
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost
from tests.service import ROOT, SAMPLES, bare_environment

DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)


def run(script: str, *arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=bare_environment(),
        check=False,
        timeout=timeout,
    )


def publish_until(publisher: BlockingPublisher, event_id: str) -> str:
    """Publishes until it is confirmed: one second may be too short on a slow machine."""
    while True:
        try:
            return publisher.to_user("42", DONE, id=event_id)
        except PublishTimeout:
            pass


@pytest.fixture
def silent() -> Iterator[str]:
    """A listener that accepts connections and sends nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"amqp://127.0.0.1:{listener.getsockname()[1]}/"


# Forks

FORK = """
import multiprocessing, os, sys
from bridge import Publisher
from bridge.samples.jobs import JobCompleted
DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)
publisher = Publisher.blocking(sys.argv[1], source="/t", timeout=100)
if sys.argv[2] == "used":
    publisher.to_user("42", DONE)
parent, child = multiprocessing.Pipe()
def work(number):
    # Twice, so that the second one shows whether the connection of the first still works.
    child.send((number, os.getpid(), publisher.to_user("42", DONE), publisher.to_user("42", DONE)))
    if number < 2:
        publisher.to_user("42", DONE)
        pid = os.fork()  # A child's child.
        if pid == 0:
            work(number + 10)
            os._exit(0)
        os.waitpid(pid, 0)
pids = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        try:
            work(number)
        finally:
            os._exit(0)
    pids.append(pid)
# The parent's connection still works, while the children publish and after they have ended.
ids = [publisher.to_user("42", DONE) for _ in range(10)]
for pid in pids:
    os.waitpid(pid, 0)
ids.append(publisher.to_user("42", DONE))
while parent.poll(0):
    number, pid, one, two = parent.recv()
    ids += [one, two]
print(len(set(ids)))
publisher.close()
"""


@pytest.mark.contract("4.10")
@pytest.mark.parametrize("when", ["used", "unused"])
def test_a_publisher_that_was_made_before_a_fork_works_in_the_child(vhost: Vhost, when: str) -> None:
    vhost.add_everything()
    done = run(FORK, vhost.url, when)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(11 + 2 * 4 + 2 * 2)], "an event id for each publish of parent and children"
    assert done.stderr == ""


ASYNC_FORK = """
import asyncio, os, sys
from bridge import Publisher
from bridge.samples.jobs import JobCompleted
publisher = Publisher(sys.argv[1], source="/t", timeout=100)
async def publish():
    await publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))
async def parent():
    await publish()
    pid = os.fork()
    if pid == 0:
        try:
            await publish()
        except RuntimeError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    await publish()
    await publisher.close()
asyncio.run(parent())
"""


@pytest.mark.contract("4.11")
def test_the_async_publisher_says_that_it_was_forked(vhost: Vhost) -> None:
    vhost.add_everything()
    done = run(ASYNC_FORK, vhost.url)
    assert done.returncode == 0, done.stderr
    assert "before the process was forked" in done.stdout


def test_a_program_may_end_without_closing(vhost: Vhost) -> None:
    vhost.add_everything()
    script = """
import sys
from bridge import Publisher
from bridge.samples.jobs import JobCompleted
publisher = Publisher.blocking(sys.argv[1], source="/t")
publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))
"""
    done = run(script, vhost.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert vhost.cut_off() == [], "the connection was not closed properly"


# A broker that is away, silent, or refuses


@pytest.mark.contract("4.8", "4.16")
async def test_it_connects_once_the_broker_is_there(vhost: Vhost, proxy: Proxy) -> None:
    vhost.add_everything()
    await proxy.refuse()
    publisher = Publisher.blocking(vhost.url_at(proxy.port), source="/t", timeout=1)

    def enter() -> None:
        with publisher:
            raise AssertionError("there is no broker to connect to")

    with pytest.raises(PublishTimeout, match="no connection within 1 s; last error: connecting to") as entered:
        await asyncio.to_thread(enter)
    assert entered.value.id == "", "there is no event to publish again"
    with pytest.raises(PublishTimeout) as caught:
        await asyncio.to_thread(publisher.to_user, "42", DONE)
    assert len(caught.value.id) == 36
    await proxy.open()
    assert await asyncio.to_thread(publish_until, publisher, caught.value.id) == caught.value.id
    await asyncio.to_thread(publisher.close)
    with pytest.raises(RuntimeError, match=r"closed: call open\(\)"):
        publisher.to_user("42", DONE)
    await asyncio.to_thread(publisher.open)
    assert await asyncio.to_thread(publish_until, publisher, "again") == "again"
    await asyncio.to_thread(publisher.close)


@pytest.mark.contract("4.9")
def test_every_call_ends_if_the_listener_sends_nothing(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit of one try to connect is long here. So if a call ends, it was by the publisher's own limit.
    monkeypatch.setattr("bridge.amqp.CONNECT_SECONDS", 10 * PATIENCE)
    publisher = Publisher.blocking(silent, source="/t", timeout=0.5)
    for call in (publisher.open, lambda: publisher.to_user("42", DONE), lambda: publisher.publish_many([])):
        try:
            call()
        except PublishTimeout as error:
            assert "within 0.5 s" in str(error)  # noqa: PT017
    publisher.close()


@pytest.mark.contract("4.9")
def test_closing_ends_the_calls_of_other_threads(silent: str) -> None:
    publisher = Publisher.blocking(silent, source="/t", timeout=10 * PATIENCE)
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            publisher.to_user("42", DONE)
        except Exception as error:  # noqa: BLE001 - checked below.
            errors.append(error)

    threads = [threading.Thread(target=publish) for _ in range(5)]
    for thread in threads:
        thread.start()
    while sum(thread.name == "bridge-publisher" for thread in threading.enumerate()) == 0:
        time.sleep(0.01)  # Until the first of them has begun; calls after the close are refused.
    publisher.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(errors) == 5
    for error in errors:
        assert isinstance(error, PublishTimeout | RuntimeError), error
        assert "closed" in str(error)
        if isinstance(error, PublishTimeout):
            assert len(error.id) == 36


@pytest.mark.contract("4.9")
async def test_closing_ends_the_tasks_of_the_async_form(silent: str) -> None:
    publisher = Publisher(silent, source="/t", timeout=10 * PATIENCE)
    tasks = [asyncio.create_task(publisher.to_user("42", DONE)) for _ in range(5)]
    await asyncio.sleep(0)  # So that each has begun.
    await publisher.close()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, PublishTimeout), error
        assert len(error.id) == 36


# RabbitMQ's own error messages


@pytest.fixture
def user(vhost: Vhost) -> Iterator[str]:
    vhost.add_user("messages-test")
    vhost.grant("messages-test")
    yield "messages-test"
    vhost.delete_user("messages-test")


def url_of(vhost: Vhost, user: str, name: str = "") -> str:
    return f"amqp://{user}:secret-{user}@127.0.0.1:{vhost.port}/{name or vhost.name}"


PUBLISH = ["publish", "--to", "all", "--type", "job.completed", "--timeout", "1",
           "--data", '{"job_id": "r", "duration_seconds": 1}']  # fmt: skip


def messages(url: str, *commands: list[str]) -> list[str]:
    """What each command prints that connects to this address."""
    found = []
    for command in commands:
        environment = bare_environment() | {
            "BRIDGE_AMQP_URL": url,
            "BRIDGE_SCHEMAS": SAMPLES,
            "BRIDGE_JWT_SECRET": "x" * 32,
            "BRIDGE_BIND": "127.0.0.1:0",
            "BRIDGE_INTERNAL_BIND": "127.0.0.1:0",
        }
        done = subprocess.run(
            [sys.executable, "-m", "bridge", *command], capture_output=True, text=True, cwd=ROOT, env=environment,
            check=False, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr
        found.append(done.stdout + done.stderr)
    return found


@pytest.mark.contract("5.33")
def test_a_virtual_host_that_does_not_exist(vhost: Vhost, user: str) -> None:
    url = url_of(vhost, user, "no-such-place")
    # Waiting would not help, so the publisher does not wait: the test ends.
    with pytest.raises(PublishForbidden, match="NOT_ALLOWED - vhost no-such-place not found"):
        Publisher.blocking(url, source="/t", timeout=10 * PATIENCE).to_user("42", DONE)
    for text in messages(url, PUBLISH, ["check"], ["serve"]):
        assert "NOT_ALLOWED - vhost no-such-place not found" in text


@pytest.mark.contract("5.33")
def test_no_right_on_the_virtual_host(vhost: Vhost, user: str) -> None:
    vhost.revoke(user)
    with pytest.raises(PublishForbidden, match=f"access to vhost '{vhost.name}' refused for user '{user}'"):
        Publisher.blocking(url_of(vhost, user), source="/t").to_user("42", DONE)
    for text in messages(url_of(vhost, user), PUBLISH, ["check"], ["serve"]):
        assert "refused for user" in text


@pytest.mark.parametrize("limit", ["vhost", "user", "channels"])
def test_a_limit_that_is_reached(vhost: Vhost, node: Node, user: str, limit: str) -> None:
    vhost.add_everything()
    set_limit, clear = {
        "vhost": (
            ["set_vhost_limits", "-p", vhost.name, '{"max-connections": 0}'],
            ["clear_vhost_limits", "-p", vhost.name],
        ),
        "user": (["set_user_limits", user, '{"max-connections": 0}'], ["clear_user_limits", user, "all"]),
        "channels": (["set_user_limits", user, '{"max-channels": 0}'], ["clear_user_limits", user, "all"]),
    }[limit]
    node.ctl(*set_limit)
    words = "limit" if limit != "channels" else "maximum allowed user limit"
    publisher = Publisher.blocking(url_of(vhost, user), source="/t", timeout=1)
    # A limit may be temporary, as other connections end. So the publisher waits, and the call can be repeated.
    with pytest.raises(PublishTimeout, match=f"NOT_ALLOWED - .*{words}") as caught:
        publisher.to_user("42", DONE)
    for text in messages(url_of(vhost, user), PUBLISH, ["check"]):
        assert "NOT_ALLOWED" in text
    node.ctl(*clear)
    assert publish_until(publisher, caught.value.id) == caught.value.id
    publisher.close()


# Lines in a program's log

NOISE = """
import logging, sys
from bridge import Publisher, PublishTimeout
from bridge.samples.jobs import JobCompleted
publisher = Publisher.blocking(sys.argv[1], source="/t", timeout=float(sys.argv[2]))
for _ in range(3):
    try:
        publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))
    except PublishTimeout:
        pass
    else:
        print("published", flush=True)
        sys.stdin.readline()
"""


def test_an_outage_is_one_line_in_the_log_and_its_end_another(node: Node) -> None:
    (port,) = free_ports(1)
    done = run(NOISE, f"amqp://127.0.0.1:{port}/", "1")
    (line,) = done.stderr.splitlines()
    assert line.startswith("publisher /t: no connection to RabbitMQ, trying again: connecting to amqp://127.0.0.1:")


async def test_a_lost_connection_is_one_line_in_the_log_and_its_return_another(vhost: Vhost, proxy: Proxy) -> None:
    vhost.add_everything()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NOISE, vhost.url_at(proxy.port), "90", cwd=ROOT, env=bare_environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        assert (await process.stdout.readline()) == b"published\n"
        await proxy.refuse()
        proxy.cut()
        process.stdin.write(b"\n")  # The second publish is during the outage.
        lost = (await process.stderr.readline()).decode()
        await proxy.open()
        _, rest = await process.communicate(b"\n\n")
    assert lost.startswith("publisher /t: no connection to RabbitMQ, trying again: ")
    (back,) = rest.decode().splitlines()
    assert back.startswith("publisher /t: connected to RabbitMQ after ")
