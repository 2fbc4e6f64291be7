"""`python -m tests.browser.chaos --seconds 120 --seed 7`: two users, seven tabs, and all faults that tabs can have.

It uses a real browser, RabbitMQ, a bridge, and a TCP proxy between browser and bridge. Faults are chosen with a seed,
which is printed. The same seed chooses the same faults, though the machine's timing differs. Afterwards the log of each
tab is checked: no event of another user, none of its own events missing or twice, and no unnecessary gap.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.node import MACHINES, Installation, Node, free_ports
from tests.browser.conftest import empty_pages
from tests.browser.engines import NAMES, Engine, ScriptError, Tab, start_engine
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.rabbit import Vhost, cloudevent
from tests.service import Service, mint

TABS = 7
LOGINS = {"42 in ops": ("42", ("ops",)), "42 in dev": ("42", ("dev",)), "43": ("43", ())}
"""Two users, one of whom changes groups: user and groups of each cookie or token."""

AUDIENCES = ["user.42", "user.43", "group.ops", "group.dev", "all"]

QUIET_SECONDS = 2 * PATIENCE
LEAST_FAULTS = 12
"""Faults continue until so many have happened: a slow machine has few in a second."""

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


def audiences_of(login: str) -> list[str]:
    user, groups = LOGINS[login]
    return [f"user.{user}", *(f"group.{group}" for group in groups), "all"]


def token_of(login: str) -> str:
    user, groups = LOGINS[login]
    return mint(user, *groups)


# The oracle.


@dataclass
class PageRecord:
    """One page from its load to its end, and everything that the client reported to it, in order."""

    name: str
    token: str | None = None
    """The login of its own token. Without one it follows the browser's login."""
    log: list[list[str | None]] = field(default_factory=list)
    expected_from: dict[str, int] = field(default_factory=dict)
    """By audience: the first event that was published while the page was live as its last user. It must have this one
    and all later ones."""
    at_end: str | None = None
    """The login with which it was live at the end."""


def judge(records: list[PageRecord], published: dict[str, int]) -> list[str]:
    """Returns the faults.

    Args:
        published: how many events each audience got, numbered from 0.
    """
    faults = []
    for record in records:
        user: str | None = None
        group: str | None = None
        expected: dict[str, int] = {}
        first: dict[str, int] = {}
        for kind, value in record.log:
            if kind == "user":
                if value is not None:
                    if user not in (None, value):
                        expected, first, group = {}, {}, None
                    user = value
            elif kind == "gap":
                if value == "other-groups":
                    expected, first, group = {}, {}, None
                elif value != "other-user":
                    faults.append(f"{record.name}: gap {value}")
            elif kind == "event" and value is not None:
                audience, _, number = value.partition(":")
                if audience.startswith("group."):
                    group = group or audience
                if not any(
                    audience in audiences_of(login)
                    for login, (name, _) in LOGINS.items()
                    if name == user and group in (None, *audiences_of(login))
                ):
                    faults.append(f"{record.name}: {value} while it is {user} and has seen {group}")
                    continue
                first.setdefault(audience, int(number))
                if audience in expected and int(number) != expected[audience]:
                    what = "missed" if int(number) > expected[audience] else "again or late"
                    faults.append(f"{record.name}: {value} where {audience}:{expected[audience]} is next ({what})")
                expected[audience] = int(number) + 1
        if record.at_end is None:
            continue
        for audience in audiences_of(record.at_end):
            if expected.get(audience, 0) != published[audience]:
                faults.append(
                    f"{record.name}: ends before {audience}:{expected.get(audience)} of {published[audience]}"
                )
            start = record.expected_from.get(audience)
            if start is not None and first.get(audience, 0) > start:
                faults.append(f"{record.name}: begins with {audience}:{first[audience]}, but {start} was expected")
    return faults


# The faults.


class Page:
    """A tab, and the log of the page in it."""

    def __init__(self, tab: Tab, record: PageRecord) -> None:
        self.tab = tab
        self.record = record

    async def read(self) -> None:
        self.record.log += await self.tab.get("window.log?.splice(0) ?? []")


