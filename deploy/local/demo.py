"""`make demo`: RabbitMQ, the bridge, a sample worker and a page, as processes of one terminal. Ctrl-C ends all."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path

from bridge.service.http import auth
from deploy.local.node import Node, NodeFailed, free_ports

USER = "demo"
GROUPS = ("operators",)
PAGE = Path(__file__).parent / "page" / "index.html"
TOKEN_SECONDS = 3600


class DemoFailed(Exception):
    """A process did not start, or ended by itself."""


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def pick_port(preferred: int) -> int:
    """The preferred port, so that the address is the same each time; another port if that one is in use."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return free_ports(1)[0]
    return preferred


@contextlib.contextmanager
def rabbitmq() -> Iterator[str]:
    """The address of a RabbitMQ: the one that the environment names, or a private node while the demo runs."""
    given = os.environ.get("BRIDGE_AMQP_URL")
    if given:
        say("RabbitMQ: yours (BRIDGE_AMQP_URL)")
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix="bridge-demo-"))
    node = Node(folder)
    try:
        say("RabbitMQ: starting a private node (some seconds)")
        node.start()
        yield node.url
    finally:
        node.remove()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def process(name: str, command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    # In its own session: Ctrl-C reaches only the demo, which then ends the other processes in order.
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_ready(child: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise DemoFailed("the bridge did not start; its log lines above give the reason")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise DemoFailed("the bridge is not ready after 60 s; its log lines above give the reason")


@contextlib.contextmanager
def page(port: int, console_url: str, secret: str, state: Path) -> Iterator[None]:
    """Serves a page at /jobs, on its own origin. The token is in a cookie, as an application's login would set it.

    /state.json has the state that an application would read from its database.
    """
    html = PAGE.read_text(encoding="utf-8").replace("__BRIDGE_URL__", console_url).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/state.json":
                body = state.read_bytes() if state.exists() else b'{"jobs": [], "notices": []}'
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)
                return
            if path not in ("/", "/jobs"):
                self.send_error(404)
                return
            cookie = SimpleCookie()
            cookie["bridge_token"] = auth.mint(
                secret, user=USER, groups=GROUPS, ttl_seconds=TOKEN_SECONDS, now=time.time()
            )
            # A cookie belongs to a host, not to a port. So the bridge on another port of localhost gets it too.
            cookie["bridge_token"]["path"] = "/"
            cookie["bridge_token"]["httponly"] = True
            cookie["bridge_token"]["samesite"] = "Lax"
            body = html if path == "/jobs" else b""
            if path == "/":  # As an application's login does: set the cookie, then redirect to the events.
                self.send_response(303)
                self.send_header("Location", console_url)
            else:
                self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Set-Cookie", cookie["bridge_token"].OutputString())
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def run() -> None:
    page_port, public_port, internal_port = pick_port(8000), pick_port(8080), pick_port(9090)
    secret = secrets.token_hex(32)
    page_url = f"http://localhost:{page_port}"
    with contextlib.ExitStack() as stack:
        amqp_url = stack.enter_context(rabbitmq())
        environment = {
            **os.environ,
            "BRIDGE_AMQP_URL": amqp_url,
            "BRIDGE_SCHEMAS": "bridge.samples",
            "BRIDGE_JWT_SECRET": secret,
            "BRIDGE_BIND": f"127.0.0.1:{public_port}",
            "BRIDGE_INTERNAL_BIND": f"127.0.0.1:{internal_port}",
            "BRIDGE_ALLOWED_ORIGINS": page_url,
            "BRIDGE_CONSOLE": "development",
            "BRIDGE_DRAIN_SECONDS": "1",
        }
        python = sys.executable
        bridge = stack.enter_context(process("bridge", [python, "-m", "bridge", "serve"], environment))
        wait_ready(bridge, f"http://127.0.0.1:{internal_port}/readyz")
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bridge-demo-"))) / "state.json"
        work = [python, "-m", "deploy.local.worker", USER, str(state)]
        worker = stack.enter_context(process("worker", work, environment))
        stack.enter_context(page(page_port, f"http://localhost:{public_port}/", secret, state))
        say(f"Open {page_url} (the console)")
        say(f"A sample page of an application: {page_url}/jobs")
        say(f"Metrics: http://127.0.0.1:{internal_port}/metrics")
        say("To publish an event, run this in another terminal:")
        # BRIDGE_AMQP_URL is in the user's environment already, and its password must not be on the screen.
        address = "" if "BRIDGE_AMQP_URL" in os.environ else f"BRIDGE_AMQP_URL={amqp_url} "
        command = (
            f"BRIDGE_SCHEMAS=bridge.samples {python} -m bridge publish --to user:{USER} --type notification --data"
        )
        print(f"      {address}{command} " + """'{"title": "Hello"}'""", flush=True)
        say("Ctrl-C stops everything.")
        asyncio.run(until_signalled({"bridge": bridge, "worker": worker}))
        say("Stopping")


async def until_signalled(children: dict[str, subprocess.Popen[bytes]]) -> None:
    """
    Raises:
        DemoFailed: a process ended by itself.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    waits = {asyncio.create_task(asyncio.to_thread(child.wait)): name for name, child in children.items()}
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait({stopped, *waits}, return_when=asyncio.FIRST_COMPLETED)
    ended = [waits[task] for task in done if task is not stopped]
    for child in children.values():
        child.terminate()  # The threads that wait for the processes must end before this loop can end.
    if ended:
        raise DemoFailed(f"the {ended[0]} ended by itself; its log lines above give the reason")


def main() -> None:
    # A signal before the loop runs must also run every `finally`.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        run()
    except KeyboardInterrupt:
        say("Stopped")
    except (DemoFailed, NodeFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
