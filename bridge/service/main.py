"""The service: wiring, signals, the order of the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Set
from typing import TYPE_CHECKING

import structlog

from bridge import __version__
from bridge.amqp import BrokerError
from bridge.catalogue.load import Catalogue
from bridge.publisher import Publisher
from bridge.service import descriptors
from bridge.service.broker.eventlog import EventLog
from bridge.service.broker.live import Broker, Delivery
from bridge.service.broker.quarantine import Quarantine
from bridge.service.descriptors import INTERNAL_CONNECTIONS, Plan, TooFewDescriptors
from bridge.service.health import Status, why_not_ready
from bridge.service.http.auth import Authenticator, InvalidKeySet
from bridge.service.http.entrance import listen
from bridge.service.http.http1 import host
from bridge.service.http.web import create_app, create_internal_app
from bridge.service.logs import summarise_rare_lines
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings, unknown_names
from bridge.service.streams.hub import Hub
from bridge.service.streams.reader import EventReader
from bridge.service.streams.writer import WriteBatch

if TYPE_CHECKING:
    from bridge.service.tracing import Tracing

STOP_SECONDS = 5.0
"""For each step of the end that waits on somebody else."""

LAG_SECONDS = 0.5

_log = structlog.get_logger("bridge.server")


def run(settings: Settings, catalogue: Catalogue) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit code.

    0 after a drain; 1 when it could not start (an address in use, a broker that refuses); the log says why.
    """
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_serve(settings, catalogue))


async def _serve(settings: Settings, catalogue: Catalogue) -> int:
    # First of all: as a container's first process, a signal without a handler would be ignored.
    stop = _on_signals()
    for problem in unknown_names(Settings):
        _log.warning("unknown setting", problem=problem)
    for note in catalogue.notes:
        _log.warning("not in the catalogue", detail=note)
    try:
        public_socket = listen(settings.bind, stall_seconds=settings.stall_seconds)
        internal_socket = listen(settings.internal_bind, stall_seconds=settings.stall_seconds)
    except OSError as error:
        _log.error("cannot listen", error=str(error))
        return 1
    try:
        plan = descriptors.divide(descriptors.raise_limit(), descriptors.count_open(), streams=settings.max_connections)
    except TooFewDescriptors as error:
        _log.error("cannot start", error=str(error))
        return 1
    if shortage := plan.shortage(settings.max_connections):
        _log.warning(
            "file descriptors limit streams",
            limit=plan.limit,
            streams=plan.streams,
            wanted=settings.max_connections,
            detail=shortage,
        )
    service = _Service(settings, catalogue, plan)
    try:
        await service.authenticator.start()
    except InvalidKeySet as error:
        _log.error("cannot start", error=str(error))
        return 1
    return await service.run(public_socket, internal_socket, stop)


