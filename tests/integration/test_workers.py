"""The programs of docs/workers.md, run as users run them: with a real RabbitMQ, the bridge, and a stream."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from bridge import Publisher, PublishTimeout
from bridge.samples.jobs import JobCompleted
from bridge.testing import FakePublisher
from deploy.local.node import Node
from tests.conftest import OpenStream
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost
from tests.service import ROOT, Service, bare_environment

EXAMPLES = ROOT / "docs" / "examples" / "workers"


class Program:
    """A program of an example, run in the example's folder, and its output."""

    def __init__(self, example: str, *arguments: str, **environment: str) -> None:
        self._folder = EXAMPLES / example
        self._arguments = arguments
        self._environment = {
            **bare_environment(),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TIMEOUT": str(PATIENCE),  # No test depends on how fast a confirm is.
            **environment,
        }
        self.text = ""
        self._new_output = asyncio.Condition()

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *self._arguments, cwd=self._folder, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            async with self._new_output:
                self.text += raw.decode()
                self._new_output.notify_all()
        async with self._new_output:
            self._new_output.notify_all()

    async def printed(self, pattern: str) -> re.Match[str]:
        """Waits for output that matches, and returns the first match."""
        async with self._new_output:
            try:
                async with asyncio.timeout(PATIENCE):
                    while (found := re.search(pattern, self.text)) is None:
                        assert not self._reader.done(), f"ended without printing {pattern!r}:\n{self.text}"
                        await self._new_output.wait()
            except TimeoutError:
                raise AssertionError(f"did not print {pattern!r} within {PATIENCE} s:\n{self.text}") from None
        return found

    @property
    def pid(self) -> int:
        return self._process.pid

    def terminate(self) -> None:
        self._process.terminate()

    async def ended(self) -> int:
        """The exit code."""
        try:
            async with asyncio.timeout(PATIENCE):
                code = await self._process.wait()
                await self._reader
        except TimeoutError:
            raise AssertionError(f"did not end within {PATIENCE} s:\n{self.text}") from None
        return code

    async def kill(self) -> None:
        # The program has its own session, so all processes in it are its own.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        await self._process.wait()
        await self._reader


class Run(Protocol):
    async def __call__(self, example: str, *arguments: str, **environment: str) -> Program: ...


@pytest.fixture
async def run(vhost: Vhost) -> AsyncIterator[Run]:
    """Starts a program that is connected to the test's RabbitMQ; it is killed after the test."""
    programs: list[Program] = []

    async def run_program(example: str, *arguments: str, **environment: str) -> Program:
        program = Program(example, *arguments, **{"AMQP_URL": vhost.url, **environment})
        programs.append(program)
        await program.start()
        return program

    yield run_program
    for program in programs:
        await program.kill()


# Celery


PREFORK = ("--pool", "prefork", "--concurrency", "2")


async def start_celery(run: Run, *pool: str, **environment: str) -> Program:
    arguments = ["-m", "celery", "-A", "tasks", "worker", *pool, "--loglevel", "INFO"]
    worker = await run("celery", *arguments, C_FORCE_ROOT="1", **environment)
    await worker.printed(r"celery@\S+ ready")
    return worker


async def enqueue(run: Run, count: int) -> list[str]:
    """The ids of the tasks, each confirmed by RabbitMQ."""
    program = await run("celery", "tasks.py", "42", str(count))
    assert await program.ended() == 0, program.text
    return program.text.split()


async def test_celery_loses_nothing_when_the_broker_restarts(
    service: Service, vhost: Vhost, node: Node, connect: OpenStream, run: Run
) -> None:
    stream = await connect(service, "42")
    worker = await start_celery(run, *PREFORK)
    await asyncio.sleep(3)  # RabbitMQ 3.10 loses a stream that is younger than this.
    tasks = await enqueue(run, 100)
    assert len(set(tasks)) == 100
    seen: dict[str, list[str]] = defaultdict(list)

    async def read_until(completed: int) -> None:
        while sum("completed" in names for names in seen.values()) < completed:
            event = await stream.next_event()
            task, _, name = event["id"].partition(":")
            seen[task].append(name)

    await read_until(20)
    await asyncio.to_thread(node.kill)
    await asyncio.to_thread(node.start)
    await read_until(100)
    assert set(seen) == set(tasks)
    for names in seen.values():
        # A task that ran when the broker died runs again, under the same ids.
        assert list(dict.fromkeys(names)) == ["started", "step-1", "step-2", "step-3", "step-4", "completed"]
    worker.terminate()
    assert await worker.ended() == 0, worker.text


