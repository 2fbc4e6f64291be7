// Types of client.js. Those of your events are made from the catalogue: bridge schemas export --format typescript

/** The part of a CloudEvent that handlers rely on; `BridgeEvent` of your catalogue's export is a union of such. */
export interface AnyEvent {
  id: string;
  source: string;
  type: string;
  time?: string;
  data: unknown;
}

export type GapReason =
  /** The log no longer reaches back to where this page was. */
  | "expired"
  /** Nobody can say where this page was. */
  | "unknown"
  /** The bridge runs without a log. */
  | "no-log"
  /** This replica cannot read an event for this page, and another might: a deploy of event types is under way. */
  | "not-readable"
  /** The stream is now another person's. */
  | "other-user"
  /** The stream is the same person's, with other groups. */
  | "other-groups"
  /** Too many events waited for `load` or for a slow handler. */
  | "overflow";

export interface Problem {
  /** HTTP status; 0 when there was no answer. */
  status: number;
  /** Stable, for programs: `expired-token`, `origin-not-allowed`, ... */
  code: string;
  detail: string;
}

export interface State {
  /**
   * connecting: asking for the stream. live: events come. interrupted: the stream is open, but the bridge has no RabbitMQ;
   * what is published meanwhile comes later. waiting: it was cut (`reason`) or failed (`problem`), and is tried again at
   * `retryAt`. refused: asking again would not help (`problem` says why) until `reconnect()`. paused: the page is hidden.
   */
  status: "connecting" | "live" | "interrupted" | "waiting" | "refused" | "paused" | "closed";
  /** Tries since it was last live. */
  attempt?: number;
  /** When it is tried again, ms since 1970. */
  retryAt?: number;
  problem?: Problem | null;
  /** Why the bridge ended the stream; null if it did not say. */
  reason?: "drain" | "rotate" | "expired" | "slow" | "busy" | "revoked" | null;
  /** Whose events these are, once known. */
  user: string | null;
  /** Whether this tab holds the connection for all tabs. */
  leads: boolean;
  /** Whether events wait for `load`. */
  loading: boolean;
}

/** `*` is one word, `#` any number of them. */
export type TypePattern = `${string}*${string}` | `${string}#${string}`;

export interface Options<Event extends AnyEvent = AnyEvent> {
  /** The bridge's `/events`, absolute or relative to the page. */
  url: string | URL;
  /** Types of the catalogue, or patterns, as in `job.*` or `billing.#`; all types without. */
  types?: (Event["type"] | TypePattern)[];
  /** One function for every event, or one for each type. What it throws goes to `reportError`. */
  onEvent?:
    | ((event: Event) => void)
    | { [Type in Event["type"]]?: (event: Extract<Event, { type: Type }>) => void };
  /**
   * Instead of `onEvent`: all events that have arrived, at most 1,000 at once. For pages that draw once for many events.
   */
  onBatch?: (events: Event[]) => void;
  /** Events may have been missed. With `load` it is called as well; without, fetch your state here. */
  onGap?: (gap: { reason: GapReason }) => void;
  /** The connection changed; for a badge that says so. */
  onState?: (state: Readonly<State>) => void;
  /**
   * Fetches the page's state: once the stream is live (so nothing falls in between), and after every gap. Events that
   * come meanwhile are held back, and handed over when its promise has resolved. Tried again when it rejects or takes
   * longer than `loadSeconds`; `signal` is aborted then, and when the stream becomes another person's.
   */
  load?: (why: { reason: GapReason | null; signal: AbortSignal }) => Promise<unknown> | unknown;
  /** Default: 60. */
  loadSeconds?: number;
  /** Events that may wait for `load` or for a slow handler, before they are dropped and a gap is told. Default: 10,000. */
  maxWaiting?: number;
  /**
   * Gives a token, for every connection; without it the cookie is used. `reason` is null, or why the last one was not
   * taken (`expired`, `invalid-token`, ...): fetch a new one then. null ends it: nobody is logged in. It is also called
   * when somebody may have logged in or out in another tab.
   */
  token?: (why: { reason: string | null }) => string | null | Promise<string | null>;
  /** One connection for all tabs of a person (default true). A text parts them further. */
  share?: boolean | string;
  /** Keep the place in sessionStorage, and go on from there after a reload. Only for pages that keep their state too. */
  keep?: boolean;
  /** Leave the stream when the page has been hidden for so long, and resume when it is looked at. Default: never. */
  pauseAfterHiddenSeconds?: number;
  /** As in fetch. Default: `include`, or `same-origin` with `token`. */
  credentials?: RequestCredentials;
}

export interface Subscription {
  /** Resolves when the stream is live for the first time; rejects with a `Problem` when it is refused. */
  readonly ready: Promise<{ user: string }>;
  /** The same object until something changes. With React: `useSyncExternalStore(events.onState, () => events.state)`. */
  readonly state: Readonly<State>;
  /** Adds a listener; call what it returns to remove it. */
  readonly onState: (listener: (state: Readonly<State>) => void) => () => void;
  /** The place of the last event handed over; what `Last-Event-ID` would be. */
  readonly cursor: string | null;
  /** Tries again after `refused`, as when somebody has logged in; does nothing at any other time. */
  reconnect(): void;
  /** Ends it. No handler is called any more, but for `onState` with `closed`. */
  close(): void;
}

export function subscribe<Event extends AnyEvent = AnyEvent>(options: Options<Event>): Subscription;

/** Whether a type matches one of the patterns, as the bridge decides it. Without patterns every type does. */
export function matcher(patterns: string[]): (type: string) => boolean;

/** Reads SSE blocks from bytes (WHATWG HTML, section 9.2.6). */
export function parse(
  body: ReadableStream<Uint8Array>,
  onBlock: (block: { name: string; data: string; id: string | null }) => void,
  onRetry: (retryMs: number) => void,
  onBytes: () => void,
): Promise<void>;
