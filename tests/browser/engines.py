"""Three browser engines behind one interface: Chromium, Firefox and WebKit, as Debian has them.

Chromium is driven by Playwright, Firefox over WebDriver BiDi, WebKit (WebKitGTK's MiniBrowser) over WebDriver. Every
tab has a process of its own, so that a test can kill or freeze one tab with a signal, as the operating system does.

This module does not depend on the bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
from playwright.async_api import BrowserContext, Page, async_playwright
from playwright.async_api import Error as PlaywrightError
from websockets.asyncio.client import ClientConnection, connect

from deploy.local.node import free_ports
from tests.patience import PATIENCE

NAMES = ("chromium", "firefox", "webkit")

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

FIREFOX_PREFERENCES: dict[str, bool | int | str] = {
    "dom.ipc.processCount.webIsolated": 100,  # By default the tabs of one site share four processes.
    "dom.ipc.processPrelaunch.enabled": False,
    "browser.tabs.unloadOnLowMemory": False,
    # No request but those of the tests.
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.aboutwelcome.enabled": False,
    "browser.newtabpage.enabled": False,
    "browser.safebrowsing.update.enabled": False,
    "browser.sessionstore.resume_from_crash": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.healthreport.uploadEnabled": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.enabledScopes": 0,
    "extensions.getAddons.cache.enabled": False,
    "extensions.update.enabled": False,
    "media.gmp-manager.updateEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,#remote-settings-dummy/v1",
    "toolkit.telemetry.server": "",
    "toolkit.startup.max_resumed_crashes": -1,
}


class ScriptError(Exception):
    """A script in a page threw, or its page was closed."""


class Driver(Protocol):
    """What an engine does for one tab."""

    async def evaluate(self, promise: str) -> str:
        """The text to which an expression resolves, which is a promise of text. Raises ScriptError if it rejects."""

    async def goto(self, url: str) -> None: ...

    async def back(self) -> None: ...

    async def close(self) -> None: ...

    async def find_process(self) -> int: ...

    async def kill(self) -> None: ...


class Tab:
    """One tab. Scripts run in its page; what they return comes as JSON."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._frozen: int | None = None

    async def goto(self, url: str) -> None:
        await self._driver.goto(url)

    async def back(self) -> None:
        """One step back in the tab's history, from the back/forward cache where the engine has the page there."""
        await self._driver.back()

    async def call(self, function: str, argument: Any = None) -> Any:
        """What a JavaScript function returns, or the value of the promise that it returns."""
        assert self._frozen is None, "a frozen tab does not answer"
        promise = f"(async () => JSON.stringify(await ({function})({json.dumps(argument)})) ?? 'null')()"
        async with asyncio.timeout(PATIENCE):
            return json.loads(await self._driver.evaluate(promise))

    async def get(self, expression: str) -> Any:
        return await self.call(f"() => ({expression})")

    async def until(self, expression: str) -> Any:
        """Waits until an expression is truthy, and returns its value."""
        # Polled from outside: in a hidden tab the engine would slow down a timer of the page.
        found: Any = None
        try:
            async with asyncio.timeout(PATIENCE):
                while not (found := await self.get(expression)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # A page has no signal for any expression.
        except TimeoutError:
            raise AssertionError(f"{expression} is {found!r} after {PATIENCE} s") from None
        return found

    async def close(self) -> None:
        await self.thaw()
        await self._driver.close()

    async def crash(self) -> None:
        """Kills the tab's process, as the system does when memory is short. The page cannot run anything before."""
        assert self._frozen is None, "thaw it first"
        await self._driver.kill()

    async def freeze(self) -> None:
        """Stops the tab's process, as a phone does with a tab in the background. Its connections stay open."""
        self._frozen = await self._driver.find_process()
        os.kill(self._frozen, signal.SIGSTOP)

    async def thaw(self) -> None:
        if self._frozen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._frozen, signal.SIGCONT)
            self._frozen = None

    @property
    def frozen(self) -> int | None:
        """The id of its stopped process."""
        return self._frozen


