"""Orders to the replicas: how they are written and read, and what a replica does. No broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bridge.amqp import AccessRefused, BrokerUnavailable
from bridge.service.broker.control import (
    CLOCK_SECONDS,
    START_SECONDS,
    Control,
    ControlClient,
    Order,
    read_moment,
    read_order,
)

KICK = Order("kick", "1", 5.0, user="42", session="a.1", reason="r", by="me", until=4.0, reply="bridge.reply.x")


class Streams:
    def __init__(self) -> None:
        self.ended: list[tuple[str, str | None]] = []
        self.opened_before: list[float | None] = []

    def end_streams(self, user: str, session: str | None, opened_before: float | None) -> int:
        self.ended.append((user, session))
        self.opened_before.append(opened_before)
        return 2

    def describe_streams(self, user: str) -> list[dict[str, Any]]:
        return [{"session": "a.1", "user": user}]

    def list_users(self, after: str, limit: int) -> list[dict[str, Any]]:
        return [{"user": after, "streams": limit}]


def make(monkeypatch: pytest.MonkeyPatch) -> tuple[Control, Streams, list[dict[str, Any]], list[tuple[str, int]]]:
    """A replica's side, its streams, its answers, and the kicks that it reported."""
    streams, kicks = Streams(), list[tuple[str, int]]()
    control = Control(
        [],
        exchange="c",
        max_age="1D",
        instance="a",
        streams=streams,
        on_kick=lambda user, ended: kicks.append((user, ended)),
    )
    control.connected = True
    answers: list[dict[str, Any]] = []
    monkeypatch.setattr(control, "_answer", lambda order, **answer: answers.append({"reply": order.reply, **answer}))
    return control, streams, answers, kicks


def test_an_order_is_read_as_it_was_written() -> None:
    assert read_order(KICK.write()) == KICK
    users = Order("users", "2", 1.5, after="z", limit=7)
    assert read_order(users.write()) == users


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"}, {"kind": None}, {"user": ""}, {"user": None}, {"user": 42}, {"at": None}, {"at": "1"},
        {"at": True}, {"until": "x"}, {"until": 1e300}, {"session": 1}, {"reply": []}, {"limit": 0}, {"limit": 1001},
        {"limit": True}, {"by": None},
    ],
)  # fmt: skip
def test_what_is_no_order_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'|object|Expecting|No|order"):
        read_order(json.dumps({**json.loads(KICK.write()), **change}).encode())


