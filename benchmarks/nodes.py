"""A Ray cluster of several nodes on this machine, each with processes of its own: to be grown, shrunk and broken.

    with LocalCluster() as cluster:
        node = cluster.add_node(cpus=1)
        subprocess.run([…, "-m", "jobs.train", …], env=cluster.environment)
        node.kill()

The head has no CPUs: work runs on the nodes. Token authentication is on, with a token of the cluster's own. Everything is
ended by process id when the context is left.
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
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
STORE_BYTES = 100_000_000
START_SECONDS, START_TRIES = 120, 3
# Ports of its own for whatever else takes a fixed one, or one of a range that all nodes share.
OWN_PORTS = ("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0")


@dataclass(frozen=True, slots=True)
class Node:
    """One node's processes: those under its `ray start --block`."""

    process: subprocess.Popen

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when a machine loses power."""
        end(_family(self.process.pid))
        self.process.wait()

    def reclaim(self) -> None:
        """SIGTERM to the node, as a cloud or Kubernetes does: Ray drains it for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S."""
        self.process.send_signal(signal.SIGTERM)


class LocalCluster:
    """A head without CPUs, and nodes that come and go.

    Args:
        autoscaling: a cluster configuration for Ray's autoscaler, see `autoscale`.
        head: extra environment of the head's processes.
        port: where the head listens.
    """

    def __init__(self, autoscaling: Path | None = None, head: dict[str, str] | None = None, port: int | None = None):
        self._folder = Path(tempfile.mkdtemp(prefix="qalign-"))  # short: paths of sockets are limited
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._base = inherited | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": f"{RAY.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment = self._base | {"RAY_ADDRESS": self.address}
        """Of jobs that are to run on this cluster."""
        self._autoscaling, self._head_environment = autoscaling, head or {}
        self._nodes: list[Node] = []
        # A process connects with one token only, and this one may be connected to another cluster.
        tokens = {key: self.environment[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        spawned = multiprocessing.get_context("spawn")
        self._asker = ProcessPoolExecutor(1, spawned, initializer=_identify, initargs=(tokens,))

    def __enter__(self) -> LocalCluster:
        command = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        command += [
            f"--temp-dir={self._folder}",
            "--node-ip-address=127.0.0.1",
            f"--ray-client-server-port={free_port()}",
        ]
        if self._autoscaling is not None:
            command.append(f"--autoscaling-config={self._autoscaling}")
        try:
            self._start(command, self._head_environment, "head")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end([process for node in self._nodes for process in _family(node.process.pid)])
        for node in self._nodes:
            node.process.wait()
        self._asker.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_node(self, cpus: float = 1, **environment: str) -> Node:
        """A new node; returns when it has joined: two that start at once take each other's sockets."""
        command = [f"--address={self.address}", f"--num-cpus={cpus:g}", "--node-ip-address=127.0.0.1"]
        return self._start(command, environment, f"node{len(self._nodes)}")

    def alive(self) -> list[str]:
        """The kinds of the nodes that are there, by Ray's own account."""
        return self._asker.submit(_kinds, self.address).result()

    def log(self, name: str = "head") -> str:
        """What a node's processes printed."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _start(self, arguments: list[str], environment: dict[str, str], name: str) -> Node:
        """Ray gives a node 30 s to come up; on a busy machine it may need another try."""
        for _ in range(START_TRIES):
            node = self._try_to_start(arguments, environment, name)
            if node is not None:
                return node
        raise RuntimeError(f"{name} did not start: {self.log(name)[-2000:]}")

    def _try_to_start(self, arguments: list[str], environment: dict[str, str], name: str) -> Node | None:
        command = [str(RAY), "start", "--block", *arguments, *OWN_PORTS, f"--object-store-memory={STORE_BYTES}"]
        with (self._folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, env=self._base | environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
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
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(processes: list[psutil.Process]) -> None:
    """SIGKILL, to those that still are the processes they were."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it; none once it has ended."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
