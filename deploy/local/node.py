"""A private RabbitMQ node: its own port, data folder, cookie and epmd, on loopback only, from the installed package.

For the demo and the tests. It never touches another RabbitMQ of the machine, works as root and as any other user, and
leaves no process behind. `make` installs the package where it is missing (deploy/local/ensure).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Installation:
    """
    Args:
        home: RabbitMQ's folder. The scripts in its `bin` are used: those in /usr/sbin change the
            user and the home folder.
        root: a folder with another Debian in it. Its RabbitMQ is used instead of the machine's
            (`deploy/local/ensure rabbitmq4` makes one). Needs root: the folder is entered by
            chroot, in a mount namespace of its own.
    """

    home: Path = Path("/usr/lib/rabbitmq")
    root: Path | None = None

    @property
    def version(self) -> str:
        """The version of the package, without running it; "unknown" if none is installed."""
        outside = (self.root or Path("/")) / self.home.relative_to("/")
        found = sorted(path.name for path in outside.glob("lib/rabbitmq_server-*"))
        return found[-1].rpartition("-")[2] if found else "unknown"

    @property
    def server(self) -> Path:
        return (self.root or Path("/")) / self.home.relative_to("/") / "bin" / "rabbitmq-server"


MACHINES = Installation(
    Path(os.environ.get("RABBITMQ_HOME", "/usr/lib/rabbitmq")),
    Path(os.environ["RABBITMQ_ROOT"]) if os.environ.get("RABBITMQ_ROOT") else None,
)
"""This machine's RabbitMQ, unless RABBITMQ_HOME or RABBITMQ_ROOT names another."""

_ENTER = """
set -e
mount -t tmpfs tmpfs "$1/tmp"  # Several nodes share the folder, so leave no mount point in it.
mkdir -p "$1$2" && mount --bind "$2" "$1$2"
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev"
root=$1; folder=$2; shift 2
exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$folder" "$@"
"""

START_SECONDS = 300
"""A node starts in four seconds. A busy machine needs many times that."""

FIRST_PORT = 10_000
"""`free_ports` begins here, above the default ports of RabbitMQ and other servers."""


class NodeFailed(Exception):
    """A command of the node failed; the text has the end of its log."""


def free_ports(count: int) -> list[int]:
    """Ports that no program uses. Another program may take one before the caller does; then the start fails.

    Where possible, they are outside the range that the system gives to outgoing connections: tests open thousands.
    """
    choice = _first_given_out() - FIRST_PORT
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", FIRST_PORT + secrets.randbelow(choice) if choice >= 1_000 else 0))
                ports.append(probe.getsockname()[1])
        return ports


def _first_given_out() -> int:
    """The first port that Linux gives to outgoing connections (ip(7), ip_local_port_range); 0 if it is not known."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return 0


class Node:
    """
    Args:
        folder: for data, logs and configuration; made if missing. Another `Node` on the same folder is the same node.
        management: whether to run the management plugin too, for its HTTP API.
        peer: a node whose cluster this node can join, by `join`.
        rabbitmq: which RabbitMQ to run.
    """

    def __init__(
        self, folder: Path, *, management: bool = False, peer: Node | None = None, rabbitmq: Installation = MACHINES
    ) -> None:
        self.folder = folder
        self.rabbitmq = rabbitmq
        self.port, self.management_port, self._dist_port, self._epmd_port = free_ports(4)
        self.name = f"bridge-{secrets.token_hex(4)}@localhost"
        self._pid_file = folder / "pid"
        folder.mkdir(parents=True, exist_ok=True)
        cookie = folder / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text((peer.folder / ".erlang.cookie").read_text() if peer else secrets.token_hex(16))
            cookie.chmod(0o400)
        if peer is not None:
            self._epmd_port = peer._epmd_port
        (folder / "env.conf").write_text("")
        (folder / "plugins").write_text("[rabbitmq_management].\n" if management else "[].\n")
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            "log.file.level = info",
            # Other programs use the machine's memory and disk too, and must not cause an alarm of this node.
            "vm_memory_high_watermark.absolute = 2GB",
            "disk_free_limit.absolute = 50MB",
        ]
        if management:  # By default the plugin listens on every address.
            lines += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self.management_port}"]
        (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def _environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": folder,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/env.conf",
            "RABBITMQ_PID_FILE": str(self._pid_file),
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{folder}/generated",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _command(self, program: str, *args: str) -> list[str]:
        command = [str(self.rabbitmq.home / "bin" / program), *args]
        if self.rabbitmq.root is None:
            return command
        own_mounts = ["unshare", "--mount", "--propagation", "private"]
        return [*own_mounts, "/bin/sh", "-c", _ENTER, "sh", str(self.rabbitmq.root), str(self.folder), *command]

    def _run(self, program: str, *args: str, timeout: float = START_SECONDS) -> str:
        done = subprocess.run(
            self._command(program, *args),
            env=self._environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise NodeFailed(
                f"{program} {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}{self.log_end()}"
            )
        return done.stdout

    def log_end(self) -> str:
        """The last 2,000 bytes of each of the node's logs."""
        logs = sorted((self.folder / "log").glob("*.log"))
        return "".join(log.read_text(errors="replace")[-2000:] for log in logs)

    def ctl(self, *args: str) -> str:
        """Runs `rabbitmqctl` against this node and returns what it prints."""
        return self._run("rabbitmqctl", "-q", *args)

    def flush(self) -> None:
        """Writes the list of streams to disk. A RabbitMQ 3.10 that is killed before that never finds them again.

        RabbitMQ writes the list by itself up to half a second after a declaration (dets tables, auto_save).
        """
        self.ctl("eval", "[ok = dets:sync(Table) || Table <- dets:all()].")

    def start(self) -> None:
        """Returns when the node accepts connections. After `kill` it starts on the same port, with its data."""
        if not self.rabbitmq.server.exists():
            raise NodeFailed(f"{self.rabbitmq.server} is missing: run deploy/local/ensure rabbitmq (or rabbitmq4)")
        self._pid_file.unlink(missing_ok=True)
        # In its own session: Ctrl-C in the terminal reaches only the demo, which then stops the node in order.
        subprocess.run(
            self._command("rabbitmq-server", "-detached"),
            env=self._environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            timeout=START_SECONDS,
            check=True,
        )
        self.ctl("wait", "--timeout", str(START_SECONDS), str(self._pid_file))

    def join(self, peer: Node) -> None:
        """Adds this running node to the cluster of its peer. Its own data is lost."""
        self.ctl("stop_app")
        self.ctl("join_cluster", peer.name)
        self.ctl("start_app")

    @property
    def pid(self) -> int:
        return int(self._pid_file.read_text())

    def kill(self) -> None:
        """kill -9, like a crash of the machine. Returns when the process is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        _wait_gone(pid)

    def remove(self) -> None:
        """Kills the node if it runs, ends its epmd, which would outlive it, and deletes its folder."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            self.kill()
        for pid in _epmds(self._epmd_port):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # A zombie: dead, and its parent has not read the exit code yet.
            return
        time.sleep(0.01)
    raise NodeFailed(f"process {pid} does not die")


def _epmds(port: int) -> list[int]:
    """Processes named epmd with this port in their environment. Only this node has this port."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == "epmd":
                environment = (entry / "environ").read_bytes().split(b"\0")
                if f"ERL_EPMD_PORT={port}".encode() in environment:
                    found.append(int(entry.name))
    return found
