// @ts-check
// The console: what a page of yours would do, shown. `list.js` has the events, `charts.js` the last minutes, `trial.js`
// and `lookup.js` the tools beside the list.
import { subscribe } from "/client.js";
import { Arrivals, Timeline, drawLatency, drawRate, drawTimeline } from "./charts.js";
import { Detail, GAPS, sample } from "./detail.js";
import { clock, duration, element, find, makeCopier, makeTabs } from "./dom.js";
import { EntryList } from "./list.js";
import { makeLookUps } from "./lookup.js";
import { makeTrial } from "./trial.js";

const MAX_HAPPENINGS = 100;
const inDevelopment = document.documentElement.dataset.development === "true";

/** @type {Record<string, any>} */
const schemas = await (await fetch("/schemas")).json();
const arrivals = new Arrivals();
const timeline = new Timeline();
/** @type {string | null} */
let token = null;
/** @type {import("/client.js").Subscription | undefined} */
let subscription;
let count = 0;
let gaps = 0;
let cuts = 0;

const authorization = () => /** @type {Record<string, string>} */ (token === null ? {} : { Authorization: `Bearer ${token}` });

// The stream

function connect() {
  subscription?.close();
  const given = token;
  const mine = subscribe({
    url: "/events?audience=true",
    // A pasted token belongs to this tab alone; without one the application's cookie counts, and tabs may share.
    share: given === null,
    ...(given === null ? {} : { token: ({ reason }) => (reason === null ? given : null) }),
    onEvent: (/** @type {any} */ event) => {
      const at = Date.now();
      const sent = Date.parse(event.time ?? "");
      const latency = Number.isNaN(sent) ? null : at - sent;
      count++;
      arrivals.add(at, latency);
      list.add({ kind: "event", at, event, latency, cursor: mine.cursor, note: "", reason: "" });
    },
    onGap: ({ reason }) => {
      gaps++;
      const at = Date.now();
      const note = `gap (${reason}): something may have been missed; a page fetches its state again`;
      timeline.gap(at, reason);
      list.add({ kind: "gap", at, event: null, latency: null, cursor: null, note, reason });
      happened(at, `gap (${reason})`, "gap", GAPS[reason]);
    },
    onState: (state) => {
      if (subscription === mine || subscription === undefined) showState(state);
    },
  });
  subscription = mine;
}

/** @type {string} */
let lastStatus = "";
let isCut = false; // One cut may be many tries.
/** @type {number | null} */
let brokenAt = null; // Since when it has not been live.

/**
 * Why a stream was cut, as far as the page knows.
 * @param {any} state
 */
function reasonOf(state) {
  if (state.problem) return `${state.problem.detail} (${state.problem.code})`;
  return state.reason ? `the bridge said ${state.reason}` : "the connection ended";
}

/** @param {any} state */
function showState(state) {
  const seconds = state.retryAt ? Math.max(0, Math.ceil((state.retryAt - Date.now()) / 1000)) : 0;
  const words = /** @type {Record<string, string>} */ ({
    connecting: "connecting",
    live: `live for user “${state.user}”${state.leads ? "" : ", by another tab"}`,
    waiting: `cut off, again in ${seconds} s`,
    refused: "refused",
    interrupted: "waiting for RabbitMQ; events come later",
    paused: "paused",
    closed: "closed",
  });
  const shown = words[state.status] ?? state.status;
  const label = find("state", HTMLElement);
  label.className = state.status;
  if (label.textContent !== shown) label.textContent = shown;
  if (state.status !== lastStatus) changeStatus(state, shown);
  find("login", HTMLElement).hidden = state.status !== "refused";
  if (state.status === "refused") find("problem", HTMLElement).textContent = `${state.problem.detail} (${state.problem.code})`;
  const to = find("sample-to", HTMLInputElement);
  if (state.status === "live" && !to.value) to.value = `user:${state.user}`;
}

/**
 * @param {any} state
 * @param {string} shown
 */