class Engine(Protocol):
    """One browser with one user's cookies and storage. `errors` has the uncaught errors of scripts."""

    name: str
    version: str
    errors: list[str]
    tabs: list[Tab]

    async def open_tab(self, url: str) -> Tab: ...

    async def set_cookie(self, url: str, name: str, value: str) -> None:
        """An HttpOnly cookie of the URL's host."""

    async def clear_cookies(self) -> None: ...


def find_program(name: str, package: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is missing: deploy/local/ensure {package}"
    return found


# Chromium, over Playwright.


@dataclass
class _ChromiumDriver:
    page: Page

    async def evaluate(self, promise: str) -> str:
        try:
            text: str = await self.page.evaluate(f"() => {promise}")
        except PlaywrightError as error:
            raise ScriptError(error.message) from None
        return text

    async def goto(self, url: str) -> None:
        await self.page.goto(url)

    async def back(self) -> None:
        # A page from the cache has loaded already, and Playwright would wait for it to load.
        await self.page.go_back(wait_until="commit")

    async def close(self) -> None:
        await self.page.close()

    async def find_process(self) -> int:
        # Only a trace contains the process of a frame.
        session = await self.page.context.new_cdp_session(self.page)
        frames: dict[str, int] = {}
        complete = asyncio.Event()

        def collect(message: dict[str, Any]) -> None:
            for event in message["value"]:
                if event["name"] == "TracingStartedInBrowser":
                    frames.update({frame["frame"]: frame["processId"] for frame in event["args"]["data"]["frames"]})

        session.on("Tracing.dataCollected", collect)
        session.on("Tracing.tracingComplete", lambda _: complete.set())
        main = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
        trace = {"includedCategories": ["disabled-by-default-devtools.timeline"], "excludedCategories": ["*"]}
        await session.send("Tracing.start", {"traceConfig": trace, "transferMode": "ReportEvents"})
        await session.send("Tracing.end")
        async with asyncio.timeout(PATIENCE):
            await complete.wait()
        await session.detach()
        return frames[main]

    async def kill(self) -> None:
        os.kill(await self.find_process(), signal.SIGKILL)


class Chromium:
    name = "chromium"

    def __init__(self, context: BrowserContext, version: str) -> None:
        self._context = context
        self.version = version
        self.errors: list[str] = []
        self.tabs: list[Tab] = []

    async def open_tab(self, url: str) -> Tab:
        page = await self._context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        await page.goto(url)
        self.tabs.append(Tab(_ChromiumDriver(page)))
        return self.tabs[-1]

    async def set_cookie(self, url: str, name: str, value: str) -> None:
        await self._context.add_cookies([{"name": name, "value": value, "url": url, "httpOnly": True}])

    async def clear_cookies(self) -> None:
        await self._context.clear_cookies()


@contextlib.asynccontextmanager
async def start_chromium() -> AsyncIterator[Engine]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=find_program("chromium", "chromium"),
            args=CHROMIUM_FLAGS,
            # Playwright turns the back/forward cache off.
            ignore_default_args=["--disable-back-forward-cache"],
        )
        context = await browser.new_context()
        context.set_default_timeout(1000 * PATIENCE)
        engine = Chromium(context, browser.version)
        yield engine
        await _thaw(engine)
        await browser.close()


# Firefox, over WebDriver BiDi (https://w3c.github.io/webdriver-bidi/), which is built in: no driver is needed.


