"""What both feeds share: their connection, the topology that it declares, and what is known of an outage.

`live.py` has the queues, `tail.py` reads the log. This file knows nothing of streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import structlog
from pamqp.commands import Basic

from bridge import amqp
from bridge.amqp import AccessRefused, BrokerError, NotFound, TopologyMismatch
from bridge.service.broker import topology
from bridge.service.broker.consumer import Batch, ConsumingConnection
from bridge.service.broker.deliveries import MAX_BODY_BYTES
from bridge.service.settings import LogSettings

if TYPE_CHECKING:
    import aio_pika
    from aiormq.abc import AbstractChannel

STEADY_SECONDS = 10.0
"""After a connection that lasted this long, the first pause is short again. Otherwise each pause is longer."""

QUARANTINE_SECONDS = 2.0
"""Limit of the wait for RabbitMQ's answer about the quarantine. After it, the bridge opens its streams."""

LOG_RECOVERY_SECONDS = 5.0
"""Limit of the wait for a log that does not exist: RabbitMQ 3.10 may not have recovered it yet."""

_LOG_PAUSE_SECONDS = 0.1

EXCHANGE_CHECK_SECONDS = 10.0
"""How often the bridge checks that the exchange exists. RabbitMQ deletes all bindings with an exchange, and notifies no
client."""

REPLICAS_EXCHANGE = "bridge.replicas"
"""A fanout exchange to which each process with queues binds one of them. The process that notices the deletion of the
events' exchange notifies the others: they may find it made again, but their bindings are gone."""

EXCHANGE_GONE = "bridge.exchange-gone"
"""Routing key of that message, and the type of the same message in the log. Its body is a `Deletion`."""

_log = structlog.get_logger("bridge.broker")


class Outage:
    """The log lines of one outage: one for each new cause, and for the attempts 1, 2, 4, 8, and so on.

    An outage of an hour has some 7,000 attempts, and a dozen lines.
    """

    def __init__(self) -> None:
        self._attempts = 0
        self._cause = ""

    def log(self, cause: BrokerError) -> None:
        self._attempts += 1
        is_new, self._cause = str(cause) != self._cause, str(cause)
        if is_new or self._attempts.bit_count() == 1:
            kind = type(cause).__name__
            _log.warning("broker unavailable", error=str(cause), kind=kind, attempts=self._attempts)


class Deletion(NamedTuple):
    """The news of a deleted exchange, from one process to the others on the virtual host."""

    exchange: str
    instance: str
    """The sender's."""
    age: float
    """Seconds since the sender noticed it. The clocks of two machines may differ, so the message has no time."""

    def write(self, key: bytes) -> bytes:
        """The message's body, with a proof that a process of this bridge wrote it: every publisher can put a message
        into the log, with any routing key."""
        return json.dumps([*self, self._proof(key)]).encode()

    @classmethod
    def parse(cls, body: bytes, key: bytes) -> Self | None:
        """The news in a body; None if it has none, or a wrong proof."""
        try:
            exchange, instance, age, proof = json.loads(body)
            news = cls(str(exchange), str(instance), float(age))
            return news if hmac.compare_digest(str(proof).encode(), news._proof(key).encode()) else None
        except (ValueError, TypeError, RecursionError):
            return None

    def _proof(self, key: bytes) -> str:
        return hmac.new(key, json.dumps(self).encode(), hashlib.sha256).hexdigest()

    def concerns(self, exchange: str, instance: str, seconds_since_made: float) -> bool:
        """Whether the bindings of this process may be gone.

        Args:
            exchange, instance: of this process. Bridges with other exchanges may share the virtual host.
            seconds_since_made: since this process began to declare exchange and bindings. If it began after the sender
                noticed the deletion, its bindings are newer than the deletion.
        """
        return self.exchange == exchange and self.instance != instance and self.age < seconds_since_made


