"""Deliveries are read from bytes: one rule a test. The property tests are in tests/property/test_deliveries.py."""

from __future__ import annotations

import struct

import pytest

from bridge.event import Cut
from bridge.service.broker.deliveries import HEARTBEAT, Deliveries, NotAmqp
from tests.raw_amqp import frame

CHANNEL = 3


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def deliver(tag: int, key: bytes = b"all.x", channel: int = CHANNEL) -> bytes:
    payload = b"\x00\x3c\x00\x3c" + short(b"c") + struct.pack(">QB", tag, 0) + short(b"events") + short(key)
    return frame(1, channel, payload)


def header(size: int, channel: int = CHANNEL) -> bytes:
    return frame(2, channel, struct.pack(">HHQH", 60, 0, size, 0))


def message(tag: int, body: bytes) -> bytes:
    return deliver(tag) + header(len(body)) + (frame(3, CHANNEL, body) if body else b"")


class Taken:
    """Records the deliveries that the callback gets."""

    def __init__(self, *, max_body: int = 100) -> None:
        self.deliveries = Deliveries(max_body=max_body)
        self.found: list[tuple[bytes, str, bytes, int | None]] = []
        self.sink = self._record  # One object: `drop` compares it by identity.
        self.deliveries.take(CHANNEL, self.sink)

    def _record(self, tag: bytes, key: str, body: bytes, offset: int | None) -> None:
        self.found.append((tag, key, body, offset))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_delivery_in_pieces(step: int) -> None:
    taken = Taken()
    data = message(1, b"hello") + message(2, b"")
    passed = b"".join(taken.deliveries.feed(data[at : at + step]) for at in range(0, len(data), step))
    assert passed == b"", "no byte of it is for the library"
    assert taken.found == [(b"c", "all.x", b"hello", None), (b"c", "all.x", b"", None)]
    assert (taken.deliveries.unacked, taken.deliveries.buffered) == (2, 0)


def test_one_ack_for_all_of_a_channel() -> None:
    taken = Taken()
    taken.deliveries.feed(message(1, b"a") + message(2, b"b"))
    assert taken.deliveries.take_acks() == frame(1, CHANNEL, b"\x00\x3c\x00\x50" + struct.pack(">QB", 2, 1))
    assert taken.deliveries.take_acks() == b""


def test_a_large_body_is_cut() -> None:
    taken = Taken(max_body=100)
    taken.deliveries.feed(message(1, b"x" * 101))
    ((_, _, body, _),) = taken.found
    assert isinstance(body, Cut)
    assert body.size == 101
    taken.deliveries.feed(message(2, b"x" * 100))
    assert not isinstance(taken.found[1][2], Cut)


def test_other_frames_go_to_the_library() -> None:
    taken = Taken()
    assert taken.deliveries.feed(HEARTBEAT) == HEARTBEAT
    other = deliver(1, channel=4)
    assert taken.deliveries.feed(other) == other


def test_after_a_drop_nothing_is_delivered_nor_acknowledged() -> None:
    taken = Taken()
    taken.deliveries.feed(message(1, b"a"))
    taken.deliveries.drop(CHANNEL, taken.sink)
    taken.deliveries.feed(message(2, b"b"))
    assert len(taken.found) == 1
    assert taken.deliveries.take_acks() == b"", "an ack after the close would close the connection"


def test_bytes_that_are_not_amqp_end_it_with_a_frame_that_the_library_refuses() -> None:
    taken = Taken()
    taken.deliveries.feed(HEARTBEAT)
    passed = taken.deliveries.feed(b"HTTP/1.1 400 Bad Request\r\n")
    assert passed.startswith(b"\x00\x00\x00\x00\x00\x00\x00\xce")
    (fault,) = taken.deliveries.faults
    assert isinstance(fault, NotAmqp)
    assert taken.deliveries.feed(message(1, b"a")) == message(1, b"a")
    assert taken.found == []


def test_an_error_of_a_callback_is_kept_and_the_next_delivery_follows() -> None:
    deliveries = Deliveries()
    calls: list[bytes] = []

    def fail(tag: bytes, key: str, body: bytes, offset: int | None) -> None:
        calls.append(body)
        raise ValueError(body)

    deliveries.take(CHANNEL, fail)
    deliveries.feed(message(1, b"a") + message(2, b"b"))
    assert calls == [b"a", b"b"]
    assert [str(fault) for fault in deliveries.faults] == ["b'a'", "b'b'"]
