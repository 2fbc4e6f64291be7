"""`make demo` as a new user runs it: one command, a page on which jobs progress, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.browser.accessibility import faults_of
from tests.browser.conftest import OpenPage
from tests.patience import PATIENCE
from tests.service import ROOT, bare_environment


class Demo:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.text = ""

    async def read_until(self, pattern: str, *, seconds: float = PATIENCE) -> re.Match[str]:
        assert self.process.stdout is not None
        async with asyncio.timeout(seconds):
            while (found := re.search(pattern, self.text)) is None:
                line = await self.process.stdout.readline()
                assert line, f"the demo ended:\n{self.text}"
                self.text += line.decode()
        return found

    def processes(self, word: str = "") -> set[int]:
        """The demo's process and all below it, also RabbitMQ's: each has the demo's mark in its environment.

        With a word, only those with this word in their command line.
        """
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                    command = (entry / "cmdline").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if self.mark in environment and word.encode() in command and state != "Z":
                    found.add(int(entry.name))
        return found

    mark = b""


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    # RabbitMQ's processes get a clean environment, but their data is below TMPDIR. So this path identifies all of them.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "deploy.local.demo",
        env={**bare_environment(), "TMPDIR": str(tmp_path)},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    made = Demo(process)
    made.mark = str(tmp_path).encode()
    yield made
    for pid in made.processes():
        with contextlib.suppress(ProcessLookupError):  # One of them may end by itself, because others have ended.
            os.kill(pid, signal.SIGKILL)
    await process.wait()


async def test_jobs_progress_on_the_page_and_ctrl_c_leaves_nothing(demo: Demo, page: Page) -> None:
    url = (await demo.read_until(r"==> Open (http://localhost:\d+)"))[1]
    command = (await demo.read_until(r"\n +(BRIDGE_AMQP_URL=.* BRIDGE_SCHEMAS=bridge\.samples .* publish .*)\n"))[1]
    await page.goto(f"{url}/jobs")
    await expect(page.locator("#state")).to_have_text("live for user “demo”")
    await expect(page.locator(".job")).not_to_have_count(0)
    await page.wait_for_function(
        """() => { const bar = document.querySelector(".job progress"); window.high ??= bar.value;
                   return document.querySelector(".job.completed") && bar.value !== window.high }""",
    )
    # The command that it prints for copying works without a change.
    done = await asyncio.create_subprocess_shell(command, env=bare_environment(), cwd=ROOT)
    assert await done.wait() == 0
    await expect(page.locator("#notices")).to_contain_text("Hello")
    await expect(page.locator("#feed")).to_contain_text("job.progress")

    assert len(demo.processes()) >= 4
    os.killpg(demo.process.pid, signal.SIGINT)
    async with asyncio.timeout(PATIENCE):
        await demo.process.wait()
    async with asyncio.timeout(PATIENCE):
        while demo.processes():  # noqa: ASYNC110 - the end of another process can only be polled.
            await asyncio.sleep(0.1)  # Between two polls.
    assert demo.process.returncode == 0


async def test_a_page_that_opens_later_shows_every_title_on_a_phone(demo: Demo, open_page: OpenPage) -> None:
    url = (await demo.read_until(r"==> Open (http://localhost:\d+)"))[1]
    first = await open_page()
    await first.goto(f"{url}/jobs")
    # Wait for a running job, so that its title was published before the second page opens, and for a notice.
    await first.wait_for_function("[...document.querySelectorAll('.running progress')].some((bar) => bar.value > 0)")
    await expect(first.locator("#notices li")).not_to_have_count(0)

    for width, scheme in ((320, "light"), (390, "dark")):
        page = await open_page()
        await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
        await page.set_viewport_size({"width": width, "height": 700})
        await page.goto(f"{url}/jobs")
        await expect(page.locator("#state")).to_have_text("live for user “demo”")
        # Entries from before the page, and new ones.
        for place in ("#jobs li", "#notices li", "#feed li"):
            await expect(page.locator(place)).not_to_have_count(0)
        await page.wait_for_function("document.querySelectorAll('#feed li').length > 10")
        titles = await page.locator(".job strong").all_text_contents()
        assert [title for title in titles if title.startswith("Job ") or "job-" in title] == []
        texts = await page.locator("#jobs li, #notices li, #feed summary").all_inner_texts()
        assert [text for text in texts if "{" in text or "undefined" in text or "null" in text] == []
        assert await faults_of(page, "header *, h2, li, li *") == []
        # The event itself is shown on demand.
        await page.locator("#feed summary", has_text="job.").last.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#feed details[open] pre")).to_contain_text('"job_id"')
        await page.close()


async def test_a_part_that_ends_by_itself_ends_the_demo(demo: Demo) -> None:
    await demo.read_until(r"==> Open ")
    (bridge,) = demo.processes("serve")
    os.kill(bridge, signal.SIGKILL)
    await demo.read_until(r"demo: the bridge ended by itself")
    async with asyncio.timeout(PATIENCE):
        assert await demo.process.wait() == 1
