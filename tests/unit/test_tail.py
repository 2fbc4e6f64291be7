"""The feed `log`: the position of the reader, and its calls to streams. The tests give the broker's answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bridge import amqp
from bridge.amqp import BrokerUnavailable
from bridge.service.broker import tail
from bridge.service.broker.feed import Deletion
from bridge.service.broker.tail import Tail
from bridge.service.settings import LogSettings
from bridge.service.streams.cursor import Anchor, digest

BODY = b"last"
LAST = Anchor(7, digest(BODY))
KEY = b"of this bridge"


class Log:
    """Answers with `found`, or has no entry. An entry that is written becomes the newest."""

    def __init__(self, found: Anchor | None) -> None:
        self.found = found
        self.written = 0

    async def newest(self) -> Anchor:
        if self.found is None:
            raise BrokerUnavailable("the log gives no entry")
        return self.found

    def write_watermark(self, on_written: Callable[[Anchor | None, int], None]) -> None:
        self.written += 1
        self.found = Anchor(0, digest(b"mine"))
        on_written(self.found, 0)


class Consumer:
    """A consumer of the log. It delivers these entries at once, and fails when the test sets `ends`."""

    entries: tuple[tuple[int, str, bytes], ...] = ()
    starts: list[int | str]
    ends: asyncio.Event

    def __init__(self, _: Any, __: str, offset: int | str, on_entry: Any, on_failure: Any) -> None:
        Consumer.starts.append(offset)
        self._on_entry = on_entry

    async def __aenter__(self) -> Consumer:
        for entry in self.entries:
            self._on_entry(*entry)
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def idle(self, _: float, changed: asyncio.Event) -> None:
        if not changed.is_set() and self.entries:
            await Consumer.ends.wait()
            raise BrokerUnavailable("the connection is lost")


@pytest.fixture
def log() -> Log:
    return Log(LAST)


@pytest.fixture
def made(log: Log, monkeypatch: pytest.MonkeyPatch) -> Tail:
    monkeypatch.setattr(tail, "LogConsumer", Consumer)
    monkeypatch.setattr(amqp, "address", lambda _: "amqp://here")
    Consumer.starts, Consumer.ends = [], asyncio.Event()
    return Tail(
        [],
        exchange="events",
        quarantine="events.invalid",
        log=LogSettings("events.log", "1h", 1_000_000),
        event_log=log,
        on_logged=lambda *entry: got.append(entry),
        write_batch=contextlib.nullcontext(),
        fleet_key=KEY,
    )


got: list[tuple[int, str, bytes]] = []


def subscribe(made: Tail) -> list[str]:
    heard: list[str] = []
    made.subscribe(
        [],
        [],
        on_delivery=lambda *_: heard.append("delivery"),
        on_bound=lambda: heard.append("bound"),
        on_lost=lambda: heard.append("lost"),
        on_refused=lambda: heard.append("refused"),
    )
    return heard


async def read(made: Tail, *entries: tuple[int, str, bytes]) -> None:
    """Reads these entries on one connection, until it is lost."""
    got.clear()
    Consumer.entries = entries
    Consumer.ends.set()
    connection: Any = object()
    with contextlib.suppress(BrokerUnavailable):
        await made._read(connection)
    made._lose_streams()


async def test_it_begins_after_the_newest_entry(made: Tail) -> None:
    heard = subscribe(made)
    await read(made, (7, "user.42.x", BODY), (8, "user.42.y", b"next"))
    assert Consumer.starts == [7]
    assert got == [(8, "user.42.y", b"next")]
    assert heard == ["bound", "lost"]
    assert made.reached == Anchor(8, digest(b"next"))


async def test_after_a_loss_it_continues_with_the_last_entry_that_it_read(made: Tail) -> None:
    await read(made, (7, "user.42.x", BODY), (8, "user.42.y", b"next"))
    await read(made, (8, "user.42.y", b"next"), (9, "all.x", b"new"))
    assert Consumer.starts == [7, 8]
    assert [key for _, key, _ in got] == ["all.x"]
    assert made.exchanges_lost == 0


@pytest.mark.parametrize("first", [(8, b"another"), (11, b"next")])
async def test_a_log_with_another_entry_at_the_position_is_an_interruption(
    made: Tail, first: tuple[int, bytes]
) -> None:
    await read(made, (7, "user.42.x", BODY), (8, "user.42.y", b"next"))
    heard = subscribe(made)
    await read(made, (first[0], "user.42.y", first[1]), (12, "all.x", b"new"))
    assert (got, heard, made.exchanges_lost, made.reached) == ([], [], 1, None)


@pytest.mark.parametrize(
    ("news", "lost"),
    [
        (Deletion("events", "other", 0.1).write(KEY), 1),
        (Deletion("parcels", "other", 0.1).write(KEY), 0),
        (Deletion("events", "other", 0.1).write(b"of somebody else"), 0),
        (b"018f3c2e-0000-7000-8000-000000000000", 0),
    ],
)
async def test_the_news_of_a_deleted_exchange_is_an_interruption(made: Tail, news: bytes, lost: int) -> None:
    await read(made, (7, "user.42.x", BODY), (8, "events.log", news), (9, "all.x", b"new"))
    assert made.exchanges_lost == lost
    assert len(got) == 1 - lost
    assert (made.reached is None) == bool(lost)


async def test_a_log_that_was_declared_again_is_an_interruption(made: Tail, log: Log) -> None:
    await read(made, (7, "user.42.x", BODY))
    log.found = Anchor(0, "AAAAAA")
    await read(made)
    assert (made.exchanges_lost, made.reached) == (1, None)


async def test_an_empty_log_gets_a_first_entry(made: Tail, log: Log) -> None:
    log.found = None
    await read(made, (0, "events.log", b"mine"), (1, "all.x", b"new"))
    assert (log.written, Consumer.starts) == (1, [0])
    assert [key for _, key, _ in got] == ["all.x"]


async def test_a_stream_that_opens_while_it_reads_is_bound_in_the_next_iteration(made: Tail) -> None:
    connection: Any = object()
    await read(made, (7, "user.42.x", BODY))
    made._gain_streams(connection)
    heard = subscribe(made)
    assert heard == []
    await asyncio.sleep(0)
    assert heard == ["bound"]


@pytest.mark.contract("8.10")
async def test_a_client_with_a_cursor_waits_until_all_that_was_published_is_read(made: Tail, log: Log) -> None:
    """Another process may have sent it an entry that this one has not read yet."""
    await read(made, (7, "user.42.x", BODY))
    found: list[Anchor | None] = []
    log.write_watermark = lambda on_written: on_written(Anchor(9, "mine.."), 0)  # type: ignore[method-assign]
    made.find_position(lambda anchor, _: found.append(anchor), resumes=False)
    made.find_position(lambda anchor, _: found.append(anchor), resumes=True)
    assert found == [LAST]
    made._last, made._anchor = (8, b"8"), None
    made._answer_waiting(8)
    assert found == [LAST]
    made._last, made._anchor = (9, b"9"), None
    made._answer_waiting(9)
    made._answer_waiting(10)
    assert found == [LAST, Anchor(9, digest(b"9"))]
    made.find_position(lambda anchor, _: found.append(anchor), resumes=True)
    assert len(found) == 3, "it has been read already"


async def test_a_closed_stream_gets_no_call(made: Tail) -> None:
    heard: list[str] = []
    subscription = made.subscribe(
        [],
        [],
        on_delivery=lambda *_: None,
        on_bound=lambda: heard.append("bound"),
        on_lost=lambda: heard.append("lost"),
        on_refused=lambda: None,
    )
    subscription.close()
    subscription.close()
    await read(made, (7, "user.42.x", BODY))
    assert heard == []


async def test_a_lost_connection_ends_the_wait_for_an_entry(
    made: Tail, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log does not answer, for example because its own connection was cut too."""
    asked, closed = asyncio.Event(), asyncio.Event()
    connected = asyncio.Event()
    connected.set()
    connection: Any = SimpleNamespace(close_callbacks=set(), connected=connected)

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[Any]:
        try:
            yield connection
        finally:
            closed.set()

    async def declare(_: Any) -> None: ...

    log.found = None  # So that the reader asks for an entry.
    monkeypatch.setattr(log, "write_watermark", lambda _: asked.set())
    monkeypatch.setattr(made, "_connection", connect)
    monkeypatch.setattr(made, "declare_topology", declare)
    running = asyncio.create_task(made.run())
    await asked.wait()
    for on_closed in connection.close_callbacks:
        on_closed(connection, ConnectionResetError("cut"))
    await closed.wait()
    assert "connection lost" in str(made.last_error)
    running.cancel()