class _Bidi:
    """One connection to Firefox."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.errors: list[str] = []

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(PATIENCE):
            found = await answer
        if found["type"] == "error":
            raise ScriptError(f"{method}: {found['error']}: {found['message']}")
        result: dict[str, Any] = found["result"]
        return result

    async def read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if (waiting := self._waiting.pop(message.get("id"), None)) is not None:
                if not waiting.done():
                    waiting.set_result(message)
            elif message.get("method") == "log.entryAdded":
                entry = message["params"]
                # Firefox logs a failed connection as a script's error, too. It has no stack.
                if entry["type"] == "javascript" and entry["level"] == "error" and "stackTrace" in entry:
                    self.errors.append(entry["text"])

    async def evaluate(self, context: str, promise: str) -> str:
        found = await self.send("script.evaluate", expression=promise, awaitPromise=True, target={"context": context})
        if found["type"] == "exception":
            raise ScriptError(found["exceptionDetails"]["text"])
        text: str = found["result"]["value"]
        return text


@dataclass
class _FirefoxDriver:
    bidi: _Bidi
    context: str

    async def evaluate(self, promise: str) -> str:
        return await self.bidi.evaluate(self.context, promise)

    async def goto(self, url: str) -> None:
        await self.bidi.send("browsingContext.navigate", context=self.context, url=url, wait="complete")

    async def back(self) -> None:
        await self.bidi.send("browsingContext.traverseHistory", context=self.context, delta=-1)

    async def close(self) -> None:
        await self.bidi.send("browsingContext.close", context=self.context)

    async def find_process(self) -> int:
        # Firefox gives the process only to its own windows, not to pages.
        windows = await self.bidi.send("browsingContext.getTree", **{"moz:scope": "chrome"})
        ask = f"""
            (async () => {{
              const {{ NavigableManager }} = ChromeUtils.importESModule(
                "chrome://remote/content/shared/NavigableManager.sys.mjs");
              const context = NavigableManager.getBrowsingContextById({json.dumps(self.context)});
              return String(context.currentWindowGlobal.osPid);
            }})()"""
        return int(await self.bidi.evaluate(windows["contexts"][0]["context"], ask))

    async def kill(self) -> None:
        os.kill(await self.find_process(), signal.SIGKILL)


class Firefox:
    name = "firefox"

    def __init__(self, bidi: _Bidi, user_context: str, version: str) -> None:
        self._bidi = bidi
        self._user_context = user_context
        self.version = version
        self.errors = bidi.errors
        self.tabs: list[Tab] = []

    async def open_tab(self, url: str) -> Tab:
        made = await self._bidi.send("browsingContext.create", type="tab", userContext=self._user_context)
        driver = _FirefoxDriver(self._bidi, made["context"])
        await driver.goto(url)
        self.tabs.append(Tab(driver))
        return self.tabs[-1]

    async def set_cookie(self, url: str, name: str, value: str) -> None:
        cookie = {
            "name": name,
            "value": {"type": "string", "value": value},
            "domain": urlsplit(url).hostname,
            "httpOnly": True,
        }
        partition = {"type": "storageKey", "userContext": self._user_context}
        await self._bidi.send("storage.setCookie", cookie=cookie, partition=partition)

    async def clear_cookies(self) -> None:
        await self._bidi.send(
            "storage.deleteCookies", partition={"type": "storageKey", "userContext": self._user_context}
        )


@contextlib.contextmanager
def run_firefox() -> Iterator[str]:
    """One Firefox for all tests, because its start takes seconds; yields its address for BiDi."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        profile = Path(folder, "profile")
        profile.mkdir()
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in FIREFOX_PREFERENCES.items()]
        (profile / "user.js").write_text("\n".join(lines))
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    find_program("firefox-esr", "firefox"),
                    "--headless",
                    "--no-remote",
                    "--profile",
                    str(profile),
                    "--remote-debugging-port",
                    "0",
                    "--remote-allow-system-access",  # To find the process of a tab.
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "HOME": folder, "MOZ_CRASHREPORTER_DISABLE": "1"},
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + PATIENCE
            while (found := re.search(r"BiDi listening on (ws://\S+)", log.read_text())) is None:
                assert process.poll() is None, f"Firefox ended: {log.read_text()}"
                assert time.monotonic() < deadline, f"Firefox does not listen: {log.read_text()}"
                time.sleep(0.05)  # A file can only be polled.
            yield found[1] + "/session"
        finally:
            _kill_group(process)


