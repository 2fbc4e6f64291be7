"""Celery tasks that show their progress to the user who started them.

celery -A tasks worker        runs the tasks
python tasks.py 42 100        queues 100 reports for user 42
"""

import os
import sys
import time

from celery import Celery, Task
from celery.signals import worker_process_shutdown

from bridge import Publisher, PublishTimeout
from bridge.samples.jobs import JobCompleted, JobProgress, JobStarted

AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
EVENTS_URL = os.environ.get("EVENTS_URL", AMQP_URL)  # Celery and the events may have different brokers.
TIMEOUT = float(os.environ.get("TIMEOUT", "30"))
STEPS = 4
STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "0.01"))

app = Celery("tasks", broker=AMQP_URL)
app.conf.update(
    # Celery acks a task when it ends, after its events. If its worker dies before that, the task runs again.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    # `delay` returns when RabbitMQ has confirmed the task. Without it, Celery does not notice a lost task.
    broker_transport_options={"confirm_publish": True},
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    task_ignore_result=True,
)

# Made before Celery forks. Each child connects with its first event.
publisher = Publisher.blocking(EVENTS_URL, source="/workers/celery", timeout=TIMEOUT)


@worker_process_shutdown.connect
def close_publisher(**_: object) -> None:
    publisher.close()


# A retry runs with the same task id, so it publishes the same event ids.
@app.task(bind=True, autoretry_for=(PublishTimeout,), max_retries=None, retry_backoff=True)
def make_report(task: Task, user: str) -> None:
    job_id = task.request.id
    started = time.monotonic()
    publisher.to_user(user, JobStarted(job_id=job_id, steps=STEPS), id=f"{job_id}:started")
    for step in range(1, STEPS + 1):
        time.sleep(STEP_SECONDS)  # The work itself.
        percent = 100 * step / STEPS
        publisher.to_user(user, JobProgress(job_id=job_id, percent=percent), id=f"{job_id}:step-{step}")
    seconds = time.monotonic() - started
    publisher.to_user(user, JobCompleted(job_id=job_id, duration_seconds=seconds), id=f"{job_id}:completed")


if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        print(make_report.delay(sys.argv[1]).id)
