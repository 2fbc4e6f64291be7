"""Publishes an event with pika, for programs that cannot use the SDK. ../publishing.md gives the reason for each step.

pip install pika
AMQP_URL=amqp://guest:guest@localhost/ python publish.py 42
"""

import json
import os
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker

EXCHANGE = "events"
MAX_BYTES = 65_536
PATIENCE_SECONDS = 30.0
HOPELESS = (403, 404)
"""AMQP reply codes: no right to publish, or no such exchange. A retry does not help."""


def word(text: str) -> str:
    """The id of a user or a group as one word of a routing key."""
    return quote(text, safe="").replace(".", "%2E")


class Events:
    """A publisher for one thread."""

    def __init__(self, url: str, *, source: str) -> None:
        self._parameters = pika.URLParameters(url)
        # Without this, a publisher waits for as long as a memory or disk alarm of RabbitMQ lasts.
        self._parameters.blocked_connection_timeout = PATIENCE_SECONDS
        self._source = source
        self._connection: pika.BlockingConnection | None = None
        self._channel: BlockingChannel | None = None

    def publish(self, audience: str, event_type: str, data: dict[str, Any], *, event_id: str | None = None) -> str:
        """Returns the event's id when RabbitMQ has confirmed it. An event without a confirm is published again for 30
        seconds; then this raises. A later retry with the same id is safe: it is the same event.

        Args:
            audience: `user.` or `group.` and `word(id)`, or `all`.
        """
        event = {
            "specversion": "1.0",
            "id": event_id or str(uuid.uuid4()),
            "source": self._source,
            "type": event_type,
            "time": datetime.now(UTC).isoformat(),
            "data": data,
        }
        body = json.dumps(event).encode()
        if len(body) > MAX_BYTES:
            raise ValueError(f"{event_type}: {len(body)} bytes; the bridge takes at most {MAX_BYTES}")
        properties = pika.BasicProperties(
            content_type="application/cloudevents+json", message_id=event["id"], delivery_mode=2
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause = 0.1
        while True:
            try:
                channel = self._open()
                channel.basic_publish(EXCHANGE, f"{audience}.{event_type}", body, properties, mandatory=True)
                return event["id"]
            except (AMQPError, OSError) as error:  # Includes a nack, a return, and a host name that does not resolve.
                self.close()
                hopeless = isinstance(error, ChannelClosedByBroker) and error.reply_code in HOPELESS
                if hopeless or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _open(self) -> BlockingChannel:
        if self._channel is None or not self._channel.is_open:
            self._connection = pika.BlockingConnection(self._parameters)
            self._channel = self._connection.channel()
            self._channel.confirm_delivery()
        return self._channel

    def close(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.close()
        self._connection = self._channel = None


if __name__ == "__main__":
    events = Events(os.environ.get("AMQP_URL", "amqp://guest:guest@localhost/"), source="/examples/pika")
    print(events.publish(f"user.{word(sys.argv[1])}", "job.completed", {"job_id": "r-7", "duration_seconds": 3.2}))
    events.close()
