"""The bridge's side of RabbitMQ: topology, live queues, the shared queue.

Owns every AMQP command for these queues. No request task awaits one: cancelling an AMQP call closes its channel with
all its consumers, and request tasks are often cancelled. So `subscribe` records the subscription and returns. A few
owner tasks make the queues, and make them again after every loss of the connection. Callbacks report when a
subscription is bound and when it is lost.

    Broker                   supervisor: keeps one consuming connection, with jittered pauses between attempts
    └─ _ConnectionEpoch      everything that lives as long as one connection
       ├─ _ChannelWorker     two channels and their owner task, for some hundred live queues
       ├─ _Shared            the process's queue for groups and broadcasts
       └─ _Dropped           the queue to which RabbitMQ sends the messages that it drops from the others
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, LimitReached, NotFound, TopologyMismatch
from bridge.routing import Audience
from bridge.service.broker.consumer import Batch, Consumer
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.broker.eventlog import OnWatermark
from bridge.service.broker.feed import (
    EXCHANGE_CHECK_SECONDS,
    EXCHANGE_GONE,
    REPLICAS_EXCHANGE,
    ConsumingFeed,
    Deletion,
)
from bridge.service.logs import RareLine
from bridge.service.settings import LogSettings
from bridge.service.streams.cursor import Anchor

if TYPE_CHECKING:
    import aio_pika
    from aiormq.abc import AbstractChannel
    from pamqp.common import FieldTable

CHANNEL_WORKERS = 8
"""Number of channel workers of a connection. Each makes one live queue at a time, so this many are made at once. After
a restart of the broker, ten thousand queues return at the rate that it can serve."""

CHANNELS_OF_A_WORKER = 2

CHANNELS_BESIDE_WORKERS = 4
"""Two for the shared queue, one for the queue of dropped messages, one to declare the topology. With all workers a
connection has 20. They are opened before any live queue is made: RabbitMQ closes the whole connection for one channel
too many."""

_ALL_CHANNELS = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * CHANNEL_WORKERS

CLOSED_SECONDS = 0.5
"""Limit of the wait for RabbitMQ's reason after a failed command. It usually arrives within one loop iteration."""

LIMIT_SECONDS = 1.0
"""After RabbitMQ refused a queue for a limit, the bridge asks for no other queue for this long."""

LIMIT_RETRY_SECONDS = 5.0
"""Mean interval at which a stream that has lost its queue asks for another one, while a limit is reached."""

PREFETCH = 200
"""Limit of unacknowledged deliveries for each live queue's consumer. A delivery is acknowledged soon after it is in a
session's backlog, so this limits only the deliveries on their way while the process is busy."""

SHARED_PREFETCH = 2_000

COMMAND_SECONDS = 30.0
"""Limit of a command's answer. After it, the bridge connects again, even if heartbeats still arrive."""

DROPPED_SECONDS = 0.5
"""Wait after the first dropped message, before the streams are read from the log: many are dropped at once."""

_RETRY_SECONDS = 1.0

_log = structlog.get_logger("bridge.broker")

Delivery = Callable[[str, bytes], None]
"""Called with the routing key and the body of a message. It must not raise."""


