"""A worker that uses the package acme-events: `AMQP_URL=amqp://... python worker.py`."""

import os

from acme_events.parcels import ParcelShipped

from bridge import Publisher

with Publisher.blocking(os.environ["AMQP_URL"], source="/workers/shipping") as publisher:
    print(publisher.to_user("42", ParcelShipped(parcel_id="p-1", carrier="DHL")))
