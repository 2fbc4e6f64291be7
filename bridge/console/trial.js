// @ts-check
// A stream beside that of the page, to try `types` and resuming from a cursor. It is not opened again when it ends.
import { parse } from "/client.js";
import { clock, element, find, pretty } from "./dom.js";

const MAX_FRAMES = 200;

/** @param {() => Record<string, string>} headers of the request, beside `Accept` */
export function makeTrial(headers) {
  const form = find("trial", HTMLFormElement);
  const frames = find("frames", HTMLElement);
  const result = find("trial-result", HTMLElement);
  const send = find("trial-send", HTMLButtonElement);
  /** @type {AbortController | null} */
  let running = null;

  const request = () => {
    const url = new URL("/events", location.href);
    const types = find("trial-types", HTMLInputElement).value.trim();
    const cursor = find("trial-cursor", HTMLInputElement).value.trim();
    if (types) url.searchParams.set("types", types);
    if (cursor) url.searchParams.set("lastEventId", cursor);
    url.searchParams.set("audience", "true");
    return url;
  };

  const stop = () => {
    running?.abort();
    running = null;
    send.textContent = "Open the stream";
  };

  const start = async () => {
    const mine = (running = new AbortController());
    let events = 0;
    let ready = "";
    let gap = "";
    let end = "It is open.";
    const show = () => {
      if (running === mine || running === null)
        result.textContent = [ready, gap, `${events} ${events === 1 ? "event" : "events"}.`, end].filter(Boolean).join(" ");
    };
    send.textContent = "Stop";
    frames.replaceChildren();
    result.className = "";
    result.textContent = "Connecting.";
    try {
      const answer = await fetch(request(), {
        headers: { Accept: "text/event-stream", ...headers() },
        cache: "no-store",
        signal: mine.signal,
      });
      if (!answer.ok || !answer.body) {
        const problem = await answer.json().catch(() => null);
        throw new Error(problem?.detail ?? `The answer is ${answer.status} ${answer.statusText}`);
      }
      await parse(
        answer.body,
        ({ name, data, id }) => {
          if (mine.signal.aborted) return;
          const content = JSON.parse(data);
          if (name === "bridge.ready") ready = content.resumed ? "Resumed." : "Begun at the newest.";
          else if (name === "bridge.gap") gap = `Gap: ${content.reason}.`;
          else if (name === "bridge.bye") end = `The bridge ended it: ${content.reason}.`;
          else if (!name.startsWith("bridge.")) events++;
          frames.append(frame(name, data, id));
          while (frames.childElementCount > MAX_FRAMES) frames.firstElementChild?.remove();
          show();
        },
        () => {},
        () => {},
      );
      if (end === "It is open.") end = "The connection ended.";
    } catch (error) {
      if (mine.signal.aborted) end = "Stopped.";
      else {
        result.className = "fault";
        ready = end = "";
        gap = error instanceof Error ? error.message : String(error);
        result.textContent = gap;
        if (running === mine) stop();
        return;
      }
    }
    show();
    if (running === mine) stop();
  };

  form.onsubmit = (submitted) => {
    submitted.preventDefault();
    if (running) stop();
    else start();
  };

  return (/** @type {string} */ cursor) => {
    stop();
    find("trial-cursor", HTMLInputElement).value = cursor;
  };
}

/**
 * @param {string} name
 * @param {string} data
 * @param {string | null} id
 */
function frame(name, data, id) {
  const head = element("summary", "", element("time", "", clock(Date.now())), " ", element("b", "", name));
  const part = element("details", name === "bridge.gap" ? "gap" : "", head);
  part.append(element("pre", "", `${id === null ? "" : `id: ${id}\n`}event: ${name}\ndata: ${pretty(data)}`));
  return element("li", "", part);
}
