"""Jobs that wait for a person."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from bridge.event import EventData
from bridge.samples.jobs import JobId


class ApprovalRequested(EventData, type="approval.requested"):
    """A job waits until a person decides."""

    approval_id: Annotated[str, Field(min_length=1, max_length=200)]
    job_id: JobId
    question: Annotated[str, Field(min_length=1, max_length=1_000, description="The question, for people")]
    expires_at: Annotated[AwareDatetime | None, Field(description="The question is closed after this time")] = None


class ApprovalDecided(EventData, type="approval.decided"):
    """A person has decided, perhaps on another device. Remove the question from the screen."""

    approval_id: Annotated[str, Field(min_length=1, max_length=200)]
    job_id: JobId
    decision: Literal["approved", "rejected", "expired"]
    decided_by: Annotated[str | None, Field(max_length=200, description="User id; null if the question expired")] = None
