"""How many workers a connection has room for, and what `bridge check` says of it."""

import pytest

from bridge.amqp import LimitReached
from bridge.service.broker.live import (
    CHANNEL_WORKERS,
    CHANNELS_BESIDE_WORKERS,
    CHANNELS_OF_A_WORKER,
    count_channel_workers,
    describe_channels,
)

LEAST = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER
ALL = CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * CHANNEL_WORKERS


@pytest.mark.parametrize(
    ("channels", "workers"),
    [(LEAST, 1), (LEAST + 1, 1), (ALL - 1, CHANNEL_WORKERS - 1), (ALL, CHANNEL_WORKERS), (65_535, CHANNEL_WORKERS)],
)
def test_never_more_channels_than_there_are(channels: int, workers: int) -> None:
    assert count_channel_workers(channels) == workers
    assert CHANNELS_BESIDE_WORKERS + CHANNELS_OF_A_WORKER * workers <= channels


def test_fewer_after_rabbitmq_refused_so_many() -> None:
    assert count_channel_workers(65_535, most=2) == 2


@pytest.mark.parametrize("channels", [0, 1, LEAST - 1])
def test_too_few_are_told_with_the_setting(channels: int) -> None:
    with pytest.raises(LimitReached, match=f"allows {channels} channels.*at least {LEAST}.*channel_max"):
        count_channel_workers(channels)
    with pytest.raises(LimitReached):
        describe_channels(channels)


def test_what_check_says() -> None:
    assert describe_channels(2047) == f"RabbitMQ allows 2047 channels in a connection, and the bridge uses {ALL}"
    assert describe_channels(LEAST).endswith(f"uses {LEAST}: streams are opened more slowly than with {ALL}")
