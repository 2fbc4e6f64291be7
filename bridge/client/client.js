// @ts-check
// The browser's end of the bridge: an ES module without dependencies. Types and docs: client.d.ts, docs/pages.md.
//
//   parse        bytes to SSE blocks (WHATWG HTML, section 9.2.6)
//   Connection   one stream, made again for ever: backoff, watchdog, tokens. Knows nothing of tabs or handlers
//   Subscription one page's view: which tab leads, what has been seen, what the handlers are told
//
// Why not EventSource: it sends no Authorization header, gives up for good after one bad status, does not show why it
// was refused, and cannot tell a dead connection from a quiet one, because it hides heartbeats.

const CONNECT_MS = 30_000; // The bridge is ready, or says that it is not, within twenty seconds; a proxy may take longer.
const TOKEN_MS = 120_000; // Somebody may have to log in.
const MAX_BACKOFF_MS = 30_000;
const DEFAULT_RETRY_MS = 3_000;
const RECENT_IDS = 1_000; // Ids remembered to drop an event that comes again.
const RING_CHARS = 500_000; // Frames that a leading tab keeps for one that was away for a moment.

const sleep = (/** @type {number} */ ms, /** @type {AbortSignal} */ signal) =>
  new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      signal.removeEventListener("abort", done);
      resolve(undefined);
    };
    const timer = setTimeout(done, ms);
    addEventListener("online", done); // The network is back: no reason to wait any longer.
    signal.addEventListener("abort", done);
    if (signal.aborted) done();
  });

/**
 * @template Value
 * @param {number} ms
 * @param {Value | Promise<Value>} value
 * @param {AbortSignal} signal
 * @returns {Promise<Value>}
 */
async function within(ms, value, signal) {
  const done = new AbortController();
  signal.addEventListener("abort", () => done.abort(), { signal: done.signal });
  const late = sleepThrough(ms, done.signal).then(() => {
    throw new Error(`no token within ${ms / 1000} s`);
  });
  late.catch(() => {});
  try {
    return await Promise.race([value, late]);
  } finally {
    done.abort();
  }
}

const sleepThrough = (/** @type {number} */ ms, /** @type {AbortSignal} */ signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve(undefined)));
  });

/**
 * Reads a stream of bytes as SSE blocks until it ends, by the standard's grammar (tests/browser/test_parser.py).
 * @param {ReadableStream<Uint8Array>} body
 * @param {(block: {name: string, data: string, id: string | null}) => void} onBlock a block with data
 * @param {(retryMs: number) => void} onRetry
 * @param {() => void} onBytes anything came, if only a comment
 */
export async function parse(body, onBlock, onRetry, onBytes) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // Removes one byte order mark at the start, as the standard asks.
  let rest = ""; // The start of a line whose end has not come.
  let afterCr = false; // The last line ended with CR: a LF that comes next is the second half of that line end.
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
      // CR ends a line at once. Waiting for a LF would hold a block back until the next one comes.
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

/** A stream that is made again until it is stopped, or refused for good. */
class Connection {
  #abort = new AbortController();

  /**
   * @param {{
   *   url: URL,
   *   credentials: RequestCredentials,
   *   token: null | ((why: {reason: string | null}) => string | null | Promise<string | null>),
   *   cursor: () => string | null,
   *   onBlock: (block: {name: string, data: string, id: string | null}) => void,
   *   onState: (state: object) => void,
   *   onBeat: () => void,
   * }} shell
   */
  constructor(shell) {
    this.shell = shell;
    queueMicrotask(() => this.#run()); // Not before who made it has it, and can stop it.
  }

  stop() {
    this.#abort.abort();
  }

  async #run() {
    const { signal } = this.#abort;
    let attempt = 0;
    /** @type {string | null} */
    let refusal = null; // The code of the last 401, for the token's callback.
    while (!signal.aborted) {
      this.shell.onState({ status: "connecting", attempt });
      const end = await this.#connect(refusal);
      if (signal.aborted) return;
      if (end.fatal) {
        this.shell.onState({ status: "refused", problem: end.problem });
        return;
      }
      if (end.wasLive) attempt = 0;
      // A new token is worth a try at once, the first time. What the server asks for is its own to spread; for
      // everything else full jitter, so that a thousand pages do not come back in one moment.
      const again = end.unauthorized && refusal === null;
      refusal = end.expired ? "expired" : end.unauthorized ? (end.problem?.code ?? "invalid-token") : null;
      if (refusal === "expired-token") refusal = "expired";
      const limit = Math.min(MAX_BACKOFF_MS, end.retryMs * 2 ** attempt);
      const ms = again || end.expired ? 0 : end.told ? end.retryMs : Math.max(end.afterMs, Math.random() * limit);
      attempt++;
      this.shell.onState({ status: "waiting", attempt, retryAt: Date.now() + ms, problem: end.problem });
      await sleep(ms, signal);
    }
  }

