"""Real proxies on loopback, each with its configuration from deploy/proxies.

A test replaces only what it must, by exact text: addresses, paths, and the idle limit, so that the test is short. If a
text is no longer in the file, the test fails. So the tested configuration is the shipped one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import httpx

from deploy.local.node import free_ports
from tests import certificate
from tests.patience import PATIENCE
from tests.service import Service

SHIPPED = Path(__file__).parents[2] / "deploy" / "proxies"

BRIDGE_HOSTS = ("127.0.0.11", "127.0.0.12")
"""An address for each bridge: the proxies ask for the readiness of all of them on the same port."""

START_SECONDS = PATIENCE


def make_certificate(folder: Path) -> None:
    """`events.crt` and `events.key` for localhost, and HAProxy's `events.pem`, which is both."""
    public, private = certificate.make()
    (folder / "events.crt").write_bytes(public)
    (folder / "events.key").write_bytes(private)
    (folder / "events.pem").write_bytes(public + private)


def shipped(name: str, changes: dict[str, str]) -> str:
    text = (SHIPPED / name).read_text()
    for old, new in changes.items():
        assert old in text, f"deploy/proxies/{name} has no {old!r}"
        text = text.replace(old, new)
    return text


def program(name: str) -> str:
    """A program of the virtual environment, or of the machine. A missing one fails the suite; it does not skip."""
    found = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    )
    assert found is not None, f"{name} is missing: deploy/local/ensure proxies, and make for those from PyPI"
    return found


