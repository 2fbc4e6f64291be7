// Types of client.js. The catalogue gives the types of your events: bridge schemas export --format typescript

/** The members of a CloudEvent that handlers need. `BridgeEvent` of your export is a union of such types. */
export interface AnyEvent {
  id: string;
  source: string;
  type: string;
  time?: string;
  data: unknown;
}

export type GapReason =
  /** The log no longer contains the entry after this page's position. */
  | "expired"
  /** The bridge cannot determine this page's position. */
  | "unknown"
  /** The bridge runs without a log. */
  | "no-log"
  /** This replica cannot read an event for this page, but another may: a deploy of event types is in progress. */
  | "not-readable"
  /** The stream now belongs to another user. */
  | "other-user"
  /** The stream belongs to the same user, who now has other groups. */
  | "other-groups"
  /** Too many events waited for `load` or for a slow handler. */
  | "overflow";

export interface Problem {
  /** HTTP status; 0 if there was no answer. */
  status: number;
  /** Stable, for programs: `expired-token`, `origin-not-allowed`, ... */
  code: string;
  detail: string;
}

export interface State {
  /**
   * - connecting: the client requests the stream.
   * - live: events arrive.
   * - interrupted: the stream is open, but the bridge has lost RabbitMQ. Events published meanwhile arrive later.
   * - waiting: the stream ended (`reason`) or failed (`problem`). The next try is at `retryAt`.
   * - refused: another try would fail too (`problem` says why). Call `reconnect()` when the cause is gone.
   * - paused: the page is hidden.
   * - closed: `close()` was called.
   */
  status: "connecting" | "live" | "interrupted" | "waiting" | "refused" | "paused" | "closed";
  /** Tries since the stream was last live. */
  attempt?: number;
  /** Time of the next try, in ms since 1970. */
  retryAt?: number;
  problem?: Problem | null;
  /** Why the bridge ended the stream; null if it gave no reason. */
  reason?: "drain" | "rotate" | "expired" | "slow" | "busy" | "revoked" | null;
  /** The user whose events these are; null until it is known. */
  user: string | null;
  /** Whether this is the leading tab, which has the connection for all tabs. */
  leads: boolean;
  /** Whether events wait for `load`. */
  loading: boolean;
}

/** `*` is one word, `#` is any number of words. */
export type TypePattern = `${string}*${string}` | `${string}#${string}`;

export interface Options<Event extends AnyEvent = AnyEvent> {
  /** The URL of the bridge's `/events`, absolute or relative to the page. */
  url: string | URL;
  /** Types of the catalogue, or patterns such as `job.*` or `billing.#`. Default: all types. */
  types?: (Event["type"] | TypePattern)[];
  /** One function for all events, or one for each type. An error that it throws goes to `reportError`. */
  onEvent?:
    | ((event: Event) => void)
    | { [Type in Event["type"]]?: (event: Extract<Event, { type: Type }>) => void };
  /**
   * Instead of `onEvent`: gets all events that have arrived, at most 1,000 at once. For pages that draw once for many
   * events.
   */
  onBatch?: (events: Event[]) => void;
  /** Events may have been missed. Without `load`, fetch your state here. With `load`, both are called. */
  onGap?: (gap: { reason: GapReason }) => void;
  /** The state of the connection changed. For example, show it in a badge. */
  onState?: (state: Readonly<State>) => void;
  /**
   * Fetches the page's state: once the stream is live, so that no event is missed, and after every gap. Events that
   * arrive meanwhile are buffered, and passed to the handler after the promise resolves. It is called again if it
   * rejects or takes longer than `loadSeconds`. `signal` is aborted then, and when the stream's user changes.
   */
  load?: (why: { reason: GapReason | null; signal: AbortSignal }) => Promise<unknown> | unknown;
  /** Limit of one `load`, in seconds. Default: 60. */
  loadSeconds?: number;
  /** The most events that wait for `load` or a slow handler. Above it they are dropped, with a gap. Default: 10,000. */
  maxWaiting?: number;
  /**
   * Returns a token for each connection. Without it, the cookie is used. `reason` is null, or why the last token was
   * refused (`expired`, `invalid-token`, ...): fetch a new one then. Return null if nobody is logged in: the stream is
   * then refused. It is also called when somebody may have logged in or out in another tab.
   */
  token?: (why: { reason: string | null }) => string | null | Promise<string | null>;
  /** One connection for all tabs of a user (default: true). Tabs with different texts do not share. */
  share?: boolean | string;
  /** Keep the cursor in sessionStorage, and resume after a reload. Only for pages that keep their state too. */
  keep?: boolean;
  /** Close the stream after the page was hidden for this time, and resume when it is visible. Default: never. */
  pauseAfterHiddenSeconds?: number;
  /** As in `fetch`. Default: `include`, or `same-origin` with `token`. */
  credentials?: RequestCredentials;
}

export interface Subscription {
  /** Resolves when the stream is live for the first time. Rejects with a `Problem` if it is refused. */
  readonly ready: Promise<{ user: string }>;
  /** The same object until the state changes. In React: `useSyncExternalStore(events.onState, () => events.state)`. */
  readonly state: Readonly<State>;
  /** Adds a listener, and returns a function that removes it. */
  readonly onState: (listener: (state: Readonly<State>) => void) => () => void;
  /** The cursor after the last event passed to a handler, as in `Last-Event-ID`. */
  readonly cursor: string | null;
  /** Tries again after `refused`, for example after a login. In other states it does nothing. */
  reconnect(): void;
  /** Ends the subscription. After it, only `onState` is called, with `closed`. */
  close(): void;
}

export function subscribe<Event extends AnyEvent = AnyEvent>(options: Options<Event>): Subscription;

/** Returns a function: whether a type matches one of the patterns, by the bridge's rules. No patterns: every type. */
export function matcher(patterns: string[]): (type: string) => boolean;

/** Reads SSE blocks from bytes (WHATWG HTML, section 9.2.6). */
export function parse(
  body: ReadableStream<Uint8Array>,
  onBlock: (block: { name: string; data: string; id: string | null }) => void,
  onRetry: (retryMs: number) => void,
  onBytes: () => void,
): Promise<void>;
