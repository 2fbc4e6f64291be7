"""A batch in several processes: `python pool.py 42 20`. Each process has its own connection."""

import multiprocessing
import os
import sys

from bridge import Publisher
from bridge.samples.jobs import JobCompleted

# A global of the module, never an argument: a connection cannot be sent to another process.
publisher = Publisher.blocking(
    os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"),
    source="/batches/reports",
    timeout=float(os.environ.get("TIMEOUT", "30")),
)


def work(user: str, number: int) -> str:
    done = JobCompleted(job_id=f"r-{number}", duration_seconds=3.2)
    return publisher.to_user(user, done, id=f"r-{number}:completed")


def main() -> None:
    user, count = sys.argv[1], int(sys.argv[2])
    context = multiprocessing.get_context(os.environ.get("METHOD"))
    with context.Pool(2) as pool:
        pool.starmap(work, [(user, number) for number in range(count)])
    publisher.to_user(user, JobCompleted(job_id="batch", duration_seconds=3.2), id="batch:completed")


if __name__ == "__main__":
    main()
