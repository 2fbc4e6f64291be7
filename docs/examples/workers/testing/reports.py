"""A program that publishes, and publishes again if RabbitMQ does not confirm."""

import os
import time

from bridge import Publisher, PublishTimeout
from bridge.samples.jobs import JobCompleted, JobStarted

publisher = Publisher.blocking(os.environ.get("AMQP_URL", "amqp://localhost/"), source="/workers/reports")


def make_report(job_id: str, user: str) -> None:
    started = time.monotonic()
    publisher.to_user(user, JobStarted(job_id=job_id), id=f"{job_id}:started")
    # The work itself is here.
    done = JobCompleted(job_id=job_id, duration_seconds=time.monotonic() - started)
    try:
        publisher.to_user(user, done, id=f"{job_id}:completed")
    except PublishTimeout as error:
        # The event may have arrived. The same id is the same event, so a stream that has shown it does not repeat it.
        publisher.to_user(user, done, id=error.id)