def count_channel_workers(channels: int, *, most: int = CHANNEL_WORKERS) -> int:
    """The number of channel workers for a connection that may have `channels` channels; `most` at most.

    Raises:
        LimitReached: the channels do not suffice for one worker.
    """
    workers = min(most, (channels - CHANNELS_BESIDE_WORKERS) // CHANNELS_OF_A_WORKER)
    if workers < 1:
        raise LimitReached(
            f"RabbitMQ allows {channels} channels in a connection, and the bridge needs at least "
            f"{CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER}: raise channel_max in rabbitmq.conf"
        )
    return workers


def describe_channels(channels: int) -> str:
    """One line for `bridge check`: the channels that RabbitMQ allows in a connection, and those that the bridge uses.

    Raises:
        LimitReached: the channels do not suffice for one worker.
    """
    workers = count_channel_workers(channels)
    used = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * workers
    line = f"RabbitMQ allows {channels} channels in a connection, and the bridge uses {used}"
    return line if workers == CHANNEL_WORKERS else f"{line}: streams are opened more slowly than with {_ALL_CHANNELS}"


class QueueSubscription:
    """The queues of one stream: a live queue of its own, and its groups on the shared queue.

    Made by `Broker.subscribe`. The callbacks run in the event loop, never inside `subscribe` or `close`:

        on_delivery(routing_key, body)  a message of the live queue arrived
        on_bound()                      the live queue and all groups are bound and consumed
        on_lost()                       they no longer are; on_bound follows when they are again
        on_refused()                    RabbitMQ refused the queue for a limit; the bridge asks again later
    """

    __slots__ = (
        "_broker",
        "bound",
        "consumed",
        "groups",
        "keys",
        "number",
        "on_bound",
        "on_delivery",
        "on_lost",
        "on_refused",
        "queue",
        "wanted",
        "worker",
    )

    def __init__(
        self,
        broker: Broker,
        number: int,
        keys: Sequence[str],
        groups: Sequence[str],
        on_delivery: Delivery,
        on_bound: Callable[[], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[], None],
    ) -> None:
        self._broker = broker
        self.number = number
        self.keys = keys
        self.groups = groups
        self.on_delivery = on_delivery
        self.on_bound = on_bound
        self.on_lost = on_lost
        self.on_refused = on_refused
        self.wanted = True
        self.consumed = False
        self.bound = False
        self.queue = ""
        """The name of the newest live queue; empty before the first one."""
        self.worker: _ChannelWorker | None = None

    def close(self) -> None:
        """Ends the deliveries at once. The queue is deleted soon after. May be called again."""
        if self.wanted:
            self.wanted = False
            self.bound = False
            self._broker.drop(self)


class Broker(ConsumingFeed):
    """Keeps the consuming connection, the subscriptions and the shared queue.

    Args:
        on_shared: called with each message of the shared queue.
        write_watermark: writes an entry to the log, and calls back with it; None without a log.
        Others: see `ConsumingFeed`.
    """

    overlaps = True
    reached: Anchor | None = None

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        exchange: str,
        quarantine: str,
        log: LogSettings | None,
        on_shared: Delivery,
        write_batch: Batch,
        fleet_key: bytes,
        write_watermark: Callable[[OnWatermark], None] | None = None,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        super().__init__(
            addresses,
            exchange=exchange,
            quarantine=quarantine,
            log=log,
            write_batch=write_batch,
            fleet_key=fleet_key,
            max_body=max_body,
        )
        self._write_watermark = write_watermark
        self.on_shared = on_shared
        self._numbers = itertools.count(1)
        self.subscriptions: dict[int, QueueSubscription] = {}
        self.groups: Counter[str] = Counter()
        self._epoch: _ConnectionEpoch | None = None
        self.dropped = 0
        """Messages that RabbitMQ has dropped from the bridge's queues since the start."""
        self.refused = 0
        """Live queues refused for a limit since the start."""
        self._most_workers = CHANNEL_WORKERS
        """Half as many after RabbitMQ refused the channels: other connections of the user or the node have them."""

    @property
    def has_dropped(self) -> bool:
        """Whether RabbitMQ has just dropped messages, and the streams are not being read from the log yet."""
        return self._epoch is not None and self._epoch.dropped.is_pending

    @property
    def shared_queue(self) -> str | None:
        """The name of the shared queue; None while it is not consumed."""
        return self._epoch.shared.queue if self._epoch is not None and self._epoch.shared.consuming else None

    def find_position(self, on_found: OnWatermark, *, resumes: bool) -> None:
        """Calls back with an entry that is written to the log now; without a log, with None."""
        if self._write_watermark is None:
            on_found(None, 0)
        else:
            self._write_watermark(on_found)

    def subscribe(
        self,
        keys: Sequence[str],
        groups: Sequence[str],
        *,
        on_delivery: Delivery,
        on_bound: Callable[[], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[], None] = lambda: None,
    ) -> QueueSubscription:
        """Requests a live queue with these binding keys, and these groups on the shared queue. Returns at once."""
        subscription = QueueSubscription(
            self, next(self._numbers), keys, groups, on_delivery, on_bound, on_lost, on_refused
        )
        self.subscriptions[subscription.number] = subscription
        self.groups.update(groups)
        if self._epoch is not None:
            self._epoch.attach(subscription)
        return subscription

    def drop(self, subscription: QueueSubscription) -> None:
        """For `QueueSubscription.close`, once for each subscription."""
        del self.subscriptions[subscription.number]
        for group in subscription.groups:
            self.groups[group] -= 1
            if not self.groups[group]:
                del self.groups[group]
        if self._epoch is not None:
            self._epoch.detach(subscription)

    # The supervisor.

    async def run(self) -> None:
        """Keeps a consuming connection until it is cancelled. Waits for a broker that cannot be reached.

        Cancelling it closes the connection; RabbitMQ then deletes the queues on it.

        Raises:
            AccessRefused, TopologyMismatch, NotFound: with the first connection only: waiting does not fix it.
        """
        next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
        while True:
            epoch: _ConnectionEpoch | None = None
            try:
                async with self._connection() as connection:
                    workers = count_channel_workers(amqp.most_channels(connection), most=self._most_workers)
                    epoch = _ConnectionEpoch(self, connection, workers=workers)
                    await self.declare_topology(connection)
                    self._epoch = epoch
                    for subscription in self.subscriptions.values():
                        epoch.attach(subscription)
                    try:
                        await epoch.run()
                    finally:
                        if self._was_steady:
                            next_pause = amqp.pauses(amqp.RECONNECT_SECONDS)
                        self._end_epoch()
            except BrokerError as error:
                cause = error if epoch is None else await epoch.cause_of(error)
                self.last_error = cause
                if isinstance(cause, _ExchangeGone):
                    self._note_deletion(noticed_here=cause.noticed_here)
                if self.connects == 0 and not isinstance(cause, BrokerUnavailable):
                    raise
                if isinstance(cause, LimitReached) and "channel" in str(cause):
                    self._most_workers = max(1, self._most_workers // 2)
                self._outage.log(cause)
            await asyncio.sleep(next_pause())

    def mark_connected(self, epoch: _ConnectionEpoch) -> None:
        """Records that the shared queue, which every stream needs, is consumed."""
        if epoch is not self._epoch or self.connected:
            return
        is_new = not epoch.has_been_up
        epoch.has_been_up = True
        self.connects += is_new
        if is_new:
            # The limit may be temporary, so the next connection tries more channels again.
            self._most_workers = min(CHANNEL_WORKERS, 2 * self._most_workers)
        self._mark_up(epoch.connection, len(self.subscriptions), is_new=is_new)

    def mark_disconnected(self, epoch: _ConnectionEpoch, error: BrokerError) -> None:
        """Records that the shared queue is lost; without it every stream misses events."""
        if epoch is self._epoch:
            self._mark_down()
        self.last_error = error

    def _end_epoch(self) -> None:
        self._epoch = None
        self._mark_down()
        for subscription in list(self.subscriptions.values()):
            subscription.worker = None
            subscription.consumed = False
            _mark_lost(subscription)


class _ExchangeGone(BrokerUnavailable):
    """The exchange was deleted, and all bindings with it. The bridge connects and makes every queue again."""

    def __init__(self, reason: object, *, noticed_here: bool = True) -> None:
        self.noticed_here = noticed_here
        super().__init__(f"the exchange is gone, and all bindings with it: {reason}")


def _mark_lost(subscription: QueueSubscription) -> None:
    if subscription.bound:
        subscription.bound = False
        subscription.on_lost()


class _ConnectionEpoch:
    """Everything that lives as long as one consuming connection."""

    def __init__(self, broker: Broker, connection: aio_pika.abc.AbstractConnection, *, workers: int) -> None:
        self.broker = broker
        self.connection = connection
        self.made_at = time.monotonic()
        """When this process began to declare exchange and bindings on this connection."""
        self.has_been_up = False
        self.full_until = 0.0
        """The bridge asks for no live queue before this time (monotonic), after RabbitMQ refused one for a limit."""
        self._closed = asyncio.Event()
        self._cause: BaseException | None = None
        connection.close_callbacks.add(self._on_closed)
        self._workers = [_ChannelWorker(self) for _ in range(workers)]
        self.shared = _Shared(self)
        self.dropped = _Dropped(self)
        self._waiting: defaultdict[str | None, dict[int, QueueSubscription]] = defaultdict(dict)
        """Subscriptions whose own queue is consumed, by what they still wait for: a group's binding, or None for the
        shared queue itself."""

    async def run(self) -> None:
        """Opens the channels, and keeps all queues until the connection is lost.

        Cancelling it cancels the owner tasks. The caller closes the connection.

        Raises:
            BrokerUnavailable: the connection ended, with the reason.
            BrokerError: an owner task failed at something that only a new connection or an operator can fix.
        """
        for worker in self._workers:
            await worker.open()
        await self.dropped.open()
        runs = [self.dropped.run(), self.shared.run(), *(worker.run() for worker in self._workers)]
        owners = [asyncio.create_task(run, name="amqp-owner") for run in runs]
        watch = asyncio.create_task(self._closed.wait(), name="amqp-closed")
        try:
            # An owner task never returns, so a task that is done has failed.
            done, _ = await asyncio.wait({watch, *owners}, return_when=asyncio.FIRST_COMPLETED)
            failed = next((task for task in done if task is not watch), None)
            if failed is not None and not self._closed.is_set():
                await failed
            raise amqp.loss_error(self._cause)
        finally:
            for task in (watch, *owners):
                task.cancel()
            await asyncio.gather(watch, *owners, return_exceptions=True)

    def _on_closed(self, _: object, error: BaseException | None) -> None:
        self._cause = error
        self._closed.set()

    async def cause_of(self, error: BrokerError) -> BrokerError:
        """RabbitMQ's reason for closing the connection, if that made a command fail; otherwise `error`.

        The library tells the waiting command only that no answer will arrive.
        """
        if type(error) is not BrokerUnavailable or self.has_been_up:
            return error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSED_SECONDS):
                await self._closed.wait()
        return error if self._cause is None else amqp.loss_error(self._cause)

    def attach(self, subscription: QueueSubscription) -> None:
        self.shared.on_groups_changed(subscription.groups)
        worker = min(self._workers, key=lambda worker: worker.load)
        worker.add(subscription)

    def detach(self, subscription: QueueSubscription) -> None:
        for missing in (None, *subscription.groups):
            self._forget(missing, subscription)
        self.shared.on_groups_changed(subscription.groups)
        if subscription.worker is not None:
            subscription.worker.remove(subscription)

    def check(self, subscription: QueueSubscription) -> None:
        """Calls `on_bound` if the live queue is consumed and the shared queue has all groups; otherwise waits."""
        if subscription.bound or not subscription.wanted or not subscription.consumed:
            return
        if not self.shared.consuming:
            self._waiting[None][subscription.number] = subscription
        elif (missing := self.shared.first_unbound(subscription.groups)) is not None:
            self._waiting[missing][subscription.number] = subscription
        else:
            subscription.bound = True
            subscription.on_bound()

    def check_waiting(self, missing: str | None) -> None:
        """Checks the subscriptions that waited for this group (None: for the shared queue) again."""
        for subscription in self._waiting.pop(missing, {}).values():
            self.check(subscription)

    def _forget(self, missing: str | None, subscription: QueueSubscription) -> None:
        waiting = self._waiting.get(missing)
        if waiting is not None:
            waiting.pop(subscription.number, None)
            if not waiting:
                del self._waiting[missing]

    def mark_all_lost(self) -> None:
        """Reports a loss to every subscription: the shared queue is gone, or messages were dropped.

        All subscriptions get broadcasts from the shared queue.
        """
        self._waiting.clear()
        for subscription in list(self.broker.subscriptions.values()):
            _mark_lost(subscription)
            self.check(subscription)


class _ChannelWorker:
    """Two channels and the task that owns them. One channel consumes; the other is for commands that may be refused,
    because a refusal closes the channel."""

    def __init__(self, epoch: _ConnectionEpoch) -> None:
        self._epoch = epoch
        self._broker = epoch.broker
        self._subscriptions: dict[bytes, QueueSubscription] = {}
        self._commands: asyncio.Queue[QueueSubscription | BrokerError] = asyncio.Queue()
        self._setup: AbstractChannel | None = None
        self._consumer: Consumer | None = None
        self._limit = RareLine("live queues refused", _log.error)
        self.load = 0

    def add(self, subscription: QueueSubscription) -> None:
        subscription.worker = self
        self.load += 1
        self._commands.put_nowait(subscription)

    def remove(self, subscription: QueueSubscription) -> None:
        self.load -= 1
        self._commands.put_nowait(subscription)

    async def open(self) -> None:
        """Opens both channels.

        Raises:
            BrokerError
        """
        self._consumer = await Consumer.open(self._epoch.connection, self._deliver, prefetch=PREFETCH)
        if self._setup is None or self._setup.is_closed:
            self._setup = await amqp.open_channel(self._epoch.connection)

    async def run(self) -> None:
        # Every stream needs the shared queue. Under a limit of queues, a live queue made first could take its place.
        await self._epoch.shared.ready.wait()
        while True:
            if self._consumer is None:
                await self.open()
            consumer, self._consumer = self._consumer, None
            assert consumer is not None, "it was opened just above"
            channel = consumer.channel
            channel.closing.add_done_callback(self._on_closed)
            channel.on_consumer_cancel_callbacks.add(self._on_cancelled)
            try:
                await self._run_commands(consumer)
            except BrokerError as error:
                if not channel.is_closed or not self._epoch.connection.connected.is_set():
                    raise  # The fault is not of this channel alone, so the bridge connects again.
                # RabbitMQ deletes the queues whose consumers were on this channel; the others remain.
                _log.warning("live queues lost", streams=len(self._subscriptions), error=str(error))
            finally:
                consumer.stop()
            self._recover()
            await asyncio.sleep(_RETRY_SECONDS)

    def _recover(self) -> None:
        lost, self._subscriptions = self._subscriptions, {}
        for subscription in lost.values():
            subscription.consumed = False
            _mark_lost(subscription)
            self._commands.put_nowait(subscription)

    def _on_closed(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._commands.put_nowait(amqp.translate(error or Exception("channel closed"), "consuming live queues"))

    def _on_cancelled(self, frame: Basic.Cancel) -> None:
        """RabbitMQ cancelled a live queue's consumer: an operator deleted the queue, or its node went down."""
        subscription = self._subscriptions.pop((frame.consumer_tag or "").encode(), None)
        if subscription is not None:
            _log.warning("live queue cancelled by the broker", stream=subscription.number)
            subscription.consumed = False
            _mark_lost(subscription)
            self._commands.put_nowait(subscription)

    def _deliver(self, tag: bytes, routing_key: str, body: bytes, _: int | None) -> None:
        subscription = self._subscriptions.get(tag)
        if subscription is not None and subscription.wanted:
            subscription.on_delivery(routing_key, body)

    async def _run_commands(self, consumer: Consumer) -> None:
        """Makes or ends one live queue after the other, as their subscriptions want.

        Raises:
            BrokerError: the consuming channel is closed, or RabbitMQ did not answer within `COMMAND_SECONDS`.
        """
        while True:
            command = await self._commands.get()
            if isinstance(command, BrokerError):
                if consumer.channel.is_closed:
                    raise command
                continue  # An error of an earlier channel.
            # The timeout cancels a command, so the library closes the channel; the whole epoch then ends.
            async with amqp.translating("making or ending a live queue"), asyncio.timeout(COMMAND_SECONDS):
                if command.wanted and not command.consumed:
                    await self._attach(command, consumer)
                elif not command.wanted and command.consumed:
                    await self._detach(command, consumer)

    async def _attach(self, subscription: QueueSubscription, consumer: Consumer) -> None:
        if time.monotonic() < self._epoch.full_until:
            self._refuse(subscription, None)
            return
        # Each attempt has its own queue name: the queue of a failed attempt may still exist.
        queue = f"bridge.live.{self._broker.instance}.{subscription.number}.{secrets.token_hex(2)}"
        try:
            async with amqp.translating("making a live queue"):
                if self._setup is None or self._setup.is_closed:
                    self._setup = await amqp.open_channel(self._epoch.connection)
                await self._declare(self._setup, queue, subscription.keys)
        except BrokerError as error:
            if not self._epoch.connection.connected.is_set():
                raise
            if isinstance(error, LimitReached):
                self._epoch.full_until = time.monotonic() + LIMIT_SECONDS
                await self._delete_queue(queue)
                self._refuse(subscription, error)
                return
            _log.error("live queue refused", stream=subscription.number, error=str(error))
            if isinstance(error, NotFound):
                raise _ExchangeGone(error) from error
            await self._delete_queue(queue)
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._commands.put_nowait, subscription)
            return
        tag = b"%d" % subscription.number
        subscription.queue = queue
        # Registered before it consumes: the first delivery may arrive in the same packet as the answer.
        self._subscriptions[tag] = subscription
        try:
            await consumer.consume(queue, tag.decode())
        except BrokerError:
            await self._delete_queue(queue)
            raise
        # A cancel or a close that arrived meanwhile is queued as a later command. A cancel has also removed the tag.
        if tag in self._subscriptions:
            subscription.consumed = True
            self._epoch.check(subscription)
            if not subscription.wanted:
                await self._detach(subscription, consumer)

    async def _declare(self, setup: AbstractChannel, queue: str, keys: Sequence[str]) -> None:
        """Declares and binds a live queue in one round trip: RabbitMQ answers the last command only. It carries out the
        commands of a channel in order, and a refusal closes the channel.

        Raises:
            BrokerError: the reason for which RabbitMQ closed the channel. A later command finds it closed already.
        """
        *others, last = keys
        try:
            arguments = self._epoch.dropped.arguments
            await setup.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments, nowait=True)
            for key in others:
                await setup.queue_bind(queue, self._broker.exchange, key, nowait=True)
            await setup.queue_bind(queue, self._broker.exchange, last)
        except Exception:
            closing = setup.closing
            if closing.done() and not closing.cancelled() and (cause := closing.exception()) is not None:
                raise amqp.translate(cause, "making a live queue") from cause
            raise

    def _refuse(self, subscription: QueueSubscription, error: LimitReached | None) -> None:
        """Reports the limit, and asks again after a pause. The hub ends a new stream; other streams wait."""
        self._broker.refused += 1
        if error is not None:
            self._limit.log(error=str(error), streams=len(self._broker.subscriptions))
        if subscription.wanted:
            subscription.on_refused()
        pause = LIMIT_RETRY_SECONDS * random.uniform(0.5, 1.5)
        asyncio.get_running_loop().call_later(pause, self._commands.put_nowait, subscription)

    async def _delete_queue(self, queue: str) -> None:
        """Deletes a queue that never had a consumer: `auto_delete` acts only after the last consumer."""
        with contextlib.suppress(BrokerError):
            async with amqp.translating("deleting a queue that was not bound"):
                self._setup = await amqp.open_channel(self._epoch.connection)
                await self._setup.queue_delete(queue)

    async def _detach(self, subscription: QueueSubscription, consumer: Consumer) -> None:
        subscription.consumed = False
        tag = b"%d" % subscription.number
        if self._subscriptions.pop(tag, None) is not None:
            # With the last consumer RabbitMQ deletes the queue (auto_delete) and its bindings.
            async with amqp.translating("ending a live queue"):
                await consumer.channel.basic_cancel(tag.decode())


