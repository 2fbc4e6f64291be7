"""What the probes say. Pure: liveness is that the loop answers at all, so only readiness has anything to decide."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Status:
    """`broker_away_seconds` is None while the bridge consumes; `started` once it has consumed for the first time.

    `broker_error` is what RabbitMQ, or the way to it, last failed with; None while the bridge consumes.
    `missing_keys` says why no key set has been read since the start; None where one has, or none is needed.
    """

    started: bool
    draining: bool
    connections: int
    max_connections: int
    broker_away_seconds: float | None
    missing_keys: str | None = None
    broker_error: str | None = None


CHECKS = frozenset({"broker", "connections"})
"""What may be left out. Starting, missing keys and draining always count: there new streams are in the wrong place."""


def why_not_ready(status: Status, *, grace_seconds: float, exclude: Set[str] = frozenset()) -> str | None:
    """The reason for a 503, or None when new streams are welcome here.

    Args:
        grace_seconds: how long the broker may be away.
        exclude: those of CHECKS that do not count. Behind a proxy that answers with a status when nobody is ready,
            which silences an EventSource for good, it is better to be asked and to say `busy`.

    A broker that is away for less than `grace_seconds` does not count: all replicas would leave the service at once,
    for a restart of the broker that their streams live through.
    """
    if status.draining:
        return "draining"
    why = f" ({status.broker_error})" if status.broker_error else ""
    if not status.started:
        return f"starting: not connected to RabbitMQ yet{why}"
    if status.missing_keys is not None:
        # Every stream would be told `busy`, so a wrong BRIDGE_JWKS must not pass a rollout. This counts only before the
        # first set: one that was read stays in use while its endpoint fails.
        return f"starting: no token can be verified yet: {status.missing_keys}; see BRIDGE_JWKS"
    away = status.broker_away_seconds
    if "broker" not in exclude and away is not None and away > grace_seconds:
        return f"RabbitMQ has been away for {away:.0f} s{why}"
    if "connections" not in exclude and status.connections >= status.max_connections:
        return f"at the cap of {status.max_connections} connections"
    return None
