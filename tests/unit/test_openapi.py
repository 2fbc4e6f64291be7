"""The OpenAPI document, without a server. tests/integration/test_openapi.py compares it with a running one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from openapi_spec_validator import validate
from pydantic import SecretStr

from bridge.catalogue.load import Catalogue, load_catalogue
from bridge.service.http.openapi import openapi
from bridge.service.http.web import create_app
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings
from tests.features import CATALOGUE, VALID
from tests.node import ask

SAMPLE = load_catalogue("bridge.samples")
FULL = openapi(CATALOGUE, version="1.2.3", cookie="who", query_token=True, console="development")


@pytest.mark.parametrize("console", ["false", "true", "development"])
@pytest.mark.parametrize("catalogue", [CATALOGUE, SAMPLE], ids=["features", "sample"])
def test_it_is_valid(catalogue: Catalogue, console: str) -> None:
    document = openapi(catalogue, version="1.2.3", console=console)
    assert document["openapi"] == "3.2.0"
    validate(document)
    for reference in re.findall(r'"#/([^"]+)"', json.dumps(document)):
        place: Any = document
        for step in reference.split("/"):
            place = place[step]


def test_a_token_has_every_way_that_the_settings_allow() -> None:
    closed = openapi(SAMPLE, version="1.2.3")
    assert list(closed["components"]["securitySchemes"]) == ["bearer", "cookie"]
    assert list(FULL["components"]["securitySchemes"]) == ["bearer", "cookie", "query"]
    assert FULL["components"]["securitySchemes"]["cookie"]["name"] == "who"
    assert FULL["paths"]["/events"]["get"]["security"] == [{"bearer": []}, {"cookie": []}, {"query": []}]
    assert "/console/publish" not in openapi(SAMPLE, version="1.2.3", console="true")["paths"]
    assert "/" not in closed["paths"]


@pytest.mark.parametrize("console", ["false", "true", "development"])
def test_it_has_every_public_route_and_no_other(console: Literal["false", "true", "development"]) -> None:
    nothing: Any = None
    settings = Settings(jwt_secret=SecretStr("x" * 32), console=console)
    app = create_app(
        hub=nothing,
        authenticator=nothing,
        settings=settings,
        catalogue=SAMPLE,
        metrics=Metrics(),
        write_batch=nothing,
        publisher=nothing if console != "development" else cast(Any, object()),
    )
    served = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule).replace("{event_type}", "{type}"), method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        # Quart answers OPTIONS by itself; that of /events is for CORS.
        if method != "OPTIONS" or rule.endpoint == "preflight"
    }
    paths = openapi(SAMPLE, version="1.2.3", console=console)["paths"]
    assert {(path, method) for path in paths for method in paths[path] if method != "parameters"} == served


def test_every_error_is_a_problem() -> None:
    for path in FULL["paths"].values():
        for method in ("get", "post", "options"):
            for status, answer in path.get(method, {}).get("responses", {}).items():
                assert (list(answer.get("content", ())) == ["application/problem+json"]) == (status >= "400")


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
    answers = ask("openapi.mjs", questions, tmp_path)
    assert answers["frame"] == {"verdicts": [True] * 2 * len(CATALOGUE)}
    # An event without data is refused also where the model has no members.
    for name in CATALOGUE:
        assert answers[name] == {"verdicts": [True, False, False]}
