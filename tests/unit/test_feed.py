"""The parts that both feeds share: the news of a deleted exchange, and the log lines of an outage."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from bridge.amqp import BrokerUnavailable, LimitReached
from bridge.service.broker.feed import Deletion, Outage

KEY = b"of this bridge"


@pytest.mark.parametrize(
    ("body", "concerns"),
    [
        (["events", "other", 3.0], True),
        (["events", "other", 11.0], False),  # Noticed before this process made its bindings.
        (["events", "mine", 3.0], False),
        (["parcels", "other", 3.0], False),  # Of another bridge on the same virtual host.
        (["events", "other"], False),
        ({"exchange": "events"}, False),
        ("events", False),
        (["events", "other", "soon", "proof"], False),
        (["events", "other", float("nan")], False),
    ],
)
def test_the_news_of_a_deletion_concerns_bindings_that_are_older_than_it(body: Any, concerns: bool) -> None:
    if isinstance(body, list) and len(body) == 3:
        body = [*body, Deletion(*body)._proof(KEY)]
    news = Deletion.parse(json.dumps(body).encode(), KEY)
    assert (news is not None and news.concerns("events", "mine", 10.0)) is concerns


@pytest.mark.parametrize("body", [b"", b"\xff", b"[", b"[" * 100_000])
def test_bytes_that_are_not_news_are_ignored(body: bytes) -> None:
    assert Deletion.parse(body, KEY) is None


def test_an_outage_has_a_line_for_each_new_cause_and_few_for_the_same() -> None:
    outage = Outage()
    with capture_logs() as lines:
        for _ in range(20):
            outage.log(BrokerUnavailable("refused"))
        outage.log(LimitReached("too many connections"))
        outage.log(BrokerUnavailable("refused"))
    assert [(line["attempts"], line["kind"]) for line in lines] == [
        (1, "BrokerUnavailable"), (2, "BrokerUnavailable"), (4, "BrokerUnavailable"), (8, "BrokerUnavailable"),
        (16, "BrokerUnavailable"), (21, "LimitReached"), (22, "BrokerUnavailable"),
    ]  # fmt: skip


def test_news_without_the_key_of_the_bridge_is_ignored() -> None:
    """Every publisher can put a message into the log, with the log's name as its routing key."""
    news = Deletion("events", "other", 3.0)
    assert Deletion.parse(news.write(KEY), KEY) == news
    assert Deletion.parse(news.write(b"of another bridge"), KEY) is None
    assert Deletion.parse(json.dumps([*news]).encode(), KEY) is None
    changed = json.loads(news.write(KEY))
    changed[0] = "parcels"
    assert Deletion.parse(json.dumps(changed).encode(), KEY) is None
