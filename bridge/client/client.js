// @ts-check
// The browser's end of the bridge: an ES module without dependencies. Types and docs: client.d.ts, docs/pages.md.
//
//   parse         bytes to SSE blocks (WHATWG HTML, section 9.2.6)
//   Connection    one stream, reconnected until it is stopped: backoff, watchdog, tokens. Knows no tabs and no handlers
//   Subscription  one page's view: the identity, which tab leads, which events were seen, and the calls of handlers
//
// Why not EventSource: it sends no Authorization header, ends for good after one bad status, does not show why it was
// refused, and hides heartbeats, so that a dead connection looks like a quiet one.
//
// Tabs share one connection. docs/contract.md, section 7, has the rules, docs/states.md the states, docs/decisions/25 an example.

const CONNECT_MS = 30_000; // The bridge is ready, or says that it is not, within 20 s; a proxy may take longer.
const TOKEN_MS = 120_000; // A person may have to log in.
const LEADER_TOKEN_MS = 5_000; // A tab that waits longer for its token gives the lead to another tab.
const FRESH_TOKEN_MS = 30_000; // A token that a HEAD request has just tried serves the GET request after it.
const MAX_BACKOFF_MS = 30_000;
const MAX_SLEEP_MS = 3_600_000; // A browser's timer fires at once above 2^31 ms.
const DEFAULT_RETRY_MS = 3_000;
const PING_MS = 5_000; // A leading tab that is silent for this long is asked, and replaced after two questions without an answer.
const GATHER_MS = 1_000; // A new leader waits at most this long for the positions of the other tabs.
const WIDEN_MS = 50; // Subscriptions that begin together cause one reconnect.
const RECENT_IDS = 10_000; // Remembered ids, by which an event that arrives twice is dropped.
const RING_CHARS = 500_000; // Blocks that each tab keeps for a tab that is behind it.
const UNKNOWN = "unknown"; // The identity of an answer to a token that cannot be judged now.
const SLICE_MS = 8; // Handlers run for this long before the page may paint and react.
const BATCH_EVENTS = 1_000; // For `onBatch`, at once.
const WAITING_EVENTS = 10_000; // Events that may wait for `load` or for a slow handler ...
const WAITING_CHARS = 10_000_000; // ... and how large they may be together.
const LOAD_SECONDS = 60;
const MAX_PATTERNS = 16; // The bridge takes no more in `types`.

const sleep = (/** @type {number} */ ms, /** @type {AbortSignal} */ signal) =>
  new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      signal.removeEventListener("abort", done);
      resolve(undefined);
    };
    const timer = setTimeout(done, Math.min(ms, MAX_SLEEP_MS));
    addEventListener("online", done); // The network is back.
    signal.addEventListener("abort", done);
    if (signal.aborted) done();
  });

/**
 * @template Value
 * @param {number} ms
 * @param {Promise<Value>} value
 * @param {string} what
 * @returns {Promise<Value>}
 */
