"""Listens and accepts, and limits the number and the time of connections that are not streams.

asyncio and uvloop accept all waiting clients in one loop iteration. If descriptors run out, asyncio stops for a second,
and uvloop resets all new clients. So the bridge accepts by itself, at most its share of descriptors
(`descriptors.Plan`). Further clients wait in the kernel's queue until a guest leaves or is closed.

A guest is a connection that is not a stream. It is in one of three phases, each with a deadline:

    WAITING    for a whole request head, since the accept or since the first byte of another request
    ANSWERING  from the head to the last byte of the answer
    IDLE       after an answer, without a byte of another request

Knows asyncio's transports, but no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import fcntl
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from typing import cast

import structlog

from bridge.service.descriptors import count_open, current_limit
from bridge.service.logs import RareLine
from bridge.service.metrics import GuestEnd
from bridge.service.settings import parse_bind

BACKLOG = 4096
"""Length of the kernel's queue of new connections. Hypercorn's default of 100 reduced 2,600 new connections a second
to 200."""

SEND_BUFFER_BYTES = 65_536
"""The kernel's send buffer. By default it buffers 2.7 MB for a client that reads nothing, which hides that it is
slow."""

HEADER_SECONDS = 10.0
"""Limit for a whole request head. The largest accepted head has 16 KB; a slow phone sends it in 2 s."""

KEEP_ALIVE_SECONDS = 75.0
"""Limit for an idle connection. Load balancers keep one for 60 s; a lower limit would close it while they use it."""

ANSWER_SECONDS = 60.0
"""Limit for an answer that is not a stream, from the request's head to the last byte. The largest has about 100 KB."""

ROOM_SECONDS = 1.0
"""A guest younger than this is not closed to make room: its request may be on its way."""

ROOM_ANSWER_SECONDS = 5.0
"""The same for a guest that is being answered. The slowest answer waits 2 s, for a key set."""

SWEEP_SECONDS = 0.5
"""Interval of the checks of deadlines."""

ACCEPTS = 64
"""The most accepts in one loop iteration, so that a burst of new connections leaves time for streams."""

SHORTAGE_SECONDS = 0.2
"""Accepting pauses for this time if the system has no descriptor or memory for a connection."""

_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = structlog.get_logger("bridge.entrance")


class Phase(enum.Enum):
    WAITING = enum.auto()
    ANSWERING = enum.auto()
    IDLE = enum.auto()


def listen(bind: str, *, stall_seconds: float) -> socket.socket:
    """Opens a listening socket. Every accepted connection inherits its options.

    TCP_USER_TIMEOUT ends a connection whose peer acknowledges no bytes for `stall_seconds`: Hypercorn has no write
    timeout, and a blocked write would delay its shutdown forever. Keepalive finds peers that vanished silently.

    Raises:
        OSError: the address is in use or does not belong to this host. The message names the address.
    """
    host, port = parse_bind(bind)
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(stall_seconds * 1000))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{bind}: {error.strerror or error}") from None
    return listener


