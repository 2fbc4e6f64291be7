// @ts-check
// The last minutes as small charts. What computes takes values and returns values; what draws makes SVG.

export const WINDOW_MS = 300_000;
const BUCKET_MS = 5_000;
const BUCKETS = WINDOW_MS / BUCKET_MS;
const WIDTH = 300;
const HEIGHT = 60;
const MAX_SPANS = 500;

/** @typedef {{at: number, count: number, middle: number | null, highest: number | null}} Bucket */

/** Counts arrivals and keeps their latencies for the last minutes. */
export class Arrivals {
  /** @type {Map<number, {count: number, latencies: number[]}>} */
  #buckets = new Map();
  /** @type {number[]} */
  #recent = [];

  /**
   * @param {number} at ms since 1970
   * @param {number | null} latency ms
   */
  add(at, latency) {
    const key = Math.floor(at / BUCKET_MS);
    const bucket = this.#buckets.get(key) ?? { count: 0, latencies: [] };
    bucket.count++;
    if (latency !== null) bucket.latencies.push(latency);
    this.#buckets.set(key, bucket);
    this.#recent.push(at);
  }

  /**
   * Arrivals a second, over the last five seconds.
   * @param {number} now
   */
  rate(now) {
    this.#recent = this.#recent.filter((at) => at > now - 5_000);
    return Math.round(this.#recent.length / 0.5) / 10;
  }

  /**
   * The window in equal parts, the oldest first. The last one is not over yet.
   * @param {number} now
   * @returns {Bucket[]}
   */
  buckets(now) {
    const newest = Math.floor(now / BUCKET_MS);
    for (const key of this.#buckets.keys()) if (key <= newest - BUCKETS) this.#buckets.delete(key);
    return Array.from({ length: BUCKETS }, (_, index) => {
      const key = newest - BUCKETS + 1 + index;
      const { count, latencies } = this.#buckets.get(key) ?? { count: 0, latencies: [] };
      const sorted = [...latencies].sort((one, other) => one - other);
      return {
        at: key * BUCKET_MS,
        count,
        middle: sorted[Math.floor(sorted.length / 2)] ?? null,
        highest: sorted.at(-1) ?? null,
      };
    });
  }
}

/** @typedef {{status: string, from: number, to: number | null, note: string}} Span */

/** What the connection was, and when. */
export class Timeline {
  /** @type {Span[]} */
  spans = [];
  /** @type {Array<{at: number, reason: string}>} */
  gaps = [];
  /** @type {number[]} */
  cuts = []; // When each began. One cut may be many tries, each of them a span.

  /**
   * @param {number} at
   * @param {string} status
   * @param {string} note
   */
  change(at, status, note) {
    const last = this.spans.at(-1);
    if (last) last.to = at;
    this.spans.push({ status, from: at, to: null, note });
    if (this.spans.length > MAX_SPANS) this.spans.shift();
  }

  /** @param {number} at */
  cut(at) {
    this.cuts.push(at);
    if (this.cuts.length > MAX_SPANS) this.cuts.shift();
  }

  /**
   * @param {number} at
   * @param {string} reason
   */
  gap(at, reason) {
    this.gaps.push({ at, reason });
    if (this.gaps.length > MAX_SPANS) this.gaps.shift();
  }

  /**
   * The part of the window in which the stream was live, from 0 to 1; null before it was ever known.
   * @param {number} now
   */
  liveShare(now) {
    const since = now - WINDOW_MS;
    let live = 0;
    let all = 0;
    for (const { status, from, to } of this.spans) {
      const ms = Math.max(0, (to ?? now) - Math.max(from, since));
      all += ms;
      if (status === "live") live += ms;
    }
    return all ? live / all : null;
  }
}

// Drawing

/**
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {string} [title]
 */
function shape(tag, attributes, title) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  if (title) {
    const text = document.createElementNS("http://www.w3.org/2000/svg", "title");
    text.textContent = title;
    made.append(text);
  }
  return made;
}

/** @param {number} at */
const moment = (at) => new Date(at).toTimeString().slice(0, 8);

/**
 * Bars, each of one or two values: the first is drawn over the second.
 * @param {Element} chart an `svg` element
 * @param {Bucket[]} buckets
 * @param {(bucket: Bucket) => [number | null, (number | null)?]} values
 * @param {(bucket: Bucket) => string} words
 * @returns {number} the value of the highest bar
 */
function drawBars(chart, buckets, values, words) {
  const top = Math.max(1, ...buckets.flatMap((bucket) => values(bucket).map((value) => value ?? 0)));
  const step = WIDTH / BUCKETS;
  const bars = buckets.flatMap((bucket, index) => {
    const x = index * step + 0.5;
    const title = `${moment(bucket.at)}: ${words(bucket)}`;
    const drawn = values(bucket).map((value, order) => {
      // A value above zero is never invisible.
      const height = value === null || value === undefined || value <= 0 ? 0 : Math.max(1.5, (value / top) * (HEIGHT - 2));
      return shape("rect", { class: order ? "pale" : "full", x, y: HEIGHT - height, width: step - 1, height });
    });
    // All of the column shows the figures, not only the bar.
    return [...drawn.reverse(), shape("rect", { class: "column", x: x - 0.5, y: 0, width: step, height: HEIGHT }, title)];
  });
  chart.replaceChildren(shape("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }), ...bars);
  return top;
}

/** @param {number} count */
const perSecond = (count) => Math.round((count / (BUCKET_MS / 1000)) * 10) / 10;

/**
 * @param {Element} chart
 * @param {Bucket[]} buckets
 * @returns {{top: string, words: string}}
 */
export function drawRate(chart, buckets) {
  const words = (/** @type {Bucket} */ bucket) => `${perSecond(bucket.count)} events a second`;
  drawBars(chart, buckets, (bucket) => [bucket.count], words);
  const top = perSecond(Math.max(...buckets.map((bucket) => bucket.count)));
  const sum = buckets.reduce((all, bucket) => all + bucket.count, 0);
  return { top: String(top), words: `${sum} events in the last five minutes, at most ${top} a second.` };
}

/**
 * @param {Element} chart
 * @param {Bucket[]} buckets
 * @returns {{top: string, words: string}}
 */
export function drawLatency(chart, buckets) {
  const words = (/** @type {Bucket} */ bucket) =>
    bucket.middle === null ? "no event with a time" : `median ${bucket.middle} ms, slowest ${bucket.highest} ms`;
  drawBars(chart, buckets, (bucket) => [bucket.middle, bucket.highest], words);
  const highest = buckets.map((bucket) => bucket.highest).filter((value) => value !== null);
  if (!highest.length) return { top: "–", words: "No event with a time in the last five minutes." };
  const newest = buckets.findLast((bucket) => bucket.middle !== null);
  const top = Math.max(...highest);
  return { top: `${top} ms`, words: `Latency: median ${newest?.middle} ms just now, at most ${top} ms in five minutes.` };
}

/** How high each state is drawn, so that colour is not the only difference. */
const LEVELS = /** @type {Record<string, number>} */ ({ live: 40, interrupted: 24, connecting: 24, waiting: 14, refused: 8, paused: 8, closed: 8 });

/**
 * @param {Element} chart
 * @param {Timeline} timeline
 * @param {number} now
 * @returns {string} the same in words
 */
export function drawTimeline(chart, timeline, now) {
  const since = now - WINDOW_MS;
  const x = (/** @type {number} */ at) => ((Math.max(at, since) - since) / WINDOW_MS) * WIDTH;
  const spans = timeline.spans.filter(({ to }) => (to ?? now) > since);
  const gaps = timeline.gaps.filter(({ at }) => at > since);
  chart.replaceChildren(
    shape("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }),
    ...spans.map(({ status, from, to, note }) => {
      const height = LEVELS[status] ?? 4;
      const width = Math.max(0.8, x(to ?? now) - x(from));
      return shape("rect", { class: status, x: x(from), y: HEIGHT - height, width, height }, `${moment(from)}: ${note}`);
    }),
    ...gaps.map(({ at, reason }) =>
      shape("rect", { class: "gap", x: Math.min(x(at), WIDTH - 2), y: 4, width: 2, height: HEIGHT - 4 }, `${moment(at)}: gap (${reason})`),
    ),
  );
  const cuts = timeline.cuts.filter((at) => at > since).length;
  const share = timeline.liveShare(now);
  const live = share === null ? "Not connected yet." : `Live for ${Math.round(share * 100)} % of the time.`;
  return `${live} In the last five minutes: ${cuts} ${cuts === 1 ? "cut" : "cuts"}, ${gaps.length} ${gaps.length === 1 ? "gap" : "gaps"}.`;
}
