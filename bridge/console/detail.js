// @ts-check
// One entry of the list, and what the schema says of it.
import { element, find, makeCopier } from "./dom.js";

/** What each reason of a gap means, and what a page does. */
export const GAPS = /** @type {Record<string, string>} */ ({
  expired: "The log no longer reaches back to where this page was. BRIDGE_LOG_MAX_AGE and BRIDGE_LOG_MAX_BYTES say how far it does.",
  unknown: "The bridge cannot tell where this page was: the cursor is of another log, or cannot be read.",
  "no-log": "There is no log, or it did not answer in time. Without a log a reconnect always has a gap.",
  "not-readable": "This replica cannot read an event for this page, and another one might: a new catalogue is being rolled out.",
  "other-user": "The stream is now another person's.",
  "other-groups": "The stream is the same person's, with other groups.",
  overflow: "Too many events waited for this page, and were dropped.",
});

/**
 * @param {any} schema
 * @param {any} root
 * @returns {any}
 */
function resolve(schema, root) {
  while (schema?.$ref) schema = root.$defs?.[schema.$ref.split("/").pop()];
  return schema ?? {};
}

/**
 * @param {any} schema
 * @param {any} root
 * @returns {string}
 */
function describe(schema, root) {
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

/**
 * A sample that its schema takes, as far as can be guessed; what is wrong with it the bridge will say.
 * @param {any} schema
 * @param {any} [root]
 * @param {string} [name]
 * @returns {any}
 */
export function sample(schema, root = schema, name = "") {
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

/**
 * @param {string} name
 * @param {any} value
 * @param {string} about
 * @param {boolean} [isUnknown]
 */
function member(name, value, about, isUnknown = false) {
  const text = value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value);
  const head = element("th", "", name);
  head.scope = "row";
  const note = element("small", isUnknown ? "fault" : "", isUnknown ? "not in the schema of this bridge" : about);
  return element("tr", "", head, element("td", "", text), element("td", "", note));
}

/** The panel beside the list. */
export class Detail {
  /** @type {import("./list.js").Entry | null} */
  entry = null;

  /** @param {Record<string, any>} schemas */
  constructor(schemas) {
    this.schemas = schemas;
    const raw = find("raw", HTMLElement);
    makeCopier(find("copy-event", HTMLButtonElement), () => raw.textContent ?? "", raw);
  }

  /** @param {import("./list.js").Entry | null} entry */
  show(entry) {
    this.entry = entry;
    find("detail", HTMLElement).hidden = entry === null;
    find("detail-empty", HTMLElement).hidden = entry !== null;
    if (!entry) return;
    const isEvent = entry.kind === "event";
    for (const id of ["detail-parts", "copy-event"]) find(id, HTMLElement).hidden = !isEvent;
    find("try-event", HTMLElement).hidden = !isEvent || !entry.cursor;
    if (!isEvent) {
      find("detail-title", HTMLElement).textContent = entry.kind === "gap" ? `Gap: ${entry.reason}` : "Connection";
      find("description", HTMLElement).textContent =
        entry.kind === "gap"
          ? `${GAPS[entry.reason] ?? ""} Something may have been missed, so a page fetches its state again.`
          : entry.note;
      return;
    }
    const { event } = entry;
    const schema = this.schemas[event.type];
    find("detail-title", HTMLElement).textContent = event.type;
    find("description", HTMLElement).textContent = schema?.description ?? "";
    find("raw", HTMLElement).textContent = JSON.stringify(event, null, 2);
    const members = schema?.properties ?? {};
    const rows = Object.entries(event)
      .filter(([name]) => name !== "data")
      .map(([name, value]) => member(name, value, name === "audience" ? "for whom it is" : "CloudEvents"));
    for (const name of new Set([...Object.keys(members), ...Object.keys(event.data ?? {})]))
      rows.push(member(`data.${name}`, event.data?.[name], describe(members[name], schema), !(name in members)));
    find("members", HTMLElement).replaceChildren(...rows);
  }
}
