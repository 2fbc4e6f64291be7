"""Tests the client's parser with each rule of the HTML standard's event-stream grammar (sections 9.2.5 and 9.2.6).

Chromium's own EventSource reads the same bytes: this checks that the table is right.
"""

from __future__ import annotations

import http.server
import json
from base64 import b64encode
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from playwright.async_api import Page

from tests.browser.site import serve

Block = tuple[str, str, str]
"""Name, data and last event id. The id is empty if there was none."""


class Case(NamedTuple):
    rule: str
    sent: bytes
    blocks: list[Block]
    retries: tuple[int, ...] = ()


def one(data: str, name: str = "message", id: str = "") -> list[Block]:
    return [(name, data, id)]


BOM = b"\xef\xbb\xbf"

CASES = [
    # 9.2.5: stream = [ bom ] *event
    Case("nothing", b"", []),
    Case("a byte order mark at the start is removed", BOM + b"data: a\n\n", one("a")),
    Case("only one byte order mark is removed", BOM + BOM + b"data: a\n\n", []),
    Case("a byte order mark later is part of a name", b"data: a\n\n" + BOM + b"data: b\n\ndata: c\n\n",
         [("message", "a", ""), ("message", "c", "")]),
    Case("a byte order mark in a value stays", b"data: " + BOM + b"a\n\n", one("\ufeffa")),
    # end-of-line = ( cr lf / cr / lf )
    Case("lines end with LF", b"event: e\ndata: a\n\n", one("a", "e")),
    Case("lines end with CR", b"event: e\rdata: a\r\r", one("a", "e")),
    Case("lines end with CR LF", b"event: e\r\ndata: a\r\n\r\n", one("a", "e")),
    Case("line ends are mixed", b"data: a\r\ndata: b\rdata: c\n\r\ndata: d\r\n\n",
         [("message", "a\nb\nc", ""), ("message", "d", "")]),
    Case("CR LF is one line end, LF CR are two", b"data: a\r\ndata: b\n\rdata: c\r\n\r\n",
         [("message", "a\nb", ""), ("message", "c", "")]),
    Case("CR CR LF is two line ends", b"data: a\r\r\ndata: b\r\r\n", [("message", "a", ""), ("message", "b", "")]),
    Case("other separators end no line", "data: a\u2028b\u2029c\u0085d\vE\f\n\n".encode(),
         one("a\u2028b\u2029c\u0085d\vE\f")),
    # comment = colon *any-char end-of-line
    Case("a comment is ignored", b": data: x\n:\n:data\ndata: a\n:\n\n", one("a")),
    Case("comments alone are no block", b":\n\n:\n\n", []),
    Case("a comment inside a block does not end it", b"data: a\n: c\ndata: b\n\n", one("a\nb")),
    # field = 1*name-char [ colon [ space ] *any-char ] end-of-line
    Case("one space after the colon is removed", b"data:a\ndata: b\ndata:  c\n\n", one("a\nb\n c")),
    Case("a tab after the colon stays", b"data:\ta\n\n", one("\ta")),
    Case("a space at the end stays", b"data: a \n\n", one("a ")),
    Case("a colon in a value stays", b"data: a:b: c\n\n", one("a:b: c")),
    Case("a line without colon is a name", b"data\n\n", one("")),
    Case("a name without colon has an empty value", b"data: a\ndata\ndata: b\n\n", one("a\n\nb")),
    Case("names are compared exactly", b"Data: x\nD: x\n data: x\ndata : x\ndatas: x\ndat: x\ndata: a\n\n", one("a")),
    Case("an unknown field is ignored", b"foo: x\nfoo\n{}\ndata: a\n\n", one("a")),
    # 9.2.6: "event"
    Case("a name is of one block", b"event: e\ndata: a\n\ndata: b\n\n", [("e", "a", ""), ("message", "b", "")]),
    Case("the last name counts", b"event: d\nevent: e\ndata: a\n\n", one("a", "e")),
    Case("an empty name is `message`", b"event: e\nevent\ndata: a\n\n", one("a")),
    Case("a name without data is forgotten", b"event: e\n\ndata: a\n\n", one("a")),
    Case("a name may follow data", b"data: a\nevent: e\n\n", one("a", "e")),
    # "data"
    Case("lines of data are joined with LF", b"data: a\ndata: b\n\n", one("a\nb")),
    Case("empty data is a block", b"data:\n\n", one("")),
    Case("two lines of empty data are one LF", b"data\ndata\n\n", one("\n")),
    Case("one LF is removed at the end", b"data: a\ndata\n\n", one("a\n")),
    Case("a block without data is not dispatched", b"event: e\nid: 1\n\n\n\n", []),
    Case("data keeps NUL", b"data: a\0b\n\n", one("a\0b")),
    # "id"
    Case("an id stays for the blocks that follow", b"id: 1\ndata: a\n\ndata: b\n\n",
         [("message", "a", "1"), ("message", "b", "1")]),
    Case("an id of a block without data stays", b"id: 1\n\ndata: a\n\n", one("a", id="1")),
    Case("an empty id resets it", b"id: 1\ndata: a\n\nid\ndata: b\n\n", [("message", "a", "1"), ("message", "b", "")]),
    Case("an id with NUL is ignored", b"id: 1\nid: 2\x003\ndata: a\n\nid: \0\ndata: b\n\n",
         [("message", "a", "1"), ("message", "b", "1")]),
    Case("the last id counts, wherever it is", b"id: 1\ndata: a\nid: 2\n\n", one("a", id="2")),
    # "retry"
    Case("a time of digits", b"retry: 1500\ndata: a\n\n", one("a"), (1500,)),
    Case("a time counts at its line, without a block", b"retry: 7\n", [], (7,)),
    Case("leading zeros are digits", b"retry: 007\n\n", [], (7,)),
    Case("other times are ignored",
         "retry: 1x\nretry: -1\nretry: +1\nretry: 1.5\nretry: 1e3\nretry:  1\nretry: 1 \nretry: \u0661\nretry: 0x1\n"
         "data: a\n\n".encode(), one("a")),
    Case("an empty time is ignored", b"retry\nretry:\ndata: a\n\n", one("a")),
    # The end of the stream.
    Case("a block without its empty line is dropped", b"data: a\n\ndata: b\n", one("a")),
    Case("a line without its end is dropped", b"data: a\n\ndata: b", one("a")),
    # UTF-8 (9.2.5, "must be decoded using the UTF-8 decode algorithm")
    Case("characters of two, three and four bytes", "data: ä€😀\n\n".encode(), one("ä€😀")),
    Case("bytes that are not UTF-8 become U+FFFD", b"data: a\xffb\xe2\x82\n\n", one("a\ufffdb\ufffd")),
]  # fmt: skip

