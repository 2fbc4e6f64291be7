"""A sample automation worker: its jobs only take time, and it publishes their events.

    python -m deploy.local.worker USER [STATE]      (BRIDGE_AMQP_URL names the RabbitMQ)

The three lines that matter are `Publisher(...)` and two `to_user(...)`. With STATE, the name of a file, the worker also
writes the state that a page loads: see `State`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridge import EventData, Publisher, PublishError, PublishTimeout
from bridge.samples.approvals import ApprovalDecided, ApprovalRequested
from bridge.samples.billing import Amount, BillingNotice
from bridge.samples.jobs import JobCompleted, JobFailed, JobProgress, JobStarted
from bridge.samples.notifications import Notification
from bridge.samples.reports import ReportReady
from bridge.service.settings import BrokerSettings, load

TITLES = ["Collect invoices", "Reconcile payments", "Refresh dashboards", "Archive old orders", "Sync the address book"]
KEPT_JOBS = 6
KEPT_NOTICES = 4
STEPS = ["Reading the source", "Comparing", "Writing changes", "Checking the result"]


class State:
    """The newest jobs and notices, as an application would have them in its database.

    A page loads this when its stream is live. So the worker first writes each change here, and then publishes it: the
    state that a page loads is never older than the first event that it gets.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._jobs: dict[str, dict[str, Any]] = {}
        self._notices: list[dict[str, Any]] = []
        self._write()

    def change_job(self, job_id: str, **members: Any) -> None:
        self._jobs.setdefault(job_id, {"job_id": job_id}).update(members)
        # A running job stays: a page that gets its next event must know its title.
        finished = [job_id for job_id, job in self._jobs.items() if job.get("status") != "running"]
        for old in finished[: max(0, len(self._jobs) - KEPT_JOBS)]:
            del self._jobs[old]
        self._write()

    def add_notice(self, data: EventData) -> None:
        self._notices = [*self._notices, {"type": data.event_type, "data": data.model_dump(mode="json")}][
            -KEPT_NOTICES:
        ]
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            draft = self._path.with_suffix(".new")
            draft.write_text(json.dumps({"jobs": list(self._jobs.values()), "notices": self._notices}))
            os.replace(draft, self._path)  # A reader gets the old text or the new text, never a part.


async def run_job(publisher: Publisher, state: State, user: str, number: int) -> None:
    """Runs one job and publishes an event for each step."""
    job_id = f"job-{number}"
    began = time.monotonic()
    title = random.choice(TITLES)
    state.change_job(job_id, title=title, status="running", percent=0, note="")
    await publisher.to_user(user, JobStarted(job_id=job_id, title=title, steps=len(STEPS)))
    for percent in range(0, 100, random.choice([4, 7, 10])):
        await asyncio.sleep(random.uniform(0.1, 0.4))
        message = STEPS[percent * len(STEPS) // 100]
        state.change_job(job_id, percent=percent, note=message)
        await publisher.to_user(user, JobProgress(job_id=job_id, percent=percent, message=message))
    seconds = round(time.monotonic() - began, 1)
    if number % 5 == 4:
        error = "The source did not answer"
        state.change_job(job_id, status="failed", note=error)
        await publisher.to_user(user, JobFailed(job_id=job_id, error=error, retryable=True))
        return
    state.change_job(job_id, percent=100, note="")
    await publisher.to_user(user, JobProgress(job_id=job_id, percent=100))
    state.change_job(job_id, status="completed", note=f"done in {seconds} s")
    await publisher.to_user(user, JobCompleted(job_id=job_id, duration_seconds=seconds))


async def publish_other_events(publisher: Publisher, state: State, user: str) -> None:
    """Publishes other events of an automation product every five seconds: to the user, a group and everybody."""
    for number in itertools.count(1):
        await asyncio.sleep(5)
        match number % 5:
            case 0:
                amount = Amount(minor_units=1900, currency="EUR")
                issued = BillingNotice(kind="invoice_issued", invoice_id=f"i-{number}", amount=amount)
                state.add_notice(issued)
                await publisher.to_user(user, issued)
            case 1:
                question = "Archive 1,204 orders older than two years?"
                asked = ApprovalRequested(approval_id=f"a-{number}", job_id="job-0", question=question)
                state.add_notice(asked)
                await publisher.to_group("operators", asked)
            case 2:
                decided = ApprovalDecided(approval_id=f"a-{number - 1}", job_id="job-0", decision="approved")
                state.add_notice(decided)
                await publisher.to_group("operators", decided)
            case 3:
                url = f"/reports/{number}.pdf"
                report = ReportReady(report_id=f"r-{number}", title="Weekly report", url=url, format="pdf")
                state.add_notice(report)
                await publisher.to_user(user, report)
            case _:
                notice = Notification(title="Maintenance on Sunday at 04:00 UTC", level="warning")
                state.add_notice(notice)
                await publisher.to_all(notice)


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """An outage of RabbitMQ longer than the timeout loses a job's events, but does not end the worker."""
    try:
        yield
    except PublishTimeout as error:
        print(f"worker: {error}", file=sys.stderr, flush=True)


async def until(stop: asyncio.Event) -> None:
    await stop.wait()


async def main(user: str, path: Path | None = None) -> None:
    url = load(BrokerSettings).amqp_url.get_secret_value()
    state = State(path)
    async with Publisher(url, source="/workers/sample") as publisher:

        async def work(lane: int) -> None:
            for number in itertools.count():
                with going_on():
                    await run_job(publisher, state, user, number * 3 + lane)
                await asyncio.sleep(random.uniform(0.5, 2))

        async def talk() -> None:
            while True:
                with going_on():
                    await publish_other_events(publisher, state, user)

        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        tasks = [asyncio.create_task(job) for job in (work(0), work(1), work(2), talk())]
        ended = asyncio.create_task(until(stop))
        done, _ = await asyncio.wait({ended, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()


if __name__ == "__main__":
    # aiormq logs each try to connect, several a second. `PublishTimeout` reports the outage once, with the last cause.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    try:
        asyncio.run(main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None))
    except PublishError as error:
        sys.exit(f"worker: {error}")
