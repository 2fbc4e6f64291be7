"""Checks of any page, at any width and in both colour schemes: scripts that return the faults that they find."""

from __future__ import annotations

from playwright.async_api import Page

# Text that is wider than its element, and a page that is wider than the window.
_CUT_OFF = """(selector) => [document.documentElement, ...document.querySelectorAll(selector)]
    .filter((it) => it.checkVisibility() && !["inline", "contents"].includes(getComputedStyle(it).display))
    .filter((it) => it.scrollWidth > it.clientWidth + 1)
    .map((it) => it.outerHTML.slice(0, 200))"""

# WCAG 2.2, 1.4.3: text has a contrast of 4.5 to 1 to its background.
_LOW_CONTRAST = """() => {
  const read = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([red, green, blue]) => [red, green, blue]
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (it) => {
    for (let at = it; at; at = at.parentElement) {
      const color = read(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const faults = [];
  for (const it of document.querySelectorAll("body *")) {
    const owns = [...it.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!owns || !it.checkVisibility() || ["SCRIPT", "STYLE", "OPTION", "TITLE"].includes(it.tagName)) continue;
    const [one, other] = [light(read(getComputedStyle(it).color)), light(behind(it))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) faults.push(`${ratio.toFixed(2)}: ${it.outerHTML.slice(0, 150)}`);
  }
  return faults;
}"""

# Elements that a screen reader cannot name, or would read wrongly.
_UNNAMED = """() => {
  const faults = [];
  const add = (fault, it) => faults.push(`${fault}: ${it.outerHTML.slice(0, 150)}`);
  const all = (selector) => document.querySelectorAll(selector);
  for (const it of all("button, input, select, textarea, [role=listbox], [role=tablist], [tabindex='0']")) {
    const named = it.getAttribute("aria-label") || it.getAttribute("aria-labelledby") || it.labels?.length;
    if (!named && !it.textContent.trim()) add("no name", it);
  }
  for (const name of ["aria-labelledby", "aria-controls", "aria-activedescendant"])
    for (const it of all(`[${name}]`))
      if (!document.getElementById(it.getAttribute(name))) add(`${name} refers to no element`, it);
  for (const it of all("[role=listbox] > :not([role=option])")) add("no option", it);
  for (const it of all("svg:not([role=img][aria-label])")) add("not described", it);
  const ids = [...all("[id]")].map((it) => it.id);
  if (new Set(ids).size !== ids.length) faults.push("an id is used twice");
  return faults;
}"""


async def faults_of(page: Page, selector: str) -> list[str]:
    """The parts of the page that cannot be read or used now.

    Args:
        selector: elements whose content must not be cut off.
    """
    return [
        *await page.evaluate(_CUT_OFF, selector),
        *await page.evaluate(_LOW_CONTRAST),
        *await page.evaluate(_UNNAMED),
    ]