class _Dropped:
    """The queue to which RabbitMQ sends messages that it drops from the live queues and the shared queue.

    When the bridge reads slowly, a policy (`max-length`, `message-ttl`) or a publisher's `expiration` can drop messages
    without a report. So each queue of the bridge names this queue for its dead letters. A message here means that some
    stream misses an event. Then all streams are read from the log, as after a lost connection.
    """

    def __init__(self, epoch: _ConnectionEpoch) -> None:
        self._epoch = epoch
        self._queue = f"bridge.dropped.{epoch.broker.instance}.{secrets.token_hex(2)}"
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()
        self._exchange_gone: _ExchangeGone | None = None

    @property
    def is_pending(self) -> bool:
        return self._timer is not None

    @property
    def arguments(self) -> FieldTable:
        """Arguments of a queue whose dropped messages go here. They have precedence over policies."""
        return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self._queue}

    async def open(self) -> None:
        """Makes and consumes the queue.

        Raises:
            BrokerError
        """
        consumer = await Consumer.open(self._epoch.connection, self._on_message, prefetch=SHARED_PREFETCH)
        consumer.channel.closing.add_done_callback(lambda _: self._closed.set())
        consumer.channel.on_consumer_cancel_callbacks.add(lambda _: self._closed.set())
        async with amqp.translating("making the queue for dropped messages"):
            setup = await amqp.open_channel(self._epoch.connection)
            await setup.queue_declare(self._queue, exclusive=True, auto_delete=True)
            await setup.close()
            await consumer.consume(self._queue, "dropped")
        await self._join_replicas()

    async def _join_replicas(self) -> None:
        """Binds the queue to `REPLICAS_EXCHANGE`, and notifies the replicas if this process noticed a deletion."""
        broker = self._epoch.broker
        try:
            async with amqp.translating(f"binding to {REPLICAS_EXCHANGE!r}"):
                channel = await amqp.open_channel(self._epoch.connection)
                await channel.exchange_declare(REPLICAS_EXCHANGE, exchange_type="fanout", durable=True)
                await channel.queue_bind(self._queue, REPLICAS_EXCHANGE)
                await broker.report_deletion(channel)
                await channel.close()
        except (AccessRefused, TopologyMismatch) as error:
            broker.warn_not_notified(error)

    async def run(self) -> None:
        """Waits until the queue is lost, or a replica reports the deletion of the exchange.

        Raises:
            BrokerUnavailable: always. Without this queue the bridge notices no dropped message, so it connects again.
        """
        await self._closed.wait()
        if self._timer is not None:
            self._timer.cancel()
        raise self._exchange_gone or BrokerUnavailable("the queue for dropped messages is gone")

    def _on_message(self, _tag: bytes, key: str, body: bytes, _offset: int | None) -> None:
        if key == EXCHANGE_GONE:
            self._on_exchange_gone(Deletion.parse(body, self._epoch.broker.fleet_key))
            return
        self._count += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DROPPED_SECONDS, self._report)

    def _on_exchange_gone(self, news: Deletion | None) -> None:
        broker, made_at = self._epoch.broker, self._epoch.made_at
        if news is not None and news.concerns(broker.exchange, broker.instance, time.monotonic() - made_at):
            self._exchange_gone = _ExchangeGone(f"replica {news.instance:.20} reports it", noticed_here=False)
            self._closed.set()

    def _report(self) -> None:
        self._timer = None
        count, self._count = self._count, 0
        _log.error(
            "messages dropped by the broker",
            count=count,
            detail="a policy (max-length, message-ttl) or an `expiration` removed them from the bridge's queues. All "
            "streams are read from the log. Exempt queues named bridge.* from the policy",
        )
        self._epoch.broker.dropped += count
        self._epoch.mark_all_lost()