class BrowserChaos:
    def __init__(self, engine: Engine, seed: int, rabbitmq: Installation) -> None:
        self.engine = engine
        self.chance = random.Random(seed)
        self.node = Node(Path(tempfile.mkdtemp(prefix="browser-chaos-")), management=True, rabbitmq=rabbitmq)
        self.pages: list[Page] = []
        self.records: list[PageRecord] = []
        self.published = dict.fromkeys(AUDIENCES, 0)
        self.faults: Counter[str] = Counter()
        self.login: str | None = None
        self.last_login = "42 in ops"
        """The current login, or the last one."""

    async def run(self, seconds: float) -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            await asyncio.to_thread(self.node.start)
            stack.callback(self.node.remove)
            self.vhost = Vhost(self.node)
            self.vhost.create()
            stack.callback(self.vhost.close)
            self.origin = stack.enter_context(empty_pages())
            (port,) = free_ports(1)
            self.service = Service(
                self.vhost.url,
                BIND=f"127.0.0.1:{port}",  # A restart uses the same port.
                ALLOWED_ORIGINS=self.origin,
                DRAIN_SECONDS="1",
                HEARTBEAT_SECONDS="2",
                RETRY_SECONDS="0.3",
                MAX_AGE_SECONDS="20",
                MAX_CONNECTIONS_PER_USER="100",
            )
            stack.push_async_callback(self.service.stop)
            await self.service.start()
            await asyncio.to_thread(self.node.flush)
            self.proxy = await stack.enter_async_context(Proxy(port))
            return await self._run_faults(seconds)

    async def _run_faults(self, seconds: float) -> list[str]:
        await self.log_in("42 in ops")
        for _ in range(TABS):
            await self.open_page()
        faults: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (5, self.burst),
            (4, self.close_a_page_in_a_burst),
            (3, self.reload_a_page),
            (2, self.leave_a_page_and_return),
            (2, self.crash_a_page),
            (1, self.freeze_a_page),
            (3, self.cut),
            (1, self.stall),
            (2, self.restart_the_bridge),
            (1, self.restart_the_broker),
            (2, self.log_out),
            (4, self.change_login),
            (1, self.show_a_page),
        ]
        ends = time.monotonic() + seconds
        while time.monotonic() < ends or self.faults.total() < LEAST_FAULTS:
            (fault,) = self.chance.choices([what for _, what in faults], [weight for weight, _ in faults])
            self.faults[fault.__name__] += 1
            print(f"{time.strftime('%H:%M:%S')} {fault.__name__}", file=sys.stderr)
            await fault()
            await asyncio.sleep(self.chance.uniform(0, 1))  # The pause between two faults.
        return await self._wait_and_judge()

    async def _wait_and_judge(self) -> list[str]:
        await self.log_in(self.login or "42 in ops")
        await self.reload(self.page_of_login())
        deadline = time.monotonic() + QUIET_SECONDS
        since = dict(self.published)
        while not all([await self._is_up_to_date(page, since) for page in self.pages]):
            assert time.monotonic() < deadline, [
                (page.record.name, await page.tab.get("subscription.state"), page.record.log[-5:])
                for page in self.pages
            ]
            await self.publish(dict.fromkeys(self.published, 1))
            await asyncio.sleep(0.5)  # Between two checks of seven pages.
        for page in self.pages:
            page.record.expected_from = dict(self.published)
            page.record.at_end = page.record.token or self.login
        await self.publish(dict.fromkeys(self.published, 3))
        while True:
            for page in self.pages:
                await page.read()
            found = judge(self.records, self.published)
            if not found or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.2)  # Between two checks of seven pages.

    async def _is_up_to_date(self, page: Page, since: dict[str, int]) -> bool:
        """Whether the page has a new event of each of its audiences: then it has the stream of its last login."""
        await page.read()
        newest = dict.fromkeys(self.published, -1)
        for kind, value in page.record.log:
            if kind == "event" and value is not None:
                audience, _, number = value.partition(":")
                newest[audience] = int(number)
        login = page.record.token or self.login
        return login is not None and all(newest[each] >= since[each] for each in audiences_of(login))

    # What the browser and its users do.

    async def log_in(self, login: str | None) -> None:
        self.login = login
        self.last_login = login or self.last_login
        if login is None:
            await self.engine.clear_cookies()
        else:
            await self.engine.set_cookie(self.origin, "bridge_token", token_of(login))

    def page_of_login(self) -> Page:
        """A page for a log-in or log-out: one that uses the cookie."""
        return self.chance.choice([page for page in self.pages if page.record.token is None])

    async def open_page(self) -> None:
        # Two of the seven pages belong to an application with tokens, one for each user.
        missing = [login for login in ("42 in ops", "43") if login not in [page.record.token for page in self.pages]]
        token = missing[0] if missing and len(self.pages) >= TABS - 2 else None
        tab = await self.engine.open_tab(self.origin)
        page = Page(tab, PageRecord(f"page {len(self.records)} of {token or 'the cookie'}", token))
        self.pages.append(page)
        self.records.append(page.record)
        await self.subscribe(page)

    async def subscribe(self, page: Page) -> None:
        url = f"http://localhost:{self.proxy.port}"
        options: dict[str, Any] = {"url": f"{url}/events"}
        if self.chance.random() < 0.5:
            options["types"] = ["job.*"] if self.chance.random() < 0.5 else ["job.completed"]
        token = None if page.record.token is None else token_of(page.record.token)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await page.tab.call(SUBSCRIBE, [f"{url}/client.js", options, token])
                return
            except ScriptError:
                # A cut may affect the module itself, which a browser then does not load again in this page.
                assert time.monotonic() < deadline, "the page cannot load the client"
                await page.tab.goto(self.origin)

    async def reload(self, page: Page) -> None:
        await page.read()
        await page.tab.goto(self.origin)
        await self._begin_again(page)

    async def _begin_again(self, page: Page) -> None:
        page.record = PageRecord(page.record.name + "'", page.record.token)
        self.records.append(page.record)
        await self.subscribe(page)

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

    async def close_a_page_in_a_burst(self) -> None:
        burst = asyncio.create_task(self.burst())
        # Mostly the leading page.
        leads = [page for page in self.pages if await page.tab.get("window.subscription?.state.leads ?? false")]
        page = self.chance.choice(leads if leads and self.chance.random() < 0.8 else self.pages)
        await self.end(page, page.tab.close)
        await burst
        await self.open_page()

    async def end(self, page: Page, how: Callable[[], Awaitable[None]]) -> None:
        await page.read()
        self.pages.remove(page)
        await how()

    async def reload_a_page(self) -> None:
        await self.reload(self.chance.choice(self.pages))

    async def leave_a_page_and_return(self) -> None:
        """Uses a link and the Back button. Some engines keep the page meanwhile, without its stream; others load it
        again."""
        page = self.chance.choice(self.pages)
        await page.read()
        await page.tab.goto(f"{self.origin}/elsewhere")
        await self.burst()
        await page.tab.back()
        await page.tab.until("location.pathname === '/' && document.readyState === 'complete'")
        if not await page.tab.get("Boolean(window.subscription)"):
            await self._begin_again(page)

    async def crash_a_page(self) -> None:
        page = self.chance.choice(self.pages)
        await self.end(page, page.tab.crash)
        await self.open_page()

    async def freeze_a_page(self) -> None:
        page = self.chance.choice(self.pages)
        await page.read()
        await page.tab.freeze()
        await self.burst()
        await asyncio.sleep(self.chance.uniform(1, 20))  # Long enough to be replaced, or not.
        await page.tab.thaw()

    async def cut(self) -> None:
        self.proxy.cut()

    async def stall(self) -> None:
        self.proxy.stall()
        await self.burst()
        await asyncio.sleep(self.chance.uniform(0.5, 8))  # The fault lasts for a time.
        self.proxy.cut()
        self.proxy.flow()

    async def restart_the_bridge(self) -> None:
        """Like a deploy, or a crash."""
        self.service.signal(self.chance.choice([signal.SIGTERM, signal.SIGKILL]))
        await self.service.ended()
        await self.burst()
        await self.service.start()

    async def restart_the_broker(self) -> None:
        await asyncio.to_thread(self.node.kill)
        await asyncio.sleep(self.chance.uniform(0, 2))  # The fault lasts for a time.
        await asyncio.to_thread(self.node.start)
        await asyncio.to_thread(self.vhost.wait_for_log, self.node, 1)
        await self.burst()

    async def log_out(self) -> None:
        await self.log_in(None)
        await self.reload(self.page_of_login())
        await self.burst()

    async def change_login(self) -> None:
        await self.log_in(self.chance.choice([login for login in LOGINS if login != self.last_login]))
        await self.reload(self.page_of_login())
        await self.burst()

    async def show_a_page(self) -> None:
        page = self.chance.choice(self.pages)
        await page.tab.get("document.dispatchEvent(new Event('visibilitychange'))")