async function within(ms, value, what) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no ${what} within ${ms / 1000} s`)), ms);
  });
  try {
    return await Promise.race([value, /** @type {Promise<never>} */ (late)]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Reads a stream of bytes as SSE blocks until it ends (WHATWG HTML, 9.2.6; tests/browser/test_parser.py).
 * @param {ReadableStream<Uint8Array>} body
 * @param {(block: {name: string, data: string, id: string | null}) => void} onBlock a block with data
 * @param {(retryMs: number) => void} onRetry
 * @param {() => void} onBytes bytes arrived, perhaps only a comment
 */
export async function parse(body, onBlock, onRetry, onBytes) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // Removes one byte order mark at the start, as the standard asks.
  let rest = ""; // The start of a line whose end has not arrived.
  let afterCr = false; // The last line ended with CR: a LF after it belongs to that line end.
  let name = "";
  /** @type {string[]} */
  let data = [];
  /** @type {string | null} */
  let id = null; // Stays for the blocks that follow.
  const take = (/** @type {string} */ line) => {
    if (line === "") {
      if (data.length) onBlock({ name: name || "message", data: data.join("\n"), id });
      name = "";
      data = [];
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // A comment.
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "data") data.push(value);
    else if (field === "event") name = value;
    else if (field === "id" && !value.includes("\0")) id = value;
    else if (field === "retry" && /^[0-9]+$/.test(value)) onRetry(Number(value));
  };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // A block without its empty line is not complete, and is dropped.
      onBytes();
      const text = decoder.decode(value, { stream: true });
      if (text === "") continue; // Part of a character.
      // CR ends a line at once. Waiting for a LF would delay a block until the next one arrives.
      const end = /\r\n?|\n/g;
      let start = (end.lastIndex = afterCr && text[0] === "\n" ? 1 : 0);
      afterCr = text.endsWith("\r");
      for (let found; (found = end.exec(text)); start = end.lastIndex) {
        take(rest + text.slice(start, found.index));
        rest = "";
      }
      rest += text.slice(start);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A stream that is reconnected until it is stopped or refused. With HEAD: until an answer names the identity. */
class Connection {
  #abort = new AbortController();

  /**
   * @param {{
   *   method: "GET" | "HEAD",
   *   url: URL,
   *   credentials: RequestCredentials,
   *   token: null | ((reason: string | null) => Promise<string | null>),
   *   cursor: () => string | null,
   *   attempt: number,
   *   onOpen: (identity: string | null) => boolean,
   *   onBlock: (block: Block) => void,
   *   onState: (state: any) => void,
   * }} shell `onOpen` returns whether to read the stream.
   */
  constructor(shell) {
    this.shell = shell;
    queueMicrotask(() => this.#run()); // Not before its maker has it, and can stop it.
  }

  stop() {
    this.#abort.abort();
  }

  async #run() {
    const { signal } = this.#abort;
    let { attempt } = this.shell;
    /** @type {string | null} */
    let refusal = null; // The code of the last 401, for the token's callback.
    while (!signal.aborted) {
      this.shell.onState({ status: "connecting", attempt });
      if (signal.aborted) return; // By a listener.
      const end = await this.#connect(refusal);
      if (signal.aborted || end.done) return;
      if (end.fatal) {
        this.shell.onState({ status: "refused", problem: end.problem });
        return;
      }
      if (end.wasLive) attempt = 0;
      // The first new token is tried at once. A pause that the server names is random already. Every other pause has
      // full jitter, so that a thousand pages do not return at the same moment.
      const again = end.unauthorized && refusal === null;
      refusal = end.expired ? "expired" : end.unauthorized ? (end.problem?.code ?? "invalid-token") : null;
      if (refusal === "expired-token") refusal = "expired";
      const limit = Math.min(MAX_BACKOFF_MS, end.retryMs * 2 ** attempt);
      const ms = again || end.expired ? 0 : end.reason ? end.retryMs : Math.max(end.afterMs, Math.random() * limit);
      attempt++;
      const { problem, reason } = end;
      this.shell.onState({ status: "waiting", attempt, retryAt: Date.now() + ms, problem, reason });
      await sleep(ms, signal);
    }
  }

  /**
   * One try, until its end.
   * @param {string | null} refusal
   */
  async #connect(refusal) {
    const end = {
      /** Whether nothing more has to be done. */
      done: false,
      /** Whether `bridge.ready` arrived. */
      wasLive: false,
      /** @type {string | null} Of the server's goodbye, which named `retryMs`. */
      reason: null,
      retryMs: DEFAULT_RETRY_MS,
      afterMs: 0,
      /** Whether the token has expired and there is a callback for a new one. */
      expired: false,
      fatal: false,
      unauthorized: false,
      /** @type {null | {status: number, code: string, detail: string}} */
      problem: null,
    };
    const abort = new AbortController();
    const stop = () => abort.abort();
    this.#abort.signal.addEventListener("abort", stop);
    let silenceMs = CONNECT_MS;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let watchdog;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(stop, silenceMs);
    };
    try {
      /** @type {Record<string, string>} */
      const headers = { Accept: "text/event-stream" };
      if (this.shell.token) {
        let token;
        try {
          token = await this.shell.token(refusal);
        } catch (error) {
          end.problem = { status: 0, code: "token-failed", detail: String(error) };
          return end;
        }
        if (this.#abort.signal.aborted) return end;
        if (!token) {
          end.fatal = true;
          end.problem = { status: 401, code: "no-token", detail: "the token's callback returned none" };
          return end;
        }
        headers.Authorization = `Bearer ${token}`;
      }
      const cursor = this.shell.cursor();
      if (cursor) headers["Last-Event-ID"] = cursor;
      alive();
      const { url, method, credentials } = this.shell;
      const ask = (/** @type {string} */ how) =>
        fetch(url, { method: how, headers, credentials, cache: "no-store", signal: abort.signal });
      let response = await ask(method);
      // An answer to HEAD has no body with a reason, and some proxies refuse HEAD.
      if (method === "HEAD" && response.status !== 200) response = await ask("GET");
      if (response.status !== 200) {
        const { ours, ...problem } = await readProblem(response);
        end.problem = problem;
        const seconds = Number(response.headers.get("Retry-After"));
        if (seconds > 0) end.afterMs = seconds * 1000;
        end.unauthorized = response.status === 401 && this.shell.token !== null;
        // A new request does not help after a refusal by the bridge, or without a login. Every other answer is a
        // proxy's, which may have no bridge behind it for a moment.
        const { status } = response;
        end.fatal = status === 401 ? !end.unauthorized : ours && status < 500 && status !== 408 && status !== 429;
        return end;
      }
      if (!/^text\/event-stream\b/i.test(response.headers.get("Content-Type") ?? "")) {
        // A login page behind a redirect, or a proxy's own page.
        const detail = `${response.url} answered ${response.headers.get("Content-Type")} and no event stream`;
        end.problem = { status: 200, code: "not-an-event-stream", detail };
        return end;
      }
      const identity = response.headers.get("Bridge-Identity");
      if (method === "HEAD" && identity === UNKNOWN) {
        end.problem = { status: 200, code: "busy", detail: "the bridge cannot judge the token now" };
        return end;
      }
      if (!this.shell.onOpen(identity) || !response.body) {
        end.done = true;
        return end;
      }
      await parse(
        response.body,
        (block) => {
          if (this.#abort.signal.aborted) return;
          if (block.name === "bridge.ready") {
            end.wasLive = true;
            // Two and a half heartbeats: one may be late, but two are not lost by chance.
            silenceMs = Math.max(5_000, JSON.parse(block.data).heartbeat_seconds * 2_500);
            alive();
          } else if (block.name === "bridge.bye") {
            end.reason = JSON.parse(block.data).reason;
            end.expired = end.reason === "expired" && this.shell.token !== null;
          }
          this.shell.onBlock(block);
        },
        (ms) => (end.retryMs = ms),
        alive,
      );
    } catch (error) {
      // The network or the watchdog. A browser does not say why a fetch failed.
      if (!this.#abort.signal.aborted && !end.wasLive) {
        const late = `no answer within ${silenceMs / 1000} s; a browser opens six connections to a host over HTTP/1.1`;
        end.problem = { status: 0, code: "unreachable", detail: abort.signal.aborted ? late : String(error) };
      }
    } finally {
      clearTimeout(watchdog);
      abort.abort();
      this.#abort.signal.removeEventListener("abort", stop);
    }
    return end;
  }
}

/** @param {Response} response */
async function readProblem(response) {
  const problem = {
    status: response.status,
    code: `status-${response.status}`,
    detail: response.statusText,
    ours: false,
  };
  try {
    const document = await response.json();
    const code = /^urn:bridge:problem:(.+)/.exec(document.type)?.[1];
    if (code) [problem.code, problem.ours] = [code, true];
    if (typeof document.detail === "string") problem.detail = document.detail;
  } catch {
    // Not the bridge's answer; a proxy's, perhaps.
  }
  return problem;
}

/** @typedef {{name: string, data: string, id: string | null}} Block */

/**
 * A position in the blocks that the tabs of one identity share. `term` rises with each leader, `n` with each block.
 * @typedef {{term: number, n: number}} Position
 */

/** @typedef {Position & {block: Block, eventKey: string | null}} Entry */

/**
 * What a tab is to the tabs of its identity. docs/states.md has the table of messages and roles.
 *   new      it does not know where the leader is
 *   follows  it has taken everything up to `#at`, and the next block of the leader follows
 *   behind   it catches up by a connection of its own
 *   leads    it has the connection; also a tab that does not share
 * @typedef {"new" | "follows" | "behind" | "leads"} Role
 */

