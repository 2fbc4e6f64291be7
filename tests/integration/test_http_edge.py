"""Raw bytes as HTTP requests: answers must follow RFC 9110 and RFC 9112."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import OpenStream
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

HOST = b"Host: bridge.example\r\n"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def talk(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Sends the pieces and closes only the sending side. Returns all bytes until the bridge closes."""
    with socket.create_connection(address, timeout=PATIENCE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    found = bytearray()
    while piece := client.recv(65_536):  # A reset fails the test: an answer may be lost with it.
        found += piece
    return bytes(found)


def answers(received: bytes, methods: list[bytes]) -> list[Answer]:
    """Parses a server's answers, without the server's own parser."""
    found: list[Answer] = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, f"an answer whose head does not end: {received[:200]!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        status = re.fullmatch(r"HTTP/1\.1 (\d{3}) [ -~]*", first)
        assert status, first
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            assert colon, line
            assert re.fullmatch(r"[A-Za-z0-9-]+", name), line
            assert value == value.rstrip()
            assert name.lower() not in ("content-length", "transfer-encoding") or name.lower() not in headers
            headers[name.lower()] = value.strip()
        code = int(status[1])
        if code == 100:
            received = rest
            continue
        method = methods[len(found)] if len(found) < len(methods) else b""
        if method == b"HEAD" or code in (204, 304):
            body, received = b"", rest
        elif headers.get("transfer-encoding") == "chunked":
            body, received = chunks(rest)
        elif "content-length" in headers:
            size = int(headers["content-length"])
            assert len(rest) >= size, "an answer that is shorter than it says"
            body, received = rest[:size], rest[size:]
        else:
            body, received = rest, b""
        found.append(Answer(code, headers, body))
    return found


def chunks(rest: bytes) -> tuple[bytes, bytes]:
    body = b""
    while rest:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        if size == 0:
            assert rest[:2] == b"\r\n"
            return body, rest[2:]
        body += rest[:size]
        assert rest[size : size + 2] == b"\r\n"
        rest = rest[size + 2 :]
    return body, b""  # A stream whose client closed.


def address_of(service: Service) -> tuple[str, int]:
    parts = urlsplit(service.public)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def assert_error(answer: Answer, *statuses: int) -> None:
    assert answer.status in statuses, answer
    assert answer.headers["connection"].lower() == "close"
    assert answer.headers["content-type"] == "application/problem+json"
    document = json.loads(answer.body)
    assert document["status"] == answer.status
    assert document["detail"]


GOOD = b"GET /schemas HTTP/1.1\r\n" + HOST + b"\r\n"

START = b"GET /schemas HTTP/1.1\r\n"
POST = b"POST /schemas HTTP/1.1\r\n" + HOST
LENGTH = b"Content-Length: "
CODING = b"Transfer-Encoding: chunked\r\n"

BAD: dict[str, tuple[bytes, int]] = {
    "length and coding": (POST + LENGTH + b"4\r\n" + CODING + b"\r\n0\r\n\r\n", 400),
    "coding and length": (START + HOST + CODING + LENGTH + b"0\r\n\r\n0\r\n\r\n", 400),
    "coding in HTTP/1.0": (b"GET /schemas HTTP/1.0\r\n" + CODING + b"\r\n0\r\n\r\n", 400),
    "two lengths": (START + HOST + LENGTH + b"1\r\n" + LENGTH + b"2\r\n\r\nab", 400),
    "a list of lengths": (START + HOST + LENGTH + b"1, 2\r\n\r\nab", 400),
    "a signed length": (START + HOST + LENGTH + b"+1\r\n\r\na", 400),
    "an unknown coding": (START + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "a bad size of a chunk": (POST + CODING + b"\r\nxyz\r\n", 0),
    "LF after a trailer": (POST + CODING + b"\r\n0\r\nX: y\n\r\n", 0),
    "lower case": (b"get /schemas HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "mixed case": (b"Get /schemas HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "unknown method": (b"BREW /schemas HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "LF after the request line": (b"GET /schemas HTTP/1.1\n" + HOST + b"\r\n", 400),
    "LF after a header": (START + b"X: y\n" + HOST + b"\r\n", 400),
    "LF for the empty line": (START + HOST + b"\n", 400),
    "LF everywhere": (b"GET /schemas HTTP/1.1\nHost: x\n\n", 400),
    "CR in a header": (START + b"X: a\rb\r\n" + HOST + b"\r\n", 400),
    "folded by a space": (START + HOST + b"X: a\r\n b\r\n\r\n", 400),
    "folded by a tab": (START + HOST + b"X: a\r\n\tb\r\n\r\n", 400),
    "a first line that is folded": (START + b" X: a\r\n" + HOST + b"\r\n", 400),
    "a space before the colon": (START + HOST + b"X : a\r\n\r\n", 400),
    "a header without a name": (START + HOST + b": a\r\n\r\n", 400),
    "NUL in a header": (START + HOST + b"X: a\0b\r\n\r\n", 400),
    "NUL in the target": (b"GET /sch\0emas HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a space in the target": (b"GET /sch emas HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "bytes in the target": (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no host": (START + b"\r\n", 400),
    "no host in a later version": (b"GET /schemas HTTP/1.2\r\n\r\n", 400),
    "two hosts": (START + HOST + HOST + b"\r\n", 400),
    "a bad host": (START + b"Host: a/b\r\n\r\n", 400),
    "no version": (b"GET /schemas\r\n" + HOST + b"\r\n", 400),
    "another protocol": (b"GET /schemas FTP/1.1\r\n" + HOST + b"\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + 64 * b"x", 400),
    "a head that is too large": (START + HOST + b"X: " + 100_000 * b"a" + b"\r\n\r\n", 431),
    "a head that is too large in one packet": (START + HOST + b"X: " + 20_000 * b"a" + b"\r\n\r\n", 431),
    "trailers that are too large": (POST + CODING + b"\r\n0\r\nX: " + 20_000 * b"a" + b"\r\n\r\n", 0),
}
"""Each with the status of the answer; 0 if the bridge may have answered before the fault arrived."""


@pytest.mark.contract("6.31", "6.32", "6.33", "6.34", "6.35", "6.36", "6.37")
async def test_bad_requests_are_refused_and_the_connection_closes(service: Service) -> None:
    for name, (request, status) in BAD.items():
        # Also after a good request; and a good request that follows must not be answered.
        for pieces in [(request, GOOD), (request + GOOD,), (GOOD, request + GOOD)]:
            received = await asyncio.to_thread(talk, address_of(service), *pieces)
            found = answers(received, [])
            if pieces[0] is GOOD:
                assert found.pop(0).status == 200
            assert len(found) == 1, (name, found)
            if status:
                assert_error(found[0], status)
    assert "Traceback" not in service.text


async def test_a_refused_head_request_has_no_body(service: Service) -> None:
    received = await asyncio.to_thread(talk, address_of(service), b"HEAD /schemas HTTP/1.1\r\nHost: x\n\r\n")
    (answer,) = answers(received, [b"HEAD"])
    assert answer.status == 400


ACCEPTED = [
    (b"\r\n" + GOOD, 200),
    (b"GET http://bridge.example/schemas HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    (b"GET HTTP://elsewhere:80/schemas HTTP/1.1\r\n" + HOST + b"\r\n", 200),
    (b"GET /schemas HTTP/1.0\r\n\r\n", 200),
    (b"GET /schemas HTTP/1.9\r\n" + HOST + b"\r\n", 200),
    (b"GET /schemas HTTP/2.1\r\n" + HOST + b"\r\n", 505),
    (b"GET /schemas HTTP/1.1\r\nhOsT:bridge.example\r\n\r\n", 200),
    (b"GET /schemas HTTP/1.1\r\n" + HOST + b"X:\t a \t\r\nY:\r\n\r\n", 200),
    (b"GET /schemas HTTP/1.1\r\n" + HOST + b"X: \xe9\xff\r\nCookie: a=\xff\r\n\r\n", 200),
    (b"GET /schemas HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc", 200),
    (b"GET /schemas HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: Chunked\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n", 200),
    (b"GET /schemas HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
     b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 200),
    (START + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n", 200),
    (b"GET /schemas/%2e%2e/%00?a=%ff HTTP/1.1\r\n" + HOST + b"\r\n", 404),
    (b"POST /schemas HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n", 405),
    (b"DELETE /events HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"TRACE /events HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    (b"GET /schemas HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n", 200),
]  # fmt: skip


@pytest.mark.contract("5.43", "6.38", "6.39")
async def test_what_is_accepted(service: Service) -> None:
    for request, status in ACCEPTED:
        received = await asyncio.to_thread(talk, address_of(service), request)
        (answer,) = answers(received, [request.split()[0]])
        assert answer.status == status, request
        assert status != 405 or "GET" in answer.headers["allow"]
    assert "Traceback" not in service.text


async def test_an_error_reaches_a_client_that_still_sends(service: Service) -> None:
    """If the bridge closed the connection at once, the kernel would reset it, and the answer would be lost."""

    def send() -> bytes:
        with socket.create_connection(address_of(service), timeout=PATIENCE) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b"get / HTTP/1.1\r\n" + HOST + b"\r\n" + 300_000 * b"x")
            return read_all(client)

    for _ in range(10):
        (answer,) = answers(await asyncio.to_thread(send), [])
        assert answer.status == 501


# The fuzz test: requests of all kinds, cut into pieces anywhere, one after another.

TOKENS = st.sampled_from([b"", b"abc", mint("fuzz").encode(), b"eyJhbGciOiJub25lIn0.e30."])
PATHS = st.sampled_from(
    [
        *b"/events /events?types=job.*&named=false /events?types=%ff%00 /events?lastEventId=%0d%0a /schemas /schemas/x "
        b"/openapi.json /client.js /nowhere /%2e%2e/etc/passwd * //x http://x/events /".split(),
        b"/" + 3000 * b"a",
    ]
)
METHODS = st.sampled_from([*b"GET HEAD POST OPTIONS PUT TRACE CONNECT get G\xc3\x89T".split(), b""])
VERSIONS = st.sampled_from(3 * [b"HTTP/1.1"] + b"HTTP/1.0 HTTP/2.0 HTTP/1.2 http/1.1".split() + [b""])
NAMES = st.sampled_from(
    [
        *b"Host Content-Length Transfer-Encoding Connection Upgrade Expect Accept Origin Cookie Authorization "
        b"Last-Event-ID Range Content-Type X-\xff Access-Control-Request-Headers If-None-Match TE Trailer".split(),
        b"X Y",
        b"",
    ]
)
VALUES = st.sampled_from(
    [
        *b"x 0 5 -1 99999999999999999999 chunked close keep-alive upgrade websocket 100-continue text/html null "
        b"https://app.example bytes=0- bridge_token=x;bridge_token=\xff a\0b \xe9".split(),
        b"",
        b"Bearer x",
        b"a\r\n b",
        9000 * b"y",
    ]
)
ENDS = st.sampled_from(4 * [b"\r\n"] + [b"\n", b"\r", b"\r\r\n", b""])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    ends = ENDS if draw(st.booleans()) else st.just(b"\r\n")
    lines = draw(METHODS) + b" " + draw(PATHS) + b" " + draw(VERSIONS) + draw(ends)
    if draw(st.booleans()):
        lines += b"Host: bridge.example" + draw(ends)
    if draw(st.booleans()):
        lines += b"Authorization: Bearer " + draw(TOKENS) + draw(ends)
    for name, value in draw(st.lists(st.tuples(NAMES, VALUES), max_size=4)):
        lines += name + draw(st.sampled_from([b": ", b":", b" : "])) + value + draw(ends)
    body = draw(st.sampled_from([b"", b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"0\r\nX: y\n\n", b"\r\n"]))
    return lines + draw(ends) + body


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    data = b"".join(draw(st.lists(st.one_of(requests(), st.binary(max_size=40)), min_size=1, max_size=3)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


KNOWN = {200, 204, 304, 400, 401, 403, 404, 405, 406, 408, 413, 417, 431, 501, 505}
LEAKS = re.compile(rb"Traceback|File \"|site-packages|\.py\b|hypercorn|quart|werkzeug|0x[0-9a-f]{6}", re.IGNORECASE)


def parse_answers(received: bytes) -> list[Answer]:
    """The answers. It is unknown which of them answer HEAD and so have no body: all combinations are tried."""
    for methods in itertools.product([b"GET", b"HEAD"], repeat=4):
        with contextlib.suppress(AssertionError, ValueError):
            return answers(received, list(methods))
    raise AssertionError(f"not a sequence of answers: {received!r}")


def assert_follows_the_rules(pieces: list[bytes], received: bytes) -> None:
    data = b"".join(pieces)
    if b"PRI * HTTP/2" in data:
        return
    body_of_client = received.count(b"text/javascript") > 0
    found = parse_answers(received)
    for answer in found:
        assert answer.status in KNOWN, answer
        if not body_of_client:
            assert not LEAKS.search(answer.body), answer
        for value in answer.headers.values():
            assert not LEAKS.search(value.encode("latin-1")), answer
    # An answer that closes is the last one (RFC 9112, section 9.6).
    for answer in found[:-1]:
        assert answer.headers.get("connection", "").lower() != "close", found


async def wait_until_metric_is(service: Service, name: str, value: float) -> None:
    async with asyncio.timeout(PATIENCE):
        while await service.metric(name) != value:  # noqa: ASYNC110 - a metric gives no signal.
            await asyncio.sleep(0.05)  # Between two polls.


async def test_answers_to_any_bytes_follow_the_rules(service: Service, connect: OpenStream, vhost: Vhost) -> None:
    innocent = await connect(service, "42")
    address = address_of(service)

    @settings(max_examples=150)
    @given(conversations())
    def fuzz(pieces: list[bytes]) -> None:
        assert_follows_the_rules(pieces, talk(address, *pieces))

    await asyncio.to_thread(fuzz)
    # The last connections may still be closing.
    await wait_until_metric_is(service, "bridge_connections", 1)
    await wait_until_metric_is(service, "bridge_guests", 0)
    await vhost.publish("user.42.job.completed", cloudevent("still-there"))
    assert (await innocent.next_event())["id"] == "still-there"
    faults = [line.get("exception") or line for line in service.lines if line.get("level", "error") == "error"]
    assert not faults, faults[0]
