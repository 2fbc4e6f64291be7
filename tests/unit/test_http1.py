"""HTTP/1.1 on real sockets: the features that Hypercorn lacks, and the checks of a request's head."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import AsyncIterator

import pytest
from hypercorn.asyncio.tcp_server import TCPServer

from bridge.service.http import entrance as entrances
from bridge.service.http.web import PROBLEM_TYPE
from tests.patience import PATIENCE
from tests.service import mint
from tests.unit.loopback import Site, site, until

GET = b"GET /client.js HTTP/1.1\r\nHost: bridge.example\r\n"


class Socket:
    """A client that writes bytes and reads answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(PATIENCE):
            status = int((await self.reader.readline()).split()[1])
            headers = {}
            while line := (await self.reader.readline()).strip():
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            content = await self.reader.readexactly(int(headers.get("content-length", 0))) if body else b""
            return status, headers, content

    async def ask(self, data: bytes, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        self.writer.write(data)
        return await self.answer(body=body)

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def client(here: Site) -> AsyncIterator[Socket]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(here.url.rpartition(":")[2]))
    try:
        yield Socket(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with site() as here, client(here) as to:
        for _ in range(2):
            assert (await to.ask(GET + b"\r\n"))[0] == 200


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"GET\r\n\r\n", 400, "bad-request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad-request"),
        (GET + b"Host: another.example\r\n\r\n", 400, "bad-request"),
        (GET + b" folded: x\r\n\r\n", 400, "bad-request"),
        (GET + b"Transfer-Encoding: gzip\r\n\r\n", 501, "not-implemented"),
        (GET + b"X: " + b"x" * 20_000, 431, "headers-too-large"),
        (GET + b"X: " + b"x" * 20_000 + b"\r\n\r\n", 431, "headers-too-large"),  # Complete in one packet.
    ],
)
async def test_a_bad_head_gets_a_problem_document_and_the_end(request_bytes: bytes, status: int, code: str) -> None:
    async with site() as here, client(here) as to:
        answered, headers, body = await to.ask(request_bytes)
        assert (answered, headers["connection"]) == (status, "close")
        document = json.loads(body)
        assert (document["status"], headers["content-type"]) == (status, PROBLEM_TYPE)
        assert await to.rest() == b""
        assert document["type"] == f"urn:bridge:problem:{code}"


async def test_the_error_of_a_head_request_has_no_body() -> None:
    async with site() as here, client(here) as to:
        to.writer.write(b"HEAD / HTTP/1.1\r\nHost: a b\r\n\r\n")
        status, headers, _ = await to.answer(body=False)
        assert status == 400
        assert int(headers["content-length"]) > 0
        assert await to.rest() == b""


async def test_http_2_is_answered_with_a_frame_of_http_2() -> None:
    async with site() as here, client(here) as to:
        to.writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        first = await to.reader.readexactly(9)
        assert first[3] == 4, "a SETTINGS frame (RFC 9113, section 6.5)"


async def test_an_upgrade_is_ignored() -> None:
    async with site() as here, client(here) as to:
        head = GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
        assert (await to.ask(head))[0] == 200


async def test_a_target_in_absolute_form_and_a_later_minor_version() -> None:
    async with site() as here, client(here) as to:
        assert (await to.ask(b"GET http://bridge.example/client.js HTTP/1.1\r\nHost: other.example\r\n\r\n"))[0] == 200
        assert (await to.ask(GET.replace(b"1.1", b"1.9") + b"\r\n"))[0] == 200


async def test_an_empty_line_before_a_request_is_ignored() -> None:
    async with site() as here, client(here) as to:
        assert (await to.ask(b"\r\n" + GET + b"\r\n"))[0] == 200
        to.writer.write(b"\r\n")
        assert (await to.ask(GET + b"\r\n"))[0] == 200


@pytest.mark.parametrize("trailer", [b"bad trailer\r\n", b"X: a\nY: b\r\n"], ids=["no-colon", "bare-lf"])
async def test_a_bad_trailer_is_refused(trailer: bytes) -> None:
    """The whole request is one packet, so the trailer arrives before the route answers. h11 accepts the second one."""
    async with site() as here, client(here) as to:
        head = b"POST /events HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n"
        status, headers, _ = await to.ask(head + b"1\r\nx\r\n0\r\n" + trailer + b"\r\n")
        assert (status, headers["connection"]) == (400, "close")
        assert await to.rest() == b""


async def test_a_stream_in_http_1_0_has_no_chunks() -> None:
    async with site() as here, client(here) as to:
        head = f"GET /events HTTP/1.0\r\nHost: b\r\nAuthorization: Bearer {mint('42')}\r\n\r\n"
        status, headers, _ = await to.ask(head.encode(), body=False)
        assert status == 200
        assert "transfer-encoding" not in headers
        assert (await to.reader.readline()).startswith(b"retry: "), "the body begins without a chunk's size"


async def test_a_head_that_does_not_end_is_answered_408(monkeypatch: pytest.MonkeyPatch) -> None:
    async with site() as here, client(here) as to:
        to.writer.write(GET)
        guests = here.entrance._guests[entrances.Phase.WAITING]
        await until(lambda: any(guest.has_begun and guest.is_silent for guest in guests))
        monkeypatch.setattr(entrances, "HEADER_SECONDS", 0.0)
        here.entrance._sweep()
        status, headers, _ = await to.answer()
        assert (status, headers["connection"]) == (408, "close")
        assert await to.rest() == b""
        assert here.ended == ["header-timeout"]


async def test_the_end_of_the_service_ends_idle_connections() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with site() as here:
            to = await stack.enter_async_context(client(here))
            assert (await to.ask(GET + b"\r\n"))[0] == 200
        assert await to.rest() == b""


async def test_after_the_last_answer_the_client_may_close() -> None:
    async with site() as here, client(here) as to:
        status, _, _ = await to.ask(GET + b"Connection: close\r\n\r\n")
        assert status == 200
        assert await to.rest() == b"", "the bridge has sent its FIN"
        to.writer.write(b"bytes that nobody reads")  # The bridge discards them, and does not reset the connection.
        to.writer.write_eof()
        await until(lambda: len(here.entrance) == 0)


async def test_a_client_that_is_gone_before_its_stream_begins_leaves_nothing() -> None:
    async with site() as here:
        async with client(here) as to:
            head = f"GET /events HTTP/1.1\r\nHost: b\r\nAuthorization: Bearer {mint('42')}\r\n\r\n"
            to.writer.write(head.encode())
            to.writer.transport.abort()
        await until(lambda: len(here.entrance) == 0 and len(here.hub) == 0)


async def test_a_client_that_leaves_during_the_close_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio raises ENOTCONN if the socket is reset between the last write and the close."""
    closes = TCPServer._close

    async def close(server: TCPServer) -> None:
        await closes(server)
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(TCPServer, "_close", close)
    async with site() as here, client(here) as to:
        assert (await to.ask(GET + b"\r\n"))[0] == 200
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "http"]
        await to.ask(GET + b"Connection: close\r\n\r\n")
        to.writer.close()
        await asyncio.wait({task})
        assert task.exception() is None, "asyncio would log it as never retrieved"
