"""Jobs that wait for a person."""

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from bridge.event import EventData
from bridge.samples.jobs import JobId


class ApprovalRequested(EventData, type="approval.requested"):
    """A job waits until a person decides."""

    approval_id: Annotated[str, Field(min_length=1, max_length=200)]
    job_id: JobId
    question: Annotated[str, Field(min_length=1, max_length=1_000, description="What is to be decided, for people")]
    expires_at: Annotated[AwareDatetime | None, Field(description="After this moment the question is closed")] = None


class ApprovalDecided(EventData, type="approval.decided"):
    """Somebody has decided, perhaps on another device: take the question off the screen."""

    approval_id: Annotated[str, Field(min_length=1, max_length=200)]
    job_id: JobId
    decision: Literal["approved", "rejected", "expired"]
    decided_by: Annotated[str | None, Field(max_length=200, description="User id; none when it expired")] = None
