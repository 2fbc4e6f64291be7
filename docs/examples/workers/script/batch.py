"""Publishes the events of many jobs: `python batch.py jobs.jsonl`. It is safe to run again: the ids stay the same.

Each line of the file is `{"job": "r-7", "user": "42", "seconds": 3.2}`.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bridge import Audience, EventRefused, Publisher, PublishTimeout
from bridge.publisher import Item
from bridge.samples.jobs import JobCompleted

ATTEMPTS = 10

publisher = Publisher.blocking(
    os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"),
    source="/scripts/batch",
    timeout=float(os.environ.get("TIMEOUT", "30")),
)


def events(jobs: Sequence[dict[str, Any]]) -> Iterator[Item]:
    for job in jobs:
        done = JobCompleted(job_id=job["job"], duration_seconds=job["seconds"])
        yield Audience.user(job["user"]), done, {"id": f"{job['job']}:completed"}


def publish_all(jobs: Sequence[dict[str, Any]]) -> int:
    """Returns how many events were refused; each is printed.

    Raises:
        PublishTimeout: ten attempts in a row confirmed nothing. Run the program again later.
    """
    start = refused = attempts = 0
    while True:
        try:
            publisher.publish_many(events(jobs[start:]))
            return refused
        except EventRefused as error:
            # All events before it are confirmed. A retry does not help, so continue after it.
            print(error, file=sys.stderr, flush=True)
            refused += 1
            start += error.index + 1
        except PublishTimeout as error:
            # The events of `error.unconfirmed` may have arrived. They are published again under the same ids.
            attempts = 1 if error.confirmed else attempts + 1
            if attempts == ATTEMPTS:
                raise
            print(f"trying again: {error}", file=sys.stderr, flush=True)
            start += error.confirmed


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    with_errors = publish_all([json.loads(line) for line in lines])
    publisher.close()
    sys.exit(1 if with_errors else 0)
