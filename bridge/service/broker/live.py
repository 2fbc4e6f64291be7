"""The bridge's side of RabbitMQ: topology, live queues, the shared queue.

Owns every AMQP command that the bridge gives. Nobody outside awaits one: cancelling an AMQP call closes its channel
with all consumers on it, and the tasks of HTTP requests are cancelled all the time. So `subscribe` only notes down what
is wanted and returns; a few owner tasks make it so, for as long as it is wanted, through every loss of the connection,
and tell by callback when it is so and when it no longer is.

    Broker        supervisor: one consuming connection, made again for ever, with jittered pauses
    └─ _ConnectionEpoch      one life of that connection, with the queues that live and die with it
       ├─ _ChannelWorker   two channels and their owner task; some hundred live queues each
       ├─ _Shared the process's queue for groups and broadcasts
       └─ _Dropped the queue to which RabbitMQ sends what it drops from the others
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING

import structlog
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, BrokerUnavailable, LimitReached, NotFound, TopologyMismatch
from bridge.routing import Audience
from bridge.service.broker import topology
from bridge.service.broker.consumer import Batch, Consumer, ConsumingConnection
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.logs import RareLine
from bridge.service.settings import LogSettings

if TYPE_CHECKING:
    import aio_pika
    from aiormq.abc import AbstractChannel
    from pamqp.common import FieldTable

CHANNEL_WORKERS = 8
"""Attaching is bounded by this: so many queues are being made at any time, each after the one before it. A broker
that is slow is asked more slowly; after its restart ten thousand queues come back at the pace it can keep."""

CHANNELS_OF_A_WORKER = 2

CHANNELS_BESIDE_WORKERS = 4
"""Two of the shared queue, one of the queue for dropped messages, and one to declare the topology. With all channel
workers a connection has 20. They are opened before the connection is used: RabbitMQ closes the connection for one
channel too many, and a new stream must not do that to the others."""

_ALL_CHANNELS = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * CHANNEL_WORKERS

CLOSED_SECONDS = 0.5
"""A connection that RabbitMQ closes says why within a turn of the loop."""

LIMIT_SECONDS = 1.0
"""After RabbitMQ refused a queue for a limit, it is not asked for another one for so long."""

LIMIT_RETRY_SECONDS = 5.0
"""A stream that had a queue before asks for another one about this often, while a limit is reached."""

PREFETCH = 200
"""Unacked deliveries for each consumer. They are acked as soon as they are in a session's backlog, so this is only what
may be on its way while the process is busy."""

SHARED_PREFETCH = 2_000

STEADY_SECONDS = 10.0
"""A connection that lasted this long is followed by a quick try; one that did not, by a longer pause each time."""

QUARANTINE_SECONDS = 2.0
"""The bridge waits this long for RabbitMQ's answer about the quarantine, and then declares the queues of streams."""

COMMAND_SECONDS = 30.0
"""A broker that leaves a command unanswered for this long is as good as gone, though its heartbeats come."""

EXCHANGE_CHECK_SECONDS = 10.0
"""How often the bridge checks that the exchange exists. RabbitMQ deletes all bindings with it, and notifies nobody."""

REPLICAS_EXCHANGE = "bridge.replicas"
"""A fanout exchange, to which each process binds its queue for dropped messages. The process that finds the exchange of
the events gone notifies the others: they find it there again, and their own bindings are gone all the same."""

EXCHANGE_GONE = "bridge.exchange-gone"
"""Routing key of that message; its body is the sender's instance."""

DROPPED_SECONDS = 0.5
"""After the first message that RabbitMQ dropped, this long passes before the streams are read from the log: many are
dropped at once."""

LOG_RECOVERY_SECONDS = 5.0

_RETRY_SECONDS = 1.0
_LOG_PAUSE_SECONDS = 0.1

_log = structlog.get_logger("bridge.broker")

Delivery = Callable[[str, bytes], None]
"""Called with the routing key and the body of a message; must not raise."""


