"""The catalogue in TypeScript and AsyncAPI."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import Field, computed_field

from bridge import __version__
from bridge.catalogue import exports
from bridge.catalogue.load import Catalogue, load_catalogue
from bridge.event import EventData

SAMPLE = load_catalogue("bridge.samples")
FOLDER = Path(__file__).parents[2] / "bridge" / "samples"


class Part(EventData):
    """Ends here */ alert(1) /*"""

    name: str
    parts: Annotated[list[Part], Field(default_factory=list)]


class Everything(EventData, type="test.everything"):
    text: str
    count: int | None
    choice: Literal["a", 'b"', 3]
    when: datetime
    mapping: Annotated[dict[str, float], Field(default_factory=dict)]
    pair: tuple[int, str] = (1, "")
    anything: Any = None
    nested: Part | list[Part]
    odd: Annotated[str, Field(alias="odd name")]
    defaulted: str = "x"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2


CATALOGUE = Catalogue({"test.everything": Everything})


def test_the_committed_files_are_current() -> None:
    """`make exports` writes them."""
    schemas = {name: SAMPLE.json_schema(name) for name in SAMPLE}
    assert json.loads((FOLDER / "events.schema.json").read_text()) == schemas
    assert (FOLDER / "events.ts").read_text() == exports.typescript(SAMPLE)
    assert json.loads((FOLDER / "asyncapi.json").read_text()) == exports.asyncapi(SAMPLE, version=__version__)


@pytest.mark.parametrize(
    "member",
    [
        "text: string;",
        "count: number | null;",
        'choice: "a" | "b\\"" | 3;',
        "when: string;",
        "mapping: { [key: string]: number };",
        "pair: [number, string];",
        "anything: unknown;",
        "nested: Part | Part[];",
        '"odd name": string;',
        "defaulted: string;",
        "twice: number;",
        "parts: Part[];",
        '"test.everything": Everything;',
    ],
)
def test_members_in_typescript(member: str) -> None:
    assert member in exports.typescript(CATALOGUE)


def test_a_description_cannot_end_its_comment() -> None:
    text = exports.typescript(CATALOGUE)
    assert "*\\/ alert(1)" in text
    assert "*/ alert" not in text


def test_asyncapi_names_every_type_and_every_reference_leads_somewhere() -> None:
    document = exports.asyncapi(CATALOGUE, version="1.2.3")
    assert document["asyncapi"] == "3.0.0"
    assert set(document["channels"]["events"]["messages"]) == {"test.everything"}
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        place: Any = document
        for step in reference.split("/"):
            place = place[step.replace("~1", "/").replace("~0", "~")]


def test_an_event_of_the_bridge_fits_the_payload_of_the_document() -> None:
    document = exports.asyncapi(CATALOGUE, version="1.2.3")
    payload = document["components"]["messages"]["test.everything"]["payload"]
    data = Everything.model_validate(
        {"text": "", "count": None, "choice": "a", "when": "2026-01-31T12:00:00Z", "nested": [], "odd name": "x"}
    )
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": "1",
        "source": "/t",
        "type": "test.everything",
        "data": data.model_dump(mode="json", by_alias=True),
    }
    schema = {**payload, "components": document["components"]}
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(event)
    del event["data"]["twice"]
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(event)