async def test_celery_ends_with_a_warm_shutdown(
    service: Service, vhost: Vhost, node: Node, connect: OpenStream, run: Run
) -> None:
    stream = await connect(service, "42")
    worker = await start_celery(run, *PREFORK, STEP_SECONDS="0.5")
    (task,) = await enqueue(run, 1)
    assert (await stream.next_event())["id"] == f"{task}:started"
    worker.terminate()
    rest = [f"{task}:step-1", f"{task}:step-2", f"{task}:step-3", f"{task}:step-4", f"{task}:completed"]
    assert await stream.ids(5) == rest
    assert await worker.ended() == 0, worker.text
    assert "Warm shutdown" in worker.text
    assert vhost.cut_off() == []


async def test_a_celery_task_runs_again_until_its_events_are_confirmed(
    service: Service, vhost: Vhost, proxy: Proxy, connect: OpenStream, run: Run
) -> None:
    stream = await connect(service, "42")
    await proxy.refuse()
    worker = await start_celery(run, *PREFORK, EVENTS_URL=vhost.url_at(proxy.port), TIMEOUT="1")
    (task,) = await enqueue(run, 1)
    await worker.printed(rf"{task}\] retry: Retry in .*PublishTimeout")
    await proxy.open()
    names = ["started", "step-1", "step-2", "step-3", "step-4", "completed"]
    assert await stream.ids(6) == [f"{task}:{name}" for name in names]
    worker.terminate()
    assert await worker.ended() == 0, worker.text


# Django


@pytest.fixture
async def site(run: Run, tmp_path: Path) -> Program:
    """The site behind gunicorn, with a database of its own."""
    return await start_site(run, tmp_path)


async def start_site(run: Run, folder: Path, **environment: str) -> Program:
    environment["DATABASE"] = str(folder / "shop.sqlite3")
    made = await run("django", "manage.py", "migrate", "--run-syncdb", **environment)
    assert await made.ended() == 0, made.text
    return await start_gunicorn(run, "django", "shop.wsgi", "--preload", **environment)


async def start_gunicorn(run: Run, example: str, *arguments: str, **environment: str) -> Program:
    return await run(
        # The control socket is a file in the home folder, the same for every gunicorn of one user.
        example, "-m", "gunicorn", "--workers", "2", "--bind", "127.0.0.1:0", "--no-control-socket", "--timeout", "600",
        *arguments, **environment,
    )  # fmt: skip


async def address(program: Program) -> str:
    return (await program.printed(r"(?:Listening at:|running on) (http://127\.0\.0\.1:\d+)"))[1]


