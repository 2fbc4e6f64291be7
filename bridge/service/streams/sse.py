"""The bytes of a stream (HTML Living Standard, section 9.2 "Server-sent events").

Pure. Owns framing and nothing else. A field's value may not hold CR, LF or NUL (9.2.6: LF, CR and CRLF each end a line;
an id with NUL is ignored). `encode_type` and `encode_data` check their text. `encode_id` does not: its cursors are
written by the bridge, and `Cursor.parse` admits no such character.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Literal

GapReason = Literal["expired", "unknown", "no-log", "not-readable"]
EndReason = Literal["drain", "rotate", "expired", "slow", "busy", "revoked"]

END_REASONS: tuple[EndReason, ...] = ("drain", "rotate", "expired", "slow", "busy", "revoked")

MEDIA_TYPE = "text/event-stream"

HEARTBEAT = b":\n"
"""A comment (9.2.6: "if the line starts with a colon, ignore the line"). With ONE line feed: after a blank line,
fetch-event-source and httpx-sse would report an empty event."""


def _check(value: bytes) -> bytes:
    if b"\n" in value or b"\r" in value or b"\0" in value:
        raise ValueError("a field's value must not hold CR, LF or NUL")
    return value


@lru_cache(maxsize=1024)  # A catalogue has a few dozen.
def encode_type(event_type: str) -> bytes:
    """The `event:` line. It comes before `data:`.

    Raises:
        ValueError: the type holds CR, LF or NUL.
    """
    return b"event: " + _check(event_type.encode("ascii")) + b"\n"


def encode_data(text: bytes) -> bytes:
    """The `data:` line of one line of UTF-8, and the blank line that ends the frame.

    Raises:
        ValueError: the text holds CR, LF or NUL. No JSON encoder writes them.
    """
    return b"data: " + _check(text) + b"\n\n"


def decode_data(frame: bytes) -> bytes:
    """The text that `encode_data` was given."""
    return frame[len(b"data: ") : -len(b"\n\n")]


def encode_id(cursor: str) -> bytes:
    """The `id:` line. The browser sends its value back as Last-Event-ID."""
    return f"id: {cursor}\n".encode("ascii")


def _encode(name: str, data: dict[str, object], *, cursor: str | None = None, retry_ms: int | None = None) -> bytes:
    # `retry:` is in the block of an event. Alone before a blank line, some clients take it for an empty event.
    head = b"" if retry_ms is None else b"retry: %d\n" % retry_ms
    if cursor is not None:
        head += encode_id(cursor)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return head + encode_type(name) + encode_data(text)


def encode_ready(
    *, user: str, identity: str, resumed: bool, heartbeat_seconds: float, cursor: str, retry_ms: int
) -> bytes:
    seconds = int(heartbeat_seconds) if heartbeat_seconds == int(heartbeat_seconds) else heartbeat_seconds
    data: dict[str, object] = {
        "user": user,
        "identity": identity,
        "resumed": resumed,
        "heartbeat_seconds": seconds,
    }
    return _encode("bridge.ready", data, cursor=cursor, retry_ms=retry_ms)


def encode_gap(reason: GapReason) -> bytes:
    return _encode("bridge.gap", {"reason": reason})


def encode_status(*, receiving: bool) -> bytes:
    # With a name of its own: an EventSource without a listener for it ignores it, also under `named=false`.
    return _encode("bridge.status", {"receiving": receiving})


def encode_position(cursor: str) -> bytes:
    # With empty data: Safari and Firefox take an id only from a block that has data.
    return _encode("bridge.position", {}, cursor=cursor)


def encode_bye(reason: EndReason, retry_ms: int, *, cursor: str | None = None) -> bytes:
    """
    Args:
        cursor: the client's own, if this is the stream's first block. A parser begins each stream with an empty last
            event id, and by 9.2.6 a block without `id:` would make that the client's position.
    """
    return _encode("bridge.bye", {"reason": reason}, cursor=cursor, retry_ms=retry_ms)