/** @typedef {{kind: "event", event: any, cursor: string | null, size: number}} EventItem */
/** @typedef {EventItem | {kind: "gap", reason: string} | {kind: "load", reason?: undefined}} Item */

class Subscription {
  /** @type {Connection | null} */
  #connection = null;
  /** @type {Connection | null} */
  #probe = null; // A HEAD request that asks for the identity of this tab's stream.
  #probeAgain = false;
  /** @type {BroadcastChannel | null} */
  #channel = null; // For the tabs of this identity.
  /** @type {BroadcastChannel | null} */
  #hints = null; // For all tabs of this URL: a person has logged in or out. It carries no event.
  /** @type {AbortController | null} */
  #joined = null; // Aborting it leaves: no lock, no channel, no connection.
  /** @type {AbortController | null} */
  #candidacy = null; // The request for the lead, or the lead.
  #giveUp = () => {}; // Releases the lead.
  /** @type {string | null} */
  #identity = null;
  /** @type {string | null} */
  #before = null; // The user before the identity changed, until the page has got a gap for it.
  #parted = 0; // Streams in a row that were opened with another identity than the probe had.
  /** @type {string | null} */
  #cursor = null;
  #attempt = 0;
  /** @type {{token: string, at: number} | null} */
  #fresh = null;
  /** @type {Promise<string | null> | null} */
  #asked = null;

  // What the tabs share.
  /** @type {Role} */
  #role = "new";
  /** @type {Position} */
  #at = { term: 0, n: 0 };
  #term = 0; // The newest leader's. Messages of a lower term are ignored.
  /** @type {(Position & {cursor: string | null}) | null} */
  #start = null; // Where this leader's connection began, posted with its next `bridge.ready`.
  /** @type {Entry[]} */
  #ring = [];
  #ringChars = 0;
  /** @type {Set<string> | null} */
  #union; // The types of all tabs; null is every type. It only grows: a cursor counts the events of its own filter.
  /** @type {string[] | null | undefined} */
  #open; // The types of this tab's connection.
  // While it is behind.
  /** @type {Set<string>} */
  #missing = new Set(); // Events of the leader that its own connection has not delivered yet.
  /** @type {Set<string>} */
  #own = new Set(); // Events that it has delivered.
  #feed = { at: { term: 0, n: 0 }, cursor: /** @type {string | null} */ (null) }; // The leader's position meanwhile.
  #missed = 0; // Questions that the leader has not answered.
  /** @type {((answer: any) => void) | null} */
  #gathering = null;

  /** @type {Set<string>} */
  #recent = new Set();
  /** @type {Item[]} */
  #waiting = []; // Items for the handlers, in order.
  #waitingChars = 0;
  #handed = /** @type {string | null} */ (null); // The cursor of the last event that a handler got.
  #handing = false;
  #loading = 0; // Loads that wait or run.
  #fetching = new AbortController(); // The `load` that runs.
  #generation = 0; // Of the identity: a `load` for an earlier one is not waited for.
  #listeners = new Set();
  #over = new AbortController(); // Aborted by `close`.
  #me = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  #wasLive = false;
  #closed = false;
  /** @type {any} */
  #state = { status: "connecting", attempt: 0 };
  /** @type {any} */
  #shown; // The state as the page sees it, with the user and whether the tab leads. One object until it changes.
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #watch;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #hiding;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #widening;
  /** @type {(value: {user: string}) => void} */
  #resolveReady = () => {};
  /** @type {(reason: Error) => void} */
  #rejectReady = () => {};

