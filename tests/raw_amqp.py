"""Publishes with hand-made frames: a library would refuse some odd messages that the broker accepts."""

from __future__ import annotations

import asyncio
import struct


def short_string(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(*fields: bytes) -> bytes:
    joined = b"".join(fields)
    return struct.pack(">I", len(joined)) + joined


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def handshake(vhost: str) -> list[bytes]:
    """What a client sends until its channel 1 is open, without heartbeats. RabbitMQ answers each with one frame."""
    login = short_string(b"PLAIN") + struct.pack(">I", 12) + b"\0guest\0guest" + short_string(b"en_US")
    return [
        b"AMQP\x00\x00\x09\x01",
        frame(1, 0, struct.pack(">HHI", 10, 11, 0) + login),
        frame(1, 0, struct.pack(">HHHIH", 10, 31, 2047, 131_072, 0))
        + frame(1, 0, struct.pack(">HH", 10, 40) + short_string(vhost.encode()) + b"\0\0"),
        frame(1, 1, struct.pack(">HHB", 20, 10, 0)),
    ]


async def publish_raw(
    port: int,
    vhost: str,
    *,
    key: bytes,
    body: bytes,
    flags: int = 0,
    properties: bytes = b"",
    exchange: bytes = b"events",
) -> None:
    """Confirmed by the broker when it returns."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def answer() -> bytes:
        _, _, size = struct.unpack(">BHI", await reader.readexactly(7))
        return await reader.readexactly(size + 1)

    try:
        for request in handshake(vhost):
            writer.write(request)
            await answer()
        writer.write(frame(1, 1, struct.pack(">HHB", 85, 10, 0)))  # confirm.select
        await answer()
        publish = struct.pack(">HHH", 60, 40, 0) + short_string(exchange) + short_string(key) + b"\0"
        writer.write(frame(1, 1, publish))
        writer.write(frame(2, 1, struct.pack(">HHQH", 60, 0, len(body), flags) + properties))
        if body:
            writer.write(frame(3, 1, body))
        confirmed = await answer()
        assert confirmed[:4] == struct.pack(">HH", 60, 80), confirmed
    finally:
        writer.close()
        await writer.wait_closed()
