"""A metric that no stream shows."""

from __future__ import annotations

from bridge.service.broker.live import Broker
from bridge.service.broker.quarantine import Quarantine
from bridge.service.forms import MessageReader
from bridge.service.metrics import Metrics
from bridge.service.settings import LogSettings, Settings
from bridge.service.streams.cursor import Anchor
from bridge.service.streams.hub import Hub
from bridge.service.streams.reader import EventReader
from bridge.service.streams.writer import WriteBatch


async def test_whether_the_log_answers_is_known_before_a_client_returns() -> None:
    metrics = Metrics()
    hub = Hub(
        reader=EventReader(
            MessageReader({}, 1_000, "events"),
            metrics=metrics,
            quarantine=Quarantine([], queue="q", on_dropped=lambda: None),
        ),
        limits=Settings(),
        metrics=metrics,
        make_feed=lambda hub: Broker(
            [],
            exchange="e",
            quarantine="q",
            log=LogSettings("l", "1h", 1),
            fleet_key=b"",
            on_shared=hub.on_shared,
            write_batch=WriteBatch(),
        ),
        log=None,
    )
    for anchor, answers in [(None, 0), (Anchor(5, "x"), 1)]:
        hub._on_watermark(anchor, 0)
        assert metrics.registry.get_sample_value("bridge_log_answers") == answers
