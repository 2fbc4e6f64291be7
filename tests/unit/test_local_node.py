"""The free ports for the private RabbitMQ, the demo and the tests."""

from pathlib import Path

from deploy.local.node import free_ports


def test_no_outgoing_connection_takes_a_free_port_before_it_is_used() -> None:
    first_given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert max(ports) < first_given_out
