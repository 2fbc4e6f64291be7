"""`python -m tests.browser.chaos --seconds 120 --seed 7`: two people, seven tabs, and everything that happens to tabs.

A real browser, RabbitMQ, a bridge, and a TCP proxy between browser and bridge. Faults are drawn with a seed, which is
printed; the same seed draws the same faults, though the machine's timing differs. Afterwards the log of each tab is
judged: no event of somebody else, none of one's own missed or twice, no gap that was not needed.

`Engine` is what a browser has to do for this. Chromium is the one that is here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from playwright.async_api import BrowserContext, Error, Playwright, async_playwright
from playwright.async_api import Page as PlaywrightPage

from deploy.local.node import MACHINES, Installation, Node
from tests.browser.conftest import Freezer, empty_pages
from tests.browser.engines import CHROMIUM_FLAGS
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

TABS = 7
PEOPLE = {"42": ("ops",), "43": ()}
AUDIENCES = {"42": ["user.42", "group.ops", "all"], "43": ["user.43", "all"]}
LEAST_FAULTS = 12
"""The storm lasts until so many have happened: a slow machine has few in a second."""

SUBSCRIBE = """
async ([client, options, token]) => {
  const { subscribe } = await import(client);
  window.log = [];
  let last;
  window.subscription = subscribe({
    ...options,
    ...(token ? { token: () => token } : {}),
    onEvent: (event) => log.push(["event", event.data.job_id]),
    onGap: ({ reason }) => log.push(["gap", reason]),
    onState: ({ user, status, leads }) => {
      if (user !== last) log.push(["user", (last = user)]);
      log.push(["state", `${status}${leads ? ", leads" : ""} ${new Date().toISOString().slice(14, 23)}`]);
    },
  });
}
"""


# What a browser has to do.


class Page(Protocol):
    async def goto(self, url: str) -> None: ...
    async def evaluate(self, script: str, given: Any = None) -> Any: ...
    async def freeze(self, freezer: Freezer) -> None: ...
    async def crash(self) -> None:
        """Ends it as a fault would; nothing can be asked of it any more."""

    async def close(self) -> None: ...


class Engine(Protocol):
    """One browser of one person at a time, whose tabs share cookies."""

    name: str

    async def start(self) -> None: ...
    async def new_page(self) -> Page: ...
    async def set_cookie(self, url: str, token: str | None) -> None:
        """None logs out."""

    async def stop(self) -> None: ...


class ChromiumPage:
    def __init__(self, page: PlaywrightPage) -> None:
        self._page = page

    async def goto(self, url: str) -> None:
        await self._page.goto(url)

    async def evaluate(self, script: str, given: Any = None) -> Any:
        return await self._page.evaluate(script, given)

    async def freeze(self, freezer: Freezer) -> None:
        await freezer.freeze(self._page)

    async def crash(self) -> None:
        devtools = await self._page.context.new_cdp_session(self._page)
        crashed = asyncio.Event()
        self._page.on("crash", lambda _: crashed.set())
        crash = asyncio.create_task(devtools.send("Page.crash"))  # Nobody answers it.
        async with asyncio.timeout(PATIENCE):
            await crashed.wait()
        crash.cancel()
        await asyncio.gather(crash, return_exceptions=True)
        await self.close()

    async def close(self) -> None:
        await self._page.close()


class Chromium:
    name = "chromium"

    def __init__(self) -> None:
        self._manager = async_playwright()
        self._playwright: Playwright
        self._context: BrowserContext

    async def start(self) -> None:
        chromium = shutil.which("chromium")
        assert chromium is not None, "chromium is missing: apt-get install chromium"
        self._playwright = await self._manager.start()
        browser = await self._playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        self._context = await browser.new_context()
        self._context.set_default_timeout(1000 * PATIENCE)

    async def new_page(self) -> Page:
        return ChromiumPage(await self._context.new_page())

    async def set_cookie(self, url: str, token: str | None) -> None:
        await self._context.clear_cookies()
        if token is not None:
            await self._context.add_cookies([{"name": "bridge_token", "value": token, "url": url, "httpOnly": True}])

    async def stop(self) -> None:
        await self._playwright.stop()


ENGINES: dict[str, Callable[[], Engine]] = {"chromium": Chromium}


# The oracle.


@dataclass
class Life:
    """One page from its load to its end, with what it was told, in order."""

    name: str
    token: bool
    """Whether it has a token of its own, and so does not follow the browser's login."""
    log: list[list[str | None]] = field(default_factory=list)
    owed: dict[str, int] = field(default_factory=dict)
    """By audience: the first event that was published after the page was seen live as its last user."""
    at_end: bool = False