def count_channel_workers(channels: int, *, most: int = CHANNEL_WORKERS) -> int:
    """As many channel workers as a connection with so many channels has room for.

    Raises:
        LimitReached: none.
    """
    workers = min(most, (channels - CHANNELS_BESIDE_WORKERS) // CHANNELS_OF_A_WORKER)
    if workers < 1:
        raise LimitReached(
            f"RabbitMQ allows {channels} channels in a connection, and the bridge needs at least "
            f"{CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER}: raise channel_max in rabbitmq.conf"
        )
    return workers


def describe_channels(channels: int) -> str:
    """What a connection with so many channels means for the bridge, in one line.

    Raises:
        LimitReached: the bridge cannot work with so few.
    """
    workers = count_channel_workers(channels)
    used = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * workers
    line = f"RabbitMQ allows {channels} channels in a connection, and the bridge uses {used}"
    return line if workers == CHANNEL_WORKERS else f"{line}: streams are opened more slowly than with {_ALL_CHANNELS}"


class Subscription:
    """One connection's wish for events: a live queue of its own, and its groups on the shared queue.

    Made by `Broker.subscribe`. The callbacks run in the event loop, never inside `subscribe` or `close`:

        on_delivery(routing_key, body)  a message of the live queue
        on_bound()                      all of it is bound and consumed
        on_lost()                       no longer; on_bound follows when it is again
        on_refused()                    RabbitMQ takes no further queue; it is tried again later
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
        """The name of its live queue, while it has one."""
        self.worker: _ChannelWorker | None = None

    def close(self) -> None:
        """Nothing more is delivered from here on. The queue is taken down soon; closing twice is harmless."""
        if self.wanted:
            self.wanted = False
            self.bound = False
            self._broker.drop(self)


class Broker:
    """
    Args:
        addresses: AMQP URLs of the cluster's nodes.
        exchange, quarantine, log: the topology, declared with every new connection.
        on_shared: called with each message of the shared queue.
        write_batch: entered and left around the callbacks of all messages that come in one packet.
        max_body: of larger bodies, callbacks get a `Cut`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        exchange: str,
        quarantine: str,
        log: LogSettings | None,
        on_shared: Delivery,
        write_batch: Batch,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self._addresses = addresses
        self._write_batch = write_batch
        self._max_body = max_body
        self.log = log
        self.exchange = exchange
        self.quarantine = quarantine
        self.on_shared = on_shared
        # Queue names never hold a user id: they are seen in places where tokens are not, and take fewer characters.
        self.instance = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self.subscriptions: dict[int, Subscription] = {}
        self.groups: Counter[str] = Counter()
        self._epoch: _ConnectionEpoch | None = None
        self.down_since: float | None = time.monotonic()
        """Monotonic time since when there has been no consuming connection; None while there is one."""
        self._up_since = 0.0
        self.last_error: BrokerError | None = None
        self.connects = 0
        """Connections made since the start, the first included."""
        self.dropped = 0
        """Messages that RabbitMQ dropped from the bridge's queues, since the start."""
        self.refused = 0
        """Live queues that RabbitMQ refused for a limit, since the start."""
        self._most_workers = CHANNEL_WORKERS
        """Fewer after RabbitMQ refused so many channels: other connections of the user or the node have them."""
        self.log_may_be_unbound = False
        """Whether the exchange was deleted, and with it the log's binding, and we have not bound it again."""
        self.exchanges_lost = 0
        """How often the exchange was deleted. Events published before the log was bound again are not in the log."""
        self.exchange_gone_at = -math.inf
        """When that was noticed last (monotonic)."""
        self.has_to_notify = False
        """Whether this process noticed it first, and has not notified the other replicas."""

    @property
    def connected(self) -> bool:
        return self.down_since is None

    @property
    def has_dropped(self) -> bool:
        """Whether RabbitMQ has just dropped messages, and the streams have not been read from the log since then."""
        return self._epoch is not None and self._epoch.dropped.is_pending

    @property
    def shared_queue(self) -> str | None:
        """The name of the shared queue, while it is consumed."""
        return self._epoch.shared.queue if self._epoch is not None and self._epoch.shared.consuming else None

    def subscribe(
        self,
        keys: Sequence[str],
        groups: Sequence[str],
        *,
        on_delivery: Delivery,
        on_bound: Callable[[], None],
        on_lost: Callable[[], None],
        on_refused: Callable[[], None] = lambda: None,
    ) -> Subscription:
        """Wishes for a live queue with these binding keys, and for these groups. Returns at once."""
        subscription = Subscription(self, next(self._numbers), keys, groups, on_delivery, on_bound, on_lost, on_refused)
        self.subscriptions[subscription.number] = subscription
        self.groups.update(groups)
        if self._epoch is not None:
            self._epoch.attach(subscription)
        return subscription

    def drop(self, subscription: Subscription) -> None:
        del self.subscriptions[subscription.number]
        for group in subscription.groups:
            self.groups[group] -= 1
            if not self.groups[group]:
                del self.groups[group]
        if self._epoch is not None:
            self._epoch.detach(subscription)

    # The supervisor.

    async def run(self) -> None:
        """Keeps a consuming connection, for ever. A broker that cannot be reached is waited for; it may be starting.

        Raises:
            AccessRefused, TopologyMismatch, NotFound: with the first connection only, what waiting does not fix.

        Cancelling it ends the connection and the queues on it.
        """
        next_pause = amqp.pauses()
        while True:
            epoch: _ConnectionEpoch | None = None
            try:
                async with self._connection() as connection:
                    workers = count_channel_workers(amqp.most_channels(connection), most=self._most_workers)
                    epoch = _ConnectionEpoch(self, connection, workers=workers)
                    await epoch.declare_topology()
                    self._epoch = epoch
                    for subscription in self.subscriptions.values():
                        epoch.attach(subscription)
                    try:
                        await epoch.run()
                    finally:
                        if self.connected and time.monotonic() - self._up_since > STEADY_SECONDS:
                            next_pause = amqp.pauses()
                        self._went_down()
            except BrokerError as error:
                cause = error if epoch is None else await epoch.cause_of(error)
                self.last_error = cause
                if isinstance(cause, _ExchangeGone):
                    self.log_may_be_unbound = True
                    self.exchanges_lost += 1
                    self.exchange_gone_at = time.monotonic()
                    self.has_to_notify = cause.noticed_here
                if self.connects == 0 and not isinstance(cause, BrokerUnavailable):
                    raise
                if isinstance(cause, LimitReached) and "channel" in str(cause):
                    self._most_workers = max(1, self._most_workers // 2)
                _log.warning("broker unavailable", error=str(cause), kind=type(cause).__name__)
            await asyncio.sleep(next_pause())

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[aio_pika.abc.AbstractConnection]:
        connection = await ConsumingConnection.open(
            self._addresses,
            name=f"bridge {self.instance} consumer",
            write_batch=self._write_batch,
            max_body=self._max_body,
        )
        try:
            yield connection
        finally:
            await amqp.close(connection)

    def note_up(self, epoch: _ConnectionEpoch) -> None:
        """The connection consumes: its shared queue is there, which every stream needs."""
        if epoch is not self._epoch or self.connected:
            return
        is_new = not epoch.has_been_up
        epoch.has_been_up = True
        self.connects += is_new
        away = None if self.connects == 1 or self.down_since is None else round(time.monotonic() - self.down_since, 3)
        self.down_since = None
        self._up_since = time.monotonic()
        self.last_error = None
        if is_new:
            self._most_workers = min(
                CHANNEL_WORKERS, 2 * self._most_workers
            )  # The next connection may have more again.
        _log.info(
            "broker connected" if is_new else "shared queue made again",
            address=amqp.address(epoch.connection),
            exchange=self.exchange,
            streams=len(self.subscriptions),
            away_seconds=away,
        )

    def note_down(self, epoch: _ConnectionEpoch, error: BrokerError) -> None:
        """The connection has lost its shared queue, without which no stream gets everything."""
        if epoch is self._epoch and self.connected:
            self.down_since = time.monotonic()
        self.last_error = error

    def _went_down(self) -> None:
        self._epoch = None
        if self.down_since is None:
            self.down_since = time.monotonic()
        for subscription in list(self.subscriptions.values()):
            subscription.worker = None
            subscription.consumed = False
            _lose(subscription)


class _ExchangeGone(BrokerUnavailable):
    """The exchange was deleted, and all bindings with it. The connection is made again, with every queue."""

    def __init__(self, reason: object, *, noticed_here: bool = True) -> None:
        self.noticed_here = noticed_here
        super().__init__(f"the exchange is gone, and all bindings with it: {reason}")


def _note_differences(what: str, declared: topology.Declared, detail: str = "nothing has to be done") -> None:
    if declared.differences:
        differences = [str(each) for each in declared.differences]
        _log.warning(f"the {what} differs, and fits", differences=differences, detail=detail)


def _lose(subscription: Subscription) -> None:
    if subscription.bound:
        subscription.bound = False
        subscription.on_lost()


class _ConnectionEpoch:
    """One life of the consuming connection."""

    def __init__(self, broker: Broker, connection: aio_pika.abc.AbstractConnection, *, workers: int) -> None:
        self.broker = broker
        self.connection = connection
        self.has_been_up = False
        self.full_until = 0.0
        """Until this moment (monotonic) RabbitMQ is asked for no queue: it has just refused one for a limit."""
        self._closed = asyncio.Event()
        self._cause: BaseException | None = None
        connection.close_callbacks.add(self._note_closed)
        self._workers = [_ChannelWorker(self) for _ in range(workers)]
        self.shared = _Shared(self)
        self.dropped = _Dropped(self)
        self._asking: asyncio.Task[topology.Declared] | None = None
        """The declaration of the quarantine, when its answer is late."""
        self._waiting: defaultdict[str | None, dict[int, Subscription]] = defaultdict(dict)
        """Who has its own queue, by what the shared queue lacks for it: a group, or None for the queue itself."""

    async def declare_topology(self) -> None:
        """Exchange, quarantine and log, on channels without consumers: a declare that differs closes its channel.

        Raises:
            BrokerError: with what differs or which right is missing, and what to do.
        """
        _note_differences("exchange", await topology.declare_exchange(self.connection, self.broker.exchange))
        await self._declare_quarantine()
        if self.broker.log is not None:
            try:
                await self._declare_log(self.broker.log)
            except (NotFound, TopologyMismatch, AccessRefused) as error:
                # Its node may be down, or an operator at work. Live events flow without it, and who comes back is told.
                if self.broker.connects == 0 and not isinstance(error, NotFound):
                    raise
                _log.error("no log", error=str(error))

    async def _declare_quarantine(self) -> None:
        """In a cluster its node may be down, which RabbitMQ 4.3 says after a minute only. Streams do without, and do
        not wait for it; what is refused meanwhile is kept for a while."""
        asking = asyncio.create_task(
            topology.declare_quarantine(self.connection, self.broker.quarantine), name="amqp-quarantine"
        )
        try:
            await asyncio.wait({asking}, timeout=QUARANTINE_SECONDS)
        except BaseException:
            asking.cancel()
            raise
        if asking.done():
            try:
                _note_differences("quarantine", asking.result())
            except NotFound as error:
                _log.error("no quarantine", error=str(error))
        else:
            _log.error("no quarantine", error=f"RabbitMQ has not answered for {QUARANTINE_SECONDS:g} s; still waiting")
            self._asking = asking
            asking.add_done_callback(self._note_quarantine)

    def _note_quarantine(self, asking: asyncio.Task[topology.Declared]) -> None:
        if asking.cancelled() or self._closed.is_set():
            return
        try:
            _note_differences("quarantine", asking.result())
        except BrokerError as error:
            _log.error("no quarantine", error=str(error))
        else:
            _log.info("quarantine found", queue=self.broker.quarantine)

    async def _declare_log(self, log: LogSettings) -> None:
        # RabbitMQ 3.10 takes connections before it has recovered its streams, and says that there is none. A live queue
        # bound then would take what the log does not get: who is connected would see it, who comes back would not.
        deadline = time.monotonic() + LOG_RECOVERY_SECONDS
        while True:
            try:
                declared = await topology.declare_log(self.connection, log, self.broker.exchange)
                break
            except NotFound:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_LOG_PAUSE_SECONDS)
        _note_differences(
            "log",
            declared,
            "it keeps events as it was made. Set BRIDGE_LOG_MAX_AGE and BRIDGE_LOG_MAX_BYTES to what it has; to keep "
            "events for another time, set BRIDGE_LOG to a new name",
        )
        if self.broker.log_may_be_unbound and not declared.may_declare:
            _log.error(
                "the log may be unbound",
                detail=f"somebody deleted exchange {self.broker.exchange!r} and made it again, and this user may not "
                f"bind {log.name!r} to it. Bind it with '#': until then who comes back gets nothing of it",
            )
        self.broker.log_may_be_unbound = False

    async def run(self) -> None:
        """Until the connection is lost.

        Raises:
            BrokerUnavailable: always; it says why the connection ended.
        """
        for worker in self._workers:
            await worker.open()
        await self.dropped.open()
        runs = [self.dropped.run(), self.shared.run(), *(worker.run() for worker in self._workers)]
        owners = [asyncio.create_task(run, name="amqp-owner") for run in runs]
        watch = asyncio.create_task(self._closed.wait(), name="amqp-closed")
        try:
            # An owner never ends by itself, so one that is done has failed at something it cannot fix.
            done, _ = await asyncio.wait({watch, *owners}, return_when=asyncio.FIRST_COMPLETED)
            failed = next((task for task in done if task is not watch), None)
            if failed is not None and not self._closed.is_set():
                await failed
            raise self._lost()
        finally:
            tasks = [watch, *owners, *([self._asking] if self._asking is not None else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note_closed(self, _: object, error: BaseException | None) -> None:
        self._cause = error
        self._closed.set()

    def _lost(self) -> BrokerUnavailable:
        found = amqp.translate(self._cause or BrokerUnavailable("the connection was closed"), "consuming")
        kind = LimitReached if isinstance(found, LimitReached) else BrokerUnavailable
        return kind(f"connection lost: {found}")

    async def cause_of(self, error: BrokerError) -> BrokerError:
        """What RabbitMQ said when it closed the connection, if that is why a command failed. The library tells whoever
        waits for an answer only that there is none."""
        if type(error) is not BrokerUnavailable or self.has_been_up:
            return error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSED_SECONDS):
                await self._closed.wait()
        return error if self._cause is None else self._lost()

    def attach(self, subscription: Subscription) -> None:
        self.shared.note_groups(subscription.groups)
        worker = min(self._workers, key=lambda worker: worker.load)
        worker.give(subscription)

    def detach(self, subscription: Subscription) -> None:
        for lacking in (None, *subscription.groups):
            self._forget(lacking, subscription)
        self.shared.note_groups(subscription.groups)
        if subscription.worker is not None:
            subscription.worker.take_back(subscription)

    def check(self, subscription: Subscription) -> None:
        """Tells the subscription that it is bound, once its own queue is and the shared queue has its groups."""
        if subscription.bound or not subscription.wanted or not subscription.consumed:
            return
        if not self.shared.consuming:
            self._waiting[None][subscription.number] = subscription
        elif (lacking := self.shared.lacking(subscription.groups)) is not None:
            self._waiting[lacking][subscription.number] = subscription
        else:
            subscription.bound = True
            subscription.on_bound()

    def check_waiting(self, lacking: str | None) -> None:
        """Has the shared queue got what these lacked, each of them lacks another group now, or nothing."""
        for subscription in self._waiting.pop(lacking, {}).values():
            self.check(subscription)

    def _forget(self, lacking: str | None, subscription: Subscription) -> None:
        waiting = self._waiting.get(lacking)
        if waiting is not None:
            waiting.pop(subscription.number, None)
            if not waiting:
                del self._waiting[lacking]

    def lose_all(self) -> None:
        """The shared queue is gone, and everybody is on it: each gets broadcasts by it. Or messages were dropped."""
        self._waiting.clear()
        for subscription in list(self.broker.subscriptions.values()):
            _lose(subscription)
            self.check(subscription)


class _ChannelWorker:
    """Two channels, one for commands that may be refused and one that consumes, and the task that speaks on them."""

    def __init__(self, epoch: _ConnectionEpoch) -> None:
        self._epoch = epoch
        self._broker = epoch.broker
        self._subscriptions: dict[bytes, Subscription] = {}
        self._commands: asyncio.Queue[Subscription | BrokerError] = asyncio.Queue()
        self._setup: AbstractChannel | None = None
        self._consumer: Consumer | None = None
        self._limit = RareLine("live queues refused", _log.error)
        self.load = 0

    def give(self, subscription: Subscription) -> None:
        subscription.worker = self
        self.load += 1
        self._commands.put_nowait(subscription)

    def take_back(self, subscription: Subscription) -> None:
        self.load -= 1
        self._commands.put_nowait(subscription)

    async def open(self) -> None:
        """Both channels.

        Raises:
            BrokerError
        """
        self._consumer = await Consumer.open(self._epoch.connection, self._deliver, prefetch=PREFETCH)
        if self._setup is None or self._setup.is_closed:
            self._setup = await amqp.open_channel(self._epoch.connection)

    async def run(self) -> None:
        # Every stream needs the shared queue, so that under a limit of queues no live queue may take its place.
        await self._epoch.shared.made.wait()
        while True:
            if self._consumer is None:
                await self.open()
            consumer, self._consumer = self._consumer, None
            assert consumer is not None, "it has just been opened"
            channel = consumer.channel
            channel.closing.add_done_callback(self._note_closed)
            channel.on_consumer_cancel_callbacks.add(self._note_cancelled)
            try:
                await self._obey(consumer)
            except BrokerError as error:
                if not channel.is_closed or not self._epoch.connection.connected.is_set():
                    raise  # More than this channel is at fault: everything is made anew.
                # Only this channel is gone, and with it the queues that had their consumers on it.
                _log.warning("live queues lost", streams=len(self._subscriptions), error=str(error))
            finally:
                consumer.stop()
            self._recover()
            await asyncio.sleep(_RETRY_SECONDS)

    def _recover(self) -> None:
        lost, self._subscriptions = self._subscriptions, {}
        for subscription in lost.values():
            subscription.consumed = False
            _lose(subscription)
            self._commands.put_nowait(subscription)

    def _note_closed(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._commands.put_nowait(amqp.translate(error or Exception("channel closed"), "consuming live queues"))

    def _note_cancelled(self, frame: Basic.Cancel) -> None:
        """The broker took a queue away: an operator deleted it, or its node went down."""
        subscription = self._subscriptions.pop((frame.consumer_tag or "").encode(), None)
        if subscription is not None:
            _log.warning("live queue cancelled by the broker", stream=subscription.number)
            subscription.consumed = False
            _lose(subscription)
            self._commands.put_nowait(subscription)

    def _deliver(self, tag: bytes, routing_key: str, body: bytes, _: int | None) -> None:
        subscription = self._subscriptions.get(tag)
        if subscription is not None and subscription.wanted:
            subscription.on_delivery(routing_key, body)

    async def _obey(self, consumer: Consumer) -> None:
        """Brings one subscription after another to what it should be.

        Raises:
            BrokerError: the consuming channel is gone.
        """
        while True:
            command = await self._commands.get()
            if isinstance(command, BrokerError):
                if consumer.channel.is_closed:
                    raise command
                continue  # Of a channel before this one.
            # Its timeout closes the channel in the middle of a command; the whole epoch ends with it.
            async with amqp.translating("making or ending a live queue"), asyncio.timeout(COMMAND_SECONDS):
                if command.wanted and not command.consumed:
                    await self._attach(command, consumer)
                elif not command.wanted and command.consumed:
                    await self._detach(command, consumer)

    async def _attach(self, subscription: Subscription, consumer: Consumer) -> None:
        if time.monotonic() < self._epoch.full_until:
            self._refuse(subscription, None)
            return
        # A name of its own for each try: the queue of a try that failed may still be there.
        queue = f"bridge.live.{self._broker.instance}.{subscription.number}.{secrets.token_hex(2)}"
        try:
            async with amqp.translating("making a live queue"):
                if self._setup is None or self._setup.is_closed:
                    self._setup = await amqp.open_channel(self._epoch.connection)
                arguments = self._epoch.dropped.arguments
                await self._setup.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments)
                for key in subscription.keys:
                    await self._setup.queue_bind(queue, self._broker.exchange, key)
        except BrokerError as error:
            if not self._epoch.connection.connected.is_set():
                raise
            if isinstance(error, LimitReached):
                self._epoch.full_until = time.monotonic() + LIMIT_SECONDS
                await self._clear_away(queue)
                self._refuse(subscription, error)
                return
            _log.error("live queue refused", stream=subscription.number, error=str(error))
            if isinstance(error, NotFound):
                raise _ExchangeGone(error) from error
            await self._clear_away(queue)
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._commands.put_nowait, subscription)
            return
        tag = b"%d" % subscription.number
        subscription.queue = queue
        # Known before it is consumed: the first delivery may come with the same packet as the answer.
        self._subscriptions[tag] = subscription
        try:
            await consumer.consume(queue, tag.decode())
        except BrokerError:
            await self._clear_away(queue)
            raise
        # What happened meanwhile (a close, a cancel) stands in the commands behind this one.
        if tag in self._subscriptions:
            subscription.consumed = True
            self._epoch.check(subscription)
            if not subscription.wanted:
                await self._detach(subscription, consumer)

    def _refuse(self, subscription: Subscription, error: LimitReached | None) -> None:
        """A limit is reached: new streams are sent away, those that had a queue wait for another one."""
        self._broker.refused += 1
        if error is not None:
            self._limit.log(error=str(error), streams=len(self._broker.subscriptions))
        if subscription.wanted:
            subscription.on_refused()
        pause = LIMIT_RETRY_SECONDS * random.uniform(0.5, 1.5)
        asyncio.get_running_loop().call_later(pause, self._commands.put_nowait, subscription)

    async def _clear_away(self, queue: str) -> None:
        """A queue that never had a consumer is not deleted by itself before the connection ends."""
        with contextlib.suppress(BrokerError):
            async with amqp.translating("deleting a queue that was not bound"):
                self._setup = await amqp.open_channel(self._epoch.connection)
                await self._setup.queue_delete(queue)

    async def _detach(self, subscription: Subscription, consumer: Consumer) -> None:
        subscription.consumed = False
        tag = b"%d" % subscription.number
        if self._subscriptions.pop(tag, None) is not None:
            # With its last consumer the queue is gone too (auto-delete), and with the queue its bindings.
            async with amqp.translating("ending a live queue"):
                await consumer.channel.basic_cancel(tag.decode())


class _Dropped:
    """The queue to which RabbitMQ sends what it drops from the live queues and the shared one.

    A policy that limits queues (`max-length`, `message-ttl`), or an `expiration` that a publisher set, takes messages
    away whenever the bridge reads slowly. Nobody would notice. So each queue of the bridge names this one for its dead
    letters. A message here says that something is missing somewhere, and all streams are read from the log, as after a
    lost connection.
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
        """Of a queue whose dropped messages come here. Arguments win over policies."""
        return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self._queue}

    async def open(self) -> None:
        """
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
        """Hears of a deleted exchange from the other replicas, and notifies them if this process noticed it."""
        broker = self._epoch.broker
        try:
            async with amqp.translating(f"binding to {REPLICAS_EXCHANGE!r}"):
                channel = await amqp.open_channel(self._epoch.connection)
                await channel.exchange_declare(REPLICAS_EXCHANGE, exchange_type="fanout", durable=True)
                await channel.queue_bind(self._queue, REPLICAS_EXCHANGE)
                if broker.has_to_notify:
                    await channel.basic_publish(
                        broker.instance.encode("ascii"), exchange=REPLICAS_EXCHANGE, routing_key=EXCHANGE_GONE
                    )
                    broker.has_to_notify = False
                await channel.close()
        except (AccessRefused, TopologyMismatch) as error:
            _log.warning(
                "replicas not notified",
                error=str(error),
                detail=f"if the exchange is deleted, another replica may not notice it. Give the bridge's user the "
                f"rights to configure, write and read {REPLICAS_EXCHANGE!r}",
            )

    async def run(self) -> None:
        """
        Raises:
            BrokerUnavailable: the queue is gone. Without it no loss would be noticed, so all is made again.
        """
        await self._closed.wait()
        if self._timer is not None:
            self._timer.cancel()
        raise self._exchange_gone or BrokerUnavailable("the queue for dropped messages is gone")

    def _on_message(self, _tag: bytes, key: str, body: bytes, _offset: int | None) -> None:
        if key == EXCHANGE_GONE:
            self._on_exchange_gone(body.decode("ascii", "replace"))
            return
        self._count += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DROPPED_SECONDS, self._report)

    def _on_exchange_gone(self, instance: str) -> None:
        broker = self._epoch.broker
        # A process that has just noticed it by itself has made its bindings again.
        if instance != broker.instance and time.monotonic() > broker.exchange_gone_at + 2 * EXCHANGE_CHECK_SECONDS:
            self._exchange_gone = _ExchangeGone(f"replica {instance:.20} says so", noticed_here=False)
            self._closed.set()

    def _report(self) -> None:
        self._timer = None
        count, self._count = self._count, 0
        _log.error(
            "messages dropped by the broker",
            count=count,
            detail="a policy (max-length, message-ttl) or an `expiration` took them out of the bridge's queues; all "
            "streams are read from the log. Exempt queues named bridge.* from the policy",
        )
        self._epoch.broker.dropped += count
        self._epoch.lose_all()


