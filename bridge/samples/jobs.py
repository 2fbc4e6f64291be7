"""An automation job, from its start to its end: completed, failed or cancelled."""

from typing import Annotated

from pydantic import Field

from bridge.event import EventData

JobId = Annotated[str, Field(min_length=1, max_length=200, description="The job, the same in all of its events")]
Seconds = Annotated[float, Field(ge=0, description="Seconds since the job started")]


class JobStarted(EventData, type="job.started"):
    """A worker has started the job."""

    job_id: JobId
    title: Annotated[str, Field(max_length=200, description="What the job does, for people")] = ""
    steps: Annotated[int | None, Field(ge=1, description="Number of steps, if it is known at the start")] = None


class JobProgress(EventData, type="job.progress"):
    """The job's progress. Only the newest event matters; a page may skip older ones."""

    job_id: JobId
    percent: Annotated[float, Field(ge=0, le=100)]
    message: Annotated[str, Field(max_length=500, description="The current step, for people")] = ""


class JobCompleted(EventData, type="job.completed"):
    """The job has completed with its result."""

    job_id: JobId
    duration_seconds: Seconds
    result_url: Annotated[str | None, Field(max_length=2_000, description="Address of the result")] = None


class JobFailed(EventData, type="job.failed"):
    """The job has ended without a result."""

    job_id: JobId
    error: Annotated[str, Field(max_length=2_000, description="The error, for the person who started the job")]
    retryable: Annotated[bool, Field(description="Whether a new start may help")] = False
    duration_seconds: Seconds | None = None


class JobCancelled(EventData, type="job.cancelled"):
    """A person or a service stopped the job."""

    job_id: JobId
    cancelled_by: Annotated[str, Field(max_length=200, description="User id, or the name of a service")]
    reason: Annotated[str, Field(max_length=500)] = ""