def judge(lives: list[Life], published: dict[str, int]) -> list[str]:
    """The faults.

    Args:
        published: how many events each audience got, numbered from 0.
    """
    faults = []
    for life in lives:
        user: str | None = None
        switched = False
        expected: dict[str, int] = {}
        first: dict[str, int] = {}
        for kind, value in life.log:
            if kind == "user":
                if value is not None:
                    switched = user not in (None, value)
                    if switched:
                        expected, first = {}, {}
                    user = value
            elif kind == "gap":
                if value != "other-user":
                    faults.append(f"{life.name}: gap {value}")
            elif kind == "event" and value is not None:
                audience, _, number = value.partition(":")
                if user is None or audience not in AUDIENCES[user]:
                    faults.append(f"{life.name}: {value} while it is {user}")
                    continue
                first.setdefault(audience, int(number))
                if audience in expected and int(number) != expected[audience]:
                    what = "missed" if int(number) > expected[audience] else "again or late"
                    faults.append(f"{life.name}: {value} where {audience}:{expected[audience]} is next ({what})")
                expected[audience] = int(number) + 1
        if not life.at_end:
            continue
        for audience in AUDIENCES[user or "42"]:
            if expected.get(audience, 0) != published[audience]:
                faults.append(f"{life.name}: ends before {audience}:{expected.get(audience)} of {published[audience]}")
            owed = life.owed.get(audience)
            if owed is not None and first.get(audience, 0) > owed:
                faults.append(f"{life.name}: begins with {audience}:{first[audience]}, and {owed} was owed")
    return faults


# The storm.


class Tab:
    def __init__(self, page: Page, life: Life) -> None:
        self.page = page
        self.life = life

    async def read(self) -> None:
        self.life.log += await self.page.evaluate("window.log?.splice(0) ?? []")


