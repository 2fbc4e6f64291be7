// Reads {files, paths}, checks JavaScript with JSDoc types as `tsc --checkJs --strict` does, and prints every error.
import { readFileSync } from "node:fs";
import { basename } from "node:path";
import ts from "typescript";

const { files, paths } = JSON.parse(readFileSync(0, "utf8"));
const program = ts.createProgram(files, {
  allowJs: true,
  checkJs: true,
  strict: true,
  noEmit: true,
  target: ts.ScriptTarget.ES2022,
  lib: ["lib.es2023.d.ts", "lib.dom.d.ts", "lib.dom.iterable.d.ts"],
  module: ts.ModuleKind.ESNext,
  moduleResolution: ts.ModuleResolutionKind.Bundler,
  types: [],
  paths,
});
const errors = ts.getPreEmitDiagnostics(program).map((it) => {
  const line = it.file ? it.file.getLineAndCharacterOfPosition(it.start).line + 1 : 0;
  return `${basename(it.file?.fileName ?? "")}:${line}: ${ts.flattenDiagnosticMessageText(it.messageText, "\n")}`;
});
process.stdout.write(JSON.stringify(errors));
