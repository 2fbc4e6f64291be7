// Publishes an event with amqplib, as any service in Node can. ../publishing.md says why each line is there.
//
//     npm install amqplib
//     AMQP_URL=amqp://guest:guest@localhost/ node publish.mjs 42
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import amqp from "amqplib";

const EXCHANGE = "events";
const MAX_BYTES = 65_536;
const PATIENCE_MS = 30_000;
/** This user may not publish it, or the exchange does not exist: waiting does not help. */
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
   * Returns the event's id once RabbitMQ has confirmed it. What got no confirm is published again, for half a minute;
   * then this throws. With the same `id` it may be tried again later: it is the same event.
   * @param {string} audience `user.${word(id)}`, `group.${word(id)}` or `all`
   */
  publish(audience, type, data, { id = randomUUID() } = {}) {
    const event = { specversion: "1.0", id, source: this.#source, type, time: new Date().toISOString(), data };
    const body = Buffer.from(JSON.stringify(event));
    if (body.length > MAX_BYTES) throw new RangeError(`${type}: ${body.length} bytes, at most ${MAX_BYTES} are taken`);
    // One after the other: they stay in order, and an error is surely about this one.
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
          throw new Error("not confirmed in time: has RabbitMQ an alarm of memory or disk?");
        }),
      ]);
    } finally {
      timeout.abort();
    }
    if (this.#returned) throw new Error("no queue takes it: is RabbitMQ just starting?");
  }

  async #connect() {
    this.#connection = await amqp.connect(this.#url, { heartbeat: 10, timeout: 10_000 });
    this.#connection.on("error", () => {}); // Without a listener Node would end. The channel is closed, too, and says so.
    const channel = await this.#connection.createConfirmChannel();
    channel.on("error", (error) => (channel.failure = error)); // Before the confirm fails.
    channel.on("return", () => (this.#returned = true)); // Before its confirm, which comes nevertheless.
    return channel;
  }

  async close() {
    const connection = this.#connection;
    this.#connection = this.#channel = undefined;
    await connection?.close().catch(() => {}); // It may be closed already.
  }
}

if (import.meta.url === `file://${process.argv[1]}`) {
  const events = new Events(process.env.AMQP_URL ?? "amqp://guest:guest@localhost/", { source: "/examples/node" });
  const data = { job_id: "r-7", duration_seconds: 3.2 };
  console.log(await events.publish(`user.${word(process.argv[2])}`, "job.completed", data));
  await events.close();
}