async def post(url: str, **values: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        return await client.post(url, **values)


async def manage(run: Run, folder: Path, *arguments: str, **environment: str) -> Program:
    return await run("django", "manage.py", *arguments, DATABASE=str(folder / "shop.sqlite3"), **environment)


@pytest.mark.any_rabbitmq
async def test_a_django_view_publishes_after_the_commit_and_never_after_a_rollback(
    service: Service, connect: OpenStream, run: Run, site: Program
) -> None:
    stream = await connect(service, "42")
    url = await address(site) + "/reports"
    made = await post(url, data={"user": "42", "name": "a"})
    assert (made.status_code, made.json()) == (201, {"event": "job-1:completed"})
    event = await stream.next_event()
    assert (event["id"], event["data"]["job_id"]) == ("job-1:completed", "1")
    assert (await post(url, data={"user": "42", "name": "a"})).status_code == 409
    # SQLite gives the number of the rolled-back row to the next one. So only the name identifies a row.
    assert (await post(url, data={"user": "42", "name": "b"})).status_code == 201
    assert (await post(url, data={"user": "42", "name": "c"})).status_code == 201
    assert await stream.ids(2) == ["job-2:completed", "job-3:completed"]
    site.terminate()
    assert await site.ended() == 0, site.text


@pytest.mark.any_rabbitmq
async def test_django_publishes_later_what_was_committed_while_the_broker_was_away(
    service: Service, vhost: Vhost, proxy: Proxy, connect: OpenStream, run: Run, tmp_path: Path
) -> None:
    stream = await connect(service, "42")
    await proxy.refuse()
    site = await start_site(run, tmp_path, AMQP_URL=vhost.url_at(proxy.port), TIMEOUT="1")
    url = await address(site) + "/reports"
    made = await asyncio.gather(*(post(url, data={"user": "42", "name": str(number)}) for number in range(3)))
    assert [answer.status_code for answer in made] == [201] * 3, site.text
    await site.printed("Error calling .* in on_commit")
    program = await manage(run, tmp_path, "publish_jobs")
    assert await program.ended() == 0, program.text
    assert "3 events published" in program.text
    assert await stream.ids(3) == [f"job-{number}:completed" for number in (1, 2, 3)]
    program = await manage(run, tmp_path, "publish_jobs")
    assert await program.ended() == 0, program.text
    assert "0 events published" in program.text


BATCH = """
from shop.models import Job
Job.objects.bulk_create(Job(user="42" if number != 150 else "", seconds=1) for number in range(300))
"""


@pytest.mark.any_rabbitmq
async def test_a_django_batch_that_fails_marks_what_is_confirmed(
    service: Service, connect: OpenStream, run: Run, tmp_path: Path
) -> None:
    stream = await connect(service, "42")
    for command in (["migrate", "--run-syncdb"], ["shell", "--no-startup", "-c", BATCH]):
        program = await manage(run, tmp_path, *command)
        assert await program.ended() == 0, program.text
    for count in (150, 0):
        program = await manage(run, tmp_path, "publish_jobs")
        assert await program.ended() != 0
        assert f"[{count} before it are confirmed]" in program.text
    fixed = "from shop.models import Job; print(Job.objects.filter(user='').update(user='42'))"
    program = await manage(run, tmp_path, "shell", "--no-startup", "-c", fixed)
    assert await program.ended() == 0, program.text
    program = await manage(run, tmp_path, "publish_jobs")
    assert await program.ended() == 0, program.text
    assert "150 events published" in program.text
    assert await stream.ids(300) == [f"job-{number}:completed" for number in range(1, 301)]


@pytest.mark.any_rabbitmq
async def test_the_sites_own_tests_need_no_broker(run: Run) -> None:
    program = await run("django", "manage.py", "test", AMQP_URL="amqp://127.0.0.1:9/", DATABASE=":memory:")
    assert await program.ended() == 0, program.text
    assert "Ran 2 tests" in program.text


# FastAPI


async def post_until_201(url: str) -> httpx.Response:
    async with asyncio.timeout(PATIENCE):
        while (answer := await post(url)).status_code == 503:
            pass
    assert answer.status_code == 201
    return answer


@pytest.mark.any_rabbitmq
async def test_fastapi_publishes_and_answers_503_while_the_broker_is_away(
    service: Service, vhost: Vhost, proxy: Proxy, connect: OpenStream, run: Run
) -> None:
    stream = await connect(service, "42")
    await proxy.refuse()
    arguments = ["-m", "uvicorn", "main:app", "--port", "0"]
    program = await run("fastapi", *arguments, AMQP_URL=vhost.url_at(proxy.port), TIMEOUT="1")
    url = await address(program) + "/jobs/r-7?user=42"
    refused = await post(url)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    await proxy.open()
    # Its callers repeat the same request until the answer is 201.
    assert (await post_until_201(url)).json() == {"event": "r-7:completed"}
    assert await stream.ids(2) == ["r-7:started", "r-7:completed"]
    await asyncio.gather(*(post_until_201(url.replace("r-7", f"r-{number}")) for number in range(10, 30)))
    expected = {f"r-{number}:{name}" for number in range(10, 30) for name in ("started", "completed")}
    assert set(await stream.ids(40)) == expected
    program.terminate()
    assert await program.ended() in (0, -signal.SIGTERM), program.text
    assert "Application shutdown complete" in program.text


# gunicorn


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preload", "--worker-class", "sync"],
        ["--preload", "--worker-class", "gthread", "--threads", "4"],
        ["--worker-class", "sync"],
        ["--worker-class", "gevent"],
    ],
    ids=["preloaded sync", "preloaded gthread", "sync", "gevent"],
)
@pytest.mark.any_rabbitmq
async def test_gunicorns_workers_publish_and_close_their_connections(
    service: Service, vhost: Vhost, node: Node, connect: OpenStream, run: Run, arguments: list[str]
) -> None:
    stream = await connect(service, "42")
    program = await start_gunicorn(run, "gunicorn", "app", *arguments)
    url = await address(program)
    answers = await asyncio.gather(*(post(f"{url}/?user=42&job=r-{number}") for number in range(40)))
    assert {answer.status_code for answer in answers} == {201}, program.text
    assert program.pid not in {answer.json()["pid"] for answer in answers}, "the workers publish, not their parent"
    assert set(await stream.ids(40)) == {f"r-{number}:completed" for number in range(40)}
    program.terminate()
    assert await program.ended() == 0, program.text
    assert vhost.cut_off() == []


