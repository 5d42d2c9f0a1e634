"""Ray's autoscaler on one machine: `python -m benchmarks.autoscale CONFIG.yaml key=value …`

The head has no CPUs. Each job's demand makes the autoscaler (version 2, the one that runs on clouds and Kubernetes) start nodes,
which here are processes of this machine; when a job is done and they are idle, it ends them. Jobs are the same commands that a
person runs. Printed per job: how long it took, when the first node came, how many there were, when the last had gone.

    python -m benchmarks.autoscale jobs/configs/dpo.yaml --jobs prepare train decode

Left out: how a cloud starts machines (`cluster.yaml`, `rayjob.yaml` say what they run).
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.nodes import STORE_BYTES, LocalCluster, free_port

JOBS = {"prepare": "jobs.prepare", "train": "jobs.train", "sweep": "tune.sweep", "decode": "jobs.decode"}
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the provider knows it by no other name
IDLE_MINUTES = 0.1
LOOK_SECONDS = 0.5
GONE_SECONDS = 120


def fake_cloud(port: int, most: int) -> dict[str, Any]:
    """A cluster configuration whose provider starts nodes as processes. Nodes have one CPU each."""
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    starts = ("head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "processes",
        "max_workers": most,
        "upscaling_speed": 20,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{key: [] for key in (*commands, *starts)},
    }


HEAD_ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One job on a cluster that was empty before and after."""

    job: str
    seconds: float
    first_node: float  # seconds from the job's start until a node was there
    most_nodes: int
    gone: float  # seconds from the job's end until no node was left
    output: str


class Autoscaled:
    """A `LocalCluster` with an autoscaler, and how many nodes it has had, as a context."""

    def __init__(self, most: int = 2) -> None:
        port = free_port()
        self._file = Path(tempfile.mkdtemp(prefix="qalign-")) / "cluster.yaml"
        self._file.write_text(yaml.safe_dump(fake_cloud(port, most)))
        self.cluster = LocalCluster(head=HEAD_ENVIRONMENT, autoscaling=self._file, port=port)
        self.seen: list[tuple[float, int]] = []  # (time.monotonic(), nodes) at each change
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="autoscaled", daemon=True)

    def __enter__(self) -> Autoscaled:
        self.cluster.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.cluster.__exit__()
        self._file.unlink()
        self._file.parent.rmdir()

    @property
    def nodes(self) -> int:
        """How many there are now, beside the head."""
        return self.seen[-1][1] if self.seen else 0

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            count = self.cluster.alive().count("worker")
            if not self.seen or self.seen[-1][1] != count:
                self.seen.append((time.monotonic(), count))

    def run(self, job: str, arguments: Sequence[str], seconds: float = 600) -> Measured:
        """Run a job to its end, and wait until its nodes are gone. Raises RuntimeError with the job's words if it fails."""
        assert self.nodes == 0, "an empty cluster"
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", JOBS[job], *arguments],
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        ended = time.monotonic()
        if done.returncode != 0:
            raise RuntimeError(f"{job} failed: {(done.stdout + done.stderr)[-3000:]}")
        while self.nodes and time.monotonic() < ended + GONE_SECONDS:
            time.sleep(LOOK_SECONDS)
        if self.nodes:
            raise RuntimeError(f"{job}: {self.nodes} nodes are still there {GONE_SECONDS} s after its end")
        counts = [(when, count) for when, count in self.seen if when >= started]
        first = next((when for when, count in counts if count), started)
        most = max((count for _, count in counts), default=0)
        gone = max(0.0, counts[-1][0] - ended) if counts else 0.0
        return Measured(job, ended - started, first - started, most, gone, done.stdout + done.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscale", description=__doc__.partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--nodes", type=int, default=2, help="how many there may be (each has one CPU)")
    options = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no nodes behind
    print(f"{'job':8} {'seconds':>8} {'first node':>11} {'nodes':>6} {'gone after':>11}")
    with Autoscaled(options.nodes) as autoscaled:
        for job in options.jobs:
            measured = autoscaled.run(job, [options.config, *options.overrides])
            columns = (
                f"{measured.seconds:8.0f} {measured.first_node:9.0f} s {measured.most_nodes:6} {measured.gone:9.0f} s"
            )
            print(f"{job:8} {columns}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
