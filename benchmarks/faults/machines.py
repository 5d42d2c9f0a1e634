"""A private Ray cluster of several nodes on this machine, and the processes that a drill may kill in it.

Nodes are `ray start --block` commands on loopback addresses of their own. Everything here is found below these commands:
no other Ray of this machine is seen, and none is touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.cluster import ENVIRONMENT
from pipeline.errors import UserError

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
START_SECONDS, STARTS = 60, 4
STORE_BYTES = 150_000_000
"""Object store of one node."""


class DrillError(UserError, RuntimeError):
    """A drill could not be set up, or did not go as it has to."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def family(process: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        root = psutil.Process(process)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, to all at once."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@dataclass(slots=True)
class Node:
    """One `ray start --block`."""

    address: str
    command: subprocess.Popen

    def find(self, title: str) -> list[psutil.Process]:
        """Its processes whose command line holds `title`."""
        found = []
        for process in family(self.command.pid):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """As a machine that loses power."""
        kill(family(self.command.pid))
        self.command.wait()

    def stop(self) -> None:
        """As a machine that is shut down."""
        members = family(self.command.pid)
        self.command.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.command.wait(15)
        kill([member for member in members if member.is_running()])


@dataclass(slots=True)
class Machines:
    """A head without CPUs, and worker nodes."""

    folder: Path
    cpus: int  # of each worker node
    takes_jobs: bool  # has a job server: ten more processes
    environment: dict[str, str] = field(default_factory=dict)  # of the nodes
    drivers: dict[str, str] = field(default_factory=dict)  # of a driver
    jobs: dict[str, str] = field(default_factory=dict)  # of `ray job submit`
    nodes: list[Node] = field(default_factory=list)  # the head first
    _port: int = 0
    _sockets: Path | None = None

    def start(self, workers: int) -> None:
        """The head and `workers` nodes."""
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self._port, dashboard = free_port(), free_port()
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **own,
            **ENVIRONMENT,
            "PATH": f"{BIN}{os.pathsep}{own['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A node that is gone is noticed after 3 s instead of 15.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),  # a busy machine is no fault
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        head = ["--head", f"--port={self._port}", "--num-cpus=0", f"--ray-client-server-port={free_port()}"]
        head += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        head += [f"--include-dashboard={str(self.takes_jobs).lower()}"]
        self._sockets = Path(tempfile.mkdtemp(prefix="drill-"))  # their paths have to be short
        self._launch("127.0.0.1", [*head, f"--temp-dir={self._sockets}"])
        for _ in range(workers):
            self.add()
        self.jobs = self.environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        self.drivers = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self._port}"}

    def add(self) -> Node:
        """One more worker node."""
        address = f"127.0.0.{len(self.nodes) + 1}"
        return self._launch(address, [f"--address=127.0.0.1:{self._port}", f"--num-cpus={self.cpus}"])

    def find(self, title: str) -> list[psutil.Process]:
        """Processes of all nodes whose command line holds `title`."""
        return [process for node in self.nodes if node.command.poll() is None for process in node.find(title)]

    def holding(self, title: str) -> Node:
        """The first node that has such a process."""
        return next(node for node in self.nodes if node.command.poll() is None and node.find(title))

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.command.poll() is None:
                node.stop()
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _launch(self, address: str, arguments: list[str]) -> Node:
        """Start a node and wait for it: nodes of one machine that start at once were seen to abort over files they share.

        A node waits for its agents for some seconds and aborts; where the machine is that busy, another try may succeed.
        """
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={address}", *arguments]
        # Ports of their own, or the nodes of one machine take each other's.
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command += [f"--object-store-memory={STORE_BYTES}"]
        log = self.folder / f"node-{len(self.nodes)}.log"
        for _ in range(STARTS):
            with log.open("w") as said:
                process = subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    start_new_session=True,
                )
            node = Node(address, process)
            if _started(node, log):
                self.nodes.append(node)
                return node
            node.kill()
        raise DrillError(f"a node of Ray did not start; see {log}")


def _started(node: Node, log: Path) -> bool:
    """Wait until it has, or given up."""
    until = time.monotonic() + 2 * START_SECONDS
    while time.monotonic() < until and node.command.poll() is None:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return True
        time.sleep(0.1)
    return False


@contextmanager
def machines(folder: Path, takes_jobs: bool, workers: int = 2, cpus: int = 2) -> Iterator[Machines]:
    """A cluster for the block."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Machines(folder, cpus, takes_jobs)
    try:
        made.start(workers)
        yield made
    finally:
        made.stop()
