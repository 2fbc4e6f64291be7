// @ts-check
// Small helpers for the page. Text from an event is always set as text, never as HTML.

/**
 * The element with this id.
 * @template {HTMLElement} Kind
 * @param {string} id
 * @param {new () => Kind} kind
 * @returns {Kind}
 */
export function find(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${kind.name} #${id}`);
  return found;
}

/**
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {string} [className]
 * @param {...(string | Node)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/**
 * @param {string} label
 * @param {() => void} onClick
 */
export function button(label, onClick) {
  const made = element("button", "", label);
  made.type = "button";
  made.onclick = onClick;
  return made;
}

/**
 * Makes a button copy text. A page without HTTPS has no clipboard; then the text is selected instead.
 * @param {HTMLButtonElement} copies
 * @param {() => string} text
 * @param {HTMLElement} shown the element that shows the text
 */
export function makeCopier(copies, text, shown) {
  const label = copies.textContent ?? "";
  copies.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
      copies.textContent = "Copied";
    } catch {
      getSelection()?.selectAllChildren(shown);
      copies.textContent = "Selected: copy it";
    }
    setTimeout(() => (copies.textContent = label), 1500);
  };
  return copies;
}

/** @param {number} ms since 1970 */
export function clock(ms) {
  const date = new Date(ms);
  return `${date.toTimeString().slice(0, 8)}.${String(date.getMilliseconds()).padStart(3, "0")}`;
}

/** @param {number} ms */
export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : ms < 60_000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 6000) / 10} min`;
}

/**
 * Text as indented JSON, or as it is.
 * @param {string} text
 */
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/**
 * Tabs by the WAI-ARIA pattern: arrow keys move between them, Tab leads into the panel.
 * @param {HTMLElement} list with role `tablist`
 * @param {(id: string) => void} onShow called with the id of the panel
 */
export function makeTabs(list, onShow) {
  const all = /** @type {HTMLButtonElement[]} */ ([...list.querySelectorAll("[role=tab]")]);
  const tabs = () => all.filter((tab) => !tab.hidden);
  const panelOf = (/** @type {HTMLButtonElement} */ tab) => tab.getAttribute("aria-controls") ?? "";
  const show = (/** @type {string} */ id) => {
    for (const tab of all) {
      const isShown = panelOf(tab) === id;
      tab.setAttribute("aria-selected", String(isShown));
      tab.tabIndex = isShown ? 0 : -1;
      find(panelOf(tab), HTMLElement).hidden = !isShown;
    }
    onShow(id);
  };
  for (const tab of all) tab.onclick = () => show(panelOf(tab));
  list.onkeydown = (key) => {
    const shown = tabs();
    const at = shown.findIndex((tab) => tab === document.activeElement);
    const last = shown.length - 1;
    const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at === 0 ? last : at - 1, Home: 0, End: last }[key.key];
    const tab = to === undefined || at < 0 ? undefined : shown[to];
    if (!tab) return;
    key.preventDefault();
    tab.focus();
    show(panelOf(tab));
  };
  return show;
}
