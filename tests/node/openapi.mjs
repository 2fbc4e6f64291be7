// As ajv.mjs, for the schemas of an OpenAPI document, which have keywords of its own.
import { readFileSync } from "node:fs";
import Ajv2020 from "ajv/dist/2020.js";
import addFormats from "ajv-formats";

const answers = {};
for (const [type, { schema, cases }] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const ajv = new Ajv2020.default({ ownProperties: true, strict: false });
  addFormats.default(ajv);
  try {
    const validate = ajv.compile(schema);
    answers[type] = { verdicts: cases.map((data) => validate(data)) };
  } catch (error) {
    answers[type] = { error: String(error) };
  }
}
process.stdout.write(JSON.stringify(answers));
