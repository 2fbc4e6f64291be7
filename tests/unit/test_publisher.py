"""Before it sends anything, the SDK makes a message of an event, or refuses it with a reason."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from bridge import Audience, EventData, EventRefused, Publisher
from bridge.event import read_event
from bridge.publisher import Attribute, EventWriter, ItemRefused, as_text, batch_error
from bridge.sender import PipelineProgress


class Done(EventData, type="test.done"):
    job_id: str
    at: datetime | None = None


USER = Audience.user("42")
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
DONE = Done(job_id="r-7")
WRITER = EventWriter(source="/t", exchange="events", max_event_bytes=65_536, log=True)


def written(**attributes: Attribute) -> dict[str, Any]:
    message = WRITER.message(USER, DONE, attributes)
    event: dict[str, Any] = json.loads(message.body)
    assert message.id == event["id"] == message.properties.message_id
    assert read_event(message.body, message.routing_key, {"test.done": Done}).text == message.body
    return event


def refused(audience: Any = USER, data: Any = DONE, **attributes: Any) -> EventRefused:
    with pytest.raises(EventRefused) as caught:
        WRITER.message(audience, data, attributes)
    return caught.value


@pytest.mark.contract("4.6")
def test_attributes_in_the_types_that_programs_have() -> None:
    identity = UUID("0192f3a4-5b6c-7d8e-9f00-112233445566")
    assert written(id=identity)["id"] == str(identity)
    assert written(id=7)["id"] == "7"
    time = datetime(2026, 1, 31, 13, 0, 0, 120_000, timezone(timedelta(hours=1)))
    assert written(time=time)["time"] == "2026-01-31T12:00:00.120Z"
    assert written(time=time.replace(microsecond=123_456))["time"] == "2026-01-31T12:00:00.123456Z"
    assert written(time="2026-01-31T12:00:00+01:00")["time"] == "2026-01-31T12:00:00+01:00"
    assert written(source="/other")["source"] == "/other"
    assert written(
        subject="s",
        traceparent=PARENT,
        tracestate="v=1",
        dataschema="https://x.example/s",
    )


@pytest.mark.contract("4.6")
def test_an_attribute_that_is_none_counts_as_not_given() -> None:
    event = written(id=None, time=None, subject=None, traceparent=None)
    assert len(event["id"]) == 36
    assert datetime.fromisoformat(event["time"]) <= datetime.now(UTC)
    assert not event.keys() & {"subject", "traceparent"}


@pytest.mark.contract("4.6", "5.7")
@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"type": "zzz"}, "'type' is not an attribute to pass .*its class gives the type"),
        ({"specversion": "0.3"}, "'specversion' is not"),
        ({"data_base64": "x"}, "'data_base64' is not"),
        ({"tenant": "x"}, "'tenant' is not .*put it into the data"),
        ({"id": True}, "id must be a str, an int or a UUID, not True"),
        ({"id": 1.5}, "id must be"),
        ({"id": ""}, "'id' must be a string that is not empty"),
        ({"id": "a b"}, "id must be 1 to 128 characters"),
        ({"time": datetime(2026, 1, 31)}, "time is 2026-01-31T00:00:00, without a zone"),
        ({"time": 1_700_000_000}, "time must be a datetime with a zone"),
        ({"subject": 7}, "subject must be a str, not 7"),
        ({"subject": "\ud800"}, "surrogate"),
        ({"time": "2026-02-30T00:00:00Z"}, "time is '2026-02-30T00:00:00Z': the day does not exist"),
        ({"traceparent": "00-ab-cd-01"}, "traceparent is '00-ab-cd-01', which is not valid in W3C .* leave it out"),
        ({"tracestate": "v=1"}, "tracestate is given without a traceparent"),
        ({"traceparent": PARENT, "tracestate": "v"}, "tracestate is 'v', which is not valid in W3C"),
        ({"datacontenttype": "text/plain"}, "datacontenttype must be a JSON type"),
    ],
)
def test_an_attribute_that_is_refused(attributes: dict[str, Any], words: str) -> None:
    error = refused(**attributes)
    assert pytest.raises(EventRefused, match=words).matches(error), error
    assert str(error).startswith("test.done for user:42: ")


@pytest.mark.contract("4.6")
def test_ids_of_users_and_groups() -> None:
    assert [as_text(value) for value in ("42", 42, UUID(int=1))] == ["42", "42", str(UUID(int=1))]
    for value in (True, None, 1.0, b"42", ["42"]):
        with pytest.raises(EventRefused, match="not the id of a user or a group"):
            as_text(value)  # type: ignore[arg-type]


def test_an_audience_and_an_event_of_the_wrong_kind() -> None:
    assert "use Audience.user" in str(refused(audience="42"))
    assert "Audience.user" in str(refused(audience=None))
    assert "str is not an event" in str(refused(data="x"))
    assert "an id must not be empty" in str(refused(audience=Audience.user("")))
    naive = refused(data=Done(job_id="r", at=datetime(2026, 1, 31)), id="e-1")
    assert "without a zone" in str(naive)
    assert naive.id == "e-1"


@pytest.mark.contract("4.12")
def test_a_malformed_item_of_a_batch_is_refused() -> None:
    bad: list[Any] = [DONE, (USER,), (USER, DONE, {}, 1), [USER, DONE]]
    for item in bad:
        with pytest.raises(ItemRefused, match=r"event 3: .* is not \(audience, data\)") as caught:
            WRITER.item(item, 3)
        assert caught.value.error.index == 3
    assert WRITER.item((USER, DONE, None), 0).id  # type: ignore[arg-type]
    assert WRITER.item((USER, DONE, {"id": "e"}), 0).id == "e"


def test_a_batch_that_fails_before_anything_was_sent() -> None:
    error = batch_error(ConnectionError("away"), PipelineProgress(0, []))
    assert (error.confirmed, error.index, error.id) == (0, None, "")


async def test_a_closed_publisher_says_so() -> None:
    publisher = Publisher("amqp://127.0.0.1:1/", source="/t", timeout=0.1)
    await publisher.close()
    with pytest.raises(RuntimeError, match=r"closed: call open\(\)"):
        await publisher.to_user("42", DONE)


@pytest.mark.contract("4.11")
def test_a_publisher_in_a_second_event_loop_says_so() -> None:
    publisher = Publisher("amqp://127.0.0.1:1/", source="/t", timeout=0.1)

    async def use() -> None:
        await publisher.to_user("42", DONE)

    with pytest.raises(Exception, match="not confirmed within"):
        asyncio.run(use())
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        asyncio.run(use())
