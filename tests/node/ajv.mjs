// Reads {type: {schema, cases: [data]}} and prints {type: {error}} or {type: {verdicts: [whether it is valid]}}.
import { readFileSync } from "node:fs";
import Ajv2020 from "ajv/dist/2020.js";
import addFormats from "ajv-formats";

const answers = {};
for (const [type, { schema, cases }] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  // A tuple of any length is no fault, though ajv's strictest mode takes it for one.
  const ajv = new Ajv2020.default({ ownProperties: true, strict: true, strictTuples: false });
  addFormats.default(ajv);
  try {
    const validate = ajv.compile(schema);
    answers[type] = { verdicts: cases.map((data) => validate(data)) };
  } catch (error) {
    answers[type] = { error: String(error) };
  }
}
process.stdout.write(JSON.stringify(answers));
