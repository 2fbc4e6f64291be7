"""Each message is read once, and each refused one is put into quarantine once."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.event import EventData, Malformed, SchemaViolation, UnknownType
from bridge.service.forms import MessageReader, read_message
from bridge.service.metrics import Metrics
from bridge.service.streams.reader import CACHE_BYTES, CACHE_EVENTS, REFUSALS, EventReader
from bridge.service.streams.streamevent import StreamEvent

KEY = "user.42.test.done"


class Done(EventData, type="test.done"):
    """The catalogue has this type only."""


class Quarantine:
    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def put(self, body: bytes, **_: str) -> None:
        self.bodies.append(body)


def body(event_type: str, number: int = 1) -> bytes:
    return b'{"specversion":"1.0","id":"%d","source":"/t","type":"%b","data":{}}' % (number, event_type.encode())


UNKNOWN = body("test.unknown")
UNKNOWN_KEY = "user.42.test.unknown"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies that the reader parses, because its cache does not have them."""
    found: list[bytes] = []

    def count(body: bytes, *args: Any, **options: Any) -> Any:
        found.append(body)
        return read_message(body, *args, **options)

    monkeypatch.setattr("bridge.service.forms.read_message", count)
    return found


def make() -> tuple[EventReader, list[bytes], Metrics]:
    quarantine: Any = Quarantine()
    metrics = Metrics()
    reader = EventReader(
        MessageReader({"test.done": Done}, 65_536, "events"),
        metrics=metrics,
        quarantine=quarantine,
    )
    return reader, quarantine.bodies, metrics


def test_an_event_is_read_once_for_all_queues_and_for_the_log(reads: list[bytes]) -> None:
    reader, refused, _ = make()
    first = reader.read(KEY, body("test.done"), via=0)
    assert isinstance(first, StreamEvent)
    assert reader.read(KEY, body("test.done"), via=1) is first
    assert reader.read_logged(KEY, body("test.done")) is first
    assert (len(reads), refused) == (1, [])


def test_an_event_of_one_queue_only_is_not_kept(reads: list[bytes]) -> None:
    reader, _, _ = make()
    for _ in range(2):
        reader.read(KEY, body("test.done"), via=1, only=True)
    assert len(reads) == 2


@pytest.mark.contract("5.25")
def test_a_refused_entry_is_read_and_quarantined_once_for_all_clients(reads: list[bytes]) -> None:
    reader, refused, metrics = make()
    for _ in range(200):
        assert isinstance(reader.read_logged(UNKNOWN_KEY, UNKNOWN), UnknownType)
    assert isinstance(reader.read(UNKNOWN_KEY, UNKNOWN, via=1), UnknownType)
    assert (len(reads), len(refused)) == (1, 1)
    assert metrics.log_unreadable.labels("unknown-type")._value.get() == 1


@pytest.mark.contract("5.24")
def test_a_message_that_was_refused_live_is_not_quarantined_again_from_the_log() -> None:
    reader, refused, _ = make()
    for queue in range(3):
        reader.read(UNKNOWN_KEY, UNKNOWN, via=queue)
    reader.read_logged(UNKNOWN_KEY, UNKNOWN)
    assert len(refused) == 1
    reader.read(UNKNOWN_KEY, UNKNOWN, via=0)
    assert len(refused) == 2, "the same queue delivered it again, so it was published again"


@pytest.mark.contract("5.25")
def test_refusals_are_remembered_within_a_bound() -> None:
    reader, refused, _ = make()
    for number in range(REFUSALS + 1):
        reader.read_logged("user.42.test.unknown", body("test.unknown", number))
    assert len(refused) == REFUSALS + 1
    assert len(reader._refusals) == REFUSALS
    assert len(reader._cache) <= 256


def test_a_body_that_is_not_json_is_refused_with_its_reason() -> None:
    reader, refused, _ = make()
    assert isinstance(reader.read(KEY, b"{", via=1), Malformed)
    assert refused == [b"{"]


def test_the_cache_gives_its_bytes_back(reads: list[bytes]) -> None:
    reader, _, _ = make()
    half = CACHE_BYTES // 2 + 1
    pads = [b" " * half, b" " * (half + 1)]
    for pad in pads * 2:
        reader.read(KEY, body("test.done") + pad, via=1)
    assert len(reads) == 4, "there is room for one of the two"
    assert reader._cache_bytes == sum(len(key[1]) for key in reader._cache)
    reads.clear()
    # After the large ones there is room for many small ones again.
    for _ in range(2):
        for number in range(CACHE_EVENTS):
            reader.read(KEY, body("test.done", number), via=1)
    assert len(reads) == CACHE_EVENTS


def test_after_a_fault_of_the_bridge_there_is_a_gap_and_the_message_is_quarantined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the reader raised, each client that resumes would fail at this message again."""
    reader, refused, _ = make()
    monkeypatch.setattr("bridge.service.forms.read_message", lambda *_, **__: 1 / 0)
    for event in (reader.read(KEY, body("test.done"), via=1), reader.read_logged(KEY, body("test.done", 2))):
        assert isinstance(event, SchemaViolation)
        assert event.depends_on_catalogue, "pages are sent `not-readable`"
        assert "ZeroDivisionError" in event.detail
    assert refused == [body("test.done"), body("test.done", 2)]
