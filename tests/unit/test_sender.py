"""Sending with confirms: which messages are tried again, and the window for many messages in order.

The integration tests use a real connection. Here a channel is a list of outcomes, one for each message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aio_pika.exceptions import ChannelNotFoundEntity, DeliveryError, PublishError
from pamqp.commands import Basic

from bridge import amqp, sender
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, NotFound, Unroutable
from bridge.sender import Message, Pipeline, Sender, Window
from tests.patience import PATIENCE

NOTHING: Any = None
NACK = DeliveryError(NOTHING, NOTHING)
RETURNED: Any = SimpleNamespace(delivery=Basic.Return(312, "NO_ROUTE", "events", "user.42.x"), routing_key="user.42.x")
NO_QUEUE = PublishError(RETURNED, RETURNED.delivery)


def message(number: int = 1, *, recovery: float = 0.0) -> Message:
    return Message(f"e{number}", b"%d" % number, "events", "user.42.x", Basic.Properties(), True, recovery)


class Channel:
    """Each publish has the next of these outcomes: an error, or None for a confirm. After the last one: confirms."""

    is_closed = False

    def __init__(self, *outcomes: BaseException | None) -> None:
        self.outcomes = list(outcomes)
        self.bodies: list[bytes] = []

    async def basic_publish(self, body: bytes, **_: Any) -> None:
        self.bodies.append(body)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        await asyncio.sleep(0)  # A confirm arrives later.
        if outcome is not None:
            raise outcome

    async def close(self) -> None:
        self.is_closed = True


class Scripted(Sender):
    """A sender that takes its channels from a list."""

    def __init__(self, *channels: Channel | BrokerError) -> None:
        super().__init__(["amqp://127.0.0.1:1/"], name="test")
        self.channels = list(channels)
        self.opened: list[Channel] = []
        self._connection = NOTHING

    async def _open(self) -> Any:
        if not self.channels:
            raise BrokerUnavailable("away")
        made = self.channels.pop(0)
        if isinstance(made, BrokerError):
            raise made
        self.opened.append(made)
        self._channel = made  # type: ignore[assignment]
        return made

    async def _send_alone(self, message: Message) -> None:
        channel: Any = self.channels.pop(0)
        self.opened.append(channel)
        try:
            await self.publish_on(channel, message)
        except sender._Unclear as error:
            raise error.failure from None


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amqp, "pauses", lambda *_: lambda: 0.0)


async def test_after_a_nack_the_same_message_is_sent_again() -> None:
    channel = Channel(NACK, NACK)
    await Scripted(channel).deliver(message(), PATIENCE)
    assert channel.bodies == [b"1"] * 3


async def test_a_connection_that_cannot_be_made_is_tried_again() -> None:
    channel = Channel()
    await Scripted(BrokerUnavailable("away"), channel).deliver(message(), PATIENCE)
    assert channel.bodies == [b"1"]


@pytest.mark.contract("5.30")
async def test_a_message_that_no_queue_takes_is_refused_unless_the_connection_is_new() -> None:
    channel = Channel(NO_QUEUE)
    with pytest.raises(Unroutable, match="no queue takes it"):
        await Scripted(channel).deliver(message(), PATIENCE)
    assert channel.bodies == [b"1"]
    channel = Channel(NO_QUEUE)
    await Scripted(channel).deliver(message(recovery=1e12), PATIENCE)
    assert channel.bodies == [b"1"] * 2


async def test_a_refusal_is_checked_on_a_channel_of_its_own() -> None:
    refused = ChannelNotFoundEntity("NOT_FOUND - no exchange 'events'")
    shared, alone = Channel(refused), Channel(refused)
    with pytest.raises(NotFound):
        await Scripted(shared, alone).deliver(message(), PATIENCE)
    assert (shared.bodies, alone.bodies) == ([b"1"], [b"1"])
    # The refusal was about another message on the shared channel.
    shared, alone = Channel(refused), Channel()
    await Scripted(shared, alone).deliver(message(), PATIENCE)
    assert alone.bodies == [b"1"]


async def test_a_message_that_is_never_confirmed_says_what_happened_last() -> None:
    with pytest.raises(BrokerUnavailable, match=r"not confirmed within 0.01 s; last error: .*nack"):
        await Scripted(Channel(*[NACK] * 1_000_000)).deliver(message(), 0.01)


async def test_a_closed_sender_fails_at_once() -> None:
    made = Scripted()
    await made.close()
    assert made.is_closed
    with pytest.raises(BrokerUnavailable, match="closed"):
        await made.deliver(message(), PATIENCE)


async def test_close_ends_the_wait_for_a_connection() -> None:
    made = Scripted()
    opening = asyncio.create_task(made.open(PATIENCE))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await made.close()
    with pytest.raises(BrokerUnavailable, match="was closed"):
        await opening


async def test_a_user_who_is_refused_is_not_tried_again() -> None:
    made = Scripted(AccessRefused("no"), Channel())
    with pytest.raises(AccessRefused):
        await made.open(PATIENCE)
    assert made.opened == []


def test_the_error_of_an_overdue_message() -> None:
    made = Scripted()
    assert "RabbitMQ does not answer" in str(made.overdue(message(), 1, None))
    made._channel = Channel()  # type: ignore[assignment]
    assert "alarm" in str(made.overdue(message(), 1, None))
    assert "last error: away" in str(made.overdue(message(), 1, BrokerUnavailable("away")))


# The window


def filled(count: int) -> Window:
    window = Window(8)
    for number in range(count):
        window.add(message(number), 10.0)
    return window


def bodies(entries: list[sender.WindowEntry]) -> list[int]:
    return [int(entry.message.body) for entry in entries]


def test_each_message_is_sent_once_until_the_window_goes_back() -> None:
    window = filled(3)
    first = window.take_unsent()
    assert (bodies(first), window.take_unsent()) == ([0, 1, 2], [])
    window.confirm(first[1])
    assert (window.confirmed, bodies(window.unconfirmed), window.head) == (0, [0, 2], first[0])
    window.go_back()
    assert bodies(window.take_unsent()) == [0, 2]
    window.confirm(first[0])
    assert (window.confirmed, len(window)) == (2, 1)


def test_a_full_window_takes_no_more() -> None:
    window = filled(8)
    assert window.is_full
    with pytest.raises(AssertionError):
        window.add(message(9), 1.0)
    window.confirm(window.head)
    assert not window.is_full


# The pipeline


def pipeline(*channels: Channel | BrokerError, size: int = 4) -> tuple[Pipeline, list[str]]:
    unroutable: list[str] = []
    record: Callable[[Message, Unroutable], None] = lambda message, _: unroutable.append(message.id)  # noqa: E731
    return Pipeline(Scripted(*channels), timeout=PATIENCE, on_unroutable=record, size=size), unroutable


async def send(made: Pipeline, count: int) -> None:
    for number in range(count):
        await made.put(message(number))
    await made.drain()
    assert made.progress().confirmed == count
    assert made.progress().unconfirmed == []


async def test_messages_go_out_in_order() -> None:
    channel = Channel()
    made, _ = pipeline(channel)
    await send(made, 40)
    assert list(map(int, channel.bodies)) == list(range(40))


async def test_after_a_nack_everything_unconfirmed_is_sent_again_in_order() -> None:
    channel = Channel(None, NACK)
    made, _ = pipeline(channel)
    await send(made, 6)
    sent = list(map(int, channel.bodies))
    assert sent[:2] == [0, 1]
    assert 1 in sent[2:], "the refused message is sent again"
    kept = [number for at, number in enumerate(sent) if number not in sent[:at] or at > sent.index(1)]
    assert [number for at, number in enumerate(kept) if number not in kept[:at]] == list(range(6))


async def test_an_unroutable_message_is_reported_and_the_others_go_on() -> None:
    made, unroutable = pipeline(Channel(None, NO_QUEUE))
    await send(made, 4)
    assert unroutable == ["e1"]


async def test_a_refusal_names_the_message_that_it_is_about() -> None:
    refused = ChannelNotFoundEntity("NOT_FOUND - no exchange 'events'")
    alone = [Channel(), Channel(NO_QUEUE), Channel(refused)]
    made, unroutable = pipeline(Channel(refused, refused, refused), *alone, size=3)
    for number in range(3):
        await made.put(message(number))
    with pytest.raises(NotFound):
        await made.drain()
    assert (made.progress().confirmed, unroutable) == (2, ["e1"])


async def test_a_pipeline_that_is_abandoned_stops_waiting() -> None:
    made, _ = pipeline(Channel())
    await made.put(message())
    made.abandon()
    assert len(made.progress().unconfirmed) == 1