class Storm:
    def __init__(self, engine: Engine, seed: int, rabbitmq: Installation) -> None:
        self.engine = engine
        self.chance = random.Random(seed)
        self.node = Node(Path(tempfile.mkdtemp(prefix="browser-chaos-")), management=True, rabbitmq=rabbitmq)
        self.tabs: list[Tab] = []
        self.lives: list[Life] = []
        self.published = dict.fromkeys(["user.42", "user.43", "group.ops", "all"], 0)
        self.faults: Counter[str] = Counter()
        self.login: str | None = None
        self.person = "42"
        """Who is logged in, or was."""
        self.freezers: list[Freezer] = []

    async def run(self, seconds: float) -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            await asyncio.to_thread(self.node.start)
            stack.callback(self.node.remove)
            self.vhost = Vhost(self.node)
            self.vhost.create()
            stack.callback(self.vhost.close)
            self.origin = stack.enter_context(empty_pages())
            service = Service(
                self.vhost.url,
                ALLOWED_ORIGINS=self.origin,
                HEARTBEAT_SECONDS="2",
                RETRY_SECONDS="0.3",
                MAX_AGE_SECONDS="20",
                MAX_CONNECTIONS_PER_USER="100",
            )
            stack.push_async_callback(service.stop)
            await service.start()
            self.proxy = await stack.enter_async_context(Proxy(int(service.public.rpartition(":")[2])))
            stack.push_async_callback(self.engine.stop)
            await self.engine.start()
            try:
                return await self._storm(seconds)
            finally:
                for freezer in self.freezers:
                    freezer.stop()

    async def _storm(self, seconds: float) -> list[str]:
        await self.log_in("42")
        for _ in range(TABS):
            await self.open_tab()
        faults: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (5, self.burst),
            (4, self.close_a_tab_in_a_burst),
            (3, self.reload_a_tab),
            (2, self.crash_a_tab),
            (1, self.freeze_a_tab),
            (3, self.cut),
            (1, self.stall),
            (2, self.log_out),
            (4, self.change_person),
            (1, self.look_at_a_tab),
        ]
        ends = time.monotonic() + seconds
        while time.monotonic() < ends or self.faults.total() < LEAST_FAULTS:
            (fault,) = self.chance.choices([what for _, what in faults], [weight for weight, _ in faults])
            self.faults[fault.__name__] += 1
            print(f"{time.strftime('%H:%M:%S')} {fault.__name__}", file=sys.stderr)
            await fault()
            await asyncio.sleep(self.chance.uniform(0, 1))  # The pause between two faults.
        return await self._come_to_rest()

    async def _come_to_rest(self) -> list[str]:
        for freezer in self.freezers:
            freezer.thaw()
        await self.log_in(self.login or "42")
        await self.reload(self.page_of_login())
        deadline = time.monotonic() + 2 * PATIENCE
        while not all([await self._is_settled(tab) for tab in self.tabs]):
            assert time.monotonic() < deadline, [await tab.page.evaluate("subscription.state") for tab in self.tabs]
            await asyncio.sleep(0.2)  # Between two looks at seven pages.
        for tab in self.tabs:
            tab.life.owed = dict(self.published)
            tab.life.at_end = True
        await self.publish(dict.fromkeys(self.published, 3))
        while True:
            for tab in self.tabs:
                await tab.read()
            found = judge(self.lives, self.published)
            if not found or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.2)  # Between two looks at seven pages.

    async def _is_settled(self, tab: Tab) -> bool:
        state = await tab.page.evaluate("window.subscription?.state")
        return bool(state) and state["status"] == "live" and (tab.life.token or state["user"] == self.login)

    # What the browser and its people do.

    async def log_in(self, user: str | None) -> None:
        self.login = user
        self.person = user or self.person
        await self.engine.set_cookie(self.origin, mint(user, *PEOPLE[user]) if user else None)

    def page_of_login(self) -> Tab:
        """A page in which somebody logs in or out: one that uses the cookie."""
        return self.chance.choice([tab for tab in self.tabs if not tab.life.token])

    async def open_tab(self) -> None:
        # Two of the seven belong to an application with tokens, each to one of the two people.
        tokens = [tab.life.name.rpartition(" ")[2] for tab in self.tabs if tab.life.token]
        missing = next((user for user in PEOPLE if user not in tokens), None) if len(self.tabs) >= TABS - 2 else None
        page = await self.engine.new_page()
        tab = Tab(page, Life(f"tab {len(self.lives)} of {missing or 'the cookie'}", missing is not None))
        self.tabs.append(tab)
        self.lives.append(tab.life)
        await self.load(tab)

    async def load(self, tab: Tab) -> None:
        await tab.page.goto(self.origin)
        user = tab.life.name.rpartition(" ")[2]
        url = f"http://localhost:{self.proxy.port}"
        options: dict[str, Any] = {"url": f"{url}/events"}
        if self.chance.random() < 0.5:
            options["types"] = ["job.*"] if self.chance.random() < 0.5 else ["job.completed"]
        token = mint(user, *PEOPLE[user]) if tab.life.token else None
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await tab.page.evaluate(SUBSCRIBE, [f"{url}/client.js", options, token])
                return
            except Error:
                # A cut may hit the module itself, which a browser then does not load again in this page.
                assert time.monotonic() < deadline, "the page cannot load the client"
                await tab.page.goto(self.origin)

    async def reload(self, tab: Tab) -> None:
        await tab.read()
        tab.life = Life(tab.life.name + "'", tab.life.token) if not tab.life.token else Life(tab.life.name, True)
        self.lives.append(tab.life)
        await self.load(tab)

    async def publish(self, counts: dict[str, int]) -> None:
        messages = []
        for audience, count in counts.items():
            for _ in range(count):
                name = f"{audience}:{self.published[audience]}"
                self.published[audience] += 1
                messages.append((f"{audience}.job.completed", cloudevent(name, job_id=name)))
        self.chance.shuffle(counts_of := [audience for audience, count in counts.items() for _ in range(count)])
        # Shuffled between audiences, in order within each.
        by_audience = {
            audience: iter([m for m in messages if m[0].startswith(f"{audience}.job")]) for audience in counts
        }
        await self.vhost.publish_all([next(by_audience[audience]) for audience in counts_of])

    async def burst(self) -> None:
        await self.publish({audience: self.chance.randrange(60) for audience in self.published})

    async def close_a_tab_in_a_burst(self) -> None:
        burst = asyncio.create_task(self.burst())
        # Mostly the one that leads.
        leads = [tab for tab in self.tabs if await tab.page.evaluate("window.subscription?.state.leads ?? false")]
        tab = self.chance.choice(leads if leads and self.chance.random() < 0.8 else self.tabs)
        await self.end(tab, tab.page.close)
        await burst
        await self.open_tab()

    async def end(self, tab: Tab, how: Callable[[], Awaitable[None]]) -> None:
        await tab.read()
        self.tabs.remove(tab)
        await how()

    async def reload_a_tab(self) -> None:
        await self.reload(self.chance.choice(self.tabs))

    async def crash_a_tab(self) -> None:
        tab = self.chance.choice(self.tabs)
        await self.end(tab, tab.page.crash)
        await self.open_tab()

    async def freeze_a_tab(self) -> None:
        tab = self.chance.choice(self.tabs)
        await tab.read()
        freezer = Freezer()
        self.freezers.append(freezer)
        await tab.page.freeze(freezer)
        await self.burst()
        await asyncio.sleep(self.chance.uniform(1, 20))  # Long enough to be replaced, or not.
        freezer.thaw()

    async def cut(self) -> None:
        self.proxy.cut()

    async def stall(self) -> None:
        self.proxy.stall()
        await self.burst()
        await asyncio.sleep(self.chance.uniform(0.5, 8))  # The fault lasts for a time.
        self.proxy.cut()
        self.proxy.flow()

    async def log_out(self) -> None:
        await self.log_in(None)
        await self.reload(self.page_of_login())
        await self.burst()

    async def change_person(self) -> None:
        await self.log_in(next(user for user in PEOPLE if user != self.person))
        await self.reload(self.page_of_login())
        await self.burst()

    async def look_at_a_tab(self) -> None:
        tab = self.chance.choice(self.tabs)
        await tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange')); 0")


