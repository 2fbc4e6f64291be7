"""Money. Amounts are whole minor units (cents), never floats."""

from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from bridge.event import EventData


class Amount(BaseModel):
    """An amount of money, as a part of an event."""

    minor_units: Annotated[int, Field(description="Cents, for a currency that has them")]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$", description="ISO 4217")]


class BillingNotice(EventData, type="billing.notice"):
    """An invoice was issued or paid, a payment failed, or a quota is nearly used up."""

    kind: Literal["invoice_issued", "payment_received", "payment_failed", "quota_warning"]
    invoice_id: Annotated[str | None, Field(max_length=200)] = None
    amount: Amount | None = None
    due: date | None = None
    message: Annotated[str, Field(max_length=1_000)] = ""
