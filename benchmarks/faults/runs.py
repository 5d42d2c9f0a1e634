"""One training that is going to be broken: its processes, its trace, and what it has to show in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.errors import DrillError
from benchmarks.nodes import ROOT, family, kill
from pipeline import checkpoint
from pipeline.progress import METRICS_FILE, read_metrics

PATIENCE = 500.0
"""Seconds for anything to happen; a recovery takes a twentieth of it on a quiet machine."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward of one rank."""

    time: float
    rank: int
    rows: tuple[int, ...]


@dataclass(slots=True)
class Training:
    """A training in a storage folder of its own.

    Args:
        folder: takes storage, trace and logs.
        settings: the configuration; storage and trace are added.
        environment: of the driver; without RAY_ADDRESS it trains with `--local`.
        overrides: key=value, of each command.
    """

    folder: Path
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    overrides: Sequence[str] = ()
    driver: subprocess.Popen | None = None
    starts: int = 0
    limits: Callable[[], None] | None = None  # run in the driver's process before it starts
    _config: Path = field(default=Path())

    def __post_init__(self) -> None:
        self.trace.mkdir(parents=True, exist_ok=True)
        self._config = self.folder / "config.yaml"
        given = dict(self.settings) | {"storage": str(self.storage)}
        given["objective"] = {**given["objective"], "trace": str(self.trace)}
        self._config.write_text(json.dumps(given))

    # ---------------------------------------------------------------------------------------------- places

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    @property
    def trace(self) -> Path:
        return self.folder / "trace"

    @property
    def run(self) -> Path:
        """The run's folder; it is there once the driver has prepared everything."""
        found = list((self.storage / "runs").glob("drill-*"))
        if len(found) != 1:
            raise DrillError(f"{self.storage}: {len(found)} runs instead of one")
        return found[0]

    @property
    def steps(self) -> list[int]:
        """Steps in the run's metrics, in their order."""
        runs = self.storage / "runs"
        return [line["step"] for path in runs.glob(f"*/{METRICS_FILE}") for line in read_metrics(path)]

    def log(self) -> str:
        """What all drivers said."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("driver-*.log")))

    # ------------------------------------------------------------------------------------------- processes

    def command(self, *overrides: str) -> list[str]:
        """The user's command."""
        local = [] if "RAY_ADDRESS" in self.environment else ["--local"]
        return ["-m", "jobs.train", str(self._config), *self.overrides, *overrides, *local]

    def start(self, *overrides: str) -> None:
        """Start the driver: the first one, or the same command again."""
        self.starts += 1
        with (self.folder / f"driver-{self.starts}.log").open("w") as log:
            self.driver = subprocess.Popen(
                [sys.executable, *self.command(*overrides)],
                env=dict(self.environment),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self.limits,
            )

    def await_step(self, step: int) -> None:
        """Until the metrics tell of this step."""
        self.wait_until(lambda: max(self.steps, default=0) >= step, f"step {step}")

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        """Raises DrillError when the driver ends, or time is up, before it is there."""
        until = time.monotonic() + PATIENCE
        while not there():
            if self.driver is not None and self.driver.poll() is not None:
                raise DrillError(f"the driver ended (status {self.driver.returncode}) before {what}: {self._tail()}")
            if time.monotonic() > until:
                raise DrillError(f"{what} did not come within {PATIENCE:g} s: {self._tail()}")
            time.sleep(0.02)

    def finish(self, status: int = 0) -> None:
        """Until the driver ends; it has to, with this exit status."""
        assert self.driver is not None
        if self.driver.wait(PATIENCE) != status:
            raise DrillError(f"the driver ended with status {self.driver.returncode}, not {status}: {self._tail()}")

    def kill_driver(self) -> None:
        """SIGKILL to the driver and all its own children; workers on the cluster's nodes are left to themselves."""
        assert self.driver is not None
        kill(family(self.driver.pid))
        self.driver.wait()

    def close(self) -> None:
        """End what is left of it."""
        if self.driver is not None and self.driver.poll() is None:
            os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()

    def _tail(self) -> str:
        return " / ".join(self.log().strip().splitlines()[-4:])

    # --------------------------------------------------------------------------------------------- results

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the newest checkpoint that verifies."""
        newest = checkpoint.latest(self.run)
        if newest is None:
            raise DrillError(f"{self.run}: no checkpoint")
        return dict(checkpoint.read_weights(newest))

    def processes(self) -> list[list[Seen]]:
        """What each process saw, in the order in which the processes began."""
        found = []
        for path in self.trace.glob("*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            found.append([Seen(line["time"], line["rank"], tuple(line["rows"])) for line in lines])
        return sorted((lines for lines in found if lines), key=lambda lines: lines[0].time)


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
