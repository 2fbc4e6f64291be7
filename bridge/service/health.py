"""Decides the answer of the readiness probe. Pure. Liveness needs no decision: it means that the loop answers."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Status:
    """The facts that readiness depends on.

    Attributes:
        started: the bridge has consumed from RabbitMQ at least once.
        broker_away_seconds: seconds since the bridge consumed last; None while it consumes.
        missing_keys: why no key set has been read since the start; None if one has been read, or none is needed.
        broker_error: the last error of RabbitMQ or of its connection; None while the bridge consumes.
    """

    started: bool
    draining: bool
    connections: int
    max_connections: int
    broker_away_seconds: float | None
    missing_keys: str | None = None
    broker_error: str | None = None


CHECKS = frozenset({"broker", "connections"})
"""The checks that a probe may exclude. Starting, missing keys and draining always count: new streams would fail."""


def why_not_ready(status: Status, *, grace_seconds: float, exclude: Set[str] = frozenset()) -> str | None:
    """Returns the reason for a 503, or None if the process accepts new streams.

    Args:
        grace_seconds: a shorter absence of RabbitMQ does not count. Otherwise a restart of RabbitMQ, which streams
            survive, would remove all replicas from the load balancer at once.
        exclude: the CHECKS that do not count. If no replica is ready, some proxies answer with an error status, after
            which an EventSource never reconnects. Behind such a proxy it is better that the bridge answers `busy`.
    """
    if status.draining:
        return "draining"
    why = f" ({status.broker_error})" if status.broker_error else ""
    if not status.started:
        return f"starting: not connected to RabbitMQ yet{why}"
    if status.missing_keys is not None:
        # Every stream would get `busy`, so a wrong BRIDGE_JWKS must stop a rollout. This counts only before the first
        # set: a set that was read stays in use while its endpoint fails.
        return f"starting: no token can be verified yet: {status.missing_keys}; see BRIDGE_JWKS"
    away = status.broker_away_seconds
    if "broker" not in exclude and away is not None and away > grace_seconds:
        return f"RabbitMQ has been away for {away:.0f} s{why}"
    if "connections" not in exclude and status.connections >= status.max_connections:
        return f"at the cap of {status.max_connections} connections"
    return None
