"""The way of a parcel."""

from bridge import EventData


class ParcelShipped(EventData, type="parcel.shipped"):
    """The carrier has it."""

    parcel_id: str
    carrier: str | None = None
