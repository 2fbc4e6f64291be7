"""A notification, for events without a type of their own."""

from typing import Annotated, Literal

from pydantic import Field

from bridge.event import EventData


class Notification(EventData, type="notification"):
    """Plain text for a person."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    body: Annotated[str, Field(max_length=5_000)] = ""
    level: Literal["info", "success", "warning", "error"] = "info"
    link: Annotated[str | None, Field(max_length=2_000)] = None
