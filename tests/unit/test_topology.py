"""The bridge reads RabbitMQ's message about a difference, and judges it. The texts are of RabbitMQ 3.10.8 and 4.3.6."""

import pytest
from pamqp.common import FieldTable

from bridge.service.broker.topology import Fits, ask_next, fits_exchange, fits_log, fits_quarantine, read_difference

NOTHING: FieldTable = {}


def words(name: str, wanted: str, current: str) -> str:
    return (
        f"declaring it: PRECONDITION_FAILED - inequivalent arg '{name}' for queue 'q' in vhost 'v': "
        f"received {wanted} but current is {current}"
    )


@pytest.mark.parametrize(
    ("name", "wanted", "current", "shown", "asked", "next_one"),
    [
        ("x-max-length", "'10000'", "'5'", "x-max-length is 5, the bridge would set 10000", {"x-max-length": 10_000},
         {"x-max-length": 5}),
        ("x-max-length", "none", "the value '5' of type 'signedint'", "x-max-length is 5, the bridge would set none",
         {}, {"x-max-length": 5}),
        ("x-max-length", "the value '10000' of type 'short'", "none",
         "x-max-length is not set, the bridge would set 10000", {"x-max-length": 10_000}, {}),
        ("x-queue-type", "'classic'", "'quorum'", "x-queue-type is quorum, the bridge would set classic",
         {"x-queue-type": "classic"}, {"x-queue-type": "quorum"}),
        ("x-single-active-consumer", "none", "the value 'true' of type 'bool'",
         "x-single-active-consumer is true, the bridge would set none", {}, {"x-single-active-consumer": True}),
        ("x-max-age", "'3600000'", "'7200000'", "x-max-age is 7200s, the bridge would set 3600s", {"x-max-age": "1h"},
         {"x-max-age": "7200s"}),
        ("alternate-exchange", "none", "the value 'a but current is none' of type 'longstr'",
         "alternate-exchange is a but current is none, the bridge would set none", {},
         {"alternate-exchange": "a but current is none"}),
        ("x-odd", "none", "the value '[{a,b}]' of type 'table'", "x-odd is [{a,b}], the bridge would set none", {},
         None),
    ],
)  # fmt: skip
def test_a_difference(
    name: str, wanted: str, current: str, shown: str, asked: FieldTable, next_one: FieldTable | None
) -> None:
    difference = read_difference(words(name, wanted, current))
    assert difference is not None
    assert str(difference) == shown
    assert difference.words.startswith("inequivalent arg '")
    assert ask_next(asked, difference) == next_one


@pytest.mark.parametrize(
    "text", ["", "RESOURCE_LOCKED - cannot obtain exclusive access", "PRECONDITION_FAILED - invalid arg 'x-max-age'"]
)
def test_a_message_about_something_else(text: str) -> None:
    assert read_difference(text) is None


@pytest.mark.contract("5.15", "5.16", "5.17")
@pytest.mark.parametrize(
    ("fits", "name", "current", "good"),
    [
        (fits_exchange, "alternate-exchange", "'a'", True),
        (fits_exchange, "type", "'direct'", False),
        (fits_exchange, "an argument of tomorrow", "'x'", False),
        (fits_quarantine, "x-queue-type", "'quorum'", True),
        (fits_quarantine, "x-queue-type", "'stream'", False),
        (fits_quarantine, "x-queue-type", "'jms'", False),
        (fits_quarantine, "x-message-ttl", "'0'", False),
        (fits_quarantine, "x-expires", "'60000'", False),
        (fits_quarantine, "x-dead-letter-exchange", "'d'", True),
        (fits_log, "x-max-age", "'1m'", True),
        (fits_log, "x-queue-type", "'quorum'", False),
        (fits_log, "durable", "'false'", False),
    ],
)
def test_a_difference_that_fits_or_not(fits: Fits, name: str, current: str, good: bool) -> None:
    difference = read_difference(words(name, "none", current))
    assert difference is not None
    assert fits(difference) is good
