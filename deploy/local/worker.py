"""A sample automation worker: runs jobs that are nothing but time, and publishes what happens to them.

    python -m deploy.local.worker USER      (BRIDGE_AMQP_URL says where)

The three lines that matter are `Publisher(...)` and two `to_user(...)`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import signal
import sys
import time
from collections.abc import Iterator

from bridge import Publisher, PublishError, PublishTimeout
from bridge.samples.approvals import ApprovalDecided, ApprovalRequested
from bridge.samples.billing import Amount, BillingNotice
from bridge.samples.jobs import JobCompleted, JobFailed, JobProgress, JobStarted
from bridge.samples.notifications import Notification
from bridge.samples.reports import ReportReady
from bridge.service.settings import BrokerSettings, load

TITLES = ["Collect invoices", "Reconcile payments", "Refresh dashboards", "Archive old orders", "Sync the address book"]
STEPS = ["Reading the source", "Comparing", "Writing changes", "Checking the result"]


async def run_job(publisher: Publisher, user: str, number: int) -> None:
    """One job from its start to its end, on the user's screen as it goes."""
    job_id = f"job-{number}"
    began = time.monotonic()
    await publisher.to_user(user, JobStarted(job_id=job_id, title=random.choice(TITLES), steps=len(STEPS)))
    for percent in range(0, 100, random.choice([4, 7, 10])):
        await asyncio.sleep(random.uniform(0.1, 0.4))
        message = STEPS[percent * len(STEPS) // 100]
        await publisher.to_user(user, JobProgress(job_id=job_id, percent=percent, message=message))
    seconds = round(time.monotonic() - began, 1)
    if number % 5 == 4:
        await publisher.to_user(user, JobFailed(job_id=job_id, error="The source did not answer", retryable=True))
        return
    await publisher.to_user(user, JobProgress(job_id=job_id, percent=100))
    await publisher.to_user(user, JobCompleted(job_id=job_id, duration_seconds=seconds))


async def tell_of_other_things(publisher: Publisher, user: str) -> None:
    """Now and then what else an automation product has to say, to the user, a group and everybody."""
    for number in itertools.count(1):
        await asyncio.sleep(5)
        match number % 5:
            case 0:
                amount = Amount(minor_units=1900, currency="EUR")
                await publisher.to_user(
                    user, BillingNotice(kind="invoice_issued", invoice_id=f"i-{number}", amount=amount)
                )
            case 1:
                question = "Archive 1,204 orders older than two years?"
                asked = ApprovalRequested(approval_id=f"a-{number}", job_id="job-0", question=question)
                await publisher.to_group("operators", asked)
            case 2:
                decided = ApprovalDecided(approval_id=f"a-{number - 1}", job_id="job-0", decision="approved")
                await publisher.to_group("operators", decided)
            case 3:
                url = f"/reports/{number}.pdf"
                await publisher.to_user(
                    user, ReportReady(report_id=f"r-{number}", title="Weekly report", url=url, format="pdf")
                )
            case _:
                await publisher.to_all(Notification(title="Maintenance on Sunday at 04:00 UTC", level="warning"))


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """A broker that is away for longer than the deadline costs a job's events, not the worker."""
    try:
        yield
    except PublishTimeout as error:
        print(f"worker: {error}", file=sys.stderr, flush=True)


async def until(stop: asyncio.Event) -> None:
    await stop.wait()


async def main(user: str) -> None:
    url = load(BrokerSettings).amqp_url.get_secret_value()
    async with Publisher(url, source="/workers/sample") as publisher:

        async def work(lane: int) -> None:
            for number in itertools.count():
                with going_on():
                    await run_job(publisher, user, number * 3 + lane)
                await asyncio.sleep(random.uniform(0.5, 2))

        async def talk() -> None:
            while True:
                with going_on():
                    await tell_of_other_things(publisher, user)

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
    # It reports each try to connect, several a second; `PublishTimeout` says it once, with the last cause.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    try:
        asyncio.run(main(sys.argv[1]))
    except PublishError as error:
        sys.exit(f"worker: {error}")
