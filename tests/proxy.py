"""A TCP proxy between the bridge and its RabbitMQ. It can reset, stall and refuse connections."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from types import TracebackType
from typing import Any

TURNS = 10
"""Turns of the loop in which asyncio makes a connection's transport and calls the server's callback; it needs four."""


class Proxy:
    """Forwards to `127.0.0.1:target`. `stall` keeps connections open and forwards no byte; `cut` resets them all.

    Args:
        tls: to use TLS towards the connecting clients.
    """

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.segment_bytes: int | None = None
        """Forward at most this many bytes in one TCP segment; None for as many as there are."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: list[asyncio.StreamWriter] = []
        self._serving: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.accepted = 0

    async def __aenter__(self) -> Proxy:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.refuse()
        self.cut()
        # Not cancelled: asyncio logs an error for each callback of a server that is.
        await asyncio.gather(*self._serving, return_exceptions=True)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.cut()
        for writer in self._writers:  # The loop closes a connection that was reset in a later turn.
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def open(self) -> None:
        """Accepts connections; also again, after `refuse`."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Accepts no new connection; open ones stay open."""
        if self._server is not None:
            # asyncio drops a connection, and leaves it open, if its server is closed between the two steps in which
            # the connection is accepted. So first it accepts no more, and finishes those that it has.
            loop = asyncio.get_running_loop()
            for listener in self._server.sockets:
                loop.remove_reader(listener.fileno())
            for _ in range(TURNS):
                await asyncio.sleep(0)
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def inject(self, data: bytes, connection: int) -> None:
        """Sends bytes to a client that the target never sent; connections are counted from 0."""
        self._clients[connection].write(data)

    def half_close(self) -> None:
        """Sends FIN to the connecting side of every connection, and still reads from it."""
        for writer in self._clients:
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()

    def stall(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        serving = asyncio.current_task()
        assert serving is not None, "a server's callback is a task"
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        if writer.is_closing():  # `cut` was called while the target was being connected.
            target_writer.transport.abort()
            return
        self._writers.add(target_writer)
        self._clients.append(writer)
        for source, target in [(reader, target_writer), (target_reader, writer)]:
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                await self._flowing.wait()
                await self._forward(data, target)
            target.close()
        except ConnectionError:
            target.transport.abort()

    async def _forward(self, data: bytes, target: asyncio.StreamWriter) -> None:
        at = 0
        while at < len(data):
            size = self.segment_bytes or len(data)
            try:
                target.write(data[at : at + size])
            except RuntimeError:  # `half_close` has closed this direction.
                return
            await target.drain()
            at += size
            if self.segment_bytes is not None:
                await asyncio.sleep(0)  # Other connections go on meanwhile.
