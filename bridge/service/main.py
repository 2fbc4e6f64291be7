"""The process of `bridge serve`: its parts, its signals, and the order in which it stops."""

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
from bridge.service.broker.control import Control, ControlClient
from bridge.service.broker.eventlog import EventLog
from bridge.service.broker.live import Broker
from bridge.service.broker.quarantine import Quarantine
from bridge.service.broker.tail import Tail
from bridge.service.descriptors import INTERNAL_CONNECTIONS, Plan, TooFewDescriptors
from bridge.service.forms import MessageReader
from bridge.service.health import Status, why_not_ready
from bridge.service.http.auth import Authenticator, InvalidKeySet
from bridge.service.http.entrance import listen
from bridge.service.http.http1 import host
from bridge.service.http.login import ApplicationLogin
from bridge.service.http.web import create_app, create_internal_app
from bridge.service.logs import summarise_rare_lines
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings, unknown_names
from bridge.service.streams.hub import Feed, Hub
from bridge.service.streams.reader import EventReader
from bridge.service.streams.writer import WriteBatch

if TYPE_CHECKING:
    from bridge.service.tracing import Tracing

STOP_SECONDS = 5.0
"""Limit of each step of the shutdown that waits for a peer."""

LAG_SECONDS = 0.5
"""Interval of the measurements of the event loop's lag."""

_log = structlog.get_logger("bridge.server")