function changeStatus(state, shown) {
  const at = Date.now();
  lastStatus = state.status;
  timeline.change(at, state.status, state.status === "waiting" ? reasonOf(state) : shown);
  const report = (/** @type {string} */ note, /** @type {string} */ kind) => {
    happened(at, note, kind);
    list.add({ kind: "cut", at, event: null, latency: null, cursor: null, note, reason: "" });
  };
  if (state.status === "waiting") {
    if (!isCut) {
      cuts++;
      timeline.cut(at);
      report(`cut off: ${reasonOf(state)}`, "cut");
    }
    isCut = true;
    brokenAt ??= at;
  } else if (state.status === "interrupted") {
    report("the bridge has no RabbitMQ: what is published now comes later", "cut");
    brokenAt ??= at;
  } else if (state.status === "live") {
    if (brokenAt === null) happened(at, shown, "live");
    else report(`live again after ${duration(at - brokenAt)}`, "live");
    isCut = false;
    brokenAt = null;
  } else if (state.status === "refused") {
    happened(at, `refused: ${reasonOf(state)}`, "gap");
    isCut = false;
    brokenAt = null;
  }
}

/**
 * A line of the timeline.
 * @param {number} at
 * @param {string} text
 * @param {string} kind
 * @param {string} [about]
 */
function happened(at, text, kind, about = "") {
  const happenings = find("happenings", HTMLElement);
  const line = element("li", kind, element("time", "", clock(at)), element("span", "", text));
  if (about) line.title = about;
  happenings.prepend(line);
  while (happenings.childElementCount > MAX_HAPPENINGS) happenings.lastElementChild?.remove();
}

// The last minutes

function drawCharts() {
  if (document.hidden) return;
  const now = Date.now();
  const buckets = arrivals.buckets(now);
  const show = (/** @type {string} */ name, /** @type {(chart: Element) => {top?: string, words: string}} */ draw) => {
    const chart = /** @type {Element} */ (document.getElementById(`${name}-chart`));
    if (chart.matches(":hover")) return; // The figure under the pointer stays, to be read.
    const { top, words } = draw(chart);
    chart.setAttribute("aria-label", words);
    if (top !== undefined) find(`${name}-top`, HTMLElement).textContent = top;
  };
  show("rate", (chart) => drawRate(chart, buckets));
  show("latency", (chart) => drawLatency(chart, buckets));
  show("timeline", (chart) => ({ words: drawTimeline(chart, timeline, now) }));
  const middle = buckets.findLast((bucket) => bucket.middle !== null)?.middle;
  const figures = {
    count: String(count),
    gaps: String(gaps),
    cuts: String(cuts),
    rate: String(arrivals.rate(now)),
    latency: middle == null ? "–" : `${middle} ms`,
  };
  for (const [id, text] of Object.entries(figures)) find(id, HTMLElement).textContent = text;
  if (subscription?.state.status === "waiting") showState(subscription.state);
}

// The list, and what is beside it

let shownBefore = ""; // The panel that was shown before an event was chosen.
let panel = "";
const detail = new Detail(schemas);
const list = new EntryList({
  list: find("events", HTMLElement),
  empty: find("empty", HTMLElement),
  matches: find("matches", HTMLElement),
  search: find("search", HTMLInputElement),
  types: find("types", HTMLSelectElement),
  pause: find("pause", HTMLButtonElement),
  clear: find("clear", HTMLButtonElement),
  hint: () =>
    lastStatus !== "live" ? "The stream is not live." : inDevelopment ? "Publish one, or run a worker." : "Run a worker, or bridge publish.",
  onChoose: (entry, isClick) => {
    detail.show(entry);
    if (entry && panel !== "event") {
      shownBefore = panel;
      showPanel("event");
    } else if (!entry && panel === "event" && shownBefore) showPanel(shownBefore);
    // With one column it is shown further down.
    if (isClick && matchMedia("(max-width: 60rem)").matches) find("beside", HTMLElement).scrollIntoView();
  },
});
const lookUps = makeLookUps(authorization);
const showTrial = makeTrial(authorization);
const looked = new Set();

const showPanel = makeTabs(find("tabs", HTMLElement), (id) => {
  panel = id;
  if (id !== "event") shownBefore = id;
  if (["log", "quarantine"].includes(id) && !looked.has(id)) {
    looked.add(id);
    if (id === "log") lookUps.showLog();
    else lookUps.showQuarantine();
  }
});

