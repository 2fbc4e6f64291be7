"""A validator of another project reads the schemas of frames in the OpenAPI document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bridge.service.http.openapi import openapi
from tests.features import CATALOGUE, VALID
from tests.node import ask

FULL = openapi(CATALOGUE, version="1.2.3", cookie="who", query_token=True, console="development")


def test_each_frame_has_the_schema_of_its_data(tmp_path: Path) -> None:
    schema = FULL["paths"]["/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    frame = FULL["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    questions: dict[str, Any] = {"frame": {"schema": {**frame, "components": FULL["components"]}, "cases": []}}
    for option in frame["anyOf"]:
        name = option["properties"]["event"]["const"]
        data = option["properties"]["data"]
        assert data["contentMediaType"] == "application/json"
        if name in CATALOGUE:
            model = CATALOGUE[name].model_validate_json(json.dumps(VALID[name][0]))
            event = {"specversion": "1.0", "id": "1", "source": "/t", "type": name}
            good = {**event, "data": model.model_dump(mode="json", by_alias=True)}
            content = {**data["contentSchema"], "components": FULL["components"]}
            questions[name] = {"schema": content, "cases": [good, event, {**good, "type": "x"}]}
            questions["frame"]["cases"] += [{"id": "a", "event": name, "data": "{}"}, {"id": "a", "data": "{}"}]
    answers = ask("ajv.mjs", questions, tmp_path, "openapi")
    assert answers["frame"] == {"verdicts": [True] * 2 * len(CATALOGUE)}
    # An event without data is refused, even if the model has no members.
    for name in CATALOGUE:
        assert answers[name] == {"verdicts": [True, False, False]}
