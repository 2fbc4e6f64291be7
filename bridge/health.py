"""What the probes say. Pure: liveness is that the loop answers at all, so only readiness has anything to decide."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Status:
    """`broker_away_seconds` is None while the bridge consumes; `started` once it has consumed for the first time."""

    started: bool
    draining: bool
    connections: int
    max_connections: int
    broker_away_seconds: float | None


def why_not_ready(status: Status, *, grace_seconds: float) -> str | None:
    """The reason for a 503, or None when new streams are welcome here.

    A broker that is away for less than `grace_seconds` does not count: all replicas would leave the service at once,
    for a restart of the broker that their streams live through.
    """
    if status.draining:
        return "draining"
    if not status.started:
        return "starting: not connected to RabbitMQ yet"
    if status.broker_away_seconds is not None and status.broker_away_seconds > grace_seconds:
        return f"RabbitMQ has been away for {status.broker_away_seconds:.0f} s"
    if status.connections >= status.max_connections:
        return f"at the cap of {status.max_connections} connections"
    return None
