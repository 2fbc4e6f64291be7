"""The entrance accepts connections, and closes some of them. Real sockets on loopback; the tests call the sweeps."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bridge.service.http import entrance as entrances
from bridge.service.http.entrance import Entrance, Guest, Phase, listen
from tests.patience import PATIENCE
from tests.unit.loopback import until


class House:
    """An entrance, its guests in the order of their arrival, and clients."""

    def __init__(self, most: int, listener: socket.socket) -> None:
        self.address = listener.getsockname()
        self.guests: list[Guest] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.ended: list[str] = []
        self.shortages = 0
        self.entrance = Entrance(
            listener,
            name="test",
            most=most,
            welcome=self._welcome,
            on_ended=self.ended.append,
            on_shortage=self._count_shortage,
        )
        self.entrance.open()
        self.clients: list[socket.socket] = []

    def _welcome(self, guest: Guest, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.guests.append(guest)
        self.writers.append(writer)

    def _count_shortage(self) -> None:
        self.shortages += 1

    async def enter(self) -> socket.socket:
        """A client that the kernel has accepted; the entrance may let it wait."""
        client = socket.socket()
        client.setblocking(False)
        self.clients.append(client)
        await asyncio.get_running_loop().sock_connect(client, self.address)
        return client

    async def has(self, count: int) -> None:
        await until(lambda: len(self.guests) == count)

    async def is_over(self, client: socket.socket) -> None:
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                while await asyncio.get_running_loop().sock_recv(client, 65_536):
                    pass


@contextlib.asynccontextmanager
async def house(most: int = 10, listener: socket.socket | None = None) -> AsyncIterator[House]:
    made = House(most, listener or listen("127.0.0.1:0", stall_seconds=30))
    try:
        yield made
    finally:
        made.entrance.close()
        for writer in made.writers:
            writer.transport.abort()
        for client in made.clients:
            client.close()
        await until(lambda: len(made.entrance) == 0)


def test_an_address_in_use_is_named() -> None:
    with listen("127.0.0.1:0", stall_seconds=30) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: ") as caught:
            listen(f"127.0.0.1:{port}", stall_seconds=30)
        assert caught.value.errno == errno.EADDRINUSE


def test_the_kernel_finds_a_stalled_peer() -> None:
    with listen("127.0.0.1:0", stall_seconds=7.5) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7_500
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


async def test_a_guest_goes_through_its_phases_and_leaves() -> None:
    async with house() as here:
        client = await here.enter()
        await here.has(1)
        (guest,) = here.guests
        assert (guest.phase, guest.has_begun, len(here.entrance)) == (Phase.WAITING, False, 1)
        client.send(b"G")
        await until(lambda: guest.has_begun)
        assert not guest.is_silent, "its byte has not been read"
        guest.has_unread = False
        assert guest.is_silent
        guest.answering()
        assert (guest.phase, guest.has_begun) == (Phase.ANSWERING, False)
        guest.idle()
        client.send(b"G")
        await until(lambda: guest.phase is Phase.WAITING)
        guest.leave()
        assert len(here.entrance) == 0
        guest.idle()
        guest.leave()
        assert len(here.entrance) == 0, "a guest leaves once"


@pytest.mark.contract("2.58", "2.59", "2.60")
@pytest.mark.parametrize(
    ("phase", "constant", "why"),
    [
        (Phase.WAITING, "HEADER_SECONDS", "header-timeout"),
        (Phase.IDLE, "KEEP_ALIVE_SECONDS", "idle"),
        (Phase.ANSWERING, "ANSWER_SECONDS", "answer-timeout"),
    ],
)
async def test_a_deadline_ends_a_guest(monkeypatch: pytest.MonkeyPatch, phase: Phase, constant: str, why: str) -> None:
    async with house() as here:
        client = await here.enter()
        await here.has(1)
        here.entrance.move(here.guests[0], phase)
        here.entrance._sweep()
        assert here.ended == [], "it has just arrived"
        monkeypatch.setattr(entrances, constant, 0.0)
        here.entrance._sweep()
        assert here.ended == [why]
        await here.is_over(client)


async def test_a_guest_whose_bytes_wait_to_be_read_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as here:
        client = await here.enter()
        await here.has(1)
        client.send(b"G")
        await until(lambda: here.guests[0].has_unread)
        monkeypatch.setattr(entrances, "HEADER_SECONDS", 0.0)
        here.entrance._sweep()
        assert here.ended == []


async def test_a_guest_that_does_not_end_after_its_deadline_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as here:
        client = await here.enter()
        await here.has(1)
        (guest,) = here.guests
        late: list[bool] = []
        guest.on_late = lambda: late.append(True)  # The host sends a last answer, and does not close.
        client.send(b"G")
        await until(lambda: guest.has_unread)
        guest.has_unread = False
        monkeypatch.setattr(entrances, "HEADER_SECONDS", 0.0)
        here.entrance._sweep()
        assert (late, guest.is_ending) == ([True], True)
        here.entrance._sweep()
        await here.is_over(client)
        assert here.ended == ["header-timeout"], "it is counted once"


async def test_a_full_entrance_lets_the_next_client_wait_until_a_guest_leaves() -> None:
    async with house(most=1) as here:
        await here.enter()
        await here.has(1)
        await here.enter()
        await until(lambda: here.entrance._is_full)
        assert len(here.guests) == 1, "the first one is too young to be closed"
        here.writers[0].transport.abort()
        await here.has(2)


@pytest.mark.contract("2.57")
@pytest.mark.parametrize("phase", list(Phase))
async def test_the_quietest_guest_makes_room(monkeypatch: pytest.MonkeyPatch, phase: Phase) -> None:
    monkeypatch.setattr(entrances, "ROOM_ANSWER_SECONDS", 0.0)
    async with house(most=1) as here:
        first = await here.enter()
        await here.has(1)
        (guest,) = here.guests
        here.entrance.move(guest, phase)
        if phase is Phase.ANSWERING:
            # The client reads nothing of its answer, which is larger than the buffers of both kernels.
            writer = here.writers[0]
            while not guest.takes_nothing:
                writer.write(b"x" * 1_000_000)
        monkeypatch.setattr(entrances, "ROOM_SECONDS", 0.0)
        await here.enter()
        await here.has(2)
        assert here.ended == ["room"]
        await here.is_over(first)


async def test_a_guest_that_sends_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(most=1) as here:
        client = await here.enter()
        await here.has(1)
        client.send(b"G")
        await until(lambda: here.guests[0].has_unread)
        monkeypatch.setattr(entrances, "ROOM_SECONDS", 0.0)
        here.entrance._make_room()
        assert here.ended == []


class Short(socket.socket):
    """A listener of a process that has no descriptor left, until the test frees some."""

    error: int | None = None

    def accept(self) -> Any:
        if self.error is not None:
            raise OSError(self.error, "made by the test")
        return super().accept()


def short(error: int) -> Short:
    with listen("127.0.0.1:0", stall_seconds=30) as listener:
        made = Short(listener.family, listener.type, listener.proto, fileno=listener.detach())
    made.setblocking(False)
    made.error = error
    return made


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_a_shortage_pauses_accepting_and_loses_no_client(error: int) -> None:
    listener = short(error)
    async with house(listener=listener) as here:
        await here.enter()
        await until(lambda: here.shortages > 0)
        assert not here.entrance._accepting
        listener.error = None
        await here.has(1)


async def test_a_client_that_is_gone_before_it_is_accepted_is_not_a_shortage() -> None:
    listener = short(errno.ECONNABORTED)
    async with house(listener=listener) as here:
        await here.enter()
        here.entrance._accept()
        assert (here.shortages, here.entrance._accepting) == (0, True)
        listener.error = None


async def test_a_closed_entrance_finishes_answers_and_accepts_no_client() -> None:
    async with house() as here:
        idle, answering = await here.enter(), await here.enter()
        await here.has(2)
        here.guests[1].answering()
        here.entrance.close()
        await here.is_over(idle)
        assert len(here.entrance) == 1
        with pytest.raises(ConnectionError):
            await here.enter()
        here.guests[1].idle()
        await here.is_over(answering)
        here.entrance.open()
        assert not here.entrance._accepting
