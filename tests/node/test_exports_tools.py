"""Tools of other projects read the exports of a catalogue that has all of pydantic's common features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bridge.catalogue import exports
from bridge.catalogue.load import Catalogue, load_catalogue
from bridge.event import EventData
from tests.features import CATALOGUE, INVALID, VALID
from tests.node import ask

SAMPLE = load_catalogue("bridge.samples")


def accepts(model: type[EventData], data: Any) -> bool:
    try:
        model.model_validate_json(json.dumps(data))
    except ValidationError:
        return False
    return True


def written(event_type: str) -> list[Any]:
    """The data that a browser gets for each valid case."""
    models = (CATALOGUE[event_type].model_validate_json(json.dumps(data)) for data in VALID[event_type])
    return [model.model_dump(mode="json", by_alias=True) for model in models]


@pytest.mark.parametrize("catalogue", [CATALOGUE, SAMPLE], ids=["features", "sample"])
def test_the_parser_of_asyncapi_finds_no_fault(catalogue: Catalogue, tmp_path: Path) -> None:
    answer = ask("asyncapi.mjs", exports.asyncapi(catalogue, version="1.2.3"), tmp_path)
    assert answer == {"errors": [], "messages": list(catalogue)}


@pytest.mark.contract("2.67")
def test_the_payloads_of_asyncapi_fit_what_browsers_get_and_require_each_member(tmp_path: Path) -> None:
    document = exports.asyncapi(CATALOGUE, version="1.2.3")
    questions = {}
    for kind, message in document["components"]["messages"].items():
        events = [
            {"specversion": "1.0", "id": "1", "source": "/t", "type": kind, "data": data} for data in written(kind)
        ]
        for member in events[0]["data"]:
            rest = {name: value for name, value in events[0]["data"].items() if name != member}
            if member != "sometimes":
                events.append({**events[0], "data": rest})
        questions[kind] = {"schema": {**message["payload"], "components": document["components"]}, "cases": events}
    answers = ask("ajv.mjs", questions, tmp_path, "draft-07")
    for kind, question in questions.items():
        good = len(VALID[kind])
        assert answers[kind] == {"verdicts": [number < good for number in range(len(question["cases"]))]}


@pytest.mark.contract("2.63", "2.65", "2.66")
def test_ajv_accepts_what_pydantic_accepts_and_refuses_what_it_refuses(tmp_path: Path) -> None:
    cases = {kind: VALID[kind] + INVALID[kind] for kind in CATALOGUE}
    expected = {kind: [accepts(CATALOGUE[kind], data) for data in cases[kind]] for kind in CATALOGUE}
    assert expected == {kind: [True] * len(VALID[kind]) + [False] * len(INVALID[kind]) for kind in CATALOGUE}
    questions = {kind: {"schema": CATALOGUE.json_schema(kind), "cases": cases[kind]} for kind in CATALOGUE}
    answers = ask("ajv.mjs", questions, tmp_path, "strict")
    for kind in CATALOGUE:
        assert "error" not in answers[kind], answers[kind]
        wrong = [
            data
            for data, theirs, ours in zip(cases[kind], answers[kind]["verdicts"], expected[kind], strict=True)
            if theirs != ours
        ]
        assert wrong == []


def events_in_typescript(catalogue: Catalogue) -> str:
    lines = ['import type { BridgeEvent, EventDataByType } from "./events";']
    lines += [
        f"({json.dumps(data)}) satisfies EventDataByType[{json.dumps(kind)}];"
        for kind in catalogue
        for data in written(kind)
    ]
    return "\n".join(lines)


@pytest.mark.contract("2.67")
def test_the_compiler_accepts_the_types_and_what_browsers_get(tmp_path: Path) -> None:
    narrowing = """
import type { BridgeEvent, EventType } from "./events";
export function show(event: BridgeEvent): string | number {
  switch (event.type) {
    case "test.scalars": return event.data.text;
    case "test.containers": return event.data.items[0] ?? 0;
    case "test.unions":
      switch (event.data.pet.kind) {
        case "cat": return event.data.pet.lives;
        case "dog": case "puppy": return String(event.data.pet.good);
      }
    case "test.naming": return event.data.twiceIt + event.data["same"].here + event.data["other"].elsewhere;
    case "test.written": return event.data.typed.length + event.data.parsed.length + (event.data.sometimes ?? 0);
    case "test.nothing-at_all": return event.id;
    default: { const none: never = event; return none; }
  }
}
// @ts-expect-error a type that the catalogue has not
export const kind: EventType = "test.other";
export const wrong = (event: Extract<BridgeEvent, { type: "test.unions" }>) => {
  // @ts-expect-error only a cat has lives
  event.data.pet.lives;
  // @ts-expect-error a member that was never declared
  event.data.anything;
};
"""
    files = {
        "events.ts": exports.typescript(CATALOGUE),
        "data.ts": events_in_typescript(CATALOGUE),
        "use.ts": narrowing,
    }
    assert ask("typescript.mjs", files, tmp_path) == []


def test_the_compiler_accepts_the_types_of_the_sample(tmp_path: Path) -> None:
    assert ask("typescript.mjs", {"events.ts": exports.typescript(SAMPLE)}, tmp_path) == []


def test_the_clients_types_are_those_of_the_catalogue(tmp_path: Path) -> None:
    use = """
import { subscribe } from "./client";
import type { BridgeEvent } from "./events";
subscribe<BridgeEvent>({ url: "/events", types: ["job.progress", "job.*", "#.ready", "notification"] });
subscribe({ url: "/events", types: ["anything.at_all"], onEvent: (event) => event.type.length });
subscribe<BridgeEvent>({ url: "/events", onEvent: { "job.progress": (event) => event.data.percent.toFixed() } });
// @ts-expect-error a type that the catalogue has not
subscribe<BridgeEvent>({ url: "/events", types: ["job.progres"] });
// @ts-expect-error a handler of a type that the catalogue has not
subscribe<BridgeEvent>({ url: "/events", onEvent: { "job.progres": () => {} } });
"""
    client = (Path(__file__).parents[2] / "bridge" / "client" / "client.d.ts").read_text()
    files = {"client.d.ts": client, "events.ts": exports.typescript(SAMPLE), "use.ts": use}
    assert ask("typescript.mjs", files, tmp_path) == []


def test_the_types_are_not_wider_than_necessary(tmp_path: Path) -> None:
    """Each line is an error: none of the members below is `any`, `unknown` or missing."""
    lines = [
        f"const {name}: BridgeEvent & {{ type: {json.dumps(kind)} }} extends infer E "
        f"? E extends {{ data: infer D }} ? D[{json.dumps(member)} & keyof D] : never : never = Symbol();"
        for kind, members in {
            "test.scalars": ["text", "literal", "colour", "level", "amount", "moment", "at", "raw", "url"],
            "test.containers": ["pair", "by_name", "by_key", "tree", "box", "position", "options", "json_like"],
            "test.unions": ["pet", "any_pet", "shape"],
            "test.naming": ['odd "name"', "größe", "class", "size"],
        }.items()
        for number, member in enumerate(members)
        for name in [f"{kind.partition('.')[2]}{number}"]
    ]
    text = "\n".join(['import type { BridgeEvent } from "./events";', "export {};", *lines])
    errors = ask("typescript.mjs", {"events.ts": exports.typescript(CATALOGUE), "data.ts": text}, tmp_path)
    assert len({error.split(":")[1] for error in errors}) == len(lines), errors
