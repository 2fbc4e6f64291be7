"""An application's own server in front of a bridge: pages, an API, and `/events`.

It forwards `/events` to the bridge, or answers like a proxy without a bridge. It shares no code with the bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.patience import PATIENCE


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    """By name in lower case."""
    body: bytes = b""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def cursor(self) -> str | None:
        """The cursor of a client, read as the bridge reads it."""
        query = parse_qs(urlsplit(self.target).query)
        return self.headers.get("last-event-id") or query.get("lastEventId", [""])[0] or None


@dataclass(frozen=True)
class Answer:
    status: int
    body: str = ""
    content_type: str = "text/html"
    headers: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        body = self.body.encode()
        fields = {"Content-Type": self.content_type, "Content-Length": str(len(body)), "Connection": "close"}
        if self.status == 204:
            fields = {"Connection": "close"}
        lines = [f"{name}: {value}" for name, value in (fields | self.headers).items()]
        return "\r\n".join([f"HTTP/1.1 {self.status} -", *lines, "", ""]).encode() + body


def answer_json(value: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(value), "application/json", {"Cache-Control": "no-store", **headers})


Route = Callable[[Request], "Answer | asyncio.Future[Answer]"]

PAGE = Answer(200, "<!doctype html><link rel=icon href='data:,'><title>test</title>")


class Site:
    """
    Args:
        bridge: the address to which `/events` is forwarded, as in http://127.0.0.1:8080.

    Attributes:
        answer: the answer to `/events`; None forwards the request to the bridge.
        routes: answers by path; every other path is an empty page.
        streams: the GET requests for `/events`.
    """

    def __init__(self, bridge: str) -> None:
        self.bridge = bridge
        self.answer: Answer | None = None
        self.routes: dict[str, Route] = {}
        self.streams: list[Request] = []
        self._requested = asyncio.Condition()
        self._connections: set[asyncio.StreamWriter] = set()
        self._open_streams: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def origin(self) -> str:
        return f"http://localhost:{self._port}"

    async def __aenter__(self) -> Site:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.refuse()
        for writer in list(self._connections):
            writer.transport.abort()

    async def open(self) -> None:
        """Accepts connections, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, reuse_address=True)
        self._port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Refuses new connections. Open ones stay open."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """Resets the connection of every stream."""
        for writer in list(self._open_streams):
            writer.transport.abort()

    async def wait_for_request(self, count: int) -> Request:
        """Waits for the `count`-th request for the stream."""
        async with asyncio.timeout(PATIENCE), self._requested:
            await self._requested.wait_for(lambda: len(self.streams) >= count)
        return self.streams[count - 1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            request = await self._read(head, reader)
            if request.path == "/events" and request.method == "GET":
                self.streams.append(request)
                async with self._requested:
                    self._requested.notify_all()
            if request.path == "/events" and self.answer is None:
                if request.method == "GET":
                    self._open_streams.add(writer)
                await self._forward(head, reader, writer)
                return
            writer.write((await self._find(request)).encode())
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The browser, or a test, has ended the connection.
        finally:
            self._connections.discard(writer)
            self._open_streams.discard(writer)
            writer.close()

    async def _read(self, head: bytes, reader: asyncio.StreamReader) -> Request:
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Request(method, target, headers, body)

    async def _find(self, request: Request) -> Answer:
        if request.path == "/events":
            assert self.answer is not None
            return self.answer
        if (route := self.routes.get(request.path)) is None:
            return PAGE
        found = route(request)
        return found if isinstance(found, Answer) else await found

    async def _forward(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bridge = urlsplit(self.bridge)
        try:
            answers, requests = await asyncio.open_connection(bridge.hostname, bridge.port)
        except OSError:
            writer.write(Answer(502, "no bridge").encode())
            return
        # One request per connection: the next one may get another answer.
        requests.write(re.sub(rb"(?i)\r\nConnection: [^\r]*", b"\r\nConnection: close", head))
        with _closing(requests):
            gone = asyncio.create_task(reader.read())  # Ends when the browser closes.
            try:
                while True:
                    some = asyncio.create_task(answers.read(65_536))
                    await asyncio.wait({some, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not some.done():
                        some.cancel()
                        return
                    if not (data := await some):
                        return
                    writer.write(data)
                    await writer.drain()
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)


@contextlib.contextmanager
def _closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        # At once: the bridge must notice now that its client is gone.
        writer.transport.abort()


@contextlib.contextmanager
def serve(answer: Callable[[http.server.BaseHTTPRequestHandler], tuple[str, bytes]]) -> Iterator[int]:
    """A server on loopback. For each GET, `answer` returns the type and the body. Yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, body = answer(self)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()