# APScheduler


@pytest.mark.any_rabbitmq
async def test_apscheduler_publishes_a_days_report_once(
    service: Service, vhost: Vhost, node: Node, connect: OpenStream, run: Run
) -> None:
    stream = await connect(service, "42", "reports")
    jobs_done: list[str] = []
    for _ in range(2):
        program = await run("apscheduler", "scheduler.py", "--now")
        jobs_done.append((await program.printed(r"(?m)^(daily-report:\S+:completed)$"))[1])
        program.terminate()
        assert await program.ended() == 0, program.text
    await vhost.publish("user.42.job.completed", json.loads(END))
    expected = [f"{day}:{name}" for day in dict.fromkeys(text.rpartition(":")[0] for text in jobs_done)
                for name in ("started", "completed")]  # fmt: skip
    assert await stream.ids(len(expected) + 1) == [*expected, "end"]
    assert vhost.cut_off() == []


@pytest.mark.any_rabbitmq
async def test_apscheduler_finishes_the_running_job(service: Service, connect: OpenStream, run: Run) -> None:
    stream = await connect(service, "42", "reports")
    program = await run("apscheduler", "scheduler.py", "--now", WORK_SECONDS="1")
    job, _, name = (await stream.next_event())["id"].rpartition(":")
    assert name == "started"
    program.terminate()
    assert (await stream.next_event())["id"] == f"{job}:completed"
    assert await program.ended() == 0, program.text


END = """{"specversion": "1.0", "id": "end", "source": "/test", "type": "job.completed",
          "data": {"job_id": "end", "duration_seconds": 1}}"""


# Without a framework


def jobs(count: int) -> list[dict[str, Any]]:
    return [{"job": f"r-{number}", "user": "42", "seconds": number} for number in range(count)]


@pytest.mark.any_rabbitmq
async def test_a_script_publishes_a_file_and_may_be_run_again(
    service: Service, vhost: Vhost, proxy: Proxy, connect: OpenStream, run: Run, tmp_path: Path
) -> None:
    stream = await connect(service, "42")
    await proxy.refuse()
    rows = jobs(200)
    rows[50]["user"] = ""
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = {"AMQP_URL": vhost.url_at(proxy.port), "TIMEOUT": "3"}
    program = await run("script", "batch.py", str(tmp_path / "jobs.jsonl"), **where)
    await program.printed("trying again: ")
    await proxy.open()
    assert await program.ended() == 1
    assert "event 50: job.completed for user:" in program.text
    expected = [f"r-{number}:completed" for number in range(200) if number != 50]
    assert await stream.ids(199) == expected
    program = await run("script", "batch.py", str(tmp_path / "jobs.jsonl"))
    assert await program.ended() == 1
    await vhost.publish("user.42.job.completed", json.loads(END))
    assert await stream.ids(1) == ["end"], "the second run published the same events"


@pytest.fixture
def batch() -> Any:
    spec = importlib.util.spec_from_file_location("batch", EXAMPLES / "script" / "batch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arrived", [False, True])
