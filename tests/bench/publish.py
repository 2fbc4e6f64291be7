"""The publisher of a benchmark, in a process of its own. It makes frames by hand, so that it needs little CPU.

    python -m tests.bench.publish PORT VHOST RATE SECONDS KEY...

Publishes RATE events a second to one key after the other. Each event's id begins with the time of its publication, in
nanoseconds since 1970. At the end it prints one line of JSON: the number of events, the longest delay, and its own CPU
seconds.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

from tests.raw_amqp import frame, handshake, short_string

PAUSE_SECONDS = 0.002


def connect(port: int, vhost: str) -> socket.socket:
    """A connection with channel 1 open and no heartbeats."""
    broker = socket.create_connection(("127.0.0.1", port))
    broker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def answer() -> None:
        head = broker.recv(7, socket.MSG_WAITALL)
        broker.recv(struct.unpack(">BHI", head)[2] + 1, socket.MSG_WAITALL)

    for request in handshake(vhost):
        broker.sendall(request)
        answer()
    return broker


def message(key: str, number: int) -> bytes:
    """The frames of one event: a CloudEvent of about 330 bytes, like a worker's progress event."""
    body = (
        f'{{"specversion":"1.0","id":"{time.time_ns()}-{number}","source":"/bench/worker-7","type":"job.progress",'
        '"time":"2026-11-23T10:15:42.123Z","datacontenttype":"application/json","data":{"job_id":"render-2026-11-23-0815",'
        '"percent":42.5,"message":"Rendering page 17 of 40: compressing the images of the appendix"}}'
    ).encode()
    publish = struct.pack(">HHH", 60, 40, 0) + short_string(b"events") + short_string(key.encode()) + b"\0"
    header = struct.pack(">HHQH", 60, 0, len(body), 0)
    return frame(1, 1, publish) + frame(2, 1, header) + frame(3, 1, body)


def close(broker: socket.socket) -> None:
    """Returns when all written messages are routed: RabbitMQ answers the close of a channel only then."""
    broker.sendall(frame(1, 1, struct.pack(">HHH", 20, 40, 0) + b"\0" + struct.pack(">HH", 0, 0)))
    broker.recv(12, socket.MSG_WAITALL)
    broker.close()


def main() -> None:
    port, vhost, rate, seconds, *keys = sys.argv[1:]
    broker = connect(int(port), vhost)
    began = time.monotonic()
    total = round(float(rate) * float(seconds))
    sent = 0
    late = 0.0
    while sent < total:
        now = time.monotonic()
        due = min(total, int((now - began) * float(rate)) + 1)
        if due > sent:
            broker.sendall(b"".join(message(keys[number % len(keys)], number) for number in range(sent, due)))
            # This grows only if the broker accepts too little, or if this process gets too little CPU time.
            late = max(late, time.monotonic() - began - due / float(rate))
            sent = due
        time.sleep(PAUSE_SECONDS)
    close(broker)
    print(json.dumps({"sent": sent, "late_seconds": round(late, 3), "cpu_seconds": time.process_time()}), flush=True)


if __name__ == "__main__":
    main()