  /** @param {any} options */
  constructor(options) {
    this.options = options;
    /** @type {string | null} */
    this.user = null; // The user of these events, once known.
    const url = new URL(options.url, location.href);
    // The type is in each event; without `event:` lines events are smaller.
    url.searchParams.set("named", "false");
    /** @type {string[]} */
    this.types = [...new Set(options.types?.length ? options.types : (url.searchParams.get("types")?.split(",") ?? []))];
    url.searchParams.delete("types");
    this.url = url;
    this.base = `bridge:${url.href}:${typeof options.share === "string" ? options.share : ""}`;
    this.keptKey = `${this.base}:${[...this.types].sort()}`;
    this.wants = matcher(this.types);
    this.#union = this.types.length ? new Set(this.types) : null;
    this.shares = options.share !== false && "BroadcastChannel" in globalThis && !!navigator.locks;
    this.ready = new Promise((resolve, reject) => {
      this.#resolveReady = resolve;
      this.#rejectReady = reject;
    });
    this.ready.catch(() => {}); // A page that does not use `ready` gets no unhandled rejection.
    if (options.onState) this.#listeners.add(options.onState);
    this.#shown = this.#describe();
    addEventListener("pagehide", this.#onPageHide);
    addEventListener("pageshow", this.#onPageShow);
    document.addEventListener("visibilitychange", this.#onVisibility);
    // Not before `subscribe` has returned: a handler may use the subscription.
    queueMicrotask(() => this.#join());
  }

  get state() {
    return this.#shown;
  }

  get cursor() {
    return this.#handed;
  }

  /** @param {(state: any) => void} listener */
  onState = (listener) => {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  };

  close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#over.abort();
    this.#fetching.abort();
    this.#leave(true);
    removeEventListener("pagehide", this.#onPageHide);
    removeEventListener("pageshow", this.#onPageShow);
    document.removeEventListener("visibilitychange", this.#onVisibility);
    this.#setState({ status: "closed" });
    this.#rejectReady(new Error("the subscription was closed"));
  }

  /** Tries again after `refused`, as when the person has logged in again. Does nothing at any other time. */
  reconnect() {
    if (this.#state.status === "refused") this.#join();
  }

  // The page is shown, hidden, cached or restored.

  // A page in the back/forward cache must not hold a connection or a lock; browsers would not keep it otherwise.
  #onPageHide = () => {
    this.#keep();
    this.#leave(true);
  };

  #onPageShow = (/** @type {PageTransitionEvent} */ event) => {
    if (event.persisted) this.#join();
  };

  #onVisibility = () => {
    clearTimeout(this.#hiding);
    if (document.visibilityState === "visible") {
      if (this.#state.status === "paused") this.#join();
      else this.#recheck(); // Somebody may have logged in or out in another tab.
    } else {
      this.#keep();
      const seconds = this.options.pauseAfterHiddenSeconds;
      if (seconds != null)
        this.#hiding = setTimeout(() => {
          this.#leave(true);
          this.#setState({ status: "paused" });
        }, seconds * 1000);
    }
  };

  #keep() {
    if (!this.options.keep || this.#handed === null) return;
    const union = this.#union && [...this.#union];
    try {
      // While the page's state is being fetched there is no position to resume from.
      if (this.#loading) sessionStorage.removeItem(this.keptKey);
      else
        sessionStorage.setItem(
          this.keptKey,
          JSON.stringify({ identity: this.#identity, user: this.user, cursor: this.#handed, union }),
        );
    } catch {
      // Storage may be full or forbidden. The next page begins without a position and calls `load`.
    }
  }

  /**
   * Restores the position that the page before this one kept, if it had the same identity.
   * @param {string | null} identity null: not known yet
   */
  #restore(identity) {
    if (!this.options.keep || this.#cursor !== null || this.#wasLive) return;
    const kept = readKept(this.keptKey);
    if (!kept) return;
    if (identity !== null && kept.identity !== identity) this.#before ??= kept.user;
    else {
      this.#cursor = this.#handed = kept.cursor;
      this.#identity = kept.identity;
      this.user = kept.user;
      this.#widen(kept.union);
    }
  }

  #join() {
    if (this.#closed || this.#joined) return;
    this.#joined = new AbortController();
    this.#setState({ status: "connecting", attempt: this.#attempt });
    if (!this.#joined) return; // A handler has closed it.
    if (!this.shares) {
      this.#restore(null);
      this.#role = "leads";
      this.#connect();
      return;
    }
    try {
      this.#hints ??= new BroadcastChannel(this.base);
    } catch {
      this.#alone();
      return;
    }
    this.#hints.onmessage = ({ data }) => this.#onHint(data.identity);
    this.#probe = this.#request("HEAD", {
      onOpen: (identity) => {
        this.#probe = null;
        if (identity === null) this.#alone(); // A bridge of the version before, or a proxy that hides the header.
        else this.#enter(identity);
        return false;
      },
      onState: (state) => (state.status === "refused" ? this.#refuse(state.problem) : this.#setState(state)),
    });
  }

  /** @param {boolean} [all] also the hints of other tabs */
  #leave(all) {
    clearTimeout(this.#watch);
    clearTimeout(this.#widening);
    this.#candidacy?.abort();
    this.#joined?.abort();
    this.#joined = null;
    this.#channel?.close();
    this.#channel = null;
    if (all) {
      clearTimeout(this.#hiding);
      this.#hints?.close();
      this.#hints = null;
    }
    this.#probe?.stop();
    this.#probe = null;
    this.#connection?.stop();
    this.#connection = null;
    this.#role = "new";
  }

  /** For a page without locks or channels (a sandboxed frame, storage forbidden), or a bridge that names no identity. */
  #alone() {
    this.#leave(true);
    this.shares = false;
    this.#join();
  }

  // The identity.

  /**
   * @param {"GET" | "HEAD"} method
   * @param {{onOpen: (identity: string | null) => boolean, onBlock?: (block: Block) => void, onState: (state: any) => void}} shell
   */
  #request(method, shell) {
    const url = new URL(this.url);
    const types = method === "HEAD" ? this.types : (this.#open ?? []);
    if (types.length) url.searchParams.set("types", types.join(","));
    const { token, credentials } = this.options;
    return new Connection({
      method,
      url,
      credentials: credentials ?? (token ? "same-origin" : "include"),
      token: token ? (reason) => this.#getToken(reason, method) : null,
      cursor: () => (method === "GET" ? this.#cursor : null),
      attempt: this.#attempt,
      onBlock: () => {},
      ...shell,
    });
  }

  /**
   * @param {string | null} reason
   * @param {"GET" | "HEAD"} method
   */
  async #getToken(reason, method) {
    let token = null;
    const fresh = this.#fresh;
    if (method === "GET" && reason === null && fresh && Date.now() < fresh.at + FRESH_TOKEN_MS) ({ token } = fresh);
    else {
      // While a callback waits for a login it is not called a second time. Its token is kept until it is used.
      this.#asked ??= within(TOKEN_MS, this.#callToken(reason), "token").finally(() => (this.#asked = null));
      token = await within(this.#role === "leads" && this.shares ? LEADER_TOKEN_MS : TOKEN_MS, this.#asked, "token");
    }
    if (method === "GET") this.#fresh = null;
    return token;
  }

  async #callToken(/** @type {string | null} */ reason) {
    const token = await this.options.token({ reason });
    this.#fresh = token ? { token, at: Date.now() } : null;
    return token;
  }

  /** Asks again for the identity of this tab's stream, and changes to it. A failed request changes nothing. */
  #recheck() {
    if (this.#probe) this.#probeAgain = true;
    if (!this.#channel || this.#probe) return;
    const end = () => {
      this.#probe?.stop();
      this.#probe = null;
      const again = this.#probeAgain;
      this.#probeAgain = false;
      if (again) this.#recheck();
    };
    this.#probe = this.#request("HEAD", {
      onOpen: (identity) => {
        end();
        if (identity !== null && identity !== this.#identity) this.#part(identity);
        return false;
      },
      onState: ({ status, retryAt, problem }) => {
        if (status === "refused") this.#refuse(problem);
        else if (status === "waiting" && retryAt > Date.now()) end();
      },
    });
  }

  /** @param {string | null} identity of the other tab; null after a refusal */
  #onHint(identity) {
    if (this.#channel && identity !== this.#identity) this.#recheck();
    else if (identity === null) return;
    else if (this.#state.status === "refused") this.#join();
    else if (this.#probe) this.#probeAgain = true;
  }

  /** This tab's stream is of another identity than its tabs share: it leaves them. */
  #part(/** @type {string} */ identity) {
    this.#leave();
    const joined = (this.#joined = new AbortController());
    this.#become(identity);
    this.#setState({ status: "connecting", attempt: this.#attempt });
    // The first time at once. Replicas without a common key would otherwise send a tab back and forth without end.
    const ms = this.#parted++ ? Math.random() * Math.min(MAX_BACKOFF_MS, 1000 * 2 ** this.#parted) : 0;
    sleep(ms, joined.signal).then(() => {
      if (!joined.signal.aborted) this.#enter(identity);
    });
  }

  /** Drops everything of the identity before: nothing of it is shown, sent or kept. */
  #become(/** @type {string} */ identity) {
    if (this.#identity === identity) return;
    if (this.#identity !== null && this.user !== null) this.#before ??= this.user;
    this.#identity = identity;
    this.user = null;
    this.#cursor = this.#handed = null;
    this.#generation++;
    this.#fetching.abort();
    this.#empty();
    this.#recent.clear();
    this.#forget();
    this.#at = { term: 0, n: 0 };
    this.#term = 0;
  }

  #enter(/** @type {string} */ identity) {
    this.#become(identity);
    this.#restore(identity);
    this.key = `${this.base}:${identity}:2`; // 2: these tabs name events by source and id.
    try {
      this.#channel = new BroadcastChannel(this.key);
    } catch {
      this.#alone();
      return;
    }
    this.#channel.onmessage = ({ data }) => this.#onMessage(data);
    this.#hints?.postMessage({ identity });
    this.#runForLead(false);
    this.#hello();
    this.#watchLeader();
    if (this.#probeAgain) {
      this.#probeAgain = false;
      this.#recheck();
    }
  }

  /** @param {any} problem */
  #refuse(problem) {
    this.#leave();
    this.#attempt = 0;
    this.#setState({ status: "refused", problem });
    this.#hints?.postMessage({ identity: null }); // A log-out in this tab is a log-out in all tabs.
    if (!this.#probeAgain) return;
    this.#probeAgain = false;
    this.#join(); // A person has logged in since this tab asked.
  }

  // The lead.

  /** @param {boolean} steal from a tab that does not answer */
  async #runForLead(steal) {
    this.#candidacy?.abort(); // A request that waits would be granted later, beside this one.
    const { signal } = (this.#candidacy = new AbortController());
    // This tab holds the lock until it leaves, gives it up, is closed or crashes. Then the browser grants it to the next.
    const held = () =>
      new Promise((resolve) => {
        this.#giveUp = () => resolve(undefined);
        signal.addEventListener("abort", () => resolve(undefined));
        if (signal.aborted) resolve(undefined);
        else this.#lead(signal);
      });
    try {
      await navigator.locks.request(/** @type {string} */ (this.key), steal ? { steal } : { signal }, held);
      if (signal.aborted) return;
      // Given up. The others come first. If none of them can serve either, it is this tab's turn again.
      const { retryAt } = this.#state;
      await Promise.race([sleep((retryAt ?? 0) - Date.now(), signal), ...(this.#asked ? [this.#asked.catch(() => {})] : [])]);
    } catch (error) {
      if (signal.aborted) return;
      if (/** @type {any} */ (error)?.name !== "AbortError") {
        this.#alone(); // No locks for this page: a sandboxed frame, storage forbidden.
        return;
      }
      this.#follow(); // Stolen by a tab that got no answer from this one.
    }
    if (!signal.aborted) this.#runForLead(false);
  }

  #follow() {
    clearTimeout(this.#widening);
    this.#connection?.stop();
    this.#connection = null;
    this.#role = "new";
    this.#hello();
    this.#watchLeader();
  }

  /** @param {AbortSignal} signal aborted when the lead is over */
  async #lead(signal) {
    clearTimeout(this.#watch);
    await this.#gather();
    if (signal.aborted) return;
    this.#role = "leads";
    this.#start = { ...this.#at, cursor: this.#cursor };
    // From the clock, which all tabs share: a tab that has just been opened knows no earlier term.
    this.#term = Math.max(Date.now(), Math.floor(this.#term) + 1) + Math.random();
    this.#at = { term: this.#term, n: 0 };
    if (this.#connection) this.#setState(this.#state);
    else this.#connect();
  }

  /** Before it connects, a new leader takes the blocks that other tabs have got from the old one and it has not. */
  async #gather() {
    const { pending = [] } = await navigator.locks.query().catch(() => ({ pending: [] }));
    let others = pending.filter(({ name }) => name === this.key).length;
    if (!others || this.#role === "behind") return;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, GATHER_MS); // A frozen tab does not answer.
      this.#gathering = (answer) => {
        if (this.#cursor === null && answer.cursor !== null) {
          // A tab without a position begins at that of the others, so that they can follow it.
          this.#at = answer.at;
          this.#cursor = answer.cursor;
          this.#rememberAll(answer.recent);
          this.#widen(answer.union);
        } else if (answer.entries) for (const entry of answer.entries) if (this.#isNext(entry)) this.#takeEntry(entry);
        if (--others > 0) return;
        clearTimeout(timer);
        resolve(undefined);
      };
      this.#post({ kind: "gather", from: this.#me, at: this.#at, cursor: this.#cursor });
    });
    this.#gathering = null;
  }

  #connect() {
    this.#connection?.stop();
    this.#open = this.#union && this.#union.size <= MAX_PATTERNS ? [...this.#union].sort() : null;
    this.#connection = this.#request("GET", {
      onOpen: (identity) => this.#verify(identity),
      onBlock: (block) => this.#onOwn(block),
      onState: (state) => this.#onOwnState(state),
    });
  }

  /** Whether the stream that was opened may be shown here, and posted to the tabs of this identity. */
  #verify(/** @type {string | null} */ identity) {
    if (identity === UNKNOWN) return true; // Only a goodbye follows.
    if (!this.shares) {
      if (identity !== null) this.#become(identity);
      return true;
    }
    if (identity === this.#identity) return true;
    if (identity === null) this.#alone();
    else this.#part(identity);
    return false;
  }

  /** @param {Block} block of this tab's own connection */
  #onOwn(block) {
    if (block.name === "bridge.ready") this.#attempt = this.#parted = 0;
    if (!this.shares) {
      this.#take(block);
      return;
    }
    if (this.#role !== "leads") {
      this.#takeEntry({ term: -1, n: 0, block, eventKey: eventKey(block) }, false);
      this.#catchUp(eventKey(block));
      return;
    }
    const entry = { term: this.#term, n: this.#at.n + 1, block, eventKey: eventKey(block) };
    const ready = block.name === "bridge.ready";
    this.#post({ kind: "entry", entry, ...(ready ? { start: this.#start, types: this.#open } : {}) });
    if (ready) this.#start = null;
    this.#takeEntry(entry);
  }

  /** @param {any} state */
  #onOwnState(state) {
    if (state.status === "refused") {
      this.#refuse(state.problem);
      return;
    }
    if (state.attempt) this.#attempt = state.attempt;
    if (this.#role === "leads") this.#post({ kind: "state", term: this.#term, state });
    this.#setState(state);
    if (this.#role === "leads" && this.shares && state.status === "waiting" && state.problem?.code === "token-failed") {
      // Another tab's callback may work.
      this.#connection?.stop();
      this.#connection = null;
      this.#role = "follows"; // It has taken all that it posted.
      this.#watchLeader();
      this.#giveUp();
    }
  }

  // Messages between the tabs. docs/states.md has the table.

  /** @param {object} message */
  #post(message) {
    this.#channel?.postMessage(message);
  }

  /** After a block that did not arrive: asks the leader for what is missing. */
  #ask() {
    this.#role = "new";
    this.#hello();
  }

  #hello() {
    this.#post({ kind: "hello", from: this.#me, at: this.#at, cursor: this.#cursor, types: this.types });
  }

  /** @param {any} message */
  #onMessage(message) {
    const { kind } = message;
    if (message.to && message.to !== this.#me) return;
    if (kind === "hello") {
      const grows = this.#widen(message.types.length ? message.types : null);
      if (this.#role === "leads") this.#welcome(message, grows);
    } else if (kind === "gather") {
      const entries = this.#after(message);
      const union = this.#union && [...this.#union];
      const recent = message.cursor === null ? [...this.#recent] : [];
      this.#post({ kind: "gathered", to: message.from, at: this.#at, cursor: this.#cursor, entries, recent, union });
    } else if (kind === "gathered") this.#gathering?.(message);
    else if (kind === "ping") {
      if (this.#role === "leads") this.#post({ kind: "pong", term: this.#term });
    } else {
      this.#hear(message);
    }
  }

  /** @param {any} message of a leader */
  #hear(message) {
    const { kind, entry } = message;
    const term = entry?.term ?? message.term;
    if (term < this.#term) return; // From a leader that was replaced and does not know it yet.
    if (term > this.#term) {
      this.#term = term;
      if (this.#role === "leads") {
        // This tab was replaced: it was frozen, and its lock was stolen.
        this.#follow();
        return;
      }
      const starts = kind === "entry" && entry.n === 1 && message.start;
      if (this.#role === "follows") {
        if (starts && this.#has(message.start)) this.#at = { term, n: 0 };
        else this.#ask();
      }
    }
    if (this.#role === "leads") return;
    if (kind === "entry") this.#hearEntry(message);
    else if (kind === "welcome") this.#onWelcome(message);
    else if (kind === "pong" && this.#role === "new") this.#hello();
    else if (kind === "state" && (this.#role === "follows" || (this.#role === "new" && message.state.status !== "live")))
      this.#setState(message.state);
    this.#watchLeader();
  }

  /** @param {any} message */
  #hearEntry({ entry, start, types }) {
    const { block } = entry;
    if (types !== undefined) this.#widen(types);
    if (this.#role === "behind") {
      // Not `#at`: nothing of it has been taken here.
      this.#feed = { at: { term: entry.term, n: entry.n }, cursor: block.id ?? this.#feed.cursor };
      if (this.#own.has(entry.eventKey)) this.#joinFeed();
      else if (entry.eventKey !== null && !this.#recent.has(entry.eventKey)) this.#missing.add(entry.eventKey);
    } else if (this.#role === "follows") {
      if (this.#isNext(entry)) this.#takeEntry(entry);
      else if (entry.n > this.#at.n) this.#ask();
    } else if (block.name === "bridge.ready" && (types === null || covers(types, this.types))) {
      // It asks for the blocks between, or, without a position, for where to begin.
      if (start && this.#has(start)) {
        this.#role = "follows";
        this.#takeEntry(entry);
      } else this.#hello();
    }
  }

  #isNext(/** @type {Entry} */ { term, n }) {
    return term === this.#at.term && n === this.#at.n + 1;
  }

  /** Whether this tab has taken everything up to a position. @param {Position & {cursor: string | null}} place */
  #has({ term, n, cursor }) {
    if (term && term === this.#at.term) return n <= this.#at.n;
    return cursor !== null && (cursor === this.#cursor || this.#ring.some((entry) => entry.block.id === cursor));
  }

  /**
   * The entries that were taken after a position; null if this tab does not know.
   * @param {{at: Position, cursor: string | null}} place
   */
  #after({ at, cursor }) {
    if (at.term === this.#at.term && at.n === this.#at.n && cursor === this.#cursor) return [];
    if (cursor !== null && cursor === this.#cursor) return [];
    const found = this.#ring.findLastIndex(
      ({ term, n, block }) => (at.term && term === at.term && n === at.n) || (cursor !== null && block.id === cursor),
    );
    return found < 0 ? null : this.#ring.slice(found + 1);
  }

  /**
   * Answers a tab that joins, or that has missed a block.
   * @param {{from: string, at: Position, cursor: string | null, types: string[]}} tab
   * @param {boolean} grows
   */
  #welcome(tab, grows) {
    if (grows || (this.#open && !covers(this.#open, tab.types.length ? tab.types : null))) {
      // The stream must carry its types first. The tab sees the `bridge.ready` of that connection.
      clearTimeout(this.#widening);
      this.#widening = setTimeout(() => this.#connect(), WIDEN_MS);
      return;
    }
    if (!isOpen(this.#state)) {
      this.#post({ kind: "state", to: tab.from, term: this.#term, state: this.#state }); // Ready comes later.
      return;
    }
    const entries = tab.cursor === null ? [] : this.#after(tab);
    const told = { user: this.user, resumed: tab.cursor !== null };
    this.#post({
      kind: "welcome",
      to: tab.from,
      term: this.#term,
      at: this.#at,
      ready: { name: "bridge.ready", id: tab.cursor ?? this.#cursor, data: JSON.stringify(told) },
      cursor: this.#cursor,
      entries,
      // The bridge may send events from before the position where this tab begins again.
      recent: entries ? [...this.#recent] : [],
      // The events that a tab too far behind has to get by a connection of its own before it can follow.
      ids: entries ? [] : this.#ring.flatMap((entry) => entry.eventKey ?? []),
      types: this.#open,
      state: this.#state,
    });
  }

  /** @param {any} message */
  #onWelcome({ at, ready, cursor, entries, recent, ids, types, state }) {
    this.#widen(types);
    if (this.#role === "follows") return;
    if (entries === null) {
      this.#role = "behind";
      this.#missing = new Set(ids.filter((/** @type {string} */ id) => !this.#recent.has(id)));
      this.#own.clear();
      this.#feed = { at, cursor };
      if (!this.#connection) this.#connect();
      return;
    }
    this.#role = "follows";
    this.#take(ready);
    for (const entry of entries) this.#takeEntry(entry);
    this.#rememberAll(recent);
    this.#at = at;
    this.#cursor = cursor;
    this.#setState(state);
  }

  /**
   * Once this tab's own connection has delivered all events of the leader, it is not needed any more. Until then no
   * event of the leader is shown, so that the order is right.
   * @param {string | null} id
   */
  #catchUp(id) {
    if (this.#role !== "behind" || id === null) return;
    this.#own.add(id);
    if (this.#missing.delete(id)) this.#joinFeed();
  }

  #joinFeed() {
    if (this.#missing.size) return;
    this.#own.clear();
    this.#connection?.stop();
    this.#connection = null;
    ({ at: this.#at, cursor: this.#cursor } = this.#feed);
    this.#role = "follows";
  }

  /** Adds the types of another tab. Returns whether the union grew. @param {Iterable<string> | null} types */
  #widen(types) {
    if (!this.#union) return false;
    if (types === null) {
      this.#union = null;
      return true;
    }
    const { size } = this.#union;
    for (const type of types) this.#union.add(type);
    return this.#union.size > size;
  }

  #forget() {
    this.#ring = [];
    this.#ringChars = 0;
  }

  /** A frozen leader keeps its lock and answers nothing. */
  #watchLeader() {
    clearTimeout(this.#watch);
    this.#missed = 0;
    const ask = () => {
      if (this.#role === "leads" || !this.#channel) return;
      const { status, retryAt } = this.#state;
      // The timers of a hidden page may be a minute late. A page that is seen does not wait for them.
      const late = status === "waiting" && this.#role === "follows" && Date.now() > retryAt + PING_MS;
      if (this.#missed >= 2 || (late && document.visibilityState === "visible")) {
        this.#runForLead(true);
        return;
      }
      this.#missed++;
      this.#post({ kind: "ping" });
      this.#watch = setTimeout(ask, PING_MS);
    };
    this.#watch = setTimeout(ask, PING_MS);
  }

  // Blocks of the stream.

  /** @param {Entry} entry @param {boolean} [shared] whether its position is one of the tabs' */
  #takeEntry(entry, shared = true) {
    if (shared) this.#at = { term: entry.term, n: entry.n };
    if (entry.block.name === "bridge.gap") this.#forget(); // No tab can continue from before a gap.
    this.#ring.push(entry);
    this.#ringChars += entry.block.data.length;
    while (this.#ringChars > RING_CHARS) this.#ringChars -= this.#ring.shift()?.block.data.length ?? 0;
    this.#take(entry.block);
  }

  /** @param {Block} block */
  #take(block) {
    if (this.#closed) return;
    const { name, data, id } = block;
    if (name === "bridge.ready") this.#onReady(JSON.parse(data), id);
    else if (name === "bridge.status") this.#setState({ status: JSON.parse(data).receiving ? "live" : "interrupted" });
    else if (name === "bridge.gap") this.#wait({ kind: "gap", reason: JSON.parse(data).reason });
    if (id !== null) this.#cursor = id;
    const event = name.startsWith("bridge.") ? null : JSON.parse(data);
    const key = event && keyOf(event);
    if (!key || this.#recent.has(key) || (this.#remember(key), !this.wants(event.type))) {
      if (!this.#waiting.length) this.#handed = this.#cursor;
      return;
    }
    this.#waitingChars += data.length;
    this.#wait({ kind: "event", event, cursor: this.#cursor, size: data.length });
    if (this.#waiting.length <= (this.options.maxWaiting ?? WAITING_EVENTS) && this.#waitingChars <= WAITING_CHARS) return;
    // A gap is better than a page without memory.
    this.#empty();
    this.#wait({ kind: "gap", reason: "overflow" });
  }

  /** Remembers what other tabs got before the position where this one begins. @param {string[]} [ids] */
  #rememberAll(ids = []) {
    for (const id of ids) this.#remember(id);
  }

  #remember(/** @type {string} */ id) {
    this.#recent.add(id);
    if (this.#recent.size > RECENT_IDS) this.#recent.delete(/** @type {string} */ (this.#recent.values().next().value));
  }

  /**
   * @param {{user: string, resumed: boolean}} told
   * @param {string | null} id
   */
  #onReady(told, id) {
    const first = !this.#wasLive;
    const placed = this.#cursor !== null;
    // A bridge of the version before names no identity: another user is noticed only here.
    const before = this.#before ?? (this.user !== told.user ? this.user : null);
    this.#before = null;
    this.#wasLive = true;
    this.user = told.user;
    this.#cursor = id ?? this.#cursor;
    this.#setState({ status: "live" });
    if (first) this.#resolveReady({ user: told.user });
    // The page shows the state of another person, or of other groups, and must fetch it again.
    if (before !== null) this.#wait({ kind: "gap", reason: before === told.user ? "other-groups" : "other-user" });
    else if (first && this.options.load && !(this.options.keep && told.resumed && placed)) this.#wait({ kind: "load" });
  }

  // Calls of the handlers: one after the other, in the order of the stream.

  /** @param {Item} item */
  #wait(item) {
    const last = this.#waiting.at(-1);
    if (item.kind !== "event" && last && last.kind !== "event") {
      this.#waiting.splice(-1, 1, item); // One load is enough for both.
      return;
    }
    this.#waiting.push(item);
    if (item.kind !== "event" && this.options.load) this.#setLoading(1);
    if (!this.#handing) this.#handOut();
  }

  #empty() {
    const loads = this.#waiting.filter(({ kind }) => kind !== "event").length;
    this.#waiting = [];
    this.#waitingChars = 0;
    if (this.options.load) this.#setLoading(-loads);
  }

  /** @param {number} change */
  #setLoading(change) {
    this.#loading += change;
    this.#setState(this.#state);
  }

  /**
   * `load` ends before the events that follow are handed out: each of them is newer than the state that it fetched, or
   * is in it already. Between events the page may paint and react.
   */
  async #handOut() {
    this.#handing = true;
    for (let ends = 0; ; ) {
      if (performance.now() >= ends) {
        await nextTask();
        ends = performance.now() + SLICE_MS;
      }
      const item = this.#waiting[0];
      if (!item || this.#closed) break;
      if (item.kind === "event") this.#handEvents(item);
      else {
        this.#waiting.shift();
        const { reason } = item;
        if (reason) call(() => this.options.onGap?.({ reason }));
        if (this.options.load) {
          await this.#load(reason ?? null);
          this.#setLoading(-1);
        }
        ends = 0;
      }
    }
    this.#handing = false;
    if (!this.#waiting.length) this.#handed = this.#cursor;
  }

  /** @param {EventItem} first */
  #handEvents(first) {
    const { onEvent, onBatch } = this.options;
    let count = 1;
    if (onBatch) while (count < BATCH_EVENTS && this.#waiting[count]?.kind === "event") count++;
    const items = /** @type {EventItem[]} */ (this.#waiting.splice(0, count));
    for (const { size } of items) this.#waitingChars -= size;
    this.#handed = /** @type {EventItem} */ (items[count - 1]).cursor;
    if (onBatch) call(() => onBatch(items.map(({ event }) => event)));
    else call(() => (typeof onEvent === "function" ? onEvent(first.event) : onEvent?.[first.event.type]?.(first.event)));
  }

  /** @param {string | null} reason */
  async #load(reason) {
    const generation = this.#generation;
    const isOver = () => this.#closed || generation !== this.#generation;
    for (let attempt = 0; !isOver(); attempt++) {
      const { signal } = (this.#fetching = new AbortController());
      const fetched = Promise.resolve().then(() => this.options.load({ reason, signal }));
      const aborted = new Promise((_, reject) => signal.addEventListener("abort", reject));
      try {
        await within(1000 * (this.options.loadSeconds ?? LOAD_SECONDS), Promise.race([fetched, aborted]), "end of `load`");
        return;
      } catch (error) {
        this.#fetching.abort();
        if (isOver()) return;
        call(() => {
          throw error;
        });
        await sleep(Math.random() * Math.min(MAX_BACKOFF_MS, 1000 * 2 ** attempt), this.#over.signal);
      }
    }
  }

  #describe() {
    return Object.freeze({ ...this.#state, user: this.user, leads: this.#role === "leads", loading: this.#loading > 0 });
  }

  /** @param {any} state */
  #setState(state) {
    if (this.#closed && state.status !== "closed") return;
    this.#state = state;
    const shown = this.#describe();
    if (JSON.stringify(shown) === JSON.stringify(this.#shown)) return;
    this.#shown = shown;
    if (state.status === "refused") this.#rejectReady(Object.assign(new Error(state.problem.detail), state.problem));
    for (const listener of [...this.#listeners]) call(() => listener(shown));
  }
}

/**
 * After the page's other tasks: `scheduler.yield` would go before them, and a timer is slow in a hidden page.
 * @returns {Promise<void>}
 */
function nextTask() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve(undefined);
    };
    port2.postMessage(null);
  });
}

/**
 * An error in a handler does not end the stream. It is reported like an uncaught error.
 * @param {() => void} handler
 */
function call(handler) {
  try {
    handler();
  } catch (error) {
    reportError(error);
  }
}

/** @param {string} key */
function readKept(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key) ?? "null");
  } catch {
    return null;
  }
}

/** Two sources may use the same id. @param {{source: string, id: string}} event */
function keyOf({ source, id }) {
  return `${id} ${source}`;
}

/** @param {Block} block */
function eventKey(block) {
  return block.name.startsWith("bridge.") ? null : keyOf(JSON.parse(block.data));
}

/** @param {any} state */
function isOpen(state) {
  return state.status === "live" || state.status === "interrupted";
}

/**
 * Whether a stream of these patterns carries every type that others ask for; null asks for every type.
 * @param {string[]} open
 * @param {string[] | null} wanted
 */
function covers(open, wanted) {
  return wanted !== null && wanted.length > 0 && wanted.every((pattern) => open.includes(pattern));
}

/**
 * Patterns as in a topic exchange: `*` is one word, `#` is any number of them.
 * @param {string[]} patterns none: every type
 * @returns {(type: string) => boolean}
 */
export function matcher(patterns) {
  // Each word includes the dot before it, so that `#` may match no word.
  const word = (/** @type {string} */ word) =>
    word === "#" ? "(\\.[^.]+)*" : word === "*" ? "\\.[^.]+" : "\\." + word.replace(/[^\w-]/g, "\\$&");
  const whole = patterns.map((pattern) => pattern.split(".").map(word).join(""));
  const regex = new RegExp(`^(?:${whole.join("|")})$`);
  return (type) => !patterns.length || regex.test("." + type);
}

/** @param {any} options */
export function subscribe(options) {
  return new Subscription(options);
}
