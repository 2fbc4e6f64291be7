"""The number of channel workers, the groups to which the shared queue is bound, and the commands for a live queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from aiormq.exceptions import ChannelPreconditionFailed

from bridge.amqp import LimitReached
from bridge.service.broker.live import (
    CHANNEL_WORKERS,
    CHANNELS_BESIDE_WORKERS,
    CHANNELS_OF_A_WORKER,
    Broker,
    _ChannelWorker,
    _Shared,
    count_channel_workers,
    describe_channels,
)
from tests.patience import PATIENCE
from tests.unit.loopback import until

LEAST = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER
ALL = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * CHANNEL_WORKERS


@pytest.mark.parametrize(
    ("channels", "workers"),
    [(LEAST, 1), (LEAST + 1, 1), (ALL - 1, CHANNEL_WORKERS - 1), (ALL, CHANNEL_WORKERS), (65_535, CHANNEL_WORKERS)],
)
def test_workers_use_no_more_channels_than_rabbitmq_allows(channels: int, workers: int) -> None:
    assert count_channel_workers(channels) == workers
    assert CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * workers <= channels


def test_there_are_fewer_workers_after_rabbitmq_refused_channels() -> None:
    assert count_channel_workers(65_535, most=2) == 2


@pytest.mark.parametrize("channels", [0, 1, LEAST - 1])
def test_too_few_channels_are_reported_with_the_setting(channels: int) -> None:
    with pytest.raises(LimitReached, match=f"allows {channels} channels.*at least {LEAST}.*channel_max"):
        count_channel_workers(channels)
    with pytest.raises(LimitReached):
        describe_channels(channels)


def test_the_line_that_check_prints() -> None:
    assert describe_channels(2047) == f"RabbitMQ allows 2047 channels in a connection, and the bridge uses {ALL}"
    assert describe_channels(LEAST).endswith(f"uses {LEAST}: streams are opened more slowly than with {ALL}")


# The groups to which the shared queue is bound. RabbitMQ is replaced by a list of its commands.


class Asked:
    def __init__(self) -> None:
        self.commands: list[tuple[str, str]] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def queue_bind(self, queue: str, exchange: str, key: str) -> None:
        await self._ask("bind", key)

    async def queue_unbind(self, queue: str, exchange: str, key: str) -> None:
        await self._ask("unbind", key)

    async def _ask(self, command: str, key: str) -> None:
        self.commands.append((command, key))
        assert len(self.commands) < 10, "it repeats the same command"
        await self.answers.wait()


class Groups:
    """The shared queue of a process, and the streams that wait for a group."""

    def __init__(self) -> None:
        self.checked: list[str | None] = []
        self.broker: Any = SimpleNamespace(groups=Counter(), exchange="events")
        epoch: Any = SimpleNamespace(broker=self.broker, check_waiting=self.checked.append)
        self.shared = _Shared(epoch)
        self.asked = Asked()

    def connect(self, *groups: str) -> None:
        self.broker.groups.update(groups)
        self.shared.on_groups_changed(groups)

    def disconnect(self, *groups: str) -> None:
        for group in groups:
            del self.broker.groups[group]
        self.shared.on_groups_changed(groups)

    async def reconcile(self) -> list[tuple[str, str]]:
        setup: Any = self.asked
        async with asyncio.timeout(PATIENCE):
            await self.shared._reconcile(setup, "bridge.shared.1")
        commands, self.asked.commands = self.asked.commands, []
        return commands


@pytest.mark.contract("1.17")
async def test_a_group_is_bound_with_its_first_connection_and_unbound_with_its_last() -> None:
    to = Groups()
    to.connect("a", "b")
    assert to.shared._changed.is_set()
    assert to.shared.first_unbound(["a", "b"]) == "a"
    assert await to.reconcile() == [("bind", "group.a.#"), ("bind", "group.b.#")]
    assert (to.checked, to.shared.first_unbound(["a", "b"])) == (["a", "b"], None)
    to.shared._changed.clear()
    to.connect("a")
    assert not to.shared._changed.is_set(), "it is bound already"
    to.disconnect("b")
    assert await to.reconcile() == [("unbind", "group.b.#")]


async def test_a_group_that_was_unbound_is_bound_again_for_the_next_connection() -> None:
    to = Groups()
    for _ in range(2):
        to.connect("a")
        assert to.shared.first_unbound(["a"]) == "a", "it waits for a new binding"
        assert await to.reconcile() == [("bind", "group.a.#")]
        to.disconnect("a")
        assert await to.reconcile() == [("unbind", "group.a.#")]


async def test_a_connection_that_opens_while_its_group_is_unbound_waits_for_a_new_binding() -> None:
    to = Groups()
    to.connect("a")
    await to.reconcile()
    to.disconnect("a")
    to.asked.answers.clear()
    running = asyncio.create_task(to.reconcile())
    await until(lambda: bool(to.asked.commands))
    to.connect("a")
    assert to.shared.first_unbound(["a"]) == "a"
    to.asked.answers.set()
    assert await running == [("unbind", "group.a.#"), ("bind", "group.a.#")]
    assert to.checked == ["a", "a"]


async def test_a_group_is_kept_until_its_last_subscription_closes() -> None:
    broker = Broker(
        [],
        exchange="events",
        quarantine="q",
        log=None,
        on_shared=lambda key, body: None,
        write_batch=contextlib.nullcontext(),
        fleet_key=b"",
    )
    one, other = (
        broker.subscribe((), groups, on_delivery=lambda key, body: None, on_bound=_nothing, on_lost=_nothing)
        for groups in (["a", "b"], ["a"])
    )
    one.close()
    assert list(broker.groups) == ["a"]
    other.close()
    other.close()
    assert (list(broker.groups), broker.subscriptions) == ([], {})


def _nothing() -> None: ...


# A live queue is declared and bound in one round trip.


class Setup:
    """A channel that RabbitMQ may close after the commands so far."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, bool]] = []
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def queue_declare(self, queue: str, *, nowait: bool, **_: Any) -> None:
        self.commands.append((queue, nowait))

    async def queue_bind(self, queue: str, exchange: str, key: str, *, nowait: bool = False) -> None:
        if self.closing.done():
            raise RuntimeError("the channel is closed")
        self.commands.append((key, nowait))


async def declare(setup: Setup, *keys: str) -> None:
    epoch: Any = SimpleNamespace(broker=SimpleNamespace(exchange="events"), dropped=SimpleNamespace(arguments={}))
    await _ChannelWorker(epoch)._declare(setup, "bridge.live.1", keys)  # type: ignore[arg-type]


async def test_rabbitmq_answers_the_last_command_only() -> None:
    setup = Setup()
    await declare(setup, "user.42.job.#", "user.42.billing.#")
    assert setup.commands == [("bridge.live.1", True), ("user.42.job.#", True), ("user.42.billing.#", False)]
    setup = Setup()
    await declare(setup, "user.42.#")
    assert setup.commands == [("bridge.live.1", True), ("user.42.#", False)]


async def test_the_reason_of_a_refusal_is_that_of_the_closed_channel() -> None:
    setup = Setup()
    setup.closing.set_exception(ChannelPreconditionFailed("PRECONDITION_FAILED - queue limit in vhost is reached"))
    with pytest.raises(LimitReached, match="limit in vhost is reached"):
        await declare(setup, "user.42.#")
    setup = Setup()
    setup.closing.cancel()
    with pytest.raises(RuntimeError):
        await declare(setup, "user.42.#")
