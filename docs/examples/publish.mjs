// Publishes an event with amqplib, from any Node program. ../publishing.md gives the reason for each step.
//
//     npm install amqplib
//     AMQP_URL=amqp://guest:guest@localhost/ node publish.mjs 42
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import amqp from "amqplib";

const EXCHANGE = "events";
const MAX_BYTES = 65_536;
const PATIENCE_MS = 30_000;
/** AMQP reply codes: no right to publish, or no such exchange. A retry does not help. */
const HOPELESS = [403, 404];

/** The id of a user or a group as one word of a routing key. */
export const word = (id) =>
  encodeURIComponent(id).replace(/[.!*'()]/g, (char) => "%" + char.charCodeAt(0).toString(16).toUpperCase());

export class Events {
  #url;
  #source;
  #connection;
  #channel;
  #last = Promise.resolve();
  #returned = false;

  constructor(url, { source }) {
    this.#url = url;
    this.#source = source;
  }

  /**
   * Returns the event's id when RabbitMQ has confirmed it. An event without a confirm is published again for 30 seconds;
   * then this throws. A later retry with the same `id` is safe: it is the same event.
   * @param {string} audience `user.${word(id)}`, `group.${word(id)}` or `all`
   */
  publish(audience, type, data, { id = randomUUID() } = {}) {
    const event = { specversion: "1.0", id, source: this.#source, type, time: new Date().toISOString(), data };
    const body = Buffer.from(JSON.stringify(event));
    if (body.length > MAX_BYTES) throw new RangeError(`${type}: ${body.length} bytes; the bridge takes at most ${MAX_BYTES}`);
    // One event after the other keeps the order, and an error is certainly about this event.
    const done = this.#last.then(() => this.#try(`${audience}.${type}`, body, id));
    this.#last = done.catch(() => {});
    return done;
  }

  async #try(key, body, id) {
    const deadline = Date.now() + PATIENCE_MS;
    for (let pause = 100; ; pause = Math.min(2 * pause, 5_000)) {
      try {
        await this.#send(key, body, id, deadline);
        return id;
      } catch (error) {
        await this.close();
        if (HOPELESS.includes(error.code) || Date.now() + pause > deadline) throw error;
      }
      await sleep(pause);
    }
  }

  async #send(key, body, id, deadline) {
    this.#channel ??= await this.#connect();
    const channel = this.#channel;
    this.#returned = false;
    const options = { mandatory: true, persistent: true, messageId: id, contentType: "application/cloudevents+json" };
    const timeout = new AbortController();
    try {
      await Promise.race([
        new Promise((resolve, reject) => {
          const settle = (error) => (error ? reject(channel.failure ?? error) : resolve());
          channel.publish(EXCHANGE, key, body, options, settle);
        }),
        sleep(deadline - Date.now(), undefined, { signal: timeout.signal }).then(() => {
          throw new Error("not confirmed in time: does RabbitMQ have a memory or disk alarm?");
        }),
      ]);
    } finally {
      timeout.abort();
    }
    if (this.#returned) throw new Error("no queue takes the event: is RabbitMQ still starting?");
  }

  async #connect() {
    this.#connection = await amqp.connect(this.#url, { heartbeat: 10, timeout: 10_000 });
    this.#connection.on("error", () => {}); // Without a listener, Node exits. The channel fails too, with the reason.
    const channel = await this.#connection.createConfirmChannel();
    channel.on("error", (error) => (channel.failure = error)); // Arrives before the confirm fails.
    channel.on("return", () => (this.#returned = true)); // Arrives before the confirm: RabbitMQ confirms a returned event too.
    return channel;
  }

  async close() {
    const connection = this.#connection;
    this.#connection = this.#channel = undefined;
    await connection?.close().catch(() => {}); // May be closed already.
  }
}

if (import.meta.url === `file://${process.argv[1]}`) {
  const events = new Events(process.env.AMQP_URL ?? "amqp://guest:guest@localhost/", { source: "/examples/node" });
  const data = { job_id: "r-7", duration_seconds: 3.2 };
  console.log(await events.publish(`user.${word(process.argv[2])}`, "job.completed", data));
  await events.close();
}