async def chaos(
    engine: str, *, seed: int, seconds: float, rabbitmq: Installation = MACHINES
) -> tuple[dict[str, Any], list[str], list[Life]]:
    storm = Storm(ENGINES[engine](), seed, rabbitmq)
    began = time.monotonic()
    found = await storm.run(seconds)
    report = {
        "engine": engine,
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "pages": len(storm.lives),
        "published": sum(storm.published.values()),
        "seen": sum(kind == "event" for life in storm.lives for kind, _ in life.log),
        "switches": sum(entry == ["gap", "other-user"] for life in storm.lives for entry in life.log),
        "faults": dict(storm.faults),
        "wrong": len(found),
    }
    return report, found, storm.lives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="chromium")
    given = parser.parse_args()
    seed = random.randrange(10_000) if given.seed is None else given.seed
    wrong = 0
    for number in range(given.rounds):
        report, found, lives = asyncio.run(chaos(given.engine, seed=seed + number, seconds=given.seconds))
        print(json.dumps(report), *found[:20], sep="\n  ", flush=True)
        if found:
            folder = Path(tempfile.mkdtemp(prefix="browser-chaos-logs-"))
            for life in lives:
                lines = [f"{kind} {value}\n" for kind, value in life.log]
                (folder / f"{number} {life.name}.log").write_text("".join(lines))
            print(f"  what each page was told: {folder}", flush=True)
        wrong += len(found)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
