"""APScheduler makes a report each morning: `python scheduler.py`. With `--now` it makes the first report at once."""

import os
import signal
import sys
import time
from datetime import UTC, datetime

from apscheduler.schedulers.blocking import BlockingScheduler
from apscheduler.triggers.cron import CronTrigger

from bridge import Publisher
from bridge.samples.jobs import JobCompleted, JobStarted

publisher = Publisher.blocking(
    os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"),
    source="/schedulers/reports",
    timeout=float(os.environ.get("TIMEOUT", "30")),
)
scheduler = BlockingScheduler(timezone=UTC)


def daily_report() -> None:
    # One job a day: a second run on the same day, after a crash or by hand, has the same job id and event ids.
    job_id = f"daily-report:{datetime.now(UTC).date()}"
    started = time.monotonic()
    publisher.to_group("reports", JobStarted(job_id=job_id), id=f"{job_id}:started")
    time.sleep(float(os.environ.get("WORK_SECONDS", "0")))  # The work itself.
    done = JobCompleted(job_id=job_id, duration_seconds=time.monotonic() - started)
    print(publisher.to_group("reports", done, id=f"{job_id}:completed"), flush=True)


def main() -> None:
    scheduler.add_job(
        daily_report,
        CronTrigger.from_crontab("0 6 * * *", timezone=UTC),
        misfire_grace_time=3600,  # A run that is up to an hour late still starts.
        **({"next_run_time": datetime.now(UTC)} if "--now" in sys.argv else {}),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        scheduler.start()
    finally:
        scheduler.shutdown()  # Waits for the running job.
        publisher.close()


if __name__ == "__main__":
    main()
