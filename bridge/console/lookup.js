// @ts-check
// The look-ups of a bridge in development: entries of the event log, and messages in quarantine.
import { button, element, find, pretty } from "./dom.js";

/**
 * @typedef {{offset?: number, routing_key: string, audience: string | null, body: string, bytes: number,
 *            is_cut: boolean, refused: {reason: string, detail: string} | null}} Message
 */

/**
 * @param {string} path
 * @param {Record<string, string>} headers
 * @param {Record<string, string>} [query]
 */
async function ask(path, headers, query = {}) {
  const url = new URL(path, location.href);
  for (const [name, value] of Object.entries(query)) if (value) url.searchParams.set(name, value);
  const answer = await fetch(url, { headers, cache: "no-store" });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail);
  return body;
}

/** @param {Message} message */
function shown({ offset, routing_key, audience, body, bytes, is_cut, refused }) {
  const type = audience === null ? "" : routing_key.slice(routing_key.indexOf(".", audience === "all" ? 0 : routing_key.indexOf(".") + 1) + 1);
  const head = element("summary", "");
  if (offset !== undefined) head.append(element("span", "offset", String(offset)), " ");
  head.append(element("b", "", type || routing_key || "no routing key"), " ", element("span", "audience", audience ?? ""));
  if (refused?.reason) head.append(" ", element("span", "fault", refused.reason));
  const part = element("details", "", head);
  if (refused?.detail) part.append(element("p", "fault", refused.detail));
  part.append(element("p", "", "Routing key: ", element("code", "", routing_key)), element("pre", "", pretty(body)));
  if (is_cut) part.append(element("p", "", `That is only the beginning: the body has ${bytes} bytes.`));
  return element("li", "", part);
}

/**
 * Runs one look-up at a time, and shows how it went.
 * @param {HTMLElement} status
 * @param {() => Promise<string>} work what to say of the answer
 */
async function run(status, work) {
  status.className = "";
  status.textContent = "Looking …";
  try {
    status.textContent = await work();
  } catch (error) {
    status.className = "fault";
    status.textContent = error instanceof Error ? error.message : String(error);
  }
}

/** @param {() => Record<string, string>} headers of each request */
export function makeLookUps(headers) {
  const entries = find("log-entries", HTMLElement);
  const status = find("log-status", HTMLElement);
  const form = find("log-form", HTMLFormElement);
  const more = button("Look further back", () => look(further));
  /** @type {number | null} */
  let further = null;
  let turn = 0;
  more.hidden = true;
  entries.after(more);

  const look = (/** @type {number | null} */ before) => {
    const mine = ++turn;
    more.hidden = true;
    const value = (/** @type {string} */ id) => find(id, HTMLInputElement).value.trim();
    return run(status, async () => {
      const query = { search: value("log-search"), types: value("log-types"), audience: value("log-audience") };
      const answer = await ask("/console/log", headers(), { ...query, ...(before === null ? {} : { before: String(before) }) });
      if (mine !== turn) return status.textContent ?? "";
      if (before === null) entries.replaceChildren();
      entries.append(...answer.entries.map(shown));
      further = answer.further;
      more.hidden = further === null;
      const count = entries.childElementCount;
      const found = count ? `${count} found, the newest first.` : "Nothing found.";
      return further === null ? `${found} That is all of the log.` : `${found} Read back to entry ${further}.`;
    });
  };

  form.onsubmit = (submitted) => {
    submitted.preventDefault();
    look(null);
  };

  const showQuarantine = () =>
    run(find("quarantine-status", HTMLElement), async () => {
      const { messages } = await ask("/console/quarantine", headers());
      find("quarantine-messages", HTMLElement).replaceChildren(...messages.map(shown));
      return messages.length
        ? `${messages.length === 50 ? "The 50 oldest" : `All ${messages.length}`}, the oldest first. They stay in the queue.`
        : "The quarantine is empty.";
    });
  find("quarantine-look", HTMLButtonElement).onclick = showQuarantine;
  return { showLog: () => look(null), showQuarantine };
}