class _Shared:
    """The queue for `all` and for the groups that have a connection here. One delivery a process, not one a browser."""

    def __init__(self, epoch: _ConnectionEpoch) -> None:
        self._epoch = epoch
        self._broker = epoch.broker
        self._changed = asyncio.Event()
        self._bound: set[str] = set()
        self.consuming = False
        self.has_consumed = False
        self.made = asyncio.Event()
        """Set once it has been consumed for the first time on this connection."""
        self.queue = ""
        self._failure: BrokerError | None = None

    def note_groups(self, groups: Sequence[str]) -> None:
        """A connection with these groups came or went."""
        if any((group in self._bound) != (group in self._broker.groups) for group in groups):
            self._changed.set()

    def lacking(self, groups: Sequence[str]) -> str | None:
        """One of these that is not bound, if there is one."""
        return next((group for group in groups if group not in self._bound), None)

    async def run(self) -> None:
        while True:
            try:
                await self._live()
            except BrokerError as error:
                if not self._epoch.connection.connected.is_set():
                    raise
                self._broker.note_down(self._epoch, error)
                _log.warning("shared queue lost", error=str(error))
                if isinstance(error, NotFound):
                    if self._broker.connects == 0:
                        raise NotFound(
                            f"exchange {self._broker.exchange!r} does not exist, and this user may not make it. {error}"
                        ) from error
                    raise _ExchangeGone(error) from error
                if isinstance(error, AccessRefused) and not self.has_consumed:
                    raise  # A right is missing; waiting does not fix it.
            finally:
                self.consuming = False
                self._bound.clear()
                self._failure = None
            self._epoch.lose_all()
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
        channel.closing.add_done_callback(self._note_closed)
        channel.on_consumer_cancel_callbacks.add(self._note_cancelled)
        try:
            async with amqp.translating("making the shared queue"):
                arguments = self._epoch.dropped.arguments
                await setup.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments)
                await self._bind_everyone(setup, queue)
                await consumer.consume(queue, "shared")
                self.queue = queue
                self.consuming = self.has_consumed = True
                self._broker.note_up(self._epoch)
                self.made.set()
                self._epoch.check_waiting(None)
                # Groups only now: who has few or none need not wait until thousands of others are bound.
                while True:
                    await self._reconcile(setup, queue)
                    try:
                        async with asyncio.timeout(EXCHANGE_CHECK_SECONDS):
                            await self._changed.wait()
                    except TimeoutError:
                        # What is bound already is no change, and needs no right but those that we use anyway; a
                        # passive declare would need the right to configure it (RabbitMQ 4.3).
                        await self._bind_everyone(setup, queue)
                    self._changed.clear()
                    if self._failure is not None:
                        raise self._failure
        except BrokerError:
            self.consuming = False
            # The connection stays: its channels are given back. When this is cancelled, the connection goes as a whole.
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
        """Binds with a group's first connection, unbinds with its last.

        A round takes what differs when it begins, because finding that looks at all groups: there may be thousands,
        and after a reconnect every one of them differs. Each is looked at anew when its turn comes: groups come and go
        while the broker is asked.
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
                        # First: a connection that comes meanwhile must wait for a new binding.
                        self._bound.discard(group)
                        await setup.queue_unbind(queue, self._broker.exchange, key)

    def _note_closed(self, closing: asyncio.Future[object]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self._fail(amqp.translate(error or Exception("channel closed"), "consuming the shared queue"))

    def _note_cancelled(self, _: Basic.Cancel) -> None:
        self._fail(BrokerUnavailable("the broker cancelled the shared queue's consumer"))

    def _fail(self, error: BrokerError) -> None:
        self._failure = error
        self._changed.set()