def test_a_script_continues_where_its_batch_failed(batch: Any, arrived: bool) -> None:
    rows = jobs(600)
    rows[500]["user"] = rows[550]["user"] = ""
    with FakePublisher.blocking() as fake:
        batch.publisher = fake
        fake.fail_next(PublishTimeout, after=100, arrived=arrived)
        fake.fail_next(PublishTimeout, after=300, arrived=arrived)
        assert batch.publish_all(rows) == 2
        expected = [f"r-{number}:completed" for number in range(600) if number not in (500, 550)]
        assert [event.id for event in fake.published] == expected
        fake.clear()
        fake.fail_next(times=10)
        with pytest.raises(PublishTimeout):
            batch.publish_all(rows)


GEVENT = """
from gevent import monkey
monkey.patch_all()
import os, sys, gevent
from bridge import Publisher
from bridge.samples.jobs import JobCompleted

publisher = Publisher.blocking(os.environ["AMQP_URL"], source="/t", timeout=120)
turns = 0

def others():
    global turns
    while True:
        turns += 1
        gevent.sleep(0)

gevent.spawn(others)
def publish(number):
    before = turns
    done = JobCompleted(job_id=str(number), duration_seconds=1)
    publisher.to_user("42", done, id=f"{number}:completed")
    return turns - before

def publish_all(start):
    jobs = [gevent.spawn(publish, number) for number in range(start, start + 25)]
    gevent.joinall(jobs, raise_error=True)
    assert all(job.value > 0 for job in jobs), "other greenlets run meanwhile"

publish_all(0)
print("first", flush=True)
gevent.os.tp_read(0, 1)  # The test has cut the connection.
publish_all(25)
publisher.close()
"""


@pytest.mark.any_rabbitmq
async def test_gevents_greenlets_publish_over_a_lost_connection(
    service: Service, vhost: Vhost, proxy: Proxy, connect: OpenStream
) -> None:
    stream = await connect(service, "42")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GEVENT, cwd=ROOT, env={**bare_environment(), "AMQP_URL": vhost.url_at(proxy.port)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        assert await process.stdout.readline() == b"first\n"
        proxy.cut()
        _, errors = await process.communicate(b"\n")
    assert process.returncode == 0, errors.decode()
    assert set(await stream.ids(50)) == {f"{number}:completed" for number in range(50)}


@pytest.mark.any_rabbitmq
async def test_celerys_gevent_pool_publishes(service: Service, connect: OpenStream, run: Run) -> None:
    stream = await connect(service, "42")
    await start_celery(run, "--pool", "gevent", "--concurrency", "10")
    tasks = await enqueue(run, 20)
    assert len(set(await stream.ids(20 * 6)) & {f"{task}:completed" for task in tasks}) == 20
    # The shutdown is not tested: one of ten workers with this pool hung after "Warm shutdown" (docs/workers.md).


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.any_rabbitmq
async def test_the_processes_of_multiprocessing_publish(
    service: Service, connect: OpenStream, run: Run, method: str
) -> None:
    stream = await connect(service, "42")
    program = await run("multiprocessing", "pool.py", "42", "20", METHOD=method)
    assert await program.ended() == 0, program.text
    expected = {f"r-{number}:completed" for number in range(20)} | {"batch:completed"}
    assert set(await stream.ids(21)) == expected


# Without an event log


@pytest.mark.contract("5.30")
@pytest.mark.any_rabbitmq
def test_an_event_without_a_queue_times_out_if_a_log_is_expected(vhost: Vhost) -> None:
    vhost.add_exchange("events")
    done = JobCompleted(job_id="r-7", duration_seconds=1)
    with (
        Publisher.blocking(vhost.url, source="/t", timeout=1) as publisher,
        pytest.raises(PublishTimeout, match="no queue takes it yet"),
    ):
        publisher.to_user("42", done)
    with Publisher.blocking(vhost.url, source="/t", timeout=1, log=False) as publisher:
        publisher.to_user("42", done)


# A user's own tests


def test_the_tests_of_a_program_that_publishes_need_no_broker(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / "testing", tmp_path / "testing")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:asyncio -p no:cacheprovider\n")
    environment = {**bare_environment(), "PYTHONPATH": str(ROOT), "AMQP_URL": "amqp://127.0.0.1:9/"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
