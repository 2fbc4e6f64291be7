"""The clients of a benchmark, in a process of its own: many streams with one epoll. It reads each chunk only once.

It takes commands as lines of JSON on its standard input and answers each with one line:

    {"do": "open", "port": 8080, "clients": [["GET /events?user=1 HTTP/1.1...", "live"], ...], "ready": "bridge.ready"}
        opens one stream for each request, all at once; answers when each is ready or has ended, with the number of
        those that ended before they were ready
    {"do": "reset"}                counts events from here on
    {"do": "report"}               how many events arrived, how late, and how many arrived twice
    {"do": "close", "group": "x"}  ends the streams of a group, and answers with the cursor of each

An event is identified by its id, `<nanoseconds since 1970>-<number>`, as tests.bench.publish writes it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import sys
import time
from array import array
from collections import Counter
from typing import Any

_ID = re.compile(rb'"id":"(\d{19})-(\d+)"')
_ID_CHARS = 48
_CURSOR = re.compile(rb"(?:^|\n)id: ([^\n]+)\n")


class Client:
    __slots__ = ("cursor", "group", "last_byte_at", "longest_silence", "name", "ready", "sock", "tail")

    def __init__(self, sock: socket.socket, name: str, group: str) -> None:
        self.sock = sock
        self.name = name
        self.group = group
        self.ready = False
        self.tail = b""
        self.cursor = ""
        self.last_byte_at = 0.0
        self.longest_silence = 0.0


class Load:
    def __init__(self) -> None:
        self._poll = select.epoll()
        self._poll.register(0, select.EPOLLIN)
        self._clients: dict[int, Client] = {}
        self._ready = b""
        self._waiting = 0
        self._asked_at = 0.0
        self._refused = 0
        self._input = b""
        self._reset()

    def _reset(self) -> None:
        self._latencies: dict[str, array[float]] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        self._first: dict[str, float] = {}
        self._cpu_before = time.process_time()
        self._began = time.monotonic()
        for client in self._clients.values():
            client.longest_silence = 0.0
            client.last_byte_at = self._began

    def run(self) -> None:
        while True:
            for number, mask in self._poll.poll():
                if number == 0:
                    if not self._command():
                        return
                elif mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    self._read(self._clients[number])

    def _command(self) -> bool:
        chunk = os.read(0, 1 << 20)
        if not chunk:
            return False
        *lines, self._input = (self._input + chunk).split(b"\n")
        for line in lines:
            command = json.loads(line)
            getattr(self, "do_" + command.pop("do"))(**command)
        return True

    @staticmethod
    def _answer(**values: Any) -> None:
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    def do_open(self, port: int, clients: list[list[str]], ready: str) -> None:
        self._ready = ready.encode()
        self._asked_at = time.monotonic()
        self._waiting = len(clients)
        self._refused = 0
        for name, group, request in clients:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            sock.connect(("127.0.0.1", port))
            sock.setblocking(False)
            sock.send(request.encode())
            client = Client(sock, name, group)
            self._clients[sock.fileno()] = client
            self._poll.register(sock.fileno(), select.EPOLLIN)

    def do_reset(self) -> None:
        self._reset()
        self._answer()

    def do_report(self) -> None:
        groups = {}
        for group, latencies in self._latencies.items():
            if not latencies:
                continue
            ordered = sorted(latencies)
            groups[group] = {
                "events": len(ordered),
                "p50_ms": ordered[len(ordered) // 2],
                "p99_ms": ordered[len(ordered) * 99 // 100],
                "max_ms": ordered[-1],
            }
        now = time.monotonic()
        silences = [max(c.longest_silence, now - c.last_byte_at) for c in self._clients.values() if c.ready]
        self._answer(
            groups=groups,
            twice=sum(count - 1 for count in self._seen.values()),
            longest_silence=max(silences, default=0.0),
            cpu_seconds=time.process_time() - self._cpu_before,
            distinct=len(self._seen),
        )

    def do_first(self, since_ns: int) -> None:
        """For each client, the seconds from `since_ns` until it got its first event that was published later."""
        self._answer(first={name: at - since_ns / 1e9 for name, at in self._first.items()})

    def do_since(self, since_ns: int) -> None:
        self._since = since_ns
        self._first = {}
        self._answer()

    _since = 0

    def do_close(self, group: str) -> None:
        ended = [client for client in self._clients.values() if client.group == group]
        for client in ended:
            self._end(client)
        self._answer(cursors={client.name: client.cursor for client in ended})

    def _end(self, client: Client) -> None:
        number = client.sock.fileno()
        self._poll.unregister(number)
        del self._clients[number]
        client.sock.close()

    def _count_ready_or_ended(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self._answer(refused=self._refused, seconds=time.monotonic() - self._asked_at)

    def _read(self, client: Client) -> None:
        try:
            chunk = client.sock.recv(262_144)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            chunk = b""
        if not chunk:
            self._end(client)
            if not client.ready:
                self._refused += 1
                self._count_ready_or_ended()
            return
        now = time.monotonic()
        client.longest_silence = max(client.longest_silence, now - client.last_byte_at)
        client.last_byte_at = now
        data = client.tail + chunk
        if not client.ready:
            if self._ready not in data:
                client.tail = data
                return
            client.ready = True
            self._count_ready_or_ended()
        end = 0
        wall = time.time_ns()
        latencies = self._latencies.get(client.group)
        if latencies is None:
            latencies = self._latencies[client.group] = array("d")
        for match in _ID.finditer(data):
            published = int(match[1])
            latencies.append((wall - published) / 1e6)
            self._seen[client.name, int(match[2])] += 1
            end = match.end()
            if self._since and published >= self._since and client.name not in self._first:
                self._first[client.name] = wall / 1e9
        for cursor in _CURSOR.finditer(data):
            client.cursor = cursor[1].decode()
        client.tail = data[max(end, len(data) - _ID_CHARS) :]


if __name__ == "__main__":
    Load().run()