PARSE = """
async ([client, cases]) => {
  const { parse } = await import(client);
  const turn = () => new Promise((resolve) => setTimeout(resolve));
  const read = async (chunks) => {
    const blocks = [], retries = [];
    let feed;
    const body = new ReadableStream({ start: (controller) => (feed = controller) });
    const onBlock = ({ name, data, id }) => blocks.push([name, data, id ?? ""]);
    const whole = parse(body, onBlock, (ms) => retries.push(ms), () => {});
    for (const chunk of chunks) feed.enqueue(chunk);
    await turn(); // Blocks that these bytes complete must be there now, before the stream ends.
    const before = JSON.stringify([blocks, retries]);
    feed.close();
    await whole;
    return before === JSON.stringify([blocks, retries]) ? [blocks, retries] : ["only at the end", blocks, retries];
  };
  const results = [];
  for (const encoded of cases) {
    const bytes = Uint8Array.from(atob(encoded), (char) => char.charCodeAt(0));
    const ways = { whole: [bytes], bytes: [...bytes].map((byte) => Uint8Array.of(byte)) };
    for (let at = 1; at < bytes.length; at++) ways[`split at ${at}`] = [bytes.slice(0, at), bytes.slice(at)];
    const found = {};
    for (const [way, chunks] of Object.entries(ways)) found[way] = await read(chunks);
    results.push(found);
  }
  return results;
}
"""

LISTEN = """
(url) => new Promise((resolve) => {
  const blocks = [];
  const source = new EventSource(url);
  const record = (message) => blocks.push([message.type, message.data, message.lastEventId]);
  for (const name of ["message", "d", "e"]) source.addEventListener(name, record);
  source.onerror = () => { source.close(); resolve(blocks); };
})
"""


@pytest.fixture
def cases() -> Iterator[str]:
    """A server of the cases; `/3` is the case with index 3."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> tuple[str, bytes]:
        number = request.path.strip("/")
        if number.isdigit():
            return "text/event-stream", CASES[int(number)].sent
        return "text/html", b"<!doctype html>"

    with serve(answer) as port:
        yield f"http://127.0.0.1:{port}"


async def test_the_client_reads_each_case_in_any_pieces(page: Page, cases: str) -> None:
    await page.route("**/client.js", lambda route: route.fulfill(path="bridge/client/client.js"))
    await page.goto(cases)
    sent = [b64encode(case.sent).decode("ascii") for case in CASES]
    results = await page.evaluate(PARSE, [f"{cases}/client.js", sent])
    faults = [
        f"{case.rule} ({way}): {json.dumps(found)}"
        for case, ways in zip(CASES, results, strict=True)
        for way, found in ways.items()
        if found != [[list(block) for block in case.blocks], list(case.retries)]
    ]
    assert not faults, "\n".join(faults)


async def test_the_browsers_own_eventsource_agrees_with_the_table(page: Page, cases: str) -> None:
    await page.goto(cases)
    for number, case in enumerate(CASES):
        found = await page.evaluate(LISTEN, f"{cases}/{number}")
        assert found == [list(block) for block in case.blocks], case.rule