@contextlib.asynccontextmanager
async def use_firefox(address: str) -> AsyncIterator[Engine]:
    """A new user context in a running Firefox. BiDi allows one session at a time."""
    async with connect(address, max_size=None, open_timeout=PATIENCE, ping_interval=None) as socket:
        bidi = _Bidi(socket)
        reading = asyncio.create_task(bidi.read())
        session = await bidi.send("session.new", capabilities={})
        await bidi.send("session.subscribe", events=["log.entryAdded"])
        user_context = (await bidi.send("browser.createUserContext"))["userContext"]
        engine = Firefox(bidi, user_context, session["capabilities"]["browserVersion"])
        yield engine
        await _thaw(engine)
        await bidi.send("browser.removeUserContext", userContext=user_context)  # It also closes its tabs.
        await bidi.send("session.end")
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


# WebKit, over WebDriver (https://www.w3.org/TR/webdriver2/).


class _WebDriver:
    """One session. Commands go to its current window, so they come one at a time."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._path = ""
        self._turn = asyncio.Lock()
        self.capabilities: dict[str, Any] = {}

    async def _send(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self._http.request(method, path, json=body if method == "POST" else None)
        found = answer.json()["value"]
        if answer.status_code != 200:
            raise ScriptError(f"{method} {path}: {found['error']}: {found['message']}")
        return found

    async def begin(self, capabilities: dict[str, Any]) -> None:
        made = await self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._path = f"/session/{made['sessionId']}"
        self.capabilities = made["capabilities"]
        limits = {"script": int(1000 * PATIENCE), "pageLoad": int(1000 * PATIENCE)}
        await self._send("POST", f"{self._path}/timeouts", limits)

    @contextlib.asynccontextmanager
    async def choose(self, window: str | None) -> AsyncIterator[None]:
        """Makes a window the current one, for as long as the block runs."""
        async with self._turn:
            if window is not None:
                await self._send("POST", f"{self._path}/window", {"handle": window})
            yield

    async def close_window(self) -> None:
        """Closes the current window. Its page need not answer."""
        await self._send("DELETE", f"{self._path}/window")

    async def send(self, method: str, path: str, body: Any = None, *, window: str | None = None) -> Any:
        async with self.choose(window):
            return await self._send(method, self._path + path, {} if body is None else body)


@dataclass
class _WebKitDriver:
    web: _WebDriver
    window: str
    process: int

    async def evaluate(self, promise: str) -> str:
        # WebDriver's callback is the last of `arguments`.
        script = f"{promise}.then((text) => arguments[0]([text, null]), (error) => arguments[0]([null, String(error)]))"
        text, error = await self.web.send("POST", "/execute/async", {"script": script, "args": []}, window=self.window)
        if error is not None:
            raise ScriptError(error)
        assert isinstance(text, str)
        return text

    async def goto(self, url: str) -> None:
        await self.web.send("POST", "/url", {"url": url}, window=self.window)

    async def back(self) -> None:
        await self.web.send("POST", "/back", window=self.window)

    async def close(self) -> None:
        async with self.web.choose(self.window):
            await self.web.close_window()

    async def find_process(self) -> int:
        return self.process

    async def kill(self) -> None:
        # WebKit ends the WebDriver session when a page crashes in an open window. So the process is stopped, the window
        # is closed, and then the process is killed. The page does not run in between.
        async with self.web.choose(self.window):
            os.kill(self.process, signal.SIGSTOP)
            await self.web.close_window()
        os.kill(self.process, signal.SIGKILL)


def _descendants(parent: int, name: str) -> set[int]:
    """Processes of this name below another one."""
    parents: dict[int, int] = {}
    named: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "stat").read_text()
            program = (entry / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue  # It has just ended.
        parents[int(entry.name)] = int(line.rpartition(")")[2].split()[1])
        if program.endswith(name.encode()):
            named.add(int(entry.name))

    def is_below(process: int) -> bool:
        return process == parent or (process in parents and is_below(parents[process]))

    return {process for process in named if is_below(process)}


class WebKit:
    name = "webkit"

    def __init__(self, web: _WebDriver, driver: int, first: str) -> None:
        self._web = web
        self._driver = driver
        self._first = first  # WebDriver handles only the cookies of the page in a window; this window is for that.
        self._processes = _descendants(driver, "WebKitWebProcess")
        self.version = str(web.capabilities["browserVersion"])
        self.errors: list[str] = []  # WebDriver does not report them.
        self.tabs: list[Tab] = []

    async def open_tab(self, url: str) -> Tab:
        made = await self._web.send("POST", "/window/new", {"type": "tab"}, window=self._first)
        # A new view has a new process, and keeps it while it stays on one site.
        (process,) = _descendants(self._driver, "WebKitWebProcess") - self._processes
        self._processes.add(process)
        driver = _WebKitDriver(self._web, made["handle"], process)
        await driver.goto(url)
        self.tabs.append(Tab(driver))
        return self.tabs[-1]

    async def set_cookie(self, url: str, name: str, value: str) -> None:
        cookie = {"name": name, "value": value, "httpOnly": True}
        await self._web.send("POST", "/url", {"url": url}, window=self._first)
        await self._web.send("POST", "/cookie", {"cookie": cookie}, window=self._first)

    async def clear_cookies(self) -> None:
        await self._web.send("DELETE", "/cookie", window=self._first)


@contextlib.contextmanager
def run_display() -> Iterator[str]:
    """An X server without a screen, as WebKit has no headless mode; yields its name for `DISPLAY`."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [find_program("Xvfb", "webkit"), "-displayfd", str(writing), "-screen", "0", "1280x800x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as chosen:
        number = chosen.readline().strip()
    try:
        assert number, "Xvfb does not start"
        yield f":{number}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _run_webdriver(display: str) -> Iterator[tuple[str, int]]:
    """WebKit's driver, which starts MiniBrowser; yields its address and its process."""
    port = free_ports(1)[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        process = subprocess.Popen(
            [find_program("WebKitWebDriver", "webkit"), "--host=127.0.0.1", f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                "DISPLAY": display,
                "GDK_BACKEND": "x11",
                "GSETTINGS_BACKEND": "memory",
                "HOME": home,
                "LIBGL_ALWAYS_SOFTWARE": "1",
                "NO_AT_BRIDGE": "1",
                "WEBKIT_DISABLE_COMPOSITING_MODE": "1",
                "XDG_CACHE_HOME": home,
                "XDG_DATA_HOME": home,
                "XDG_RUNTIME_DIR": home,
            },
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + PATIENCE
            while not _answers(address):
                assert process.poll() is None, "WebKitWebDriver ended"
                assert time.monotonic() < deadline, "WebKitWebDriver does not listen"
                time.sleep(0.05)  # It prints nothing when it listens.
            yield address, process.pid
        finally:
            _kill_group(process)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/status", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:
        return False


def _find_minibrowser() -> str:
    found = sorted(Path("/usr").glob("lib/*/webkit2gtk-4.*/MiniBrowser"))
    assert found, "MiniBrowser is missing: deploy/local/ensure webkit"
    return str(found[-1])


@contextlib.asynccontextmanager
async def start_webkit(display: str) -> AsyncIterator[Engine]:
    with _run_webdriver(display) as (address, process):
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as http:
            web = _WebDriver(http)
            await web.begin({"webkitgtk:browserOptions": {"binary": _find_minibrowser(), "args": ["--automation"]}})
            yield WebKit(web, process, await web.send("GET", "/window"))


@contextlib.asynccontextmanager
async def start_engine(name: str) -> AsyncIterator[Engine]:
    """Starts one of `NAMES`, with all that it needs, for the length of the block."""
    async with contextlib.AsyncExitStack() as stack:
        if name == "chromium":
            yield await stack.enter_async_context(start_chromium())
        elif name == "firefox":
            yield await stack.enter_async_context(use_firefox(stack.enter_context(run_firefox())))
        else:
            yield await stack.enter_async_context(start_webkit(stack.enter_context(run_display())))


async def _thaw(engine: Engine) -> None:
    for tab in engine.tabs:
        await tab.thaw()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a browser with all its processes, the stopped ones too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