def run(settings: Settings, catalogue: Catalogue) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit code.

    0: drained after a signal. 1: it could not start (an address is in use, RabbitMQ refuses), or a part failed. The
    log has the reason. A second signal ends the process at once, with 128 and the signal's number.
    """
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_serve(settings, catalogue))


async def _serve(settings: Settings, catalogue: Catalogue) -> int:
    # First: Linux ignores a signal without a handler if the process is the first one of a container.
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
        self.login = (
            ApplicationLogin(
                settings.auth_url,
                forwarded=settings.auth_headers,
                timeout=settings.auth_timeout_seconds,
                remember_seconds=settings.auth_cache_seconds,
                concurrency=settings.auth_concurrency,
                on_answer=metrics.record_login,
            )
            if settings.auth_url is not None
            else None
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
            reader=EventReader(MessageReader.of(catalogue, settings), metrics=metrics, quarantine=self.quarantine),
            limits=settings,
            metrics=metrics,
            make_feed=self._make_feed,
            log=self.log,
        )
        feed = self.hub.feed
        metrics.connections_limit.set(settings.max_connections)
        metrics.guests_limit.set(plan.guests)
        metrics.ready.set_function(lambda: self._why_not_ready() is None)
        metrics.broker_connected.set_function(lambda: feed.connected)
        metrics.broker_connects.set_function(lambda: feed.connects)
        metrics.broker_dropped.set_function(lambda: feed.dropped)
        metrics.queues_refused.set_function(lambda: feed.refused)
        if self.log is not None:
            log = self.log
            metrics.log_passes.set_function(lambda: log.scans)
            metrics.log_waiting.set_function(lambda: log.waiting)
            metrics.log_waiting_for_budget.set_function(lambda: log.waiting_for_budget)
            metrics.log_entries.set_function(lambda: log.entries_read)
            metrics.log_answers.set(1)  # Until a stream needs the log for the first time.
        self.control = (
            Control(
                settings.addresses,
                exchange=settings.control,
                max_age=settings.control_max_age,
                instance=feed.instance,
                streams=self.hub,
                on_kick=self._on_kick,
            )
            if settings.control
            else None
        )
        if self.control is not None:
            control = self.control
            metrics.control_answers.set_function(lambda: control.connected)
        self.public = create_app(
            hub=self.hub,
            authenticator=self.authenticator,
            settings=settings,
            catalogue=catalogue,
            metrics=metrics,
            write_batch=self.write_batch,
            publisher=self.publisher,
            tracing=self.tracing,
            login=self.login,
            control=self.control,
        )
        key = settings.internal_key
        self.internal = create_internal_app(
            why_not_ready=self._why_not_ready,
            metrics=metrics,
            control=ControlClient(settings.addresses, exchange=settings.control) if settings.control else None,
            key=None if key is None else key.get_secret_value(),
        )

    def _on_kick(self, user: str, ended: int) -> None:
        self.metrics.kicked.inc(ended)
        if self.login is not None:
            self.login.forget(user)

    def _make_feed(self, hub: Hub) -> Feed:
        settings = self.settings
        if settings.feed == "log":
            assert self.log is not None, "the settings require a log"
            assert settings.log_stream is not None, "the same"
            return Tail(
                settings.addresses,
                exchange=settings.exchange,
                quarantine=settings.quarantine,
                log=settings.log_stream,
                event_log=self.log,
                on_logged=hub.on_logged,
                write_batch=self.write_batch,
                fleet_key=settings.identity_key,
                max_body=settings.max_kept_bytes,
            )
        return Broker(
            settings.addresses,
            exchange=settings.exchange,
            quarantine=settings.quarantine,
            log=settings.log_stream,
            on_shared=hub.on_shared,
            write_watermark=None if self.log is None else self.log.write_watermark,
            write_batch=self.write_batch,
            fleet_key=settings.identity_key,
            max_body=settings.max_kept_bytes,
        )

    def _why_not_ready(self, exclude: Set[str] = frozenset()) -> str | None:
        down_since = self.hub.feed.down_since
        status = Status(
            started=self.hub.feed.connects > 0,
            draining=self.hub.draining,
            connections=len(self.hub),
            max_connections=self.settings.max_connections,
            broker_away_seconds=None if down_since is None else time.monotonic() - down_since,
            missing_keys=self.authenticator.missing_keys,
            broker_error=None if self.hub.feed.last_error is None else str(self.hub.feed.last_error),
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
        # The parts with connections to RabbitMQ. Each has its own task: in one `gather`, the first cancelled one would
        # end it, and the others could not close their connections before the loop ends.
        connected = {asyncio.create_task(self.hub.feed.run(), name="broker")}
        if self.log is not None:
            connected.add(asyncio.create_task(self.log.run(), name="log"))
            if self.hub.feed.overlaps:
                connected.add(asyncio.create_task(self.hub.write_watermarks(), name="watermarks"))
        if self.control is not None:
            connected.add(asyncio.create_task(self.control.run(), name="control"))
        stopping = asyncio.create_task(stop.wait(), name="stop")
        # Almost all objects that exist now live as long as the process: exclude them from further garbage collection.
        gc.collect()
        gc.freeze()

        # Only a signal ends the service normally. A part that ends by itself has failed.
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
        # Close the public address after the drain: a client that reconnects meanwhile gets `bridge.bye`, not a refusal.
        end_public.set()
        await _finish(public)
        for task in connected:
            task.cancel()
        # The limit is needed if RabbitMQ does not answer any more.
        await asyncio.gather(asyncio.wait(connected, timeout=STOP_SECONDS), self.quarantine.close())
        if self.publisher is not None:
            await self.publisher.close()
        if self.login is not None:
            await self.login.close()
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
    # Imported only if tracing is on: the import takes 7 MB and 0.2 s.
    from bridge.service.tracing import Tracing

    return Tracing()


def _on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            _log.warning("second signal, exiting at once", signal=number.name)
            os._exit(128 + number)
        _log.info("signalled", signal=number.name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


async def _finish(task: asyncio.Task[None]) -> None:
    """Waits at most 5 s for the end of a server: a peer that reads nothing must not delay the exit."""
    _, unfinished = await asyncio.wait({task}, timeout=STOP_SECONDS)
    if unfinished:
        _log.warning("connections not closed in time", part=task.get_name(), seconds=STOP_SECONDS)
        task.cancel()
    elif not task.cancelled() and (error := task.exception()) is not None:
        _log.error("failed", part=task.get_name(), exc_info=error)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
