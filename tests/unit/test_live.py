"""How many lanes a connection has room for, and what `bridge check` says of it."""

import pytest

from bridge.amqp import LimitReached
from bridge.service.broker.live import CHANNELS_BESIDE_LANES, CHANNELS_OF_A_LANE, LANES, count_lanes, describe_channels

LEAST = CHANNELS_BESIDE_LANES + CHANNELS_OF_A_LANE
ALL = CHANNELS_BESIDE_LANES + CHANNELS_OF_A_LANE * LANES


@pytest.mark.parametrize(
    ("channels", "lanes"), [(LEAST, 1), (LEAST + 1, 1), (ALL - 1, LANES - 1), (ALL, LANES), (65_535, LANES)]
)
def test_never_more_channels_than_there_are(channels: int, lanes: int) -> None:
    assert count_lanes(channels) == lanes
    assert CHANNELS_BESIDE_LANES + CHANNELS_OF_A_LANE * lanes <= channels


def test_fewer_after_rabbitmq_refused_so_many() -> None:
    assert count_lanes(65_535, most=2) == 2


@pytest.mark.parametrize("channels", [0, 1, LEAST - 1])
def test_too_few_are_told_with_the_setting(channels: int) -> None:
    with pytest.raises(LimitReached, match=f"allows {channels} channels.*at least {LEAST}.*channel_max"):
        count_lanes(channels)
    with pytest.raises(LimitReached):
        describe_channels(channels)


def test_what_check_says() -> None:
    assert describe_channels(2047) == f"RabbitMQ allows 2047 channels in a connection, and the bridge uses {ALL}"
    assert describe_channels(LEAST).endswith(f"uses {LEAST}: streams are opened more slowly than with {ALL}")
