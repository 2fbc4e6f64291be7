"""The application is asked whose a request is. A real HTTP server answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bridge.service.http.claims import Subscriber, TryAgain
from bridge.service.http.login import (
    MAX_ANSWER_BYTES,
    REVALIDATE_SECONDS,
    ApplicationLogin,
    LoginForbidden,
    NotLoggedIn,
    read_answer,
)
from tests.patience import PATIENCE

ANN = {"user": "ann", "groups": ["ops"], "expires_in": 600}


def read(value: object, status: int = 200) -> Subscriber:
    return read_answer(status, json.dumps(value).encode(), 1000.0, shown="http://app/login")


@pytest.mark.contract("6.41")
@pytest.mark.parametrize(
    ("value", "subscriber"),
    [
        (ANN, Subscriber("ann", ("ops",), 1600.0)),
        ({"user": 42, "more": 1}, Subscriber("42", (), 1000 + REVALIDATE_SECONDS)),
        ({"user": "a", "groups": None, "expires_in": 0.5}, Subscriber("a", (), 1000.5)),
        ({"user": "a", "groups": ["x", 7, "x", ""]}, Subscriber("a", ("x", "7"), 1300.0)),
    ],
)
def test_an_answer_names_a_subscriber(value: object, subscriber: Subscriber) -> None:
    assert read(value) == subscriber


@pytest.mark.contract("6.43")
@pytest.mark.parametrize(
    "value",
    [
        [], None, {}, {"user": ""}, {"user": None}, {"user": True}, {"user": 1.5}, {"user": "a", "groups": "ops"},
        {"user": "a", "groups": [None]}, {"user": "a", "groups": [True]}, {"user": "a", "expires_in": 0},
        {"user": "a", "expires_in": -1}, {"user": "a", "expires_in": "60"}, {"user": "a", "expires_in": True},
        {"user": "a", "expires_in": float("inf")}, {"user": "a", "expires_in": float("nan")},
    ],
)  # fmt: skip
def test_an_answer_that_is_not_as_agreed_is_temporary(value: object) -> None:
    with pytest.raises(TryAgain, match="http://app/login answers"):
        read(value)


@pytest.mark.contract("6.43")
@pytest.mark.parametrize("status", [201, 204, 400, 404, 429, 500, 502, 503])
def test_another_status_is_temporary(status: int) -> None:
    with pytest.raises(TryAgain, match=f"answers {status}"):
        read(ANN, status)


@pytest.mark.contract("6.43")
def test_a_redirect_is_temporary_and_says_what_to_do() -> None:
    with pytest.raises(TryAgain, match="must answer 401 itself"):
        read(ANN, 302)
    with pytest.raises(TryAgain, match="an HTML page"):
        read_answer(200, b"\n<html>", 0, shown="http://app")
    with pytest.raises(TryAgain, match="no JSON"):
        read_answer(200, b"[" * 100_000, 0, shown="http://app")


@pytest.mark.contract("6.42")
@pytest.mark.parametrize(("status", "error"), [(401, NotLoggedIn), (403, LoginForbidden)])
def test_a_refusal_has_the_reason_of_the_application(status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="Please log in again"):
        read({"detail": "Please log in again."}, status)
    for body in (b"", b"<html>", b'"x"', b'{"detail":1}', b"[]"):
        with pytest.raises(error, match="the application"):
            read_answer(status, body, 0, shown="http://app")


class Application:
    """Answers the questions, and records their headers."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, str]], tuple[int, dict[str, str], bytes]] = lambda _: (200, {}, encoded(ANN))
        self.may_answer = threading.Event()
        self.may_answer.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.asked.append(headers)
                outer.may_answer.wait(PATIENCE)
                status, more, body = outer.answer(headers)
                self.send_response(status)
                for name, value in {**more, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/login"


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
async def application() -> AsyncIterator[Application]:
    made = Application()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield made
    finally:
        made.may_answer.set()
        await asyncio.to_thread(made.server.shutdown)
        thread.join()
        made.server.server_close()


@asynccontextmanager
async def asking(url: str, **options: Any) -> AsyncIterator[ApplicationLogin]:
    given: dict[str, Any] = {
        "forwarded": ["Cookie"],
        "timeout": PATIENCE,
        "remember_seconds": PATIENCE,
        "concurrency": 9,
    } | options
    login = ApplicationLogin(url, **given)
    try:
        yield login
    finally:
        await login.close()


@pytest.mark.contract("6.40")
async def test_only_the_listed_headers_are_passed_on(application: Application) -> None:
    async with asking(application.url, forwarded=["cookie", "X-Tenant"]) as login:
        picked = login.pick([("Cookie", "a=é"), ("cookie", "b=2"), ("X-TENANT", "t"), ("Authorization", "secret")])
        assert (await login.ask(picked)).user == "ann"
    (asked,) = application.asked
    assert asked["x-tenant"] == "t"
    assert asked["accept"] == "application/json"
    assert "authorization" not in asked


@pytest.mark.contract("6.40")
async def test_one_users_cookie_is_never_sent_with_another_users_question(application: Application) -> None:
    application.answer = lambda _: (200, {"Set-Cookie": "session=ann; Path=/"}, encoded(ANN))
    async with asking(application.url) as login:
        await login.ask([("cookie", "a=1")])
        await login.ask([])
    assert "cookie" not in application.asked[1]


@pytest.mark.contract("6.40", "6.43")
async def test_a_redirect_is_not_followed(application: Application) -> None:
    application.answer = lambda _: (302, {"Location": "/login"}, b"")
    async with asking(application.url) as login:
        with pytest.raises(TryAgain, match="redirects"):
            await login.ask([])
    assert len(application.asked) == 1


@pytest.mark.contract("6.45")
async def test_requests_with_the_same_headers_share_a_question_and_its_answer(application: Application) -> None:
    outcomes: list[str] = []
    async with asking(application.url, on_answer=lambda outcome, _: outcomes.append(outcome)) as login:
        application.may_answer.clear()
        asked = [asyncio.create_task(login.ask([("cookie", "a=1")])) for _ in range(5)]
        while not application.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # The server's thread sends no signal.
        application.may_answer.set()
        assert {one.user for one in await asyncio.gather(*asked)} == {"ann"}
        remembered = await login.ask([("cookie", "a=1")])
        assert len(application.asked) == 1
        assert remembered.issued_at is not None
        assert remembered.issued_at <= time.time(), "when it was asked, so that an order after it makes it old"
        await login.ask([("cookie", "a=1")], again=True)
        await login.ask([("cookie", "b=1")])
        assert len(application.asked) == 3
    assert sorted(outcomes) == ["accepted"] * 3 + ["remembered"]


@pytest.mark.contract("6.45")
async def test_a_refusal_is_not_remembered_and_ends_what_was(application: Application) -> None:
    async with asking(application.url) as login:
        await login.ask([])
        application.answer = lambda _: (401, {}, b"")
        with pytest.raises(NotLoggedIn):
            await login.ask([], again=True)
        with pytest.raises(NotLoggedIn):
            await login.ask([])
        application.answer = lambda _: (200, {}, encoded(ANN))
        assert (await login.ask([])).user == "ann"


@pytest.mark.contract("6.45")
async def test_an_answer_is_not_remembered_for_longer_than_it_holds(application: Application) -> None:
    application.answer = lambda _: (200, {}, encoded({**ANN, "expires_in": 1e-9}))
    async with asking(application.url) as login:
        await login.ask([])
        await login.ask([])
    assert len(application.asked) == 2


@pytest.mark.contract("6.45")
async def test_questions_wait_for_a_free_place(application: Application) -> None:
    async with asking(application.url, concurrency=1) as login:
        application.may_answer.clear()
        asked = [asyncio.create_task(login.ask([("cookie", f"a={number}")])) for number in range(3)]
        while not application.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # The server's thread sends no signal.
        assert len(application.asked) == 1
        application.may_answer.set()
        await asyncio.gather(*asked)
    assert len(application.asked) == 3


@pytest.mark.contract("6.43")
async def test_an_application_that_is_silent_or_away_is_temporary(application: Application) -> None:
    application.may_answer.clear()
    async with asking(application.url, timeout=0.05) as login:
        with pytest.raises(TryAgain, match=r"has not answered within 0\.05 s"):
            await login.ask([])
    async with asking("http://user:secret@127.0.0.1:1/x?token=1") as login:
        with pytest.raises(TryAgain, match="cannot be asked") as error:
            await login.ask([])
    assert "secret" not in str(error.value)
    assert "token" not in str(error.value)


@pytest.mark.contract("6.43")
async def test_an_answer_without_an_end_is_temporary(application: Application) -> None:
    application.answer = lambda _: (200, {}, b" " * (MAX_ANSWER_BYTES + 1))
    async with asking(application.url) as login:
        with pytest.raises(TryAgain, match="more than"):
            await login.ask([])
