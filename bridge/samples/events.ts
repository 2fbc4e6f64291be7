// The event catalogue's types, as browsers receive them.
// Made by `bridge schemas export --format typescript`; edit the models instead.

/** A CloudEvent 1.0 in JSON, as in an SSE `data:` line. */
export interface CloudEvent<Type extends string = string, Data = unknown> {
  specversion: "1.0";
  id: string;
  source: string;
  type: Type;
  subject?: string;
  time?: string;
  datacontenttype?: "application/json";
  dataschema?: string;
  traceparent?: string;
  tracestate?: string;
  data: Data;
}

/** A part of an event, no event itself. */
export interface Amount {
  /** Cents, for a currency that has them */
  minor_units: number;
  /** ISO 4217 */
  currency: string;
}

/** Somebody has decided, perhaps on another device: take the question off the screen. */
export interface ApprovalDecided {
  approval_id: string;
  /** The job, the same in all of its events */
  job_id: string;
  decision: "approved" | "rejected" | "expired";
  /** User id; none when it expired */
  decided_by: string | null;
}

/** A job waits until a person decides. */
export interface ApprovalRequested {
  approval_id: string;
  /** The job, the same in all of its events */
  job_id: string;
  /** What is to be decided, for people */
  question: string;
  /** After this moment the question is closed */
  expires_at: string | null;
}

/** An invoice is there, was paid, or was not. */
export interface BillingNotice {
  kind: "invoice_issued" | "payment_received" | "payment_failed" | "quota_warning";
  invoice_id: string | null;
  amount: Amount | null;
  due: string | null;
  message: string;
}

/** Somebody stopped the job. */
export interface JobCancelled {
  /** The job, the same in all of its events */
  job_id: string;
  /** User id, or the name of a service */
  cancelled_by: string;
  reason: string;
}

/** The job is done, and well. */
export interface JobCompleted {
  /** The job, the same in all of its events */
  job_id: string;
  /** Seconds since the job started */
  duration_seconds: number;
  /** Where the result can be fetched */
  result_url: string | null;
}

/** The job has ended without its result. */
export interface JobFailed {
  /** The job, the same in all of its events */
  job_id: string;
  /** What went wrong, for the person who started the job */
  error: string;
  /** Whether starting it again may help */
  retryable: boolean;
  duration_seconds: number | null;
}

/** The job got further. Only the newest matters; a page may skip the others. */
export interface JobProgress {
  /** The job, the same in all of its events */
  job_id: string;
  percent: number;
  /** What is being done now, for people */
  message: string;
}

/** A worker has taken the job up. */
export interface JobStarted {
  /** The job, the same in all of its events */
  job_id: string;
  /** What the job does, for people */
  title: string;
  /** Number of steps, where it is known beforehand */
  steps: number | null;
}

/** Plain text for a person. */
export interface Notification {
  title: string;
  body: string;
  level: "info" | "success" | "warning" | "error";
  link: string | null;
}

/** A report can be fetched. */
export interface ReportReady {
  report_id: string;
  title: string;
  url: string;
  format: "pdf" | "csv" | "xlsx" | "html" | "json";
  size_bytes: number | null;
  job_id: string | null;
}

export interface EventDataByType {
  "approval.decided": ApprovalDecided;
  "approval.requested": ApprovalRequested;
  "billing.notice": BillingNotice;
  "job.cancelled": JobCancelled;
  "job.completed": JobCompleted;
  "job.failed": JobFailed;
  "job.progress": JobProgress;
  "job.started": JobStarted;
  "notification": Notification;
  "report.ready": ReportReady;
}

export type EventType = keyof EventDataByType;

/** Any event of the catalogue; `switch (event.type)` narrows its `data`. */
export type BridgeEvent = { [Type in EventType]: CloudEvent<Type, EventDataByType[Type]> }[EventType];