class _Shared:
    """The queue for `all` and for the groups with a connection here: one delivery a process, not one a browser."""

    def __init__(self, epoch: _ConnectionEpoch) -> None:
        self._epoch = epoch
        self._broker = epoch.broker
        self._changed = asyncio.Event()
        self._bound: set[str] = set()
        self.consuming = False
        self.has_consumed = False
        self.ready = asyncio.Event()
        """Set once the queue has been consumed for the first time on this connection."""
        self.queue = ""
        self._failure: BrokerError | None = None

    def on_groups_changed(self, groups: Sequence[str]) -> None:
        """For each subscription that begins or ends, with its groups."""
        if any((group in self._bound) != (group in self._broker.groups) for group in groups):
            self._changed.set()

    def first_unbound(self, groups: Sequence[str]) -> str | None:
        """The first of these groups that the queue is not bound to; None if it is bound to all."""
        return next((group for group in groups if group not in self._bound), None)

    async def run(self) -> None:
        """Keeps the queue, and makes it again after a loss.

        Raises:
            BrokerError: the connection is lost, the exchange is gone, or a right is missing.
        """
        while True:
            try:
                await self._live()
            except BrokerError as error:
                if not self._epoch.connection.connected.is_set():
                    raise
                self._broker.mark_disconnected(self._epoch, error)
                _log.warning("shared queue lost", error=str(error))
                if isinstance(error, NotFound):
                    if self._broker.connects == 0:
                        raise NotFound(
                            f"exchange {self._broker.exchange!r} does not exist, and the bridge's user may not make "
                            f"it. {error}"
                        ) from error
                    raise _ExchangeGone(error) from error
                if isinstance(error, AccessRefused) and not self.has_consumed:
                    raise  # A right is missing, so waiting does not help.
            finally:
                self.consuming = False
                self._bound.clear()
                self._failure = None
            self._epoch.mark_all_lost()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _live(self) -> None:
        queue = f"bridge.shared.{self._broker.instance}.{secrets.token_hex(2)}"
        async with amqp.translating("making the shared queue"):
            setup = await amqp.open_channel(self._epoch.connection)
        consumer = await Consumer.open(
            self._epoch.connection,
            lambda _tag, key, body, _offset: self._broker.on_shared(key, body),
            prefetch=SHARED_PREFETCH,
        )
        channel = consumer.channel
        channel.closing.add_done_callback(self._on_closed)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)
        try:
            async with amqp.translating("making the shared queue"):
                arguments = self._epoch.dropped.arguments
                await setup.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments)
                await self._bind_everyone(setup, queue)
                await consumer.consume(queue, "shared")
                self.queue = queue
                self.consuming = self.has_consumed = True
                self._broker.mark_connected(self._epoch)
                self.ready.set()
                self._epoch.check_waiting(None)
                # Groups are bound last: a stream with few groups must not wait until thousands of others are bound.
                while True:
                    await self._reconcile(setup, queue)
                    try:
                        async with asyncio.timeout(EXCHANGE_CHECK_SECONDS):
                            await self._changed.wait()
                    except TimeoutError:
                        # Fails if the exchange is gone. Repeating a binding changes nothing and needs no further right;
                        # a passive declare needs the right to configure the exchange (RabbitMQ 4.3).
                        await self._bind_everyone(setup, queue)
                    self._changed.clear()
                    if self._failure is not None:
                        raise self._failure
        except BrokerError:
            self.consuming = False
            # The connection remains, so its channels are closed. After a cancel the caller closes the connection.
            if self._epoch.connection.connected.is_set():
                with contextlib.suppress(BrokerError):
                    consumer.stop()
                    async with amqp.translating("closing the shared queue's channels"):
                        await setup.close()
                        await channel.close()
            raise
        finally:
            consumer.stop()

    async def _bind_everyone(self, setup: AbstractChannel, queue: str) -> None:
        await setup.queue_bind(queue, self._broker.exchange, Audience.everyone().binding_key())

    async def _reconcile(self, setup: AbstractChannel, queue: str) -> None:
        """Binds a group with its first connection, and unbinds it with its last.

        Each round compares all groups once, because there may be thousands; after a reconnect all of them differ. Each
        group is then checked again before its command, because groups change while RabbitMQ answers.
        """
        while differing := self._bound.symmetric_difference(self._broker.groups):
            for group in sorted(differing):
                key = Audience.group(group).binding_key()
                match group in self._bound, group in self._broker.groups:
                    case False, True:
                        await setup.queue_bind(queue, self._broker.exchange, key)
                        self._bound.add(group)
                        self._epoch.check_waiting(group)
                    case True, False:
                        # Before the unbind: a connection that arrives meanwhile must wait for a new binding.
                        self._bound.discard(group)
                        await setup.queue_unbind(queue, self._broker.exchange, key)

    def _on_closed(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._fail(amqp.translate(error or Exception("channel closed"), "consuming the shared queue"))

    def _on_cancelled(self, _: Basic.Cancel) -> None:
        self._fail(BrokerUnavailable("RabbitMQ cancelled the shared queue's consumer"))

    def _fail(self, error: BrokerError) -> None:
        self._failure = error
        self._changed.set()