class Guest(asyncio.StreamReaderProtocol):
    """An accepted connection until it becomes a stream. Its host (`http1.py`) reports the phases of HTTP to it."""

    def __init__(self, entrance: Entrance, descriptor: int, now: float) -> None:
        self._reader: asyncio.StreamReader | None = asyncio.StreamReader()
        super().__init__(self._reader)
        self._entrance = entrance
        self._descriptor = descriptor
        self._transport: asyncio.Transport | None = None
        self.phase = Phase.WAITING
        self.since = now
        self.has_begun = False
        """Whether a byte has arrived of a request that is not answered yet."""
        self.has_unread = False
        """Whether bytes have arrived that the host has not read. Set here, cleared by the host."""
        self.is_ending = False
        self.on_late: Callable[[], None] = self.close
        """Called if a head has begun but is not complete at its deadline. The host may answer before it closes."""

    # Called by the host.

    def answering(self) -> None:
        self.has_begun = False
        self._entrance.move(self, Phase.ANSWERING)

    def idle(self) -> None:
        self._entrance.move(self, Phase.IDLE)

    def leave(self) -> None:
        """The connection is now a stream, or closed: the entrance no longer counts it."""
        self._entrance.forget(self)

    def close(self) -> None:
        """Closes the connection once all written bytes are sent."""
        if self._transport is not None:
            self._transport.close()

    # Called by the entrance.

    def abort(self) -> None:
        self.is_ending = True
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_silent(self) -> bool:
        """Whether no unread bytes of the client wait, neither here nor in the kernel."""
        if self.has_unread or self._transport is None:
            return False
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(self._descriptor, termios.FIONREAD, struct.pack("i", 0))
            return bool(struct.unpack("i", answer)[0] == 0)
        return True

    @property
    def takes_nothing(self) -> bool:
        """Whether written bytes wait because the client does not read."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # A cast: uvloop's transport has the methods of `asyncio.Transport`, but does not inherit from it.
        self._transport = cast("asyncio.Transport", transport)
        reader, self._reader = self._reader, None
        assert reader is not None, "asyncio calls this once"
        if self.is_ending:
            self._transport.abort()
            return
        self._entrance.welcome(self, reader, _KeptWriter(self._transport, self, reader, asyncio.get_running_loop()))

    def data_received(self, data: bytes) -> None:
        self.has_unread = True
        self.has_begun = True
        if self.phase is Phase.IDLE:
            self._entrance.move(self, Phase.WAITING)
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._entrance.forget(self)
        super().connection_lost(error)


class _KeptWriter(asyncio.StreamWriter):
    """A StreamWriter that does not close its connection when it is deleted: a stream still uses the connection."""

    def __del__(self) -> None: ...


Welcome = Callable[[Guest, asyncio.StreamReader, asyncio.StreamWriter], None]


class Entrance:
    """Accepts the connections of one listening socket, and counts and limits its guests.

    Args:
        listener: made by `listen`.
        name: for log lines, for example "public".
        most: the most guests at once.
        welcome: called with each new guest, its reader and its writer.
        on_ended: called with the reason for each guest that the entrance closes.
        on_shortage: called when the system has no descriptor or memory for a connection.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        name: str,
        most: int,
        welcome: Welcome,
        on_ended: Callable[[GuestEnd], object],
        on_shortage: Callable[[], object],
    ) -> None:
        self._listener = listener
        self._name = name
        self._most = most
        self.welcome = welcome
        self._on_ended = on_ended
        self._on_shortage = on_shortage
        self._loop = asyncio.get_running_loop()
        # In the order in which they entered the phase: the first guest of each phase has been in it longest.
        self._guests: dict[Phase, dict[Guest, None]] = {phase: {} for phase in Phase}
        self._count = 0
        self._accepting = False
        self._is_full = False
        """Whether accepting waits until a guest leaves."""
        self._closed = False
        self._retry: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._shortage = RareLine("cannot accept connections", _log.error)
        self._crowd = RareLine("connections closed to make room", _log.warning)
        self._late = RareLine("connections closed without a request", _log.warning)

    def __len__(self) -> int:
        return self._count

    def open(self) -> None:
        if not self._accepting and not self._closed:
            self._accepting = True
            self._is_full = False
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Stops accepting, and closes all guests that are not being answered."""
        self._closed = True
        self._pause()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._listener.close()
        for phase in (Phase.WAITING, Phase.IDLE):
            for guest in list(self._guests[phase]):
                guest.close()

    def move(self, guest: Guest, phase: Phase) -> None:
        if guest not in self._guests[guest.phase]:
            return  # The guest has left.
        del self._guests[guest.phase][guest]
        guest.phase = phase
        guest.since = time.monotonic()
        self._guests[phase][guest] = None
        if self._closed and phase is Phase.IDLE:
            guest.close()

    def forget(self, guest: Guest) -> None:
        if guest not in self._guests[guest.phase]:
            return
        del self._guests[guest.phase][guest]
        self._count -= 1
        if self._is_full:
            self.open()

    # Accepting.

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            if self._count >= self._most:
                self._make_room()
                return
            try:
                accepted, _ = self._listener.accept()
            except OSError as error:
                # Other errors mean that this client is gone (accept(2), "Error handling"), or that no client waits.
                if error.errno in _SHORTAGES:
                    self._run_short(error)
                return
            accepted.setblocking(False)
            guest = Guest(self, accepted.fileno(), time.monotonic())
            self._guests[Phase.WAITING][guest] = None
            self._count += 1
            task = self._loop.create_task(self._connect(guest, accepted), name="accept")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    async def _connect(self, guest: Guest, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: guest, accepted)
        except OSError:  # The client is gone.
            accepted.close()
            self.forget(guest)

    def _run_short(self, error: OSError) -> None:
        self._on_shortage()
        self._shortage.log(
            address=self._name,
            error=str(error),
            open_descriptors=count_open(),
            limit=current_limit(),
            detail="new clients wait until others leave; raise the limit of open files (ulimit -n)",
        )
        self._pause(SHORTAGE_SECONDS)

    def _pause(self, seconds: float | None = None) -> None:
        """Stops accepting for `seconds`, or until `open` is called."""
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener.fileno())
        if self._retry is not None:
            self._retry.cancel()
        self._retry = None if seconds is None else self._loop.call_later(seconds, self.open)

    def _make_room(self) -> None:
        """A client waits and all places are used: closes the guests that have been silent longest."""
        now = time.monotonic()
        ending = 0
        for phase, least in (
            (Phase.WAITING, ROOM_SECONDS),
            (Phase.IDLE, ROOM_SECONDS),
            (Phase.ANSWERING, ROOM_ANSWER_SECONDS),
        ):
            for guest in self._guests[phase]:
                if ending >= ACCEPTS or now - guest.since < least:
                    break
                if guest.is_ending:
                    guest.abort()
                    ending += 1
                elif guest.takes_nothing if phase is Phase.ANSWERING else guest.is_silent:
                    self._on_ended("room")
                    self._crowd.log(address=self._name, guests=self._count, most=self._most, phase=phase.name.lower())
                    guest.abort()
                    ending += 1
        # Wait until a guest leaves; aborted guests leave in the next loop iteration. If none left, try again later.
        self._is_full = True
        self._pause(ROOM_SECONDS / 4)

    # Deadlines.

    def _sweep(self) -> None:
        now = time.monotonic()
        self._end_late(Phase.WAITING, now - HEADER_SECONDS, "header-timeout")
        self._end_late(Phase.IDLE, now - KEEP_ALIVE_SECONDS, "idle")
        self._end_late(Phase.ANSWERING, now - ANSWER_SECONDS, "answer-timeout")
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep) if self._count else None

    def _end_late(self, phase: Phase, before: float, why: GuestEnd) -> None:
        for guest in list(self._guests[phase]):
            if guest.since > before:
                return
            if guest.is_ending:
                guest.abort()
            elif phase is Phase.ANSWERING or guest.is_silent:
                self._on_ended(why)
                if phase is Phase.WAITING:
                    self._late.log(address=self._name, seconds=HEADER_SECONDS, begun=guest.has_begun)
                self._end(guest, phase)

    def _end(self, guest: Guest, phase: Phase) -> None:
        if phase is Phase.ANSWERING:
            guest.abort()
            return
        guest.is_ending = True
        guest.since = time.monotonic()  # The guest gets one more deadline for the answer, and is then aborted.
        del self._guests[phase][guest]
        self._guests[phase][guest] = None
        if phase is Phase.WAITING and guest.has_begun:
            guest.on_late()
        else:
            guest.close()
