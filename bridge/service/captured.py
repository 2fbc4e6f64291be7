"""Reads captured messages from a file, for `bridge check --sample`. Pure."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from bridge.service.broker.properties import MessageBody, Properties, Value

_PROPERTIES = ("content_type", "content_encoding", "message_id", "type", "app_id")


def read_captured(data: bytes, routing_key: str | None) -> list[tuple[str, bytes]]:
    """The messages of a file, each with its routing key: a body alone, or what RabbitMQ's management shows.

    Args:
        routing_key: replaces the key of each message; a body alone has none.

    Raises:
        ValueError: the file has no message, or a message has no routing key or no body.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    messages = value if isinstance(value, list) else [value]
    if not messages or not all(isinstance(message, dict) and "payload" in message for message in messages):
        if routing_key is None:
            raise ValueError("the file has a body alone: give its routing key with --routing-key")
        return [(routing_key, data)]
    return [_read_one(number, message, routing_key) for number, message in enumerate(messages, 1)]


def _read_one(number: int, message: dict[str, Any], routing_key: str | None) -> tuple[str, bytes]:
    key = message.get("routing_key") if routing_key is None else routing_key
    if not isinstance(key, str):
        raise ValueError(f"message {number} has no routing_key: give it with --routing-key")
    payload = message["payload"]
    if not isinstance(payload, str):
        raise ValueError(f"the payload of message {number} is not a string")
    if message.get("payload_encoding") == "base64":
        try:
            body = base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the payload of message {number} is not base64: {error}") from None
    else:
        body = payload.encode("utf-8", "surrogatepass")
    # Without properties the management writes an empty list.
    given = message.get("properties") or {}
    if not isinstance(given, dict):
        raise ValueError(f"the properties of message {number} are not an object")
    texts = {name: given[name] for name in _PROPERTIES if isinstance(given.get(name), str)}
    time = given.get("timestamp")
    found: dict[str, Any] = given.get("headers") or {}
    headers: list[tuple[str, Value]] = [
        (name, value)
        for name, value in found.items()
        if isinstance(value, str | bool | int) and not name.startswith("x-")
    ]
    properties = Properties(**texts, timestamp=time if isinstance(time, int) else None, headers=tuple(sorted(headers)))
    return key, MessageBody(body, properties)