find("close", HTMLElement).onclick = () => {
  list.choose(null);
  find("events", HTMLElement).focus(); // The browser scrolls to it.
};
find("try-event", HTMLElement).onclick = () => {
  showTrial(detail.entry?.cursor ?? "");
  showPanel("try");
  find("trial-send", HTMLElement).focus();
};
find("trial-newest", HTMLElement).onclick = () => {
  find("trial-cursor", HTMLInputElement).value = subscription?.cursor ?? "";
};
find("publish-again", HTMLElement).onclick = () => {
  const event = detail.entry?.event;
  if (!event) return;
  find("sample-type", HTMLSelectElement).value = event.type;
  find("sample-data", HTMLTextAreaElement).value = JSON.stringify(event.data, null, 2);
  if (event.audience) find("sample-to", HTMLInputElement).value = event.audience;
  showPanel("publish");
  find("sample-data", HTMLElement).focus();
};

// Publishing

function showSample() {
  const schema = schemas[find("sample-type", HTMLSelectElement).value];
  find("sample-data", HTMLTextAreaElement).value = JSON.stringify(sample(schema), null, 2);
}

/** @param {Event} submitted */
async function publish(submitted) {
  submitted.preventDefault();
  const output = find("published", HTMLElement);
  output.className = "";
  output.textContent = "…";
  try {
    const data = JSON.parse(find("sample-data", HTMLTextAreaElement).value);
    const to = find("sample-to", HTMLInputElement).value;
    const answer = await fetch("/console/publish", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization() },
      body: JSON.stringify({ to, type: find("sample-type", HTMLSelectElement).value, data }),
    });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.detail);
    output.textContent = `published ${body.id}`;
  } catch (error) {
    output.className = "fault";
    output.textContent = error instanceof Error ? error.message : String(error);
  }
}

// Snippets

function showSnippets() {
  const origin = location.origin;
  const snippets = {
    EventSource: `const source = new EventSource("${origin}/events?named=false", { withCredentials: true });
source.onmessage = (message) => console.log(JSON.parse(message.data));
source.addEventListener("bridge.gap", () => location.reload());`,
    "The client": `import { subscribe } from "${origin}/client.js";
subscribe({ url: "${origin}/events", load: fetchState, onEvent: { "job.completed": (event) => show(event.data) } });`,
    curl: `curl -N -H "Authorization: Bearer $TOKEN" ${origin}/events`,
    Shell: `bridge publish --to user:42 --type notification --data '{"title": "Hello"}'`,
    Python: `async with Publisher("amqp://…", source="/workers/reports") as publisher:
    await publisher.to_user("42", JobCompleted(job_id="r-7", duration_seconds=3.2))`,
  };
  for (const [name, text] of Object.entries(snippets)) {
    const code = element("pre", "", text);
    const copies = makeCopier(element("button", "", "Copy"), () => text, code);
    copies.setAttribute("aria-label", `Copy: ${name}`);
    const head = element("div", "bar", element("h3", "", name), copies);
    find("snippets", HTMLElement).append(element("div", "snippet", head, code));
  }
}

// The page

find("sample", HTMLFormElement).onsubmit = publish;
find("sample-type", HTMLSelectElement).onchange = showSample;
find("login", HTMLFormElement).onsubmit = (submitted) => {
  submitted.preventDefault();
  token = find("token", HTMLInputElement).value.trim() || null;
  connect();
};

document.addEventListener("keydown", (key) => {
  if (key.ctrlKey || key.metaKey || key.altKey) return;
  const focused = document.activeElement;
  const isTyping = focused instanceof HTMLElement && /^(INPUT|SELECT|TEXTAREA)$/.test(focused.tagName);
  if (key.key === "Escape") {
    if (isTyping) focused.blur();
    else list.choose(null);
  } else if (!isTyping && key.key === "/") {
    key.preventDefault();
    find("search", HTMLElement).focus();
  } else if (!isTyping && key.key === "p") find("pause", HTMLElement).click();
});

for (const type of Object.keys(schemas)) {
  find("types", HTMLSelectElement).append(new Option(type, type));
  find("sample-type", HTMLSelectElement).append(new Option(type, type));
}
for (const part of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-needs-development]"))) part.hidden = !inDevelopment;
showPanel(inDevelopment ? "publish" : "event");
showSample();
showSnippets();
list.redraw();
drawCharts();
setInterval(drawCharts, 1000);
connect();
