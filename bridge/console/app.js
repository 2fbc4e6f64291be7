// @ts-check
// The console: what a page of yours would do, shown. Everything that stands in an event is set as text, never as HTML.
import { subscribe } from "/client.js";

const MAX_ROWS = 500;
const $ = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));

/** @type {Array<{event: any, at: number, latency: number | null, note?: string, kind?: string}>} */
let entries = [];
/** @type {Record<string, any>} */
let schemas = {};
let shown = entries; // After the filters.
let count = 0;
let gaps = 0;
let paused = false;
let dirty = false;
/** @type {any} */
let chosen = null;
/** @type {number[]} */
let arrivals = [];
/** @type {string | null} */
let token = null;
/** @type {any} */
let subscription;

// The stream

function connect() {
  subscription?.close();
  const given = token;
  subscription = subscribe({
    url: "/events",
    // A pasted token belongs to this tab alone; without one the application's cookie counts, and tabs may share.
    share: given === null,
    ...(given === null ? {} : { token: ({ reason }) => (reason === null ? given : null) }),
    onEvent: (event) => {
      const at = Date.now();
      const latency = event.time ? at - Date.parse(event.time) : null;
      count++;
      arrivals.push(at);
      add({ event, at, latency });
    },
    onGap: ({ reason }) => {
      gaps++;
      add({ event: null, at: Date.now(), latency: null, kind: "gap", note: `gap (${reason}): something may have been missed; a page fetches its state anew` });
    },
    onState: (state) => showState(state),
  });
}

let lastStatus = "";

function showState(/** @type {any} */ state) {
  const words = {
    connecting: "connecting",
    live: `live for user “${state.user}”${state.leads ? "" : ", by another tab"}`,
    waiting: `cut off, again in ${Math.max(0, Math.round((state.retryAt - Date.now()) / 100) / 10)} s`,
    refused: "refused",
    interrupted: "waiting for RabbitMQ; events come later",
    paused: "paused",
    closed: "closed",
  };
  $("state").className = state.status;
  $("state").textContent = words[/** @type {keyof words} */ (state.status)];
  if (state.status !== lastStatus && ["live", "waiting", "refused"].includes(state.status))
    add({ event: null, at: Date.now(), latency: null, kind: "note", note: $("state").textContent });
  lastStatus = state.status;
  $("login").hidden = state.status !== "refused";
  if (state.status === "refused") $("problem").textContent = `${state.problem.detail} (${state.problem.code})`;
  if (state.status === "live" && !$("sample-to").value) $("sample-to").value = `user:${state.user}`;
}

// The list. Many events may come in one frame of the screen; it is drawn once.

function add(/** @type {any} */ entry) {
  entries.unshift(entry);
  entries.length = Math.min(entries.length, MAX_ROWS);
  redraw();
}

function redraw() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame(() => {
    dirty = false;
    draw();
  });
}

function element(/** @type {string} */ tag, /** @type {string} */ text = "", /** @type {string} */ className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function draw() {
  $("count").textContent = String(count);
  $("gaps").textContent = String(gaps);
  const newest = entries.find((entry) => entry.latency !== null);
  $("latency").textContent = newest ? `${newest.latency} ms` : "–";
  if (paused) return;
  const words = $("search").value.toLowerCase();
  const type = $("types").value;
  shown = entries.filter(
    ({ event, note }) =>
      (!type || (event && event.type === type)) && (!words || JSON.stringify(event ?? note).toLowerCase().includes(words)),
  );
  $("empty").hidden = shown.length > 0;
  $("events").replaceChildren(
    ...shown.map((entry) => {
      const row = element("li", "", entry.kind ?? "");
      const time = element("time", new Date(entry.at).toTimeString().slice(0, 8) + "." + String(entry.at % 1000).padStart(3, "0"));
      if (entry.event) {
        row.setAttribute("role", "option");
        row.setAttribute("aria-selected", String(entry === chosen));
        row.append(time, element("span", entry.event.type), element("code", JSON.stringify(entry.event.data)));
        row.append(element("small", entry.latency === null ? "" : `${entry.latency} ms`));
        row.onclick = () => choose(entry);
      } else {
        const text = element("span", entry.note);
        text.style.gridColumn = "2 / -1";
        row.append(time, text);
      }
      return row;
    }),
  );
}

setInterval(() => {
  const since = Date.now() - 5000;
  arrivals = arrivals.filter((at) => at > since);
  $("rate").textContent = String(Math.round(arrivals.length / 0.5) / 10);
  if (subscription?.state.status === "waiting") showState(subscription.state);
}, 500);

// One event

function choose(/** @type {any} */ entry) {
  chosen = entry;
  redraw();
  $("detail").hidden = entry === null;
  if (entry === null) return;
  const { event } = entry;
  const schema = schemas[event.type];
  $("detail-title").textContent = event.type;
  $("description").textContent = schema?.description ?? "";
  $("raw").textContent = JSON.stringify(event, null, 2);
  const rows = Object.entries(event)
    .filter(([name]) => name !== "data")
    .map(([name, value]) => member(name, value, "CloudEvents"));
  const members = schema?.properties ?? {};
  for (const name of new Set([...Object.keys(members), ...Object.keys(event.data ?? {})]))
    rows.push(member(`data.${name}`, event.data?.[name], describe(members[name], schema), !(name in members)));
  $("members").replaceChildren(...rows);
}

function member(/** @type {string} */ name, /** @type {any} */ value, /** @type {string} */ about, unknown = false) {
  const row = document.createElement("tr");
  row.append(element("td", name), element("td", value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value)));
  const cell = element("td");
  cell.append(element("small", unknown ? "not in the schema of this bridge" : about, unknown ? "fault" : ""));
  row.append(cell);
  return row;
}

