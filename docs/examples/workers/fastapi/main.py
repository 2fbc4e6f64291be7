"""FastAPI with one async publisher for each process: `uvicorn main:app`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request

from bridge import Publisher, PublishTimeout
from bridge.samples.jobs import JobCompleted, JobStarted

AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/")
TIMEOUT = float(os.environ.get("TIMEOUT", "10"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Connects with the first event, so the program starts without RabbitMQ. `async with` would need it at the start.
    app.state.publisher = Publisher(AMQP_URL, source="/apis/jobs", timeout=TIMEOUT)
    yield
    await app.state.publisher.close()


app = FastAPI(lifespan=lifespan)


def publisher_of(request: Request) -> Publisher:
    publisher: Publisher = request.app.state.publisher
    return publisher


Events = Annotated[Publisher, Depends(publisher_of)]


@app.post("/jobs/{job_id}", status_code=201)
async def run_job(job_id: str, user: str, publisher: Events) -> dict[str, str]:
    try:
        await publisher.to_user(user, JobStarted(job_id=job_id), id=f"{job_id}:started")
        # The work itself is here.
        done = JobCompleted(job_id=job_id, duration_seconds=3.2)
        return {"event": await publisher.to_user(user, done, id=f"{job_id}:completed")}
    except PublishTimeout as error:
        # The caller sends the request again. The second try has the same event ids.
        raise HTTPException(503, f"not published: {error}", {"Retry-After": "5"}) from error