async def chaos(
    engine: Engine, *, seed: int, seconds: float, rabbitmq: Installation = MACHINES
) -> tuple[dict[str, Any], list[str], list[PageRecord]]:
    run = BrowserChaos(engine, seed, rabbitmq)
    began = time.monotonic()
    found = await run.run(seconds)
    gaps = Counter(str(value) for record in run.records for kind, value in record.log if kind == "gap")
    report = {
        "engine": f"{engine.name} {engine.version}",
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "pages": len(run.records),
        "published": sum(run.published.values()),
        "seen": sum(kind == "event" for record in run.records for kind, _ in record.log),
        "gaps": dict(gaps),
        "faults": dict(run.faults),
        "wrong": len(found),
    }
    return report, found, run.records


async def _run(engine: str, seed: int, seconds: float) -> tuple[dict[str, Any], list[str], list[PageRecord]]:
    async with start_engine(engine) as started:
        return await chaos(started, seed=seed, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--engine", choices=NAMES, action="append", help="may be given again; all three by default")
    given = parser.parse_args()
    first = random.randrange(10_000) if given.seed is None else given.seed
    wrong = 0
    for seed in range(first, first + given.rounds):
        for engine in given.engine or NAMES:
            report, found, records = asyncio.run(_run(engine, seed, given.seconds))
            print(json.dumps(report), *found[:20], sep="\n  ", flush=True)
            if found:
                folder = Path(tempfile.mkdtemp(prefix="browser-chaos-logs-"))
                for record in records:
                    lines = [f"{kind} {value}\n" for kind, value in record.log]
                    (folder / f"{engine} {seed} {record.name}.log").write_text("".join(lines))
                print(f"  the log of each page: {folder}", flush=True)
            wrong += len(found)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
