"""Headers as real clients send them."""

import pytest

from bridge.service.http.headers import (
    MOST_ASKED,
    MOST_ASKED_BYTES,
    STREAM_REQUEST_HEADERS,
    admits_stream,
    allowed_headers,
    bearer_token,
    is_own_origin,
    normal_origin,
)

JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
"""The default of java.net.HttpURLConnection."""


@pytest.mark.contract("6.27")
@pytest.mark.parametrize(
    ("lines", "admitted"),
    [
        ([], True), ([""], True), ([JAVA], True), (["*/*"], True), (["*"], True), (["text/*"], True),
        (["TEXT/Event-Stream"], True), (["text/event-stream; charset=utf-8"], True),
        (["text/html,text/event-stream;q=0.001"], True), (["text/html", "text/event-stream"], True),
        (["text/event-stream ; q=1.0 ; x=y"], True), (["text/event-stream;q=1."], True), (["*/*;q=.1"], True),
        # A part that cannot be read excludes nothing.
        (["nonsense"], True), (["text/event-stream;q=high"], True), (["text/event-stream;q=1.2.3"], True),
        (['text/html;level="a,b"', "*/*"], True), ([";q=0"], True), ([","], True),
        (["application/json"], False), (["text/html, application/json;q=0.9"], False), (["nonsense, text/html"], False),
        (["text/event-stream;q=0"], False), (["text/event-stream;q=0.000"], False), (["*/*;q=0"], False),
        # The most specific range decides.
        (["text/event-stream;q=0, text/*, */*"], False), (["*/*, text/*;q=0"], False),
        (["*/*;q=0, text/event-stream"], True), (["text/*;q=0", "text/event-stream;q=.5"], True),
        (["text/event-stream;q=0, text/event-stream;q=1"], True),
    ],
)  # fmt: skip
def test_accept(lines: list[str], admitted: bool) -> None:
    assert admits_stream(lines) is admitted


@pytest.mark.contract("6.24")
@pytest.mark.parametrize(
    ("lines", "token"),
    [
        (["Bearer a.b.c"], "a.b.c"), (["bearer a.b.c"], "a.b.c"), (["BEARER   a.b.c  "], "a.b.c"), (["Bearer\ta"], "a"),
        (["Basic dTpw", "Bearer a"], "a"), (["Bearer a", "Bearer b"], "a"),
        ([], None), ([""], None), (["Basic dTpw"], None), (["Bearer"], None), (["Bearer "], None), (["Bearera"], None),
    ],
)  # fmt: skip
def test_bearer(lines: list[str], token: str | None) -> None:
    assert bearer_token(lines) == token


@pytest.mark.contract("6.28")
@pytest.mark.parametrize(
    ("origin", "normal"),
    [
        ("https://App.Example", "https://app.example"), ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"), ("http://app.example:443", "http://app.example:443"),
        ("http://app.example:8080", "http://app.example:8080"), ("https://[::1]:443", "https://[::1]"),
        ("null", "null"), ("", ""),
    ],
)  # fmt: skip
def test_origins(origin: str, normal: str) -> None:
    assert normal_origin(origin) == normal


@pytest.mark.contract("5.39", "6.28")
@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("https://a.example", "a.example", True), ("https://A.example", "a.EXAMPLE", True),
        ("https://a.example", "a.example:443", True), ("https://a.example:443", "a.example", True),
        ("http://a.example", "a.example:80", True), ("http://a.example:8080", "a.example:8080", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("http://a.example", "a.example:443", False), ("http://a.example:8080", "a.example", False),
        ("https://a.example.evil", "a.example", False), ("https://evil", "a.example", False), ("null", "null", False),
        ("null", "", False), ("", "", False), ("https://", "", False), ("http://[", "[", False), ("x", "x", False),
        ("file://a.example", "a.example", False), ("https://a.example/", "a.example", False),
        ("https://u@a.example", "a.example", False),
    ],
)  # fmt: skip
def test_own_origin(origin: str, host: str, own: bool) -> None:
    assert is_own_origin(origin, host) is own


OURS = ", ".join(STREAM_REQUEST_HEADERS)


@pytest.mark.contract("6.29")
@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ([], ""),
        ([""], ""),
        (["traceparent,baggage"], ", traceparent, baggage"),
        (["traceparent , baggage", "Sentry-Trace"], ", traceparent, baggage, Sentry-Trace"),
        (["authorization,ACCEPT,last-event-id"], ""),
        (["x,x,X"], ", x"),
        # Only names of headers are repeated: nothing that ends a line or begins another value.
        (['a b,c:d,e\r\nf,\xe9,g;h,*"i,j'], ", j"),
        (["*"], ", *"),
        (["a" * MOST_ASKED_BYTES], ", " + "a" * MOST_ASKED_BYTES),
        (["a" * (MOST_ASKED_BYTES + 1)], ""),
        ([",".join(f"x{number}" for number in range(2 * MOST_ASKED))], "".join(f", x{n}" for n in range(MOST_ASKED))),
    ],
)
def test_a_preflight_is_allowed_the_names_that_it_asks_for(asked: list[str], more: str) -> None:
    assert allowed_headers(asked) == OURS + more
