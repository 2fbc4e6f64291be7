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

/** An amount of money, as a part of an event. */
export interface Amount {
  /** Cents, for a currency that has them */
  minor_units: number;
  /** ISO 4217 */
  currency: string;
}

/** A person has decided, perhaps on another device. Remove the question from the screen. */
export interface ApprovalDecided {
  approval_id: string;
  /** The job, the same in all of its events */
  job_id: string;
  decision: "approved" | "rejected" | "expired";
  /** User id; null if the question expired */
  decided_by: string | null;
}

/** A job waits until a person decides. */
export interface ApprovalRequested {
  approval_id: string;
  /** The job, the same in all of its events */
  job_id: string;
  /** The question, for people */
  question: string;
  /** The question is closed after this time */
  expires_at: string | null;
}

/** An invoice was issued or paid, a payment failed, or a quota is nearly used up. */
export interface BillingNotice {
  kind: "invoice_issued" | "payment_received" | "payment_failed" | "quota_warning";
  invoice_id: string | null;
  amount: Amount | null;
  due: string | null;
  message: string;
}

/** A person or a service stopped the job. */
export interface JobCancelled {
  /** The job, the same in all of its events */
  job_id: string;
  /** User id, or the name of a service */
  cancelled_by: string;
  reason: string;
}

/** The job has completed with its result. */
export interface JobCompleted {
  /** The job, the same in all of its events */
  job_id: string;
  /** Seconds since the job started */
  duration_seconds: number;
  /** Address of the result */
  result_url: string | null;
}

/** The job has ended without a result. */
export interface JobFailed {
  /** The job, the same in all of its events */
  job_id: string;
  /** The error, for the person who started the job */
  error: string;
  /** Whether a new start may help */
  retryable: boolean;
  duration_seconds: number | null;
}

/** The job's progress. Only the newest event matters; a page may skip older ones. */
export interface JobProgress {
  /** The job, the same in all of its events */
  job_id: string;
  percent: number;
  /** The current step, for people */
  message: string;
}

/** A worker has started the job. */
export interface JobStarted {
  /** The job, the same in all of its events */
  job_id: string;
  /** What the job does, for people */
  title: string;
  /** Number of steps, if it is known at the start */
  steps: number | null;
}

/** Plain text for a person. */
export interface Notification {
  title: string;
  body: string;
  level: "info" | "success" | "warning" | "error";
  link: string | null;
}

/** A report is ready to fetch. */
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
