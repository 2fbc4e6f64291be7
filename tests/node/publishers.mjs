// Publishes one job.completed to user 42, as programs for Node do: node publishers.mjs PROGRAM
import "reflect-metadata";
import amqplib from "amqplib";

const url = process.env.AMQP_URL;
const key = "user.42.job.completed";
const data = { job_id: "r-7", duration_seconds: 0.5 };

async function withChannel(publish) {
  const connection = await amqplib.connect(url);
  const channel = await connection.createConfirmChannel();
  await publish(channel);
  await channel.waitForConfirms();
  await connection.close();
}

async function nest(options, message) {
  const { ClientRMQ } = await import("@nestjs/microservices");
  // With `wildcards`, NestJS publishes to a topic exchange, and the pattern is the routing key.
  const client = new ClientRMQ({
    urls: [url], exchange: "events", wildcards: true, queueOptions: { durable: true }, persistent: true, ...options,
  });
  const { lastValueFrom } = await import("rxjs");
  await lastValueFrom(client.emit(key, message), { defaultValue: null });
  await client.close();
}

const programs = {
  amqplib: () => withChannel((channel) =>
    channel.publish("events", key, Buffer.from(JSON.stringify(data)), {
      contentType: "application/json", messageId: "amqplib-1", appId: "/amqplib", timestamp: 1769860800,
    })),
  // The messages of the CloudEvents SDK, in binary and in structured mode.
  cloudevents: (mode) => withChannel(async (channel) => {
    const { CloudEvent, HTTP } = await import("cloudevents");
    const event = new CloudEvent({ id: `sdk-${mode}`, source: "/cloudevents", type: "job.completed", data });
    const { headers, body } = HTTP[mode](event);
    const { "content-type": contentType, ...others } = headers;
    channel.publish("events", key, Buffer.from(body), { contentType, headers: others });
  }),
  nest: () => nest({}, data),
  "nest-plain": async () => {
    const { RmqRecordBuilder } = await import("@nestjs/microservices");
    const record = new RmqRecordBuilder(data).setOptions({ messageId: "nest-1", appId: "/nest" }).build();
    const options = (packet) => packet.data?.options;
    await nest({ serializer: { serialize: ({ data: record }) => ({ ...record.data, options: record.options }) } }, record);
  },
};

await programs[process.argv[2]](process.argv[3]);
process.exit(0);
