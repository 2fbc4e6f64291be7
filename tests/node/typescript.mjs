// Reads {file: text}, writes the files beside itself, compiles them together with `strict`, and prints every error.
import { readFileSync, writeFileSync } from "node:fs";
import ts from "typescript";

const files = JSON.parse(readFileSync(0, "utf8"));
for (const [file, text] of Object.entries(files)) writeFileSync(file, text);
const program = ts.createProgram(Object.keys(files), {
  strict: true,
  exactOptionalPropertyTypes: true,
  noUncheckedIndexedAccess: true,
  noEmit: true,
  target: ts.ScriptTarget.ES2022,
  module: ts.ModuleKind.ESNext,
  moduleResolution: ts.ModuleResolutionKind.Bundler,
  types: [],
});
const errors = ts.getPreEmitDiagnostics(program).map((it) => {
  const line = it.file ? it.file.getLineAndCharacterOfPosition(it.start).line + 1 : 0;
  return `${it.file?.fileName}:${line}: ${ts.flattenDiagnosticMessageText(it.messageText, "\n")}`;
});
process.stdout.write(JSON.stringify(errors));
