"""Captured messages are read from a file."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from bridge.service.broker.properties import Properties, properties_of
from bridge.service.captured import read_captured

KEY = "all.job.completed"
# As `rabbitmqadmin get queue=q --format=raw_json` prints it.
CAPTURED: dict[str, Any] = {
    "payload_bytes": 2,
    "redelivered": False,
    "exchange": "events",
    "routing_key": KEY,
    "message_count": 0,
    "properties": {
        "content_type": "application/json",
        "message_id": "1",
        "timestamp": 1_769_860_800,
        "app_id": "/app",
        "delivery_mode": 2,
        "headers": {"ce-id": "2", "x-death": [], "x-own": "a", "list": []},
    },
    "payload": "{}",
    "payload_encoding": "string",
}


def read(value: Any, key: str | None = None) -> list[tuple[str, bytes]]:
    return read_captured(json.dumps(value).encode(), key)


@pytest.mark.parametrize("value", [CAPTURED, [CAPTURED]])
def test_a_message_as_the_management_shows_it(value: Any) -> None:
    ((key, body),) = read(value)
    assert (key, body) == (KEY, b"{}")
    assert properties_of(body) == Properties(
        content_type="application/json",
        message_id="1",
        timestamp=1_769_860_800,
        app_id="/app",
        headers=(("ce-id", "2"),),
    )


def test_a_payload_in_base64_and_no_properties() -> None:
    encoded = CAPTURED | {"payload": base64.b64encode(b"\xff").decode(), "payload_encoding": "base64", "properties": []}
    ((_, body),) = read(encoded, "all.other")
    assert (body, properties_of(body)) == (b"\xff", Properties())


@pytest.mark.parametrize("data", [b"{}", b"[]", b"\xff", b"[1]", b"{", b'{"a":1}'])
def test_a_body_alone_needs_its_key(data: bytes) -> None:
    assert read_captured(data, KEY) == [(KEY, data)]
    with pytest.raises(ValueError, match="--routing-key"):
        read_captured(data, None)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"routing_key": None}, "message 1 has no routing_key"),
        ({"payload": 1}, "is not a string"),
        ({"payload": "?", "payload_encoding": "base64"}, "is not base64"),
        ({"properties": "x"}, "are not an object"),
    ],
)
def test_a_message_with_a_fault(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        read(CAPTURED | change)
