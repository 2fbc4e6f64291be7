// @ts-check
// The list of what came. Many events may come in one frame of the screen; it is drawn once.
import { button, clock, element } from "./dom.js";

const MAX_ROWS = 500;

/**
 * @typedef {object} Entry
 * @property {"event" | "gap" | "cut"} kind
 * @property {number} at ms since 1970
 * @property {any} event the CloudEvent; null for the other kinds
 * @property {number | null} latency ms
 * @property {string | null} cursor where the stream was when it came
 * @property {string} note what it is, for the other kinds
 * @property {string} reason of a gap
 */

export class EntryList {
  /** @type {Entry[]} */
  #entries = [];
  /** @type {Entry[] | null} */
  #frozen = null; // What was there when it was paused.
  /** @type {WeakMap<Entry, HTMLLIElement>} */
  #rows = new WeakMap();
  /** @type {Entry[]} */
  #shown = [];
  /** @type {Entry | null} */
  #chosen = null;
  #drawing = false;
  #cleared = false;
  #heldBack = 0;
  #numbered = 0;

  /**
   * @param {{
   *   list: HTMLElement, empty: HTMLElement, matches: HTMLElement, search: HTMLInputElement, types: HTMLSelectElement,
   *   pause: HTMLButtonElement, clear: HTMLButtonElement, onChoose: (entry: Entry | null, isClick: boolean) => void, hint: () => string,
   * }} parts
   */
  constructor(parts) {
    this.parts = parts;
    parts.search.oninput = parts.types.onchange = () => this.redraw();
    parts.pause.onclick = () => this.#pause();
    parts.clear.onclick = () => this.#clear();
    parts.list.onkeydown = (key) => this.#onKey(key);
  }

  get chosen() {
    return this.#chosen;
  }

  /** @param {Entry} entry */
  add(entry) {
    this.#entries.unshift(entry);
    if (this.#frozen) this.#heldBack++;
    this.#entries.length = Math.min(this.#entries.length, MAX_ROWS);
    this.redraw();
  }

  /**
   * @param {Entry | null} entry
   * @param {boolean} [isClick]
   */
  choose(entry, isClick = false) {
    this.#mark(false);
    this.#chosen = entry;
    this.#mark(true);
    this.parts.onChoose(entry, isClick);
  }

  redraw() {
    if (this.#drawing) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#draw();
    });
  }

  #pause() {
    this.#frozen = this.#frozen ? null : [...this.#entries];
    this.#heldBack = 0;
    this.parts.pause.textContent = this.#frozen ? "Resume" : "Pause";
    this.parts.pause.classList.toggle("paused", this.#frozen !== null);
    this.redraw();
  }

  #clear() {
    this.#entries = [];
    if (this.#frozen) this.#frozen = [];
    this.#heldBack = 0;
    this.#cleared = true;
    this.choose(null);
    this.redraw();
  }

  #showAll() {
    this.parts.search.value = this.parts.types.value = "";
    this.#draw();
    this.parts.list.focus();
  }

  /** @param {Entry} entry */
  #matches({ event, kind, note }) {
    const { search, types } = this.parts;
    const words = search.value.toLowerCase();
    if (types.value && (kind !== "event" || event.type !== types.value)) return false;
    return !words || (kind === "event" ? JSON.stringify(event) : note).toLowerCase().includes(words);
  }

  #draw() {
    const { list, empty, matches, search, types } = this.parts;
    const all = this.#frozen ?? this.#entries;
    const shown = all.filter((entry) => this.#matches(entry));
    const rows = shown.map((entry) => this.#row(entry));
    // Mostly some rows are new at the top, and as many too many at the end. The others stay as they are.
    const known = new Set(rows);
    for (const row of [...list.children]) if (!known.has(/** @type {HTMLLIElement} */ (row))) row.remove();
    rows.forEach((row, index) => {
      if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    });
    this.#shown = shown;
    this.#mark(true);

    const isFiltered = search.value !== "" || types.value !== "";
    const held = this.#frozen ? `paused, ${this.#heldBack} held back` : "";
    const count = isFiltered ? `${shown.length} of ${all.length}` : "";
    matches.textContent = [count, held].filter(Boolean).join(" · ");
    list.hidden = shown.length === 0;
    empty.hidden = shown.length > 0;
    if (shown.length > 0) return;
    const parts = [];
    if (all.length) {
      const what = [search.value && `“${search.value}”`, types.value && `type ${types.value}`].filter(Boolean).join(" and ");
      parts.push(element("span", "", `None of the ${all.length} here matches ${what}.`));
      parts.push(button("Show all", () => this.#showAll()));
    } else if (this.#cleared) parts.push(element("span", "", "Cleared. What comes next is shown here."));
    else parts.push(element("span", "", `No event yet. ${this.parts.hint()}`));
    // The same words again would be read out again.
    if (empty.textContent !== parts.map((part) => part.textContent).join("")) empty.replaceChildren(...parts);
  }

  /** @param {Entry} entry */
  #row(entry) {
    const known = this.#rows.get(entry);
    if (known) return known;
    const row = element("li", entry.kind);
    row.id = `entry-${++this.#numbered}`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", "false");
    row.append(element("time", "", clock(entry.at)));
    if (entry.kind === "event") {
      const { type, audience, data } = entry.event;
      row.append(
        element("span", "type", type),
        element("span", "audience", audience ?? ""),
        preview(data),
        element("small", "", entry.latency === null ? "" : `${entry.latency} ms`),
      );
    } else row.append(element("span", "note", entry.note));
    row.onclick = () => this.choose(entry, true);
    this.#rows.set(entry, row);
    return row;
  }

  /** @param {boolean} isChosen */
  #mark(isChosen) {
    const row = this.#chosen && this.#rows.get(this.#chosen);
    row?.setAttribute("aria-selected", String(isChosen));
    if (isChosen && row?.isConnected) this.parts.list.setAttribute("aria-activedescendant", row.id);
    else this.parts.list.removeAttribute("aria-activedescendant");
  }

  /** @param {KeyboardEvent} key */
  #onKey(key) {
    if (key.ctrlKey || key.metaKey || key.altKey || !this.#shown.length) return;
    const last = this.#shown.length - 1;
    const at = this.#chosen ? this.#shown.indexOf(this.#chosen) : -1;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: last, Enter: at, " ": at }[key.key];
    if (to === undefined) return;
    key.preventDefault();
    const entry = this.#shown[Math.min(last, Math.max(0, to))];
    if (!entry) return;
    this.choose(entry);
    this.#rows.get(entry)?.scrollIntoView({ block: "nearest" });
  }
}

/** The members of an event's data in one line. @param {any} data */
function preview(data) {
  const line = element("code");
  for (const [name, value] of Object.entries(data ?? {})) {
    if (value === null || value === "") continue;
    line.append(element("i", "", name), ` ${typeof value === "string" ? value : JSON.stringify(value)}  `);
  }
  return line;
}
