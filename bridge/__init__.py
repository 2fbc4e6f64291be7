"""Streams typed events from a RabbitMQ topic exchange to browsers as Server-Sent Events.

This package exports the names that workers need. Importing it does not import the server's dependencies.
"""

from bridge.blocking import BlockingPublisher
from bridge.event import EventData
from bridge.publisher import (
    EventRefused,
    ExchangeMissing,
    Publisher,
    PublishError,
    PublishForbidden,
    PublishTimeout,
    new_id,
)
from bridge.routing import Audience, decode_id, encode_id

__version__ = "0.1.0"

__all__ = [
    "Audience",
    "BlockingPublisher",
    "EventData",
    "EventRefused",
    "ExchangeMissing",
    "PublishError",
    "PublishForbidden",
    "PublishTimeout",
    "Publisher",
    "decode_id",
    "encode_id",
    "new_id",
]
