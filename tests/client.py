"""A client of a stream, in place of a browser: a plain socket, hand-written HTTP/1.1, and the independent decoder."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from tests.decoder import Decoder, Frame
from tests.patience import PATIENCE


class Stream:
    """
    Args:
        base: the bridge's address, as in http://127.0.0.1:8080.
        token: sent as Authorization: Bearer, unless None.
        headers: further request headers.
        receive_buffer: bytes that the kernel buffers while the test does not read.
        tls: the certificates to trust, if `base` is an https address.
        segment_bytes: send the request in TCP segments of this many bytes.
    """

    def __init__(
        self,
        base: str,
        token: str | None,
        *,
        query: str = "",
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        tls: ssl.SSLContext | None = None,
        segment_bytes: int | None = None,
    ) -> None:
        self._address = urlsplit(base)
        self._path = "/events" + (f"?{query}" if query else "")
        self._headers = {"Host": self._address.netloc, "Accept": "text/event-stream", **(headers or {})}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._receive_buffer = receive_buffer
        self._tls = tls
        self._segment_bytes = segment_bytes
        self.decoder = Decoder()
        self.frames: list[Frame] = []
        """All frames so far; `next` returns one after another."""
        self.raw = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended = False
        """The body ended properly, with its last chunk."""
        self._taken = 0
        self._size: int | None = None
        """Size of the chunk whose size line has been read, but not yet its bytes."""
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Stream:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        await self.request()
        async with asyncio.timeout(PATIENCE):
            status = await self._reader.readline()
            self.status = int(status.split()[1])
            while (line := (await self._reader.readline()).decode("latin-1").strip()) != "":
                name, _, value = line.partition(":")
                self.headers[name.lower()] = value.strip()

    async def request(self) -> None:
        """Sends the request and does not wait for the answer."""
        assert self._address.hostname is not None
        raw = socket.socket()
        if self._receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        raw.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(raw, (self._address.hostname, self._address.port))
        except BaseException:
            raw.close()
            raise
        limit = 1024 if self._receive_buffer is not None else 2**20
        name = self._address.hostname if self._tls is not None else None
        self._reader, self._writer = await asyncio.open_connection(
            sock=raw, limit=limit, ssl=self._tls, server_hostname=name
        )
        head = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        request = f"GET {self._path} HTTP/1.1\r\n{head}\r\n".encode("latin-1")
        size = self._segment_bytes or len(request)
        for at in range(0, len(request), size):
            self._writer.write(request[at : at + size])  # One segment: asyncio sets TCP_NODELAY.
            if size < len(request):
                await asyncio.sleep(0)  # The bridge gets a chance to read this segment alone.

    async def body(self) -> bytes:
        """The body of an answer that is not a stream."""
        return await self._reader.readexactly(int(self.headers["content-length"]))

    async def _read_chunk(self) -> None:
        """Loses no byte if it is cancelled."""
        if self._size is None:
            self._size = int(await self._reader.readline() or b"-1", 16)
        if self._size <= 0:
            if self._size == 0:
                self.ended = True
                return
            raise ConnectionResetError("cut without a last chunk")
        chunk = (await self._reader.readexactly(self._size + 2))[:-2]
        self._size = None
        self.raw += chunk
        self.frames += self.decoder.feed(chunk)

    async def next(self, *, seconds: float = PATIENCE) -> Frame:
        """The next frame.

        Raises:
            EOFError: the body has ended.
            ConnectionError: it was cut.
        """
        async with asyncio.timeout(seconds):
            while len(self.frames) <= self._taken:
                if self.ended:
                    raise EOFError
                await self._read_chunk()
        self._taken += 1
        return self.frames[self._taken - 1]

    async def ready(self) -> Frame:
        frame = await self.next()
        assert frame.event == "bridge.ready", frame
        return frame

    async def next_event(self, *, seconds: float = PATIENCE) -> dict[str, Any]:
        """The next CloudEvent; the bridge's own frames are skipped."""
        async with asyncio.timeout(seconds):  # For all of them: a quiet stream sends a position again and again.
            while (frame := await self.next(seconds=seconds)).event.startswith("bridge."):
                pass
        value: dict[str, Any] = frame.json
        return value

    async def ids(self, count: int, *, seconds: float = PATIENCE) -> list[str]:
        return [(await self.next_event(seconds=seconds))["id"] for _ in range(count)]

    async def until(self, event: str, *, seconds: float = PATIENCE) -> Frame:
        async with asyncio.timeout(seconds):
            while (frame := await self.next(seconds=seconds)).event != event:
                pass
        return frame

    async def rest(self, *, seconds: float = PATIENCE) -> list[Frame]:
        """All frames to the end of the body."""
        found = []
        while True:
            try:
                found.append(await self.next(seconds=seconds))
            except EOFError:
                return found

    async def comments(self, count: int, *, seconds: float = PATIENCE) -> None:
        """Waits until so many heartbeats have arrived."""
        async with asyncio.timeout(seconds):
            while self.decoder.comments < count:
                await self._read_chunk()

    @contextlib.asynccontextmanager
    async def read_on(self) -> AsyncIterator[None]:
        """Reads in the background during the block, as a browser does; `next` returns the frames afterwards.

        A test that publishes for some time needs it: a fast machine publishes more than the
        bridge buffers for a client that does not read.
        """

        async def run() -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # `next` raises it again.
                while not self.ended:
                    await self._read_chunk()

        running = asyncio.create_task(run())
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def close(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            # All waits of a writer share one future: a wait that is cancelled would end the next one, too.
            await asyncio.shield(self._writer.wait_closed())

    def half_close(self) -> None:
        """Sends FIN and still reads."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write_eof()

    def abort(self) -> None:
        """Resets the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