@given(st.binary(max_size=60) | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_an_order_or_a_value_error(body: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(read_order(body), Order)


def test_a_kick_ends_streams_and_refuses_older_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    control, streams, answers, kicks = make(monkeypatch)
    order = Order("kick", "1", time.time(), user="42", until=100.0, reply="q")
    control._on_entry(0, "kick", order.write())
    assert (streams.ended, kicks) == ([("42", None)], [("42", 2)])
    assert answers == [{"reply": "q", "ended": 2}]
    assert control.revocations.refuses("42", 99.0)


def test_an_entry_is_carried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    control, streams, _, _ = make(monkeypatch)
    for offset in (3, 3, 2, 4):
        control._on_entry(offset, "kick", KICK.write())
    assert len(streams.ended) == 2


@pytest.mark.contract("9.4")
def test_an_order_that_is_read_late_or_again_means_the_streams_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    control, streams, answers, _ = make(monkeypatch)
    control.connected = False
    control._on_entry(0, "kick", Order("kick", "1", 100.0, user="42", reply="q").write())
    control._on_entry(1, "who", Order("who", "2", 100.0, user="42", reply="q").write())
    assert (streams.opened_before, answers) == ([100.0 + CLOCK_SECONDS], [])
    control._hello = "mine"
    control._on_entry(2, "hello", Order("hello", "mine", 1.0).write())
    control._on_entry(3, "kick", Order("kick", "3", 100.0, user="42", reply="q").write())
    assert streams.opened_before[1:] == [None], "the clock of whoever gave it may be wrong"
    assert answers == [{"reply": "q", "ended": 2}]


def test_questions_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    control, _, answers, _ = make(monkeypatch)
    now = time.time()
    control._on_entry(0, "who", Order("who", "1", now, user="42", reply="q").write())
    control._on_entry(1, "users", Order("users", "2", now, after="z", limit=3, reply="p").write())
    assert answers == [
        {"reply": "q", "streams": [{"session": "a.1", "user": "42"}]},
        {"reply": "p", "users": [{"user": "z", "streams": 3}]},
    ]


def test_a_hello_of_another_replica_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    control, _, _, _ = make(monkeypatch)
    control._hello = "mine"
    control._on_entry(0, "hello", Order("hello", "other", 1.0).write())
    assert not control._changed.is_set()
    control._on_entry(1, "hello", Order("hello", "mine", 1.0).write())
    assert control._changed.is_set()


def test_moments() -> None:
    assert read_moment("now", 100.0) == 100.0
    assert read_moment("42.5", 100.0) == 42.5
    assert read_moment("1970-01-01T00:01:00Z", 100.0) == 60.0
    assert read_moment("1970-01-01T01:01:00+01:00", 100.0) == 60.0
    for text in ("soon", "1970-01-01T00:00:00", "", "200", "nan", "inf"):
        with pytest.raises(ValueError, match=r"is not a moment|is in the future"):
            read_moment(text, 100.0)


def asking(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any]) -> tuple[ControlClient, list[dict[str, Any]]]:
    """A client whose questions get these answers, and the questions."""
    asked: list[dict[str, Any]] = []

    async def ask(_: ControlClient, kind: str, **order: Any) -> list[dict[str, Any]]:
        asked.append({"kind": kind, **order})
        return list(answers)

    monkeypatch.setattr(ControlClient, "_ask", ask)
    return ControlClient([], exchange="c"), asked


async def test_users_of_all_replicas_are_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"replica": "b", "users": [{"user": "1", "streams": 1}, {"user": "3", "streams": 1}]}
    second = {"replica": "a", "users": [{"user": "1", "streams": 2}, {"user": "2", "streams": 1}, 7]}
    client, asked = asking(monkeypatch, first, second)
    page = await client.users(after="0", limit=2)
    assert page.replicas == ["a", "b"]
    assert page.users == [{"user": "1", "streams": 3}, {"user": "2", "streams": 1}]
    assert page.further
    assert asked == [{"kind": "users", "after": "0", "limit": 2}]
    assert not (await client.users(limit=9)).further


async def test_a_kick_says_what_each_replica_did(monkeypatch: pytest.MonkeyPatch) -> None:
    client, asked = asking(monkeypatch, {"replica": "a", "ended": 2}, {"replica": "b", "ended": None})
    assert (await client.kick("42", by="me", until=1.0)).replicas == {"a": 2, "b": 0}
    assert asked[0] == {"kind": "kick", "user": "42", "by": "me", "session": None, "reason": "", "until": 1.0}


async def test_streams_have_the_name_of_their_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = asking(monkeypatch, {"replica": "a", "streams": [{"session": "a.1"}]}, {"replica": "b", "streams": 1})
    found = await client.streams("42")
    assert (found.replicas, found.streams) == (["a", "b"], [{"session": "a.1", "replica": "a"}])


@pytest.mark.contract("9.4")
@pytest.mark.parametrize("late", [False, True])
async def test_without_the_control_stream_streams_are_opened_after_a_while(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    control, _, _, _ = make(monkeypatch)
    failed = asyncio.Event()

    async def fail() -> None:
        control._reached_at = time.monotonic() - (START_SECONDS + 1 if late else 0)
        failed.set()
        raise BrokerUnavailable("away")

    monkeypatch.setattr(control, "_read", fail)
    monkeypatch.setattr("bridge.service.broker.control.WAIT_SECONDS", 0.01)
    running = asyncio.create_task(control.run())
    await failed.wait()
    await asyncio.sleep(0)
    assert await control.wait_until_known() is late
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_missing_right_is_no_reason_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    control, _, _, _ = make(monkeypatch)

    async def refuse() -> None:
        raise AccessRefused("no right")

    monkeypatch.setattr(control, "_read", refuse)
    running = asyncio.create_task(control.run())
    assert await control.wait_until_known()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_no_replica_could_read_is_refused_before_it_is_sent() -> None:
    client = ControlClient([], exchange="c")
    with pytest.raises(ValueError, match="'user' is missing"):
        await client.kick("", by="me")
    with pytest.raises(ValueError, match="shorten the reason"):
        await client.kick("42", by="me", reason="x" * 200_000)
