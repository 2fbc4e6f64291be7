// As ajv.mjs, for the schemas of an AsyncAPI document: draft-07, with its discriminator.
import { readFileSync } from "node:fs";
import Ajv from "ajv";
import addFormats from "ajv-formats";

const answers = {};
for (const [type, { schema, cases }] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  const ajv = new Ajv.default({ ownProperties: true, strict: false, allErrors: true });
  addFormats.default(ajv);
  try {
    const validate = ajv.compile(schema);
    answers[type] = { verdicts: cases.map((data) => validate(data)) };
  } catch (error) {
    answers[type] = { error: String(error) };
  }
}
process.stdout.write(JSON.stringify(answers));
