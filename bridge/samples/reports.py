"""Reports that jobs make for people."""

from typing import Annotated, Literal

from pydantic import Field

from bridge.event import EventData
from bridge.samples.jobs import JobId


class ReportReady(EventData, type="report.ready"):
    """A report is ready to fetch."""

    report_id: Annotated[str, Field(min_length=1, max_length=200)]
    title: Annotated[str, Field(max_length=200)]
    url: Annotated[str, Field(max_length=2_000)]
    format: Literal["pdf", "csv", "xlsx", "html", "json"]
    size_bytes: Annotated[int | None, Field(ge=0)] = None
    job_id: JobId | None = None
