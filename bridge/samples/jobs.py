"""The life of an automation job, from its start to one of three ends."""

from typing import Annotated

from pydantic import Field

from bridge.event import EventData

JobId = Annotated[str, Field(min_length=1, max_length=200, description="The job, the same in all of its events")]
Seconds = Annotated[float, Field(ge=0, description="Seconds since the job started")]


class JobStarted(EventData, type="job.started"):
    """A worker has taken the job up."""

    job_id: JobId
    title: Annotated[str, Field(max_length=200, description="What the job does, for people")] = ""
    steps: Annotated[int | None, Field(ge=1, description="Number of steps, where it is known beforehand")] = None


class JobProgress(EventData, type="job.progress"):
    """The job got further. Only the newest matters; a page may skip the others."""

    job_id: JobId
    percent: Annotated[float, Field(ge=0, le=100)]
    message: Annotated[str, Field(max_length=500, description="What is being done now, for people")] = ""


class JobCompleted(EventData, type="job.completed"):
    """The job is done, and well."""

    job_id: JobId
    duration_seconds: Seconds
    result_url: Annotated[str | None, Field(max_length=2_000, description="Where the result can be fetched")] = None


class JobFailed(EventData, type="job.failed"):
    """The job has ended without its result."""

    job_id: JobId
    error: Annotated[str, Field(max_length=2_000, description="What went wrong, for the person who started the job")]
    retryable: Annotated[bool, Field(description="Whether starting it again may help")] = False
    duration_seconds: Seconds | None = None


class JobCancelled(EventData, type="job.cancelled"):
    """Somebody stopped the job."""

    job_id: JobId
    cancelled_by: Annotated[str, Field(max_length=200, description="User id, or the name of a service")]
    reason: Annotated[str, Field(max_length=500)] = ""
