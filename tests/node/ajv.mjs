// Reads {type: {schema, cases: [data]}} and prints {type: {error}} or {type: {verdicts: [whether it is valid]}}.
//   node ajv.mjs KIND
import { readFileSync } from "node:fs";
import Ajv from "ajv";
import Ajv2020 from "ajv/dist/2020.js";
import addFormats from "ajv-formats";

const kinds = {
  // An exported JSON Schema. A tuple of any length is correct, though ajv's strictest mode reports it.
  strict: () => new Ajv2020.default({ ownProperties: true, strict: true, strictTuples: false }),
  // A schema of an AsyncAPI document: draft-07, with its discriminator.
  "draft-07": () => new Ajv.default({ ownProperties: true, strict: false, allErrors: true }),
  // A schema of an OpenAPI document, which has keywords of its own.
  openapi: () => new Ajv2020.default({ ownProperties: true, strict: false }),
};
const answers = {};
for (const [type, { schema, cases }] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const ajv = kinds[process.argv[2]]();
  addFormats.default(ajv);
  try {
    const validate = ajv.compile(schema);
    answers[type] = { verdicts: cases.map((data) => validate(data)) };
  } catch (error) {
    answers[type] = { error: String(error) };
  }
}
process.stdout.write(JSON.stringify(answers));
