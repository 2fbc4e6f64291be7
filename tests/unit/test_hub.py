"""What the hub does for all streams at once. No broker: sessions are what it is told of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bridge import hub
from bridge.cursor import Anchor
from bridge.metrics import Metrics

OLD, NEW = Anchor(100, "aaaaaa"), Anchor(200, "bbbbbb")


async def test_an_anchor_is_not_offered_once_a_newer_one_has_been(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is offered twice after its answer. One that took long is answered just before the next."""
    monkeypatch.setattr(hub, "ARRIVAL_SECONDS", (0.0, 1.0))
    nothing: Any = None
    made = hub.Hub(
        models={}, limits=nothing, metrics=Metrics(), quarantine=nothing, make_broker=lambda _: nothing, log=None
    )
    made._on_anchor(OLD, 1_000)
    await asyncio.sleep(0.2)
    made._on_anchor(NEW, 2_000)
    await asyncio.sleep(1.2)
    assert made.anchors_since(0) == [(OLD, 1_000), (NEW, 2_000), (NEW, 2_000)]
    assert made.anchors_since(2) == [(NEW, 2_000)]