class ConsumingFeed:
    """The base of both feeds.

    Args:
        addresses: AMQP URLs of the cluster's nodes.
        exchange, quarantine, log: the topology, declared with every new connection.
        write_batch: entered and left around the callbacks of all messages of one packet.
        fleet_key: a secret that all processes of the bridge share.
        max_body: limit of a body in bytes; callbacks get a `Cut` of a larger one.
    """

    needs_log = False
    """Whether there are no live events without the log."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        exchange: str,
        quarantine: str,
        log: LogSettings | None,
        write_batch: Batch,
        fleet_key: bytes,
        max_body: int = MAX_BODY_BYTES,
    ) -> None:
        self._addresses = addresses
        self._write_batch = write_batch
        self._max_body = max_body
        self.exchange = exchange
        self.quarantine = quarantine
        self.log = log
        self.fleet_key = fleet_key
        # A queue name contains no user id: more people see queue names than tokens, and AMQP limits a name's length.
        self.instance = secrets.token_hex(4)
        self.down_since: float | None = time.monotonic()
        """Monotonic time since which no event arrives; None while they do."""
        self._up_since = 0.0
        self.last_error: BrokerError | None = None
        self._outage = Outage()
        self.connects = 0
        """Connections since the start, the first included."""
        self.exchanges_lost = 0
        """How often events may have been lost before the log had them: after a deletion of the exchange or the log."""
        self.deletion_to_report: float | None = None
        """When this process noticed a deletion of the exchange (monotonic), until it has notified the others."""
        self.log_may_be_unbound = False
        """Whether the log's binding was deleted with the exchange, and the bridge has not bound the log again."""
        self._declaring: asyncio.Task[topology.Declared] | None = None
        """The declaration of the quarantine, if its answer takes longer than `QUARANTINE_SECONDS`."""

    @property
    def connected(self) -> bool:
        return self.down_since is None

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[aio_pika.abc.AbstractConnection]:
        connection = await ConsumingConnection.open(
            self._addresses,
            name=f"bridge {self.instance} consumer",
            write_batch=self._write_batch,
            max_body=self._max_body,
            pauses=not self.needs_log,
        )
        try:
            yield connection
        finally:
            if self._declaring is not None:
                self._declaring.cancel()
                await asyncio.gather(self._declaring, return_exceptions=True)
                self._declaring = None
            await amqp.close(connection)

    # What is known of an outage.

    def _mark_up(self, connection: aio_pika.abc.AbstractConnection, streams: int, *, is_new: bool = True) -> None:
        """Events arrive from now on. `connects` counts this connection already.

        Args:
            is_new: whether they arrive for the first time on this connection.
        """
        away = None if self.connects == 1 or self.down_since is None else round(time.monotonic() - self.down_since, 3)
        self.down_since = None
        self._up_since = time.monotonic()
        self.last_error = None
        self._outage = Outage()
        _log.info(
            "broker connected" if is_new else "shared queue made again",
            address=amqp.address(connection),
            exchange=self.exchange,
            streams=streams,
            away_seconds=away,
        )

    def _mark_down(self) -> None:
        if self.down_since is None:
            self.down_since = time.monotonic()

    @property
    def _was_steady(self) -> bool:
        return self.connected and time.monotonic() - self._up_since > STEADY_SECONDS

    def _note_deletion(self, *, noticed_here: bool) -> None:
        """The exchange was deleted, and all bindings with it."""
        self.exchanges_lost += 1
        self.log_may_be_unbound = True
        if noticed_here:
            self.deletion_to_report = time.monotonic()

    async def report_deletion(self, channel: AbstractChannel) -> None:
        """Notifies the other processes of a deletion that this one has noticed, if it has: those with queues by
        `REPLICAS_EXCHANGE`, which exists, and those that read the log by an entry of it.

        Raises:
            Exceptions of aio-pika, see `amqp.translating`.
        """
        if self.deletion_to_report is None:
            return
        body = Deletion(self.exchange, self.instance, time.monotonic() - self.deletion_to_report).write(self.fleet_key)
        await channel.basic_publish(body, exchange=REPLICAS_EXCHANGE, routing_key=EXCHANGE_GONE)
        if self.log is not None:
            properties = Basic.Properties(delivery_mode=2, message_type=EXCHANGE_GONE)
            await channel.basic_publish(body, exchange="", routing_key=self.log.name, properties=properties)
        self.deletion_to_report = None

    def warn_not_notified(self, error: BrokerError) -> None:
        _log.warning(
            "replicas not notified",
            error=str(error),
            detail="another replica may miss the deletion of the exchange. Grant the bridge's user the rights to "
            f"configure, write and read {REPLICAS_EXCHANGE!r}",
        )

    # The topology.

    async def declare_topology(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Declares exchange, quarantine and log, on channels without consumers: a refused declare closes its channel.

        Raises:
            BrokerError: names the difference or the missing right, and how to fix it.
        """
        _log_differences("exchange", await topology.declare_exchange(connection, self.exchange))
        await self._declare_quarantine(connection)
        if self.log is not None:
            try:
                await self._declare_log(connection, self.log)
            except (NotFound, TopologyMismatch, AccessRefused) as error:
                # Its node may be down, or an operator changes it. With queues, live events need no log; a client that
                # returns gets a gap.
                if self.needs_log or (self.connects == 0 and not isinstance(error, NotFound)):
                    raise
                _log.error("no log", error=str(error))

    async def _declare_quarantine(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Declares the quarantine, and waits `QUARANTINE_SECONDS` at most: if its node is down, RabbitMQ 4.3 answers
        only after a minute. Streams do not need it, and `Quarantine` keeps refused messages for a while."""
        declaring = asyncio.create_task(
            topology.declare_quarantine(connection, self.quarantine), name="amqp-quarantine"
        )
        try:
            await asyncio.wait({declaring}, timeout=QUARANTINE_SECONDS)
        except BaseException:
            declaring.cancel()
            raise
        if declaring.done():
            try:
                _log_differences("quarantine", declaring.result())
            except NotFound as error:
                _log.error("no quarantine", error=str(error))
        else:
            _log.error("no quarantine", error=f"no answer from RabbitMQ within {QUARANTINE_SECONDS:g} s; still waiting")
            self._declaring = declaring
            declaring.add_done_callback(lambda done: self._on_quarantine_declared(connection, done))

    def _on_quarantine_declared(
        self, connection: aio_pika.abc.AbstractConnection, declaring: asyncio.Task[topology.Declared]
    ) -> None:
        if declaring.cancelled() or not connection.connected.is_set():
            return
        try:
            _log_differences("quarantine", declaring.result())
        except BrokerError as error:
            _log.error("no quarantine", error=str(error))
        else:
            _log.info("quarantine found", queue=self.quarantine)

    async def _declare_log(self, connection: aio_pika.abc.AbstractConnection, log: LogSettings) -> None:
        # RabbitMQ 3.10 accepts connections before it has recovered its streams, and says that the log does not exist.
        # A live queue bound then would get events that the log misses, so a client that returns would not get them.
        deadline = time.monotonic() + LOG_RECOVERY_SECONDS
        while True:
            try:
                declared = await topology.declare_log(connection, log, self.exchange)
                break
            except NotFound:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_LOG_PAUSE_SECONDS)
        _log_differences(
            "log",
            declared,
            "the limits of the existing log apply. Set BRIDGE_LOG_MAX_AGE and BRIDGE_LOG_MAX_BYTES to them. To apply "
            "other limits, set BRIDGE_LOG to a new name",
        )
        if self.log_may_be_unbound and not declared.may_declare:
            _log.error(
                "the log may be unbound",
                detail=f"exchange {self.exchange!r} was deleted and made again, and the bridge's user may not "
                f"bind {log.name!r} to it. Bind it with '#': until then, clients that return miss events",
            )
        self.log_may_be_unbound = False


def _log_differences(what: str, declared: topology.Declared, detail: str = "no action is needed") -> None:
    if declared.differences:
        differences = [str(each) for each in declared.differences]
        _log.warning(f"the {what} differs, and fits", differences=differences, detail=detail)
