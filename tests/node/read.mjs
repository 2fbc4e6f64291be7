// Reads a stream with a client of another project, and prints each event that it reports, as a line of JSON.
//   node read.mjs CLIENT URL TOKEN NAMES
const [client, url, token, names] = process.argv.slice(2);
const headers = { Authorization: `Bearer ${token}` };
const print = (name, id, data) => process.stdout.write(JSON.stringify([name, id, data]) + "\n");
const listen = (source) => {
  source.onmessage = (message) => print("message", message.lastEventId, message.data);
  for (const name of names.split(","))
    source.addEventListener(name, (message) => print(name, message.lastEventId, message.data));
};

const clients = {
  async eventsource() {
    const { EventSource } = await import("eventsource");
    listen(new EventSource(url, { fetch: (input, init) => fetch(input, { ...init, headers: { ...init.headers, ...headers } }) }));
  },
  async "eventsource-parser"() {
    const { createParser } = await import("eventsource-parser");
    const parser = createParser({ onEvent: ({ event, id, data }) => print(event ?? "message", id, data) });
    const decoder = new TextDecoder();
    for await (const chunk of (await fetch(url, { headers })).body) parser.feed(decoder.decode(chunk, { stream: true }));
  },
  async "event-source-polyfill"() {
    const { EventSourcePolyfill } = await import("event-source-polyfill");
    listen(new (EventSourcePolyfill ?? (await import("event-source-polyfill")).default.EventSourcePolyfill)(url, { headers }));
  },
  async "@microsoft/fetch-event-source"() {
    // This package is made for browsers: it checks whether the page is hidden.
    globalThis.window = globalThis;
    globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
    const { fetchEventSource } = await import("@microsoft/fetch-event-source");
    await fetchEventSource(url, { headers, onmessage: ({ event, id, data }) => print(event || "message", id, data) });
  },
};
await clients[client]();
