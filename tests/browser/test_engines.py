"""Tests of the engines themselves: other tests rely on this when they kill, freeze or leave a tab."""

from __future__ import annotations

import pytest

from tests.browser.engines import Engine, ScriptError
from tests.conftest import Eventually

LISTEN = """
() => {
  window.received = [];
  window.channel = new BroadcastChannel("test");
  window.channel.onmessage = (message) => received.push(message.data);
}
"""

SEND = "(word) => window.channel.postMessage(word)"


async def test_scripts_return_values_and_errors(engine: Engine, origin: str, eventually: Eventually) -> None:
    tab = await engine.open_tab(origin)
    assert await tab.call("async (value) => ({ ...value, b: undefined, c: '\\u2028😀' })", {"a": [1, None]}) == {
        "a": [1, None],
        "c": "\u2028😀",
    }
    assert await tab.get("undefined") is None
    with pytest.raises(ScriptError, match="no such luck"):
        await tab.call("async () => { throw Error('no such luck') }")
    assert await tab.get("location.origin") == origin
    await tab.call(
        "() => { window.onerror = () => { window.thrown = true }; setTimeout(() => { throw Error('late') }) }"
    )
    await tab.until("thrown")
    if engine.name != "webkit":  # WebDriver has no event for it.
        await eventually(lambda: engine.errors != [])
        assert ["late" in error for error in engine.errors] == [True]
        engine.errors.clear()


async def test_tabs_share_cookies_storage_and_channels(engine: Engine, origin: str) -> None:
    await engine.set_cookie(origin, "who", "42")
    one, two = [await engine.open_tab(origin) for _ in range(2)]
    assert await one.get("document.cookie") == "", "it is HttpOnly"
    assert await one.get("fetch('/cookie').then((answer) => answer.text())") == "who=42"
    await one.get("localStorage.setItem('a', '1')")
    assert await two.get("localStorage.getItem('a')") == "1"
    await one.call(LISTEN)
    await two.call(LISTEN)
    await two.call(SEND, "hello")
    assert await one.until("received.length && received") == ["hello"]
    await engine.clear_cookies()
    assert await two.get("fetch('/cookie').then((answer) => answer.text())") == ""


async def test_a_frozen_tab_stops_and_the_others_do_not(engine: Engine, origin: str) -> None:
    one, two, three = [await engine.open_tab(origin) for _ in range(3)]
    for each in (one, two, three):
        await each.call(LISTEN)
    # A page's channel may be open before the browser's other processes know it.
    await one.call(SEND, "before")
    for each in (two, three):
        await each.until("received.length === 1")
    await two.freeze()
    await one.call(SEND, "hello")
    await three.until("received.length === 2")
    await two.thaw()
    await two.until("received.length === 2")


async def test_a_tab_that_crashes_ends_no_other_tab(engine: Engine, origin: str) -> None:
    one, two, three = [await engine.open_tab(origin) for _ in range(3)]
    # The lock of a page is free when its process is gone, without any message.
    await one.call("() => new Promise((got) => navigator.locks.request('x', () => (got(), new Promise(() => {}))))")
    await two.call("() => { navigator.locks.request('x', () => { window.free = true }) }")
    await one.crash()
    await two.until("window.free")
    await three.close()
    assert await two.get("1 + 1") == 2


async def test_a_page_returns_from_the_cache_unchanged(engine: Engine, origin: str) -> None:
    tab = await engine.open_tab(origin)
    await tab.call("() => { window.before = 1; onpageshow = (event) => { window.kept = event.persisted } }")
    await tab.goto(origin + "/elsewhere")
    assert await tab.get("window.before") is None
    await tab.back()
    assert await tab.until("window.kept && location.pathname") == "/"
    assert await tab.get("window.before") == 1
