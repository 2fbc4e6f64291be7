"""The delivery of a parcel."""

from typing import Annotated

from pydantic import AwareDatetime, Field

from bridge import EventData


class ParcelShipped(EventData, type="parcel.shipped"):
    """The carrier has taken the parcel."""

    parcel_id: Annotated[str, Field(min_length=1, max_length=200)]
    carrier: Annotated[str | None, Field(max_length=200, description="Name of the carrier, for people")] = None
    arrives_at: Annotated[AwareDatetime | None, Field(description="Expected arrival")] = None
