import asyncio
import contextlib
import gc
import random
import threading
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from aiormq.exceptions import ChannelPreconditionFailed, ConnectionNotAllowed
from yarl import URL

from bridge import amqp
from deploy.local.node import free_ports


def test_a_failed_connection_may_be_collected_in_any_thread() -> None:
    """The library's `__del__` makes a task, which needs a loop. The thread that collects garbage may not have one."""
    (port,) = free_ports(1)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    left: list[object] = []

    async def fail() -> None:
        amqp._quiet.set(True)  # A kept log record would hold the error, and the error the connection.
        connection = amqp.BrokerConnection(URL(f"amqp://127.0.0.1:{port}/"))
        left.append(connection)
        with contextlib.suppress(ConnectionError):
            await connection.connect()

    def forget() -> None:
        left.clear()
        gc.collect()

    try:
        asyncio.run_coroutine_threadsafe(fail(), loop).result()
        forgotten = weakref.ref(left[0])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            without_a_loop = threading.Thread(target=forget)
            without_a_loop.start()
            without_a_loop.join()
        assert forgotten() is None
        assert not [str(warning.message) for warning in heard]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def unclosed() -> Any:
    connected = asyncio.Event()
    connected.set()
    return SimpleNamespace(close_callbacks=set(), connected=connected)


async def for_ever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("ended")


@pytest.mark.parametrize(
    ("error", "words"),
    [(None, "connection lost: the connection was closed"), (ConnectionResetError("reset"), "reset")],
)
async def test_work_ends_when_its_connection_is_lost(error: BaseException | None, words: str) -> None:
    connection, ended = unclosed(), list[str]()
    waiting = asyncio.create_task(amqp.while_open(connection, for_ever(ended)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for on_closed in connection.close_callbacks:
        on_closed(connection, error)
        on_closed(connection, error)
    with pytest.raises(amqp.BrokerUnavailable, match=words):
        await waiting
    assert ended == ["ended"]


async def test_work_does_not_begin_on_a_lost_connection() -> None:
    connection, ended = unclosed(), list[str]()
    connection.connected.clear()
    with pytest.raises(amqp.BrokerUnavailable, match="connection lost"):
        await amqp.while_open(connection, for_ever(ended))
    assert ended == []


def test_a_loss_by_a_limit_is_told_apart() -> None:
    limit = ConnectionNotAllowed("NOT_ALLOWED - vhost: connection limit (1) is reached")
    assert type(amqp.loss_error(limit)) is amqp.LimitReached
    assert type(amqp.loss_error(None)) is amqp.BrokerUnavailable


async def test_a_cancel_ends_the_work_first() -> None:
    connection, ended = unclosed(), list[str]()
    waiting = asyncio.create_task(amqp.while_open(connection, for_ever(ended)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == ["ended"]


async def test_an_error_of_the_work_is_raised() -> None:
    async def fail() -> None:
        raise amqp.NotFound("made by the test")

    with pytest.raises(amqp.NotFound, match="made by the test"):
        await amqp.while_open(unclosed(), fail())


def test_a_node_without_a_replica_of_the_log_is_unavailable_for_now() -> None:
    refused = ChannelPreconditionFailed(
        "PRECONDITION_FAILED - stream queue 'events.log' in vhost '/' does not have a running replica on the local node"
    )
    found = amqp.translate(refused, "consuming 'events.log'")
    assert type(found) is amqp.NoReplica
    assert "rabbitmq-streams add_replica" in str(found)
    assert type(amqp.translate(ChannelPreconditionFailed("inequivalent arg"), "x")) is amqp.TopologyMismatch


def test_the_pauses_grow_up_to_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _, ceiling: ceiling)
    draw = amqp.pauses(1.0)
    assert [draw() for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    draw = amqp.pauses()
    assert [draw() for _ in range(9)][-2:] == [5.0, 5.0]
