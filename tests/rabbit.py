"""A real RabbitMQ for the tests: one private node per run, a new virtual host per test, and its management API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aio_pika
import aiormq
import httpx

from deploy.local.node import MACHINES, Installation, Node, NodeFailed
from tests.patience import PATIENCE


@contextlib.contextmanager
def ignore_deleted_queue() -> Iterator[None]:
    """Ends the block without an error if a live queue is deleted while a message is on its way to it.

    RabbitMQ nacks such messages, several with one frame, or (4.3) closes the connection with 506. The caller connects
    and sends them again. The other queues may have them already; with the same id it is the same event.
    """
    try:
        yield
    except (aio_pika.exceptions.DeliveryError, aiormq.exceptions.ConnectionResourceError):
        pass
    except asyncio.CancelledError:
        # aiormq also raises this for a lost connection, in a task that was not cancelled.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise


class Vhost:
    """One virtual host, and what an operator can see and do there."""

    def __init__(self, node: Node, *, port: int | None = None) -> None:
        self.node = node
        self.name = f"test-{secrets.token_hex(4)}"
        self.port = port or node.port
        self._api = httpx.Client(
            base_url=f"http://127.0.0.1:{node.management_port}/api/", auth=("guest", "guest"), timeout=PATIENCE
        )

    @property
    def url(self) -> str:
        return self.url_at(self.port)

    def url_at(self, port: int, *, user: str = "guest", password: str = "guest") -> str:
        return f"amqp://{user}:{password}@127.0.0.1:{port}/{self.name}"

    def _call(self, method: str, path: str, **body: Any) -> Any:
        try:
            response = self._api.request(method, path, json=body or None)
        except (httpx.RemoteProtocolError, httpx.NetworkError):
            # RabbitMQ closes a connection that was idle for a minute, also when the next request is on its way. Each
            # of these requests may be made twice.
            response = self._api.request(method, path, json=body or None)
        if response.status_code != 404:
            response.raise_for_status()
        return response.json() if response.content and response.status_code == 200 else None

    def create(self) -> None:
        self._call("PUT", f"vhosts/{self.name}")
        self.grant("guest")

    def delete(self) -> None:
        self._call("DELETE", f"vhosts/{self.name}")
        self.close()

    def close(self) -> None:
        self._api.close()

    def grant(self, user: str, *, configure: str = ".*", write: str = ".*", read: str = ".*") -> None:
        self._call("PUT", f"permissions/{self.name}/{user}", configure=configure, write=write, read=read)

    def revoke(self, user: str) -> None:
        self._call("DELETE", f"permissions/{self.name}/{user}")

    def add_user(self, user: str) -> None:
        self._call("PUT", f"users/{user}", password="secret-" + user, tags="")

    def import_definitions(self, text: str) -> None:
        self._call("POST", "definitions", **json.loads(text))

    def delete_user(self, user: str) -> None:
        self._call("DELETE", f"users/{user}")

    def queues(self) -> list[str]:
        """Without the control stream, which every bridge declares."""
        return [name for name in self.all_queues() if name != "bridge.control"]

    def all_queues(self) -> list[str]:
        return [queue["name"] for queue in self._call("GET", f"queues/{self.name}?columns=name")]

    def count(self, queue: str) -> int:
        """Messages in a queue, as of RabbitMQ's last statistics."""
        found = self._call("GET", f"queues/{self.name}/{queue}?columns=messages") or {}
        return int(found.get("messages", 0))

    def live_queues(self) -> list[str]:
        return [name for name in self.queues() if name.startswith("bridge.live.")]

    def bindings(self, *, exchange: str = "events") -> list[tuple[str, str]]:
        """Queue and binding key of each binding of the exchange."""
        found = self._call("GET", f"exchanges/{self.name}/{exchange}/bindings/source")
        return sorted((binding["destination"], binding["routing_key"]) for binding in found or [])

    def delete_queue(self, name: str) -> None:
        """Also an exclusive one, which the management API does not delete."""
        self.node.ctl("delete_queue", "--vhost", self.name, name)

    def delete_bound_queue(self, key: str) -> None:
        """Deletes the queue that is bound with this key. If the machine stood still, the bridge may have lost its
        connection, and have made another queue between the two commands."""
        deadline = time.monotonic() + PATIENCE
        while True:
            names = {name for name, bound in self.bindings() if bound == key}
            try:
                if names:
                    self.delete_queue(names.pop())
                    return
            except NodeFailed:
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, f"no queue is bound with {key}"
            time.sleep(0.1)  # Between two looks.

    def wait_for_log(self, node: Node, replicas: int, *, seconds: float = PATIENCE) -> None:
        """Waits until so many replicas of the log run, as `node` sees it. A restarted node has none at first."""
        deadline = time.monotonic() + seconds
        while True:
            listed = json.loads(node.ctl("list_queues", "-p", self.name, "name", "online", "--formatter", "json"))
            online = next(len(queue["online"]) for queue in listed if queue["name"] == "events.log")
            if online >= replicas:
                return
            assert time.monotonic() < deadline, f"{online} of {replicas} replicas of the log run"
            time.sleep(0.5)  # RabbitMQ's command line can only be polled.

    def add_exchange(self, name: str) -> None:
        self._call("PUT", f"exchanges/{self.name}/{name}", type="topic", durable=True)

    def add_everything(self) -> None:
        """Declares the exchange, and a queue that gets everything that is published there."""
        self.add_exchange("events")
        self._call("PUT", f"queues/{self.name}/everything", durable=True)
        self._call("POST", f"bindings/{self.name}/e/events/q/everything", routing_key="#")

    def set_policy(self, name: str, **definition: Any) -> None:
        """Sets a policy for every queue of the virtual host, as an operator's pattern `.*` does."""
        body = {"pattern": ".*", "definition": definition, "apply-to": "queues"}
        self._call("PUT", f"policies/{self.name}/{name}", **body)

    def delete_exchange(self, name: str) -> None:
        self._call("DELETE", f"exchanges/{self.name}/{name}")

    def close_connections(self, *, named: str = "") -> int:
        """Closes connections, as an operator's "force close" does; returns how many.

        Args:
            named: only connections whose name, as their client gave it, contains this.
        """
        names = [
            found["name"]
            for found in self._call("GET", f"vhosts/{self.name}/connections") or []
            if named in found.get("user_provided_name", "")
        ]
        for name in names:
            self._call("DELETE", f"connections/{quote(name, safe='')}")
        return len(names)

    def cut_off(self, *, seconds: float = PATIENCE) -> list[str]:
        """Waits until all publishers' connections have ended. Returns the names of those that ended without a close."""
        ends = r"([\d.:]+ -> [\d.:]+) - (publisher [^,)\n]*)"
        deadline = time.monotonic() + seconds
        while True:
            log = "\n".join(path.read_text() for path in (self.node.folder / "log").glob("*.log"))
            opened = re.findall(rf"{ends}\)?: user .* granted access to vhost '{self.name}'", log)
            # For a connection that ended without a close, the entry has two lines: the connection, and what happened.
            found = re.findall(rf"closing AMQP .*?{ends}, vhost: '{self.name}'.*\)(:\n.* client unexpectedly)?", log)
            if opened and len(found) >= len(opened):  # RabbitMQ writes its log a moment later.
                return [name for _, name, cut in found if cut]
            assert time.monotonic() < deadline, f"{len(opened)} connections, {len(found)} of them have ended"
            time.sleep(0.05)  # A file can only be polled.

    async def publish(self, key: str, body: bytes | dict[str, Any], *, exchange: str = "events") -> None:
        """Publishes with aio-pika alone, as a worker in another language would: no code of the bridge's."""
        await self.publish_all([(key, body)], exchange=exchange)

    async def publish_all(
        self, messages: list[tuple[str, bytes | dict[str, Any]]], *, exchange: str = "events"
    ) -> None:
        waiting = deque(messages)
        async with asyncio.timeout(PATIENCE):
            while waiting:
                with ignore_deleted_queue():
                    await self._publish_some(waiting, exchange)

    async def _publish_some(self, waiting: deque[tuple[str, bytes | dict[str, Any]]], exchange: str) -> None:
        """Publishes what is in `waiting`, and removes from it what is confirmed."""
        connection = await aio_pika.connect(self.url_at(self.node.port))
        async with connection:
            channel = await connection.channel()
            target = await channel.get_exchange(exchange, ensure=False)
            while waiting:
                key, body = waiting[0]
                raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                await target.publish(aio_pika.Message(raw), key, mandatory=False)
                waiting.popleft()

    async def take(self, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
        """Takes all messages out of a queue."""
        connection = await aio_pika.connect(self.url_at(self.node.port))
        found = []
        async with connection:
            channel = await connection.channel()
            declared = await channel.get_queue(queue, ensure=False)
            while (message := await declared.get(fail=False)) is not None:
                await message.ack()
                found.append(message)
        return found


FURTHER = os.environ.get("SUITE_RABBITMQ_ROOT")
"""A folder with a second RabbitMQ (see `Installation.root`), which the tests run on as well. `make test` sets it; empty
where it could not be made."""

INSTALLATIONS = [MACHINES, *([Installation(root=Path(FURTHER))] if FURTHER else [])]


def cloudevent(event_id: str, event_type: str = "job.completed", **data: Any) -> dict[str, Any]:
    """An event as any program might write it."""
    if event_type == "job.completed":
        data = {"job_id": "r-7", "duration_seconds": 3.2, **data}
    return {"specversion": "1.0", "id": event_id, "source": "/test", "type": event_type, "data": data}
