"""Asks the application who sent a request, for applications with sessions of their own (`BRIDGE_AUTH_URL`).

The application gets some headers of the request, such as `Cookie`, and answers with the user. The bridge itself reads
no session. `read_answer` decides what an answer means; the class asks, and limits how often.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Literal

import httpx

from bridge import __version__
from bridge.service.http.claims import InvalidToken, Refusal, Subscriber, TryAgain

REVALIDATE_SECONDS = 300.0
"""How long an answer without `expires_in` holds. A session may end at any time, so it is asked again."""

MAX_ANSWER_BYTES = 65_536
MAX_REMEMBERED = 4_096
"""Answers that are kept for a moment."""

_SHOWN_CHARS = 300

Outcome = Literal["accepted", "remembered", "refused", "unavailable"]
Headers = Sequence[tuple[str, str]]


class NotLoggedIn(InvalidToken):
    """401: the application knows no user for this request."""

    code = "not-logged-in"


class LoginForbidden(Refusal):
    """403: the application refuses this user."""

    code = "forbidden-by-application"


class ApplicationLogin:
    """
    Args:
        url: asked with GET.
        forwarded: names of the headers that the application gets, without regard to case.
        timeout: limit of one question in seconds, with its wait for a free connection.
        remember_seconds: how long an answer is used for further requests with the same headers. A refusal is not: after
            a log-in, the same cookie may be a user's.
        concurrency: the most questions at once.
        on_answer: called with the outcome of each request, and the seconds that its question took.
    """

    def __init__(
        self,
        url: str,
        *,
        forwarded: Iterable[str],
        timeout: float,
        remember_seconds: float,
        concurrency: int,
        on_answer: Callable[[Outcome, float], object] = lambda *_: None,
    ) -> None:
        self.url = url
        self._shown = str(httpx.URL(url).copy_with(username="", password="", query=None))
        self._forwarded = frozenset(name.lower() for name in forwarded)
        self._timeout = timeout
        self._remember_seconds = remember_seconds
        self._slots = asyncio.Semaphore(concurrency)
        self._on_answer = on_answer
        self._answers: OrderedDict[bytes, tuple[Subscriber, float]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[Subscriber]] = {}
        # A jar that takes no cookie: one user's session must never be sent with another user's question.
        self._client = httpx.AsyncClient(
            timeout=timeout,
            follow_redirects=False,
            cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=[])),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def pick(self, headers: Iterable[tuple[str, str]]) -> Headers:
        """The headers of a request that the application gets."""
        return [(name, value) for name, value in headers if name.lower() in self._forwarded]

    def forget(self, user: str) -> None:
        """Drops what is remembered of a user."""
        for key in [key for key, (subscriber, _) in self._answers.items() if subscriber.user == user]:
            del self._answers[key]

    async def ask(self, headers: Headers, *, again: bool = False) -> Subscriber:
        """The subscriber of a request. Requests with the same headers share one question.

        Args:
            headers: those of `pick`.
            again: asks even if an answer is remembered.

        Raises:
            NotLoggedIn, LoginForbidden: the application refuses. The message has its reason, if it gives one.
            TryAgain: it does not answer now, or not as it should.

        Cancelling does not end the question.
        """
        key = hashlib.sha256(json.dumps(sorted(headers)).encode()).digest()
        now = time.time()
        if not again and (known := self._answers.get(key)) is not None and now < known[1]:
            self._on_answer("remembered", 0.0)
            return known[0]
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._ask(key, headers), name="login")
            task.add_done_callback(lambda done: self._end(key, done))
        return await asyncio.shield(task)

    def _end(self, key: bytes, task: asyncio.Task[Subscriber]) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # The request may be gone; then nothing else reads it.

    async def _ask(self, key: bytes, headers: Headers) -> Subscriber:
        begun, asked_at = time.monotonic(), time.time()
        outcome: Outcome = "unavailable"
        try:
            subscriber = replace(await self._fetch(headers), issued_at=asked_at)
            outcome = "accepted"
        except TryAgain:
            raise
        except Refusal:
            outcome = "refused"
            self._answers.pop(key, None)
            raise
        finally:
            self._on_answer(outcome, time.monotonic() - begun)
        self._answers[key] = subscriber, min(time.time() + self._remember_seconds, subscriber.expires_at)
        self._answers.move_to_end(key)
        if len(self._answers) > MAX_REMEMBERED:
            self._answers.popitem(last=False)
        return subscriber

    async def _fetch(self, headers: Headers) -> Subscriber:
        own = {"accept": "application/json", "user-agent": f"rabbitmq-sse-bridge/{__version__}"}
        sent = [(name.lower(), value) for name, value in headers]
        sent += [(name, value) for name, value in own.items() if name not in dict(sent)]
        # As the server decoded them (RFC 9110, section 5.5).
        raw = [(name.encode("ascii"), value.encode("latin-1")) for name, value in sent]
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._slots,
                self._client.stream("GET", self.url, headers=raw) as response,
            ):
                body = bytearray()
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise TryAgain(f"{self._shown} answers more than {MAX_ANSWER_BYTES} bytes")
                return read_answer(response.status_code, bytes(body), time.time(), shown=self._shown)
        except TimeoutError:
            raise TryAgain(f"{self._shown} has not answered within {self._timeout:g} s") from None
        except httpx.HTTPError as error:
            raise TryAgain(f"{self._shown} cannot be asked: {error or type(error).__name__}") from None

    async def close(self) -> None:
        """Ends all questions and connections."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


def read_answer(status: int, body: bytes, now: float, *, shown: str) -> Subscriber:
    """
    Args:
        now: seconds since 1970.
        shown: the address, for messages.

    Raises:
        NotLoggedIn, LoginForbidden: 401 and 403.
        TryAgain: any other answer. It may be that of a proxy in front of an application that starts.
    """
    if status == 401:
        raise NotLoggedIn(_detail(body) or "the application does not know who you are: log in, and open the page again")
    if status == 403:
        raise LoginForbidden(_detail(body) or "the application refuses this user")
    if 300 <= status < 400:
        raise TryAgain(
            f"{shown} redirects ({status}), perhaps to a login page: it must answer 401 itself to a request without a "
            "login"
        )
    if status != 200:
        raise TryAgain(f"{shown} answers {status}; expected are 200, 401 and 403")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        what = "an HTML page" if body.lstrip()[:1] == b"<" else "no JSON"
        raise TryAgain(f'{shown} answers {what}; expected is {{"user": …, "groups": […], "expires_in": …}}') from None
    if not isinstance(value, dict):
        raise TryAgain(f"{shown} answers JSON that is not an object")
    return Subscriber(
        user=_user(value.get("user"), shown),
        groups=_groups(value.get("groups"), shown),
        expires_at=now + _seconds(value.get("expires_in"), shown),
    )


def _user(value: object, shown: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise TryAgain(f"{shown} answers no `user`: it must be text that is not empty, or an integer")
    return value


def _groups(value: object, shown: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(
        isinstance(group, str | int) and not isinstance(group, bool) for group in value
    ):
        raise TryAgain(f"{shown} answers `groups` that are not a list of texts or integers")
    return tuple(dict.fromkeys(str(group) for group in value if group != ""))


def _seconds(value: object, shown: str) -> float:
    if value is None:
        return REVALIDATE_SECONDS
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise TryAgain(f"{shown} answers `expires_in` that is not a number of seconds above 0")
    return float(value)


def _detail(body: bytes) -> str:
    """The reason in a problem document (RFC 9457), or in the `detail` of a framework's own answer."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""
    return detail[:_SHOWN_CHARS] if isinstance(detail, str) else ""
