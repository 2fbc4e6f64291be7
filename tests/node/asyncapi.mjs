// Reads an AsyncAPI document and prints what AsyncAPI's own parser finds wrong with it.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
const errors = diagnostics.filter(({ severity }) => severity === 0).map(({ message, path }) => `${path.join(".")}: ${message}`);
const messages = document ? document.messages().all().map((message) => message.id()) : [];
process.stdout.write(JSON.stringify({ errors, messages }));