function resolve(/** @type {any} */ schema, /** @type {any} */ root) {
  while (schema?.$ref) schema = root.$defs?.[schema.$ref.split("/").pop()];
  return schema ?? {};
}

/** @returns {string} */
function describe(/** @type {any} */ schema, /** @type {any} */ root) {
  const resolved = resolve(schema, root);
  const options = resolved.anyOf ?? resolved.oneOf;
  const kind = options
    ? options.map((/** @type {any} */ option) => describe(option, root)).join(" or ")
    : resolved.enum
      ? resolved.enum.map((/** @type {any} */ value) => JSON.stringify(value)).join(" or ")
      : "const" in resolved
        ? JSON.stringify(resolved.const)
        : (resolved.type ?? "any");
  return [kind, schema?.description].filter(Boolean).join(": ");
}

// A sample that its schema takes, as far as can be guessed; what is wrong with it the bridge will say.

/** @returns {any} */
function sample(/** @type {any} */ schema, /** @type {any} */ root, /** @type {string} */ name) {
  const it = resolve(schema, root);
  if ("default" in it) return it.default;
  if ("const" in it) return it.const;
  if (it.enum) return it.enum[0];
  if (it.anyOf ?? it.oneOf) return sample((it.anyOf ?? it.oneOf)[0], root, name);
  switch (it.type) {
    case "string":
      if (it.format === "date-time") return new Date().toISOString();
      if (it.format === "date") return new Date().toISOString().slice(0, 10);
      if (it.format === "uri") return "https://example.com/";
      return `a ${name.replaceAll("_", " ")}`.slice(0, it.maxLength ?? 200);
    case "integer":
    case "number":
      return Math.max(it.minimum ?? 0, Math.min(it.maximum ?? 42, 42));
    case "boolean":
      return true;
    case "array":
      return [];
    case "object": {
      /** @type {Record<string, any>} */
      const made = {};
      for (const [key, part] of Object.entries(it.properties ?? {}))
        if (it.required?.includes(key)) made[key] = sample(part, root, key);
      return made;
    }
  }
  return null;
}

function showSample() {
  const schema = schemas[$("sample-type").value];
  $("sample-data").value = JSON.stringify(sample(schema, schema, ""), null, 2);
}

async function publish(/** @type {Event} */ submitted) {
  submitted.preventDefault();
  const output = $("published");
  output.className = "";
  output.textContent = "…";
  try {
    const data = JSON.parse($("sample-data").value);
    const answer = await fetch("/console/publish", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) },
      body: JSON.stringify({ to: $("sample-to").value, type: $("sample-type").value, data }),
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
    const part = element("div", "", "snippet");
    const frame = element("div");
    frame.append(element("pre", text), copier(() => text));
    part.append(element("b", name), frame);
    $("snippets").append(part);
  }
}

function copier(/** @type {() => string} */ text, button = element("button", "Copy")) {
  const label = button.textContent;
  button.onclick = async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = label), 1500);
  };
  return button;
}

// The page

$("search").oninput = $("types").onchange = redraw;
$("clear").onclick = () => {
  entries = [];
  choose(null);
};
$("pause").onclick = () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  redraw();
};
$("close").onclick = () => choose(null);
$("sample").onsubmit = publish;
$("sample-type").onchange = showSample;
$("login").onsubmit = (/** @type {Event} */ submitted) => {
  submitted.preventDefault();
  token = $("token").value.trim() || null;
  connect();
};
copier(() => $("raw").textContent, $("copy-event"));

document.addEventListener("keydown", (key) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
  if (key.key === "Escape") {
    if (typing) /** @type {HTMLElement} */ (document.activeElement).blur();
    else choose(null);
  } else if (!typing && key.key === "/") {
    key.preventDefault();
    $("search").focus();
  } else if (!typing && key.key === "p" && !key.ctrlKey && !key.metaKey) $("pause").click();
  else if (document.activeElement === $("events") && ["ArrowDown", "ArrowUp", "Enter"].includes(key.key)) {
    key.preventDefault();
    const events = shown.filter(({ event }) => event);
    const at = events.indexOf(chosen) + { ArrowDown: 1, ArrowUp: -1, Enter: 0 }[/** @type {"Enter"} */ (key.key)];
    if (events[Math.max(0, at)]) choose(events[Math.max(0, at)]);
    requestAnimationFrame(() => document.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" }));
  }
});

schemas = await (await fetch("/schemas")).json();
for (const type of Object.keys(schemas)) {
  $("types").append(new Option(type, type));
  $("sample-type").append(new Option(type, type));
}
$("publish").hidden = document.documentElement.dataset.publish !== "true";
showSample();
showSnippets();
connect();
