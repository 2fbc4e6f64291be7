"""The OpenAPI document, without a server. tests/integration/test_openapi.py compares it with a running one."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, cast

import pytest
from openapi_spec_validator import validate
from pydantic import SecretStr

from bridge.catalogue.load import Catalogue, load_catalogue
from bridge.service.http.openapi import openapi
from bridge.service.http.web import create_app
from bridge.service.metrics import Metrics
from bridge.service.settings import Settings
from tests.features import CATALOGUE

SAMPLE = load_catalogue("bridge.samples")
FULL = openapi(CATALOGUE, version="1.2.3", cookie="who", query_token=True, console="development")


@pytest.mark.contract("2.71")
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


@pytest.mark.contract("2.71")
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
