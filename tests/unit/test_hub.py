"""What the hub does for all streams at once. No broker: sessions are what it is told of."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bridge import hub
from bridge.cursor import Anchor
from bridge.metrics import Metrics


class Stream:
    """A connection and its session in one, which notes the anchors that it is offered."""

    def __init__(self) -> None:
        self.session = self
        self.offered: list[Anchor] = []

    def anchor(self, anchor: Anchor, _: int) -> None:
        self.offered.append(anchor)


OLD, NEW = Anchor(100, "aaaaaa"), Anchor(200, "bbbbbb")


@pytest.mark.parametrize("streams", [1, hub.ANCHORED_AT_ONCE + 1])
async def test_an_anchor_is_not_offered_once_a_newer_one_has_been(
    monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    """Each is offered twice after its answer. One that took long is answered just before the next."""
    monkeypatch.setattr(hub, "ARRIVAL_SECONDS", (0.0, 1.0))
    nothing: Any = None
    made = hub.Hub(
        models={}, limits=nothing, metrics=Metrics(), quarantine=nothing, make_broker=lambda _: nothing, log=None
    )
    told = [Stream() for _ in range(streams)]
    made._connections = dict.fromkeys(told)  # type: ignore[arg-type]
    made._on_anchor(OLD, 1_000)
    await asyncio.sleep(0.2)
    made._on_anchor(NEW, 2_000)
    await asyncio.sleep(1.2)
    assert all(stream.offered == [OLD, NEW, NEW] for stream in told)