  /**
   * One try, until its end.
   * @param {string | null} refusal
   */
  async #connect(refusal) {
    const end = {
      /** Whether it got as far as `bridge.ready`. */
      wasLive: false,
      /** Whether the server named `retryMs` in a goodbye. */
      told: false,
      retryMs: DEFAULT_RETRY_MS,
      afterMs: 0,
      /** Whether the token's time was over, and there is a way to a new one. */
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
          token = await within(TOKEN_MS, this.shell.token({ reason: refusal }), this.#abort.signal);
        } catch (error) {
          end.problem = { status: 0, code: "token-failed", detail: String(error) };
          return end;
        }
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
      const response = await fetch(this.shell.url, {
        headers,
        credentials: this.shell.credentials,
        cache: "no-store",
        signal: abort.signal,
      });
      if (response.status !== 200 || !response.body) {
        end.problem = await readProblem(response);
        const seconds = Number(response.headers.get("Retry-After"));
        if (seconds > 0) end.afterMs = seconds * 1000;
        end.unauthorized = response.status === 401 && this.shell.token !== null;
        // What asking again does not mend. 408 and 429 are about the moment.
        end.fatal = response.status < 500 && ![408, 429].includes(response.status) && !end.unauthorized;
        return end;
      }
      await parse(
        response.body,
        (block) => {
          if (block.name === "bridge.ready") {
            end.wasLive = true;
            // Two heartbeats and a half: one may be late, two are not lost by chance.
            silenceMs = Math.max(5_000, JSON.parse(block.data).heartbeat_seconds * 2_500);
            alive();
          } else if (block.name === "bridge.bye") {
            end.told = true;
            end.expired = JSON.parse(block.data).reason === "expired" && this.shell.token !== null;
          }
          this.shell.onBlock(block);
        },
        (ms) => (end.retryMs = ms),
        () => {
          alive();
          this.shell.onBeat();
        },
      );
    } catch (error) {
      // The network or the watchdog. Why a fetch fails a browser does not tell.
      if (!this.#abort.signal.aborted && !end.wasLive)
        end.problem = { status: 0, code: "unreachable", detail: String(error) };
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
  const problem = { status: response.status, code: `status-${response.status}`, detail: response.statusText };
  try {
    const document = await response.json();
    if (typeof document.type === "string") problem.code = document.type.replace(/^urn:bridge:problem:/, "");
    if (typeof document.detail === "string") problem.detail = document.detail;
  } catch {
    // Not the bridge's answer; a proxy's, perhaps.
  }
  return problem;
}

/** @typedef {{name: string, data: string, id: string | null}} Block */

class Subscription {
  /** @type {Connection | null} */
  #connection = null;
  /** @type {BroadcastChannel | null} */
  #channel = null;
  /** @type {AbortController | null} */
  #joined = null; // Aborting it leaves: no lock, no channel, no connection.
  /** @type {string | null} */
  #cursor = null;
  /** @type {Block[]} */
  #ring = [];
  #ringChars = 0;
  /** @type {Set<string>} */
  #recent = new Set();
  /** @type {Block[] | null} */
  #held = null; // Events that wait for `load`; null when nothing does.
  #loads = 0;
  /** @type {Promise<void> | undefined} */
  #loading;
  #over = new AbortController(); // Aborted by `close`.
  #me = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  #leads = false;
  #greeted = false; // It has been live once.
  #welcomed = false; // It has been told, since it joined, where the leading tab is; all that comes is news.
  #closed = false;
  /** @type {any} */
  #state = { status: "connecting", attempt: 0 };
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #watch;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #hiding;
  #silenceMs = CONNECT_MS;
  /** @type {(value: {user: string}) => void} */
  #resolveReady = () => {};
  /** @type {(reason: Error) => void} */
  #rejectReady = () => {};

  /** @param {any} options */
  constructor(options) {
    this.options = options;
    /** @type {string | null} */
    this.user = null; // Whose events these are, once known.
    const url = new URL(options.url, location.href);
    // The type stands in each event; without `event:` lines they take fewer bytes.
    url.searchParams.set("named", "false");
    if (options.types?.length) url.searchParams.set("types", [...options.types].sort().join(","));
    this.url = url;
    this.key = `bridge:${url.href}:${typeof options.share === "string" ? options.share : ""}`;
    this.shares = options.share !== false && "BroadcastChannel" in globalThis && !!navigator.locks;
    this.ready = new Promise((resolve, reject) => {
      this.#resolveReady = resolve;
      this.#rejectReady = reject;
    });
    this.ready.catch(() => {}); // Who does not ask is not bothered.
    if (options.keep) ({ cursor: this.#cursor, user: this.user } = readKept(this.key));
    addEventListener("pagehide", this.#onPageHide);
    addEventListener("pageshow", this.#onPageShow);
    document.addEventListener("visibilitychange", this.#onVisibility);
    // Not before `subscribe` has returned: a handler may want what it returns.
    queueMicrotask(() => this.#join());
  }

  get state() {
    return { ...this.#state, user: this.user, leads: this.#leads, loading: this.#held !== null };
  }

  get cursor() {
    return this.#cursor;
  }

  close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#over.abort();
    this.#leave();
    removeEventListener("pagehide", this.#onPageHide);
    removeEventListener("pageshow", this.#onPageShow);
    document.removeEventListener("visibilitychange", this.#onVisibility);
    this.#setState({ status: "closed" });
    this.#rejectReady(new Error("the subscription was closed"));
  }

  /** Tries again after `refused`, as when the person has logged in anew. Does nothing at any other time. */
  reconnect() {
    if (this.#closed || this.#state.status !== "refused") return;
    this.#leave();
    this.#join();
    if (this.#channel) this.#stand(true); // The tab that leads has given up.
  }

  // The page comes and goes.

  // A page in the back/forward cache must not hold a connection or a lock; browsers would not keep it otherwise.
  #onPageHide = () => {
    this.#keep();
    this.#leave();
  };

  #onPageShow = (/** @type {PageTransitionEvent} */ event) => {
    if (event.persisted) this.#join();
  };

  #onVisibility = () => {
    clearTimeout(this.#hiding);
    if (document.visibilityState === "visible") {
      if (this.#state.status === "paused") this.#join();
    } else {
      this.#keep();
      const seconds = this.options.pauseAfterHiddenSeconds;
      if (seconds != null)
        this.#hiding = setTimeout(() => {
          this.#leave();
          this.#setState({ status: "paused" });
        }, seconds * 1000);
    }
  };

  #keep() {
    if (!this.options.keep || this.#cursor === null) return;
    try {
      // While the page's state is being fetched there is nothing to go on from.
      if (this.#held) sessionStorage.removeItem(this.key);
      else sessionStorage.setItem(this.key, JSON.stringify({ cursor: this.#cursor, user: this.user }));
    } catch {
      // Storage may be full or forbidden: the next page begins anew, and is told so.
    }
  }

  #join() {
    if (this.#closed || this.#joined) return;
    this.#joined = new AbortController();
    if (!this.shares) {
      this.#lead();
      return;
    }
    this.#setState({ status: "connecting", attempt: 0 });
    if (!this.#joined) return; // A handler has closed it.
    try {
      this.#channel = new BroadcastChannel(this.key);
    } catch {
      this.#leadAlone();
      return;
    }
    this.#channel.onmessage = ({ data }) => this.#onMessage(data);
    this.#stand(false);
    this.#welcomed = false;
    this.#hello();
    this.#watchLeader();
  }

  #hello() {
    this.#post({ kind: "hello", from: this.#me, cursor: this.#cursor });
  }

  #forget() {
    this.#ring = [];
    this.#ringChars = 0;
  }

  #leave() {
    clearTimeout(this.#watch);
    clearTimeout(this.#hiding);
    this.#joined?.abort();
    this.#joined = null;
    this.#channel?.close();
    this.#channel = null;
    this.#connection?.stop();
    this.#connection = null;
    this.#leads = false;
    this.#forget();
  }

  // Which tab leads.

  /** @param {boolean} steal */
  #stand(steal) {
    const joined = this.#joined;
    if (!joined) return;
    // The lock is held until this tab leaves, is closed, or crashes; the browser then gives it to the next.
    const held = () =>
      new Promise((resolve) => {
        if (joined.signal.aborted) return resolve(undefined);
        joined.signal.addEventListener("abort", () => resolve(undefined));
        this.#lead();
      });
    navigator.locks
      .request(this.key, steal ? { steal: true } : { signal: joined.signal }, held)
      .catch((error) => {
        if (joined.signal.aborted || joined !== this.#joined) return; // Left.
        if (error?.name !== "AbortError") {
          this.#leadAlone(); // No locks for this page: a sandboxed frame, storage forbidden.
          return;
        }
        // Stolen by a tab that took this one for dead: follow, and stand again.
        this.#connection?.stop();
        this.#connection = null;
        this.#leads = false;
        this.#stand(false);
        // What the other has said meanwhile was not listened to.
        this.#welcomed = false;
        this.#hello();
        this.#watchLeader();
      });
  }

  #leadAlone() {
    this.shares = false;
    this.#channel?.close();
    this.#channel = null;
    this.#lead();
  }

  #lead() {
    clearTimeout(this.#watch);
    this.#connection?.stop();
    this.#leads = true;
    this.#forget();
    this.#connection = new Connection({
      url: this.url,
      credentials: this.options.credentials ?? (this.options.token ? "same-origin" : "include"),
      token: this.options.token ?? null,
      cursor: () => this.#cursor,
      onBlock: (block) => {
        // A tab that leads without a place begins at "now", which is a hole for those that had one.
        this.#post({ kind: "block", block, anew: block.name === "bridge.ready" && !this.#greeted });
        const { user } = this;
        this.#take(block);
        // What lies before a hole, or was another person's, leads nobody on: who has a place there is told a gap.
        if (block.name === "bridge.gap" || this.user !== user) this.#forget();
        this.#ring.push(block);
        this.#ringChars += block.data.length;
        while (this.#ringChars > RING_CHARS) this.#ringChars -= this.#ring.shift()?.data.length ?? 0;
      },
      onState: (state) => {
        this.#post({ kind: "state", state });
        this.#setState(state);
      },
      onBeat: () => this.#post({ kind: "beat" }),
    });
  }

  /** @param {object} message */
  #post(message) {
    this.#channel?.postMessage(message);
  }

  /** @param {any} message */
  #onMessage(message) {
    if (message.kind === "hello") {
      if (this.#leads) this.#welcome(message);
      return;
    }
    if (this.#leads || (message.to && message.to !== this.#me)) return;
    if (message.kind === "state") {
      // That the leader is live says nothing of a tab that has not been welcomed.
      if (message.state.status !== "live" || this.#welcomed) this.#setState(message.state);
    } else if (message.kind === "block") {
      const { block, anew } = message;
      const ready = block.name === "bridge.ready";
      if (this.#welcomed && ready && !anew && block.id !== this.#cursor) {
        // Another tab leads, from another place: what comes by it is not simply news. It is asked what lies between.
        this.#welcomed = false;
        this.#hello();
      } else if (this.#welcomed) {
        this.#take(block);
        if (ready && anew) this.#onGap("unknown");
      } else if (ready && this.#cursor === null) {
        this.#welcomed = true;
        this.#take(block);
      } else if (ready) {
        // This tab has a place of its own, and asks for what lies between the two.
        this.#hello();
      }
    } else if (message.kind === "welcome") {
      this.#welcomed = true;
      for (const block of message.blocks) this.#take(block);
      this.#setState(message.state);
    }
    this.#watchLeader();
  }

  /** @param {{from: string, cursor: string | null}} tab */
  #welcome(tab) {
    if (this.#state.status !== "live") {
      this.#post({ kind: "state", to: tab.from, state: this.#state }); // It will see this tab's ready itself.
      return;
    }
    const ready = { name: "bridge.ready", id: this.#cursor, data: "" };
    const told = { user: this.user, resumed: tab.cursor !== null, heartbeat_seconds: this.#silenceMs / 2_500 };
    /** @type {Block[]} */
    let blocks = [];
    if (tab.cursor !== null && tab.cursor !== this.#cursor) {
      const at = this.#ring.findIndex((block) => block.id === tab.cursor);
      if (at >= 0) blocks = this.#ring.slice(at + 1).filter((block) => !block.name.startsWith("bridge."));
      else {
        told.resumed = false;
        blocks = [{ name: "bridge.gap", id: this.#cursor, data: '{"reason":"unknown"}' }];
      }
    }
    ready.data = JSON.stringify(told);
    this.#post({
      kind: "welcome",
      to: tab.from,
      blocks: [ready, ...blocks],
      state: this.#state,
    });
  }

  /** A leader that is frozen holds its lock and says nothing. Who is looked at does not wait for it. */
  #watchLeader() {
    clearTimeout(this.#watch);
    const joined = this.#joined;
    const { status, retryAt } = this.#state;
    const patience =
      status === "waiting" ? Math.max(0, retryAt - Date.now()) : status === "connecting" ? CONNECT_MS : 0;
    this.#watch = setTimeout(() => {
      if (this.#leads || joined !== this.#joined || !joined) return;
      if (document.visibilityState === "visible" && this.#state.status !== "refused") this.#stand(true);
      else this.#watchLeader();
    }, this.#silenceMs * 2 + patience);
  }

  // What comes.

  /** @param {Block} block */
  #take(block) {
    if (this.#closed) return;
    if (block.name === "bridge.ready") this.#onReady(JSON.parse(block.data), block.id);
    else if (block.name === "bridge.gap") this.#onGap(JSON.parse(block.data).reason);
    if (block.id !== null) this.#cursor = block.id;
    if (block.name.startsWith("bridge.")) return;
    const event = JSON.parse(block.data);
    if (this.#recent.has(event.id)) return;
    this.#recent.add(event.id);
    if (this.#recent.size > RECENT_IDS) this.#recent.delete(/** @type {string} */ (this.#recent.values().next().value));
    if (this.#held) this.#held.push(event);
    else this.#hand(event);
  }

  /**
   * @param {{user: string, resumed: boolean, heartbeat_seconds: number}} told
   * @param {string | null} id
   */
  #onReady(told, id) {
    const first = !this.#greeted;
    const placed = this.#cursor !== null;
    const other = this.user !== null && this.user !== told.user;
    this.#greeted = true;
    this.user = told.user;
    this.#silenceMs = Math.max(5_000, told.heartbeat_seconds * 2_500);
    this.#cursor = id ?? this.#cursor;
    this.#setState({ status: "live" });
    if (first) this.#resolveReady({ user: told.user });
    // What was shown is another person's, or a tab without a place took over: the page must fetch anew.
    if (other) this.#onGap("other-user");
    else if (first && this.options.load && !(this.options.keep && told.resumed && placed)) this.#load(null);
  }

  /** @param {string} reason */
  #onGap(reason) {
    call(() => this.options.onGap?.({ reason }));
    if (!this.options.load) return;
    if (this.#held) this.#held = []; // They are older than what is fetched now.
    this.#load(reason);
  }

  /**
   * Fetches the page's state, and holds events back until it is there: each of them is newer than what was fetched, or
   * in it already.
   * @param {string | null} reason
   */
  async #load(reason) {
    const mine = ++this.#loads;
    this.#held ??= [];
    this.#setState(this.#state);
    const before = this.#loading;
    this.#loading = (async () => {
      await before; // One after another: a slow one that was begun first must not show its old state last.
      for (let attempt = 0; mine === this.#loads && !this.#closed; attempt++) {
        try {
          await this.options.load({ reason });
          return;
        } catch (error) {
          call(() => {
            throw error;
          });
          await sleep(Math.random() * Math.min(MAX_BACKOFF_MS, 1000 * 2 ** attempt), this.#over.signal);
        }
      }
    })();
    await this.#loading;
    if (mine !== this.#loads || this.#closed) return; // A later gap loads again.
    const held = this.#held ?? [];
    this.#held = null;
    this.#setState(this.#state);
    for (const event of held) this.#hand(event);
  }

  /** @param {any} event */
  #hand(event) {
    if (this.#closed) return;
    const { onEvent } = this.options;
    call(() => (typeof onEvent === "function" ? onEvent(event) : onEvent?.[event.type]?.(event)));
  }

  /** @param {any} state */
  #setState(state) {
    if (this.#closed && state.status !== "closed") return;
    this.#state = state;
    if (state.status === "refused") this.#rejectReady(Object.assign(new Error(state.problem.detail), state.problem));
    call(() => this.options.onState?.(this.state));
  }
}

/**
 * A handler's fault is the page's, and must not end the stream: it goes where uncaught errors go.
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
    return { cursor: null, user: null, ...JSON.parse(sessionStorage.getItem(key) ?? "{}") };
  } catch {
    return { cursor: null, user: null };
  }
}

/** @param {any} options */
export function subscribe(options) {
  return new Subscription(options);
}
