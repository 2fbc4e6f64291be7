"""Events of a parcel's delivery."""

from bridge import EventData


class ParcelShipped(EventData, type="parcel.shipped"):
    """The carrier has taken the parcel."""

    parcel_id: str
    carrier: str | None = None
