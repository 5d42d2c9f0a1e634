"""A Ray cluster of several nodes on this machine, each with processes of its own: to be grown, shrunk and broken.

    with LocalCluster() as cluster:
        node = cluster.add_node(cpus=1)
        subprocess.run([…, "-m", "jobs.train", …], env=cluster.environment)
        node.kill()

The head has no CPUs: work runs on the nodes. Each node is a `ray start --block` on a loopback address of its own, and everything
is found below these commands: no other Ray of this machine is seen, and none is touched. Token authentication is on, with a
token of the cluster's own. When the context is left, all of it is killed by process id.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.errors import UserError

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
HEAD = "127.0.0.1"
STORE_BYTES = 150_000_000
"""Object store of one node."""
START_SECONDS, START_TRIES = 120, 4
RAYLET_SECONDS = 60
"""A node's agents have this long to come up, twice as long as by default: a busy machine is no fault."""
# Ports of its own for whatever else takes a fixed one, or one of a range that all nodes share.
OWN_PORTS = ("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0")


class NodeError(UserError, RuntimeError):
    """A node did not start."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node's processes: those under its `ray start --block`."""

    process: subprocess.Popen

    def processes(self) -> list[psutil.Process]:
        """All of them; none once the command has ended, whose number may by then be another's."""
        return family(self.process.pid) if self.process.poll() is None else []

    def find(self, title: str) -> list[psutil.Process]:
        """Those whose command line holds `title`."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when a machine loses power."""
        kill(self.processes())
        self.process.wait()

    def reclaim(self) -> None:
        """SIGTERM to the node, as a cloud or Kubernetes does: Ray drains it for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S."""
        self.process.send_signal(signal.SIGTERM)


class LocalCluster:
    """A head without CPUs, and nodes that come and go.

    Args:
        environment: extra variables of all its processes, and of what runs on it.
        head: extra variables of the head's processes.
        autoscaling: a cluster configuration for Ray's autoscaler, see `autoscale`.
        port: where the head listens.
        takes_jobs: whether it has a job server: ten more processes.
        logs: keeps what each node printed; else it goes with the cluster.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        head: Mapping[str, str] | None = None,
        autoscaling: Path | None = None,
        port: int | None = None,
        takes_jobs: bool = False,
        logs: Path | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="qalign-"))  # short: paths of sockets are limited
        self._logs = logs or self._folder
        self._logs.mkdir(parents=True, exist_ok=True)
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.port = port or free_port()
        self.address = f"{HEAD}:{self.port}"
        self._dashboard_port = free_port() if takes_jobs else None
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._base = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": f"{RAY.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": str(RAYLET_SECONDS),
            **(environment or {}),
        }
        self.environment = self._base | {"RAY_ADDRESS": self.address}
        """Of a driver that is to run on this cluster."""
        self.job_environment = self._base | {"RAY_ADDRESS": f"http://{HEAD}:{self._dashboard_port}"}
        """Of `ray job submit`, where it takes jobs."""
        self._autoscaling, self._head_environment = autoscaling, head or {}
        self._nodes: list[Node] = []
        # A process connects with one token only, and this one may be connected to another cluster.
        tokens = {key: self.environment[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        spawned = multiprocessing.get_context("spawn")
        self._asker = ProcessPoolExecutor(1, spawned, initializer=_identify, initargs=(tokens,))

    def __enter__(self) -> LocalCluster:
        command = ["--head", f"--port={self.port}", "--num-cpus=0", f"--ray-client-server-port={free_port()}"]
        command += [f"--temp-dir={self._folder}", f"--node-ip-address={HEAD}"]
        if self._dashboard_port is None:
            command.append("--include-dashboard=false")
        else:
            command += [f"--dashboard-host={HEAD}", f"--dashboard-port={self._dashboard_port}"]
        if self._autoscaling is not None:
            command.append(f"--autoscaling-config={self._autoscaling}")
        try:
            self._start(command, self._head_environment, "head")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        kill([process for node in self._nodes for process in node.processes()])
        for node in self._nodes:
            node.process.wait()
        self._asker.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_node(self, cpus: float = 1, **environment: str) -> Node:
        """A new node; returns when it has joined: two that start at once take each other's sockets."""
        number = len(self._nodes)
        own = f"127.0.0.{number + 1}"  # all of 127/8 is this machine
        command = [f"--address={self.address}", f"--num-cpus={cpus:g}", f"--node-ip-address={own}"]
        return self._start(command, environment, f"node{number}")

    def find(self, title: str) -> list[psutil.Process]:
        """Processes of all nodes whose command line holds `title`."""
        return [process for node in self._nodes for process in node.find(title)]

    def holding(self, title: str) -> Node:
        """The first node that has such a process."""
        return next(node for node in self._nodes if node.find(title))

    def alive(self) -> list[str]:
        """The kinds of the nodes that are there, by Ray's own account."""
        return self._asker.submit(_kinds, self.address).result()

    def log(self, name: str = "head") -> str:
        """What a node's processes printed."""
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def _start(self, arguments: list[str], environment: Mapping[str, str], name: str) -> Node:
        """On a busy machine a node may need another try."""
        for _ in range(START_TRIES):
            node = self._try_to_start(arguments, environment, name)
            if node is not None:
                return node
        raise NodeError(f"{name} of a local Ray did not start: {' / '.join(self.log(name).strip().splitlines()[-8:])}")

    def _try_to_start(self, arguments: list[str], environment: Mapping[str, str], name: str) -> Node | None:
        command = [str(RAY), "start", "--block", *arguments, *OWN_PORTS, f"--object-store-memory={STORE_BYTES}"]
        with (self._logs / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, env={**self._base, **environment}, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self._nodes.append(Node(process))
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self.log(name):
            if process.poll() is not None or time.monotonic() > deadline:
                self._nodes.pop().kill()
                return None
            time.sleep(0.2)
        return self._nodes[-1]


def _identify(tokens: dict[str, str]) -> None:
    os.environ.update(tokens)


def _kinds(address: str) -> list[str]:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(address)
    return [str(node.ray_node_type_name) for node in (*status.active_nodes, *status.idle_nodes)]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        return probe.getsockname()[1]


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; none once it has ended."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all at once, to those that still are the processes they were."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