class Edge:
    """One proxy in front of two bridges. The classes below have the configuration of each proxy, and how it reloads.

    Args:
        folder: for its configuration, certificate and logs.
        bridges: the bridges behind it.
        idle_seconds: its limit for a stream without any bytes.
    """

    name = ""
    has_idle_limit = True
    limited: tuple[tuple[str, str], ...] = ()
    """Texts of its rate limit, each with a replacement for a test: five streams at once, and then nearly none."""
    answers_without_bridges = True
    """Whether it answers an EventSource by itself when no bridge is up."""
    reload_signal = signal.SIGHUP

    def __init__(self, folder: Path, bridges: list[Service], idle_seconds: float) -> None:
        self.folder = folder
        self.idle_seconds = idle_seconds
        (self.port,) = free_ports(1)
        self.url = f"https://localhost:{self.port}"
        first, second = (bridge.public.removeprefix("http://") for bridge in bridges)
        self._upstream = {"bridge-1:8080": first, "bridge-2:8080": second}
        self._hosts = [address.rpartition(":")[0] for address in (first, second)]
        self._ports = [address.rpartition(":")[2] for address in (first, second)]
        (self._internal,) = {bridge.internal.rpartition(":")[2] for bridge in bridges}
        self._idle = f"{idle_seconds * 1000:.0f}ms"
        self._files = {name: str(folder / name) for name in ("events.crt", "events.key", "events.pem")}
        self._processes: list[asyncio.subprocess.Process] = []
        self.limits: dict[str, str] = {}
        """Replacements of the shipped rate limit."""
        make_certificate(folder)

    def trust(self) -> ssl.SSLContext:
        """A new context each time: httpx changes the context that it gets for HTTP/2."""
        return ssl.create_default_context(cafile=self.folder / "events.crt")

    def _certificate(self, *names: str) -> dict[str, str]:
        return {f"/etc/ssl/{name}": self._files[name] for name in names}

    def configure(self) -> list[str]:
        """Writes its configuration, and returns the command that runs it in the foreground."""
        return []

    async def __aenter__(self) -> Edge:
        await self._run(self.configure())
        async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(verify=self.trust()) as client:
            while True:
                assert self._processes[-1].returncode is None, self.logs()
                # Wait for an answer of a bridge: Traefik listens before it knows its routes.
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/schemas")).status_code == 200:
                        return self
                await asyncio.sleep(0.02)  # Between two polls.

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            # Each has its own session, so that its workers end with it, old ones too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _run(self, command: list[str]) -> asyncio.subprocess.Process:
        with (self.folder / f"output-{len(self._processes)}.log").open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.folder,
                # Traefik and Caddy write into the home folder.
                env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def logs(self) -> str:
        """All its logs: access, errors, output."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    async def logged(self, text: str) -> None:
        async with asyncio.timeout(START_SECONDS):
            while text not in self.logs():  # noqa: ASYNC110 - a file can only be polled.
                await asyncio.sleep(0.02)  # Between two polls.

    def _workers(self) -> set[str]:
        pid = self._processes[0].pid
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    async def reload(self) -> None:
        """Reloads as an operator does; returns once the new configuration is in use."""
        before = self._workers()
        self._processes[0].send_signal(self.reload_signal)
        async with asyncio.timeout(START_SECONDS):
            while self._workers() <= before:  # noqa: ASYNC110 - /proc can only be polled.
                await asyncio.sleep(0.02)  # Between two polls.


class Nginx(Edge):
    name = "nginx"
    limited = (("rate=5r/s", "rate=1r/m"), ("burst=100", "burst=4"))

    def configure(self) -> list[str]:
        text = shipped(
            "nginx.conf",
            {
                **self._upstream,
                **self.limits,
                **self._certificate("events.crt", "events.key"),
                "listen 443 ssl http2;": f"listen 127.0.0.1:{self.port} ssl http2;",
                "/run/nginx.pid": f"{self.folder}/nginx.pid",
                "/var/log/nginx/": f"{self.folder}/",
                "proxy_read_timeout 60s;": f"proxy_read_timeout {self._idle};",
                # The folders that are compiled in belong to root.
                "\nhttp {\n": "\nhttp {\n"
                + "".join(
                    f"    {kind}_temp_path {self.folder}/{kind};\n"
                    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
                ),
                # Without root, a process cannot raise its limit above the machine's.
                "worker_rlimit_nofile 65536;": "",
                "worker_connections 32768;": "worker_connections 512;",
            },
        )
        (self.folder / "nginx.conf").write_text(text)
        start = ["-p", str(self.folder), "-e", "error.log", "-c", str(self.folder / "nginx.conf")]
        return [program("nginx"), *start, "-g", "daemon off;"]


class Haproxy(Edge):
    name = "haproxy"
    limited = (("gt 150 }", "gt 5 }"), ("http_req_rate(10s)\n", "http_req_rate(1h)\n"), ("expire 30s", "expire 1h"))
    reload_signal = signal.SIGUSR2

    def configure(self) -> list[str]:
        text = shipped(
            "haproxy.cfg",
            {
                **self._upstream,
                **self.limits,
                **self._certificate("events.pem"),
                "bind :443 ": f"bind 127.0.0.1:{self.port} ",
                # The machine may not allow so many.
                "maxconn 20000": "maxconn 500",
                "check port 9090": f"check port {self._internal}",
                "timeout client 60s": f"timeout client {self._idle}",
                "timeout server 60s": f"timeout server {self._idle}",
            },
        )
        (self.folder / "haproxy.cfg").write_text(text)
        return [program("haproxy"), "-W", "-f", str(self.folder / "haproxy.cfg")]


class Caddy(Edge):
    name = "caddy"

    def configure(self) -> list[str]:
        (admin,) = free_ports(1)
        text = shipped(
            "Caddyfile",
            {
                **self._upstream,
                **self._certificate("events.crt", "events.key"),
                "admin localhost:2019": f"admin 127.0.0.1:{admin}\n\tauto_https disable_redirects",
                "https://events.example.com {": f"{self.url} {{\n\tbind 127.0.0.1",
                "health_port 9090": f"health_port {self._internal}",
                "read_timeout 60s": f"read_timeout {self._idle}",
            },
        )
        (self.folder / "Caddyfile").write_text(text)
        return [program("caddy"), "run", "--config", str(self.folder / "Caddyfile")]

    async def reload(self) -> None:
        # Forced: without it, Caddy ignores a file that has not changed.
        command = ["reload", "--force", "--config", str(self.folder / "Caddyfile")]
        reloading = await self._run([program("caddy"), *command])
        async with asyncio.timeout(START_SECONDS):
            assert await reloading.wait() == 0, self.logs()


class Envoy(Edge):
    name = "envoy"
    # One token more: the test's first request, which waits for the start, uses one.
    limited = (
        (
            "{max_tokens: 1000, tokens_per_fill: 100, fill_interval: 1s}",
            "{max_tokens: 6, tokens_per_fill: 1, fill_interval: 3600s}",
        ),
    )

    def configure(self) -> list[str]:
        changes = {
            **self.limits,
            **self._certificate("events.crt", "events.key"),
            "{address: 0.0.0.0, port_value: 443}": f"{{address: 127.0.0.1, port_value: {self.port}}}",
            "port_value: 9090": f"port_value: {self._internal}",
            "stream_idle_timeout: 60s": f"stream_idle_timeout: {self.idle_seconds}s",
        }
        for host, port, name in zip(self._hosts, self._ports, ("bridge-1", "bridge-2"), strict=True):
            changes[f"{{address: {name}, port_value: 8080}}"] = f"{{address: {host}, port_value: {port}}}"
        (self.folder / "envoy.yaml").write_text(shipped("envoy.yaml", changes))
        self._base_id = str(secrets.randbelow(2**24))  # Processes with the same id are epochs of the same Envoy.
        self._epoch = 0
        return self._command()

    def _command(self) -> list[str]:
        options = ["--restart-epoch", str(self._epoch), "--drain-time-s", "60", "--parent-shutdown-time-s", "3900"]
        # By default it writes its log every ten seconds.
        own = ["--base-id", self._base_id, "--concurrency", "1", "--file-flush-interval-msec", "50"]
        return [program("envoy"), "-c", str(self.folder / "envoy.yaml"), *options, *own]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await super().__aexit__(kind, error, traceback)
        # The memory that its epochs share: a killed process leaves it behind.
        os.unlink(f"/dev/shm/envoy_shared_memory_{self._base_id}0")

    async def reload(self) -> None:
        self._epoch += 1
        before = self.logs().count("starting main dispatch loop")
        await self._run(self._command())
        async with asyncio.timeout(START_SECONDS):
            while self.logs().count("starting main dispatch loop") <= before:
                assert self._processes[-1].returncode is None, self.logs()
                await asyncio.sleep(0.02)  # Between two polls.


class Traefik(Edge):
    name = "traefik"
    limited = (("{average: 100, burst: 1000}", "{average: 1, period: 1h, burst: 6}"),)
    has_idle_limit = False
    answers_without_bridges = False

    def configure(self) -> list[str]:
        routes = self.folder / "routes" / "traefik-routes.yaml"
        routes.parent.mkdir()
        static = {
            'address: ":443"': f'address: "127.0.0.1:{self.port}"',
            "/etc/traefik/traefik-routes.yaml": str(routes),
            # This is not a limit of a stream's life, as the file says. So a short one must not cut any.
            "readTimeout: 60s": f"readTimeout: {self._idle}",
        }
        (self.folder / "traefik.yaml").write_text(shipped("traefik.yaml", static))
        self._routes = routes
        self._reloads = 0
        self._write_routes()
        return [program("traefik"), f"--configFile={self.folder}/traefik.yaml"]

    def _write_routes(self) -> None:
        names = ["localhost", *(f"reload-{number + 1}" for number in range(self._reloads))]
        changes = {
            **self._upstream,
            **self.limits,
            **self._certificate("events.crt", "events.key"),
            "Host(`events.example.com`)": " || ".join(f"Host(`{name}`)" for name in names),
            "port: 9090": f"port: {self._internal}",
        }
        # Renamed into place, so that Traefik never reads half of the file.
        draft = self.folder / "draft.yaml"
        draft.write_text(shipped("traefik-routes.yaml", changes))
        draft.replace(self._routes)

    async def reload(self) -> None:
        self._reloads += 1
        self._write_routes()
        async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(verify=self.trust()) as client:
            host = {"Host": f"reload-{self._reloads}"}
            while (await client.get(f"{self.url}/events", headers=host)).status_code == 404:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # Between two polls.


EDGES: list[type[Edge]] = [Nginx, Haproxy, Caddy, Envoy, Traefik]
