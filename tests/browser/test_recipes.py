"""Runs the code for pages in README.md and docs/resume.md unchanged, in each engine and with a real bridge."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.browser.engines import Engine, Tab
from tests.browser.site import Answer, Request, Site, answer_json
from tests.conftest import Eventually, StartService
from tests.patience import PATIENCE
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

pytestmark = pytest.mark.any_rabbitmq

ROOT = Path(__file__).parents[2]

# The functions that the recipes leave to the page. `log` has what was shown, in order.
PAGE = """
<!doctype html><link rel=icon href="data:,"><title>test</title><script>
window.log = [];
window.whose = null;
function show(state) { whose = state.user ?? null; log.push(state.user ? `load ${state.user}` : state.job_id); }
function apply(event) { log.push(event.data.job_id); }
function clear() { whose = null; log.push("clear"); }
function fetchMyState() { log.push("gap"); }
</script>
"""


def read_recipe(path: str, heading: str) -> list[str]:
    """The JavaScript in a section of a page of the docs."""
    text = (ROOT / path).read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    blocks: list[str] = re.findall(r"^```js\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert blocks, f"{path} has no code under {heading}"
    return blocks


def make_page(*scripts: str) -> Answer:
    return Answer(200, PAGE + "".join(f"<script>\n{script}\n</script>" for script in scripts))


class Application:
    """An application with a log-in, an API and pages that follow the recipe of docs/resume.md."""

    def __init__(self, engine: Engine, site: Site, service: Service, vhost: Vhost) -> None:
        self.engine = engine
        self.site = site
        self.service = service
        self._vhost = vhost
        self._users: dict[str, str] = {}
        self.state_requests: asyncio.Queue[tuple[Request, asyncio.Future[Answer]]] = asyncio.Queue()
        """Requests for the state, if `answers` is off."""
        self.answers = True
        site.routes["/"] = lambda _: make_page(*read_recipe("docs/resume.md", "A page that is never wrong"))
        site.routes["/api/jobs"] = self._serve

    def state(self, request: Request) -> Answer:
        token = request.headers.get("cookie", "").partition("bridge_token=")[2]
        return answer_json({"user": self._users[token]}) if token in self._users else Answer(401, "log in")

    def _serve(self, request: Request) -> Answer | asyncio.Future[Answer]:
        if self.answers:
            return self.state(request)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.state_requests.put_nowait((request, answer))
        return answer

    async def log_in(self, user: str, *groups: str) -> None:
        token = mint(user, *groups)
        self._users[token] = user
        await self.engine.set_cookie(f"{self.site.origin}/log-in", "bridge_token", token)

    async def log_out(self) -> None:
        """Logs out without notifying any page."""
        await self.engine.clear_cookies()

    async def open(self) -> Tab:
        return await self.engine.open_tab(self.site.origin)

    async def publish(self, job: str, user: str = "42") -> None:
        await self._vhost.publish(f"user.{user}.job.completed", cloudevent(job, job_id=job))

    async def next_request(self) -> tuple[Request, asyncio.Future[Answer]]:
        async with asyncio.timeout(PATIENCE):
            return await self.state_requests.get()


@pytest.fixture
async def application(engine: Engine, start: StartService, vhost: Vhost) -> AsyncIterator[Application]:
    async with Site("") as site:
        service = await start(RETRY_SECONDS="0.2", ALLOWED_ORIGINS=site.origin)
        site.bridge = service.public
        made = Application(engine, site, service, vhost)
        await made.log_in("42")
        yield made


async def test_a_state_that_cannot_be_fetched_is_fetched_again_before_any_event_is_applied(
    application: Application,
) -> None:
    application.answers = False
    tab = await application.open()
    _, answer = await application.next_request()
    ready = await tab.get("lastId")
    await application.publish("e1")
    await tab.until(f"lastId !== '{ready}'")
    answer.set_result(Answer(503, "not now"))
    request, answer = await application.next_request()
    assert await tab.get("log") == ["clear"]
    answer.set_result(application.state(request))
    await tab.until("log.includes('e1')")
    assert await tab.get("log") == ["clear", "load 42", "e1"]


async def test_after_an_event_that_cannot_be_applied_the_state_is_fetched(application: Application) -> None:
    tab = await application.open()
    await tab.until("whose")
    await tab.get("window.usual = apply")
    await tab.call("() => { apply = () => { apply = usual; throw Error('no such job') } }")
    await application.publish("e1")
    await tab.until("log.length >= 3")
    await application.publish("e2")
    await tab.until("log.includes('e2')")
    assert await tab.get("log") == ["clear", "load 42", "load 42", "e2"]


async def test_a_stream_that_reconnects_as_another_user_clears_the_page(application: Application) -> None:
    application.answers = False
    tab = await application.open()
    of_42, late = await application.next_request()
    state_of_42 = application.state(of_42)
    ready = await tab.get("lastId")
    await application.publish("of-42")
    await tab.until(f"lastId !== '{ready}'")
    # Another user logs in in another tab, while this page waits for its state.
    await application.log_in("43")
    application.site.cut()
    request, answer = await application.next_request()
    answer.set_result(application.state(request))
    await tab.until("whose === '43'")
    if not late.done():
        late.set_result(state_of_42)
    await application.publish("also-of-42")
    await application.publish("of-43", "43")
    await tab.until("log.includes('of-43')")
    assert await tab.get("log") == ["clear", "clear", "load 43", "of-43"]


async def test_a_stream_that_reconnects_with_other_groups_clears_the_page(application: Application) -> None:
    """The page may see other events now: the old group's data is removed, and the new group's is loaded."""
    await application.log_in("42", "ops")
    tab = await application.open()
    await tab.until("whose")
    await application.log_in("42", "sales")
    application.site.cut()
    await tab.until("log.length >= 4")
    await application.publish("e1")
    await tab.until("log.includes('e1')")
    assert await tab.get("log") == ["clear", "load 42", "clear", "load 42", "e1"]


async def test_a_state_of_another_user_than_the_streams_is_not_shown(application: Application) -> None:
    tab = await application.open()
    await tab.until("whose")
    await application.log_in("43")
    await tab.call("() => load()")  # As after a gap.
    await tab.until("whose === '43'")
    await application.publish("of-42")
    await application.publish("of-43", "43")
    await tab.until("log.includes('of-43')")
    assert await tab.get("log") == ["clear", "load 42", "clear", "load 43", "of-43"]


async def test_a_log_out_clears_the_page_in_all_tabs(application: Application, eventually: Eventually) -> None:
    one, two = [await application.open() for _ in range(2)]
    for tab in (one, two):
        await tab.until("whose")
    await one.call("() => logOut()")
    for tab in (one, two):
        await tab.until("whose === null")
        assert await tab.get("log") == ["clear", "load 42", "clear"]
    count = len(application.site.streams)
    await application.log_in("43")
    await two.call("() => listen()")
    await two.until("whose === '43'")
    assert application.site.streams[count].cursor is None, "the other user's cursor must not be used"
    assert len(application.site.streams) == count + 1
    assert await one.get("log") == ["clear", "load 42", "clear"]


@pytest.mark.parametrize("answer", [None, Answer(302, headers={"Location": "/log-in"})], ids=["401", "redirect"])
async def test_after_a_log_out_without_notice_the_page_is_cleared_when_its_stream_ends(
    application: Application, answer: Answer | None
) -> None:
    tab = await application.open()
    await tab.until("whose")
    await application.log_out()
    application.site.answer = answer
    application.site.cut()
    await tab.until("whose === null")
    assert await tab.get("log") == ["clear", "load 42", "clear"]
    assert await tab.get("source") is None


async def test_a_stream_that_was_given_up_is_opened_again_and_resumes(application: Application) -> None:
    tab = await application.open()
    await tab.until("whose")
    last = await tab.get("lastId")
    application.site.answer = Answer(502, "no bridge")
    application.site.cut()
    await tab.until("failures >= 2")
    await application.publish("e1")
    application.site.answer = None
    await tab.until("log.includes('e1')")
    assert await tab.get("log") == ["clear", "load 42", "e1"]
    assert {request.cursor for request in application.site.streams[1:]} == {last}


async def test_a_page_that_was_left_and_opened_again(application: Application) -> None:
    tab = await application.open()
    await tab.until("whose")
    await tab.goto(f"{application.site.origin}/elsewhere")
    await application.publish("meanwhile")
    await tab.back()
    await tab.until("location.pathname === '/' && whose && source.readyState === EventSource.OPEN")
    await application.publish("after")
    await tab.until("log.includes('after')")
    found = await tab.get("log")
    # A page from the cache gets the missed event; a page that is loaded again has it in its state.
    assert found in (["clear", "load 42", "meanwhile", "after"], ["clear", "load 42", "after"])

    await tab.goto(f"{application.site.origin}/elsewhere")
    await application.log_out()
    await tab.back()
    await tab.until("location.pathname === '/' && log.at(-1) === 'clear' && source === null")
    assert await tab.get("whose") is None


Break = Callable[[Site, Tab], Awaitable[None]]


async def answer_502(site: Site, tab: Tab) -> None:
    site.answer = Answer(502, "no bridge")
    site.cut()
    await tab.until("failures >= 2")


async def refuse(site: Site, tab: Tab) -> None:
    site.refuse()
    site.cut()
    # Firefox gives up, because the page is of another origin. The others reconnect by themselves, without a signal.
    await tab.until("failures >= 2 || !navigator.userAgent.includes('Firefox')")


@pytest.mark.parametrize("breaks", [answer_502, refuse])
async def test_the_readmes_page_resumes(engine: Engine, start: StartService, vhost: Vhost, breaks: Break) -> None:
    async with Site("") as page, Site("") as site:
        service = await start(RETRY_SECONDS="0.2", ALLOWED_ORIGINS=page.origin)
        site.bridge = service.public
        await engine.set_cookie(site.origin, "bridge_token", mint("42"))
        listen, _ = read_recipe("README.md", "Listen")
        assert "https://events.example.com" in listen
        page.routes["/"] = lambda _: make_page(listen.replace("https://events.example.com", site.origin))
        tab = await engine.open_tab(page.origin)
        await tab.until("lastId")
        last = await tab.get("lastId")
        await breaks(site, tab)
        await vhost.publish("user.42.job.completed", cloudevent("e1", job_id="e1"))
        site.answer = None
        if breaks is refuse:
            await site.open()
        await tab.until("log.length")
        assert await tab.get("log") == ["e1"]
        assert {request.cursor for request in site.streams[1:]} == {last}
