"""A WSGI application: `gunicorn --preload --workers 2 app:application`, with sync or gthread workers."""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from bridge import Publisher, PublishTimeout
from bridge.samples.jobs import JobCompleted

# With --preload, the parent makes the publisher. Each worker connects with its first event.
publisher = Publisher.blocking(
    os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"),
    source="/sites/reports",
    timeout=float(os.environ.get("TIMEOUT", "10")),
)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    query = parse_qs(environ["QUERY_STRING"])
    job_id, user = query["job"][0], query["user"][0]
    done = JobCompleted(job_id=job_id, duration_seconds=3.2)
    try:
        answer = {"event": publisher.to_user(user, done, id=f"{job_id}:completed"), "pid": os.getpid()}
        status = "201 Created"
    except PublishTimeout as error:
        answer, status = {"error": str(error)}, "503 Service Unavailable"
    start_response(status, [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
