"""What the hub does for all streams at once. No broker: sessions are what it is told of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import pytest

from bridge import hub
from bridge.cursor import Anchor
from bridge.metrics import Metrics

OLD, NEW = Anchor(100, "aaaaaa"), Anchor(200, "bbbbbb")


def test_an_anchor_is_not_offered_once_a_newer_one_has_been(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is offered twice after its answer. One that took long is answered just before the next."""
    monkeypatch.setattr(hub, "ARRIVAL_SECONDS", (5.0, 13.0))
    now, due = 0.0, list[tuple[float, Callable[[], None]]]()

    class Clock:
        def call_later(self, seconds: float, call: Callable[..., None], *args: object) -> None:
            due.append((now + seconds, partial(call, *args)))

    def pass_to(then: float) -> None:
        nonlocal now
        for at, call in sorted(due, key=itemgetter(0)):
            if now < at <= then:
                call()
        now = then

    monkeypatch.setattr("bridge.hub.asyncio.get_running_loop", Clock)
    nothing: Any = None
    made = hub.Hub(
        models={}, limits=nothing, metrics=Metrics(), quarantine=nothing, make_broker=lambda _: nothing, log=None
    )
    made._on_anchor(OLD, 1_000)
    pass_to(6)
    made._on_anchor(NEW, 2_000)
    pass_to(30)
    assert made.anchors_since(0) == [(OLD, 1_000), (NEW, 2_000), (NEW, 2_000)]
    assert made.anchors_since(2) == [(NEW, 2_000)]