class _Service:
    """The parts of one process and the order in which they start and end."""

    def __init__(self, settings: Settings, catalogue: Catalogue, plan: Plan) -> None:
        self.metrics = metrics = Metrics()
        metrics.connections_wanted.set(settings.max_connections)
        self.plan = plan
        self.settings = settings = settings.model_copy(update={"max_connections": plan.streams})
        self.write_batch = WriteBatch()
        secret = settings.jwt_secret
        self.authenticator = Authenticator(
            secret=None if secret is None else secret.get_secret_value(),
            jwks=settings.jwks,
            audience=settings.jwt_audience,
            issuer=settings.jwt_issuer,
            user_claim=settings.jwt_user_claim,
            groups_claim=settings.jwt_groups_claim,
        )
        self.quarantine = Quarantine(
            settings.addresses, queue=settings.quarantine, on_dropped=metrics.quarantine_dropped.inc
        )
        self.publisher = (
            Publisher(
                settings.amqp_url.get_secret_value(),
                source="/bridge/console",
                exchange=settings.exchange,
                timeout=STOP_SECONDS,
                max_event_bytes=settings.max_event_bytes,
                log=bool(settings.log),
            )
            if settings.console == "development"
            else None
        )
        self.tracing = _tracing() if settings.tracing else None
        stream = settings.log_stream
        self.log = (
            None
            if stream is None
            else EventLog(
                settings.addresses,
                log=stream,
                exchange=settings.exchange,
                write_batch=self.write_batch,
                max_body=settings.max_kept_bytes,
                entries_per_user=settings.log_entries_per_user,
                on_read=metrics.log_wait_seconds.observe,
            )
        )
        self.hub = Hub(
            reader=EventReader(
                catalogue,
                max_event_bytes=settings.max_event_bytes,
                metrics=metrics,
                quarantine=self.quarantine,
            ),
            limits=settings,
            metrics=metrics,
            make_broker=self._make_broker,
            log=self.log,
        )
        broker = self.hub.broker
        metrics.connections_limit.set(settings.max_connections)
        metrics.guests_limit.set(plan.guests)
        metrics.ready.set_function(lambda: self._why_not_ready() is None)
        metrics.broker_connected.set_function(lambda: broker.connected)
        metrics.broker_connects.set_function(lambda: broker.connects)
        metrics.broker_dropped.set_function(lambda: broker.dropped)
        metrics.queues_refused.set_function(lambda: broker.refused)
        if self.log is not None:
            log = self.log
            metrics.log_passes.set_function(lambda: log.scans)
            metrics.log_waiting.set_function(lambda: log.waiting)
            metrics.log_waiting_for_budget.set_function(lambda: log.waiting_for_budget)
            metrics.log_entries.set_function(lambda: log.entries_read)
            metrics.log_answers.set(1)  # Until it is asked: without a stream nobody needs it.
        self.public = create_app(
            hub=self.hub,
            authenticator=self.authenticator,
            settings=settings,
            catalogue=catalogue,
            metrics=metrics,
            write_batch=self.write_batch,
            publisher=self.publisher,
            tracing=self.tracing,
        )
        self.internal = create_internal_app(why_not_ready=self._why_not_ready, metrics=metrics)

    def _make_broker(self, on_shared: Delivery) -> Broker:
        settings = self.settings
        return Broker(
            settings.addresses,
            exchange=settings.exchange,
            quarantine=settings.quarantine,
            log=settings.log_stream,
            on_shared=on_shared,
            write_batch=self.write_batch,
            max_body=settings.max_kept_bytes,
        )

    def _why_not_ready(self, exclude: Set[str] = frozenset()) -> str | None:
        down_since = self.hub.broker.down_since
        status = Status(
            started=self.hub.broker.connects > 0,
            draining=self.hub.draining,
            connections=len(self.hub),
            max_connections=self.settings.max_connections,
            broker_away_seconds=None if down_since is None else time.monotonic() - down_since,
            missing_keys=self.authenticator.missing_keys,
            broker_error=None if self.hub.broker.last_error is None else str(self.hub.broker.last_error),
        )
        return why_not_ready(status, grace_seconds=self.settings.broker_grace_seconds, exclude=exclude)

    async def run(self, public_socket: socket.socket, internal_socket: socket.socket, stop: asyncio.Event) -> int:
        _log.info(
            "serving",
            version=__version__,
            public=_address(public_socket),
            internal=_address(internal_socket),
            pid=os.getpid(),
        )
        end_public, end_internal = asyncio.Event(), asyncio.Event()
        internal = asyncio.create_task(
            host(
                self.internal,
                internal_socket,
                end_internal,
                name="internal",
                guests=INTERNAL_CONNECTIONS,
                on_ended=lambda _: None,
                on_shortage=self.metrics.accept_failures.inc,
            ),
            name="internal",
        )
        public = asyncio.create_task(
            host(
                self.public,
                public_socket,
                end_public,
                name="public",
                guests=self.plan.guests,
                on_ended=lambda why: self.metrics.guests_ended.labels(why).inc(),
                on_shortage=self.metrics.accept_failures.inc,
                on_entrance=lambda entrance: self.metrics.guests.set_function(lambda: len(entrance)),
            ),
            name="public",
        )
        lag = asyncio.create_task(self._measure_lag(), name="loop-lag")
        keys = asyncio.create_task(self.authenticator.read_first_keys(), name="first-keys")
        quarantine = asyncio.create_task(self.quarantine.run(), name="quarantine")
        # What holds connections to RabbitMQ, each a task of its own: of several in one `gather` the first to be
        # cancelled would end it, and the others' goodbyes would be cut short at the end of the loop.
        connected = {asyncio.create_task(self.hub.broker.run(), name="broker")}
        if self.log is not None:
            connected.add(asyncio.create_task(self.log.run(), name="log"))
            connected.add(asyncio.create_task(self.hub.write_watermarks(), name="watermarks"))
        stopping = asyncio.create_task(stop.wait(), name="stop")
        # From here on almost everything lives as long as the process; the collector need not walk it again and again.
        gc.collect()
        gc.freeze()

        # Nothing but a signal ends the service; a part that ends by itself has failed.
        done, _ = await asyncio.wait(
            {stopping, *connected, quarantine, public, internal}, return_when=asyncio.FIRST_COMPLETED
        )
        code = 0 if stopping in done else 1
        for task in done - {stopping}:
            error = task.exception()
            if isinstance(error, BrokerError):
                _log.error("cannot start", error=str(error))
            else:
                _log.error("failed", part=task.get_name(), exc_info=error)

        await self.hub.drain()
        # Only now the door: a client that reconnects during the drain is told to, and not left before a closed one.
        end_public.set()
        await _finish(public)
        for task in connected:
            task.cancel()
        # A broker that answers nothing more must not keep the process either.
        await asyncio.gather(asyncio.wait(connected, timeout=STOP_SECONDS), self.quarantine.close())
        if self.publisher is not None:
            await self.publisher.close()
        quarantine.cancel()
        end_internal.set()
        await _finish(internal)
        for task in (lag, keys, stopping):
            task.cancel()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close, STOP_SECONDS)
        summarise_rare_lines()
        _log.info("stopped", code=code)
        return code

    async def _measure_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self.metrics.loop_lag_seconds.set(max(0.0, time.monotonic() - due))


def _tracing() -> Tracing:
    # Imported only here: it takes 7 MB and a fifth of a second, from nobody who does not want it.
    from bridge.service.tracing import Tracing

    return Tracing()


def _on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            _log.warning("signalled again, leaving at once", signal=number.name)
            os._exit(128 + number)
        _log.info("signalled", signal=number.name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def _finish(task: asyncio.Task[None]) -> None:
    """Waits for a server's end; a peer that takes no more bytes must not keep the process."""
    _, unfinished = await asyncio.wait({task}, timeout=STOP_SECONDS)
    if unfinished:
        _log.warning("gave up connections that would not close", part=task.get_name())
        task.cancel()
    elif not task.cancelled() and (error := task.exception()) is not None:
        _log.error("failed", part=task.get_name(), exc_info=error)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
