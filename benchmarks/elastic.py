"""Training on nodes that come and go: `python -m benchmarks.elastic [--dtype bfloat16] [--zero 3]`

Two nodes; one is killed, later another one joins: 2 → 1 → 2 workers. The same steps are then trained in one process that nothing
happens to. Printed: seconds from each event until training goes on, and the largest difference of the losses.

The model is a random Llama of 2 layers × 32: what is measured is the machinery.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.nodes import LocalCluster
from pipeline.progress import LOG_FILE, METRICS_FILE, read_metrics
from pipeline.run_log import path_of, read_events

STEPS = 100_000
"""More than are ever trained: the schedule has to be the same, and the drill ends when it has seen enough."""
SETTLED = 12
"""Steps that are waited for after each event."""
WAIT_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Drill:
    """What happened."""

    shrink: float  # seconds from the kill until the next step was done
    grow: float  # seconds from the new node's start until a step was done by both
    steps: int
    losses: list[float]
    expected: list[float]
    told: str  # what the person at the terminal saw
    starts: list[dict[str, Any]]  # the events of rank 0

    @property
    def difference(self) -> float:
        return max(abs(one - other) for one, other in zip(self.losses, self.expected, strict=True))


def drill(config: Path, overrides: Sequence[str]) -> Drill:
    """Run it. `config` is of a run whose storage is empty."""
    from pipeline.config_file import load

    changes = [*overrides, "scaling.workers=[1,2]", "scaling.resize_seconds=2", f"train.max_steps={STEPS}"]
    changes += [f"train.epochs={STEPS}", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
    storage = Path(load(config, changes).storage)
    with LocalCluster() as cluster:
        cluster.add_node()
        doomed = cluster.add_node()
        log = storage / "driver.log"
        storage.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            command = [sys.executable, "-m", "jobs.train", str(config), *changes]
            driver = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output)
        try:
            follow = Follow(storage, driver, log)
            follow.until(lambda: follow.workers == 2 and follow.step >= SETTLED)
            doomed.kill()
            killed, step = time.monotonic(), follow.step
            follow.until(lambda: follow.workers == 1 and follow.step > step)
            shrink = time.monotonic() - killed
            follow.until(lambda step=follow.step: follow.step >= step + SETTLED)
            cluster.add_node()
            joined = time.monotonic()
            follow.until(lambda: follow.workers == 2)
            follow.until(lambda step=follow.step: follow.step > step)
            grow = time.monotonic() - joined
            follow.until(lambda step=follow.step: follow.step >= step + SETTLED)
        finally:
            driver.kill()
            driver.wait()
        run = follow.run
    lines = read_metrics(run / METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "no step is missing or told twice"
    expected = undisturbed(config, changes, len(lines))
    starts = [event for event in read_events(path_of(run, 0)) if event["event"] in ("start", "checkpoint")]
    told = (run / LOG_FILE).read_text() if (run / LOG_FILE).is_file() else ""
    return Drill(shrink, grow, len(lines), [line["loss"] for line in lines], expected, told, starts)


class Follow:
    """How far the run is."""

    def __init__(self, storage: Path, driver: subprocess.Popen, log: Path) -> None:
        self._storage, self._driver, self._log = storage, driver, log

    @property
    def run(self) -> Path:
        return next((self._storage / "runs").iterdir())

    @property
    def step(self) -> int:
        lines = read_metrics(self.run / METRICS_FILE) if (self._storage / "runs").is_dir() else []
        return lines[-1]["step"] if lines else 0

    @property
    def workers(self) -> int:
        if not (self._storage / "runs").is_dir():
            return 0
        starts = [event for event in read_events(path_of(self.run, 0)) if event["event"] == "start"]
        return starts[-1]["workers"] if starts else 0

    def until(self, there: Callable[[], bool]) -> None:
        """Wait. Raises RuntimeError with the driver's words when it ends, or when it takes too long."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not there():
            if self._driver.poll() is not None or time.monotonic() > deadline:
                words = self._log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"at step {self.step} with {self.workers} workers: {words}")
            time.sleep(0.1)


def undisturbed(config: Path, overrides: Sequence[str], steps: int) -> list[float]:
    """The losses of the same steps in one process."""
    from pipeline import driver
    from pipeline.config_file import load
    from pipeline.loop import train_worker

    with tempfile.TemporaryDirectory() as storage:
        # Neither evaluation nor checkpoints change what is learned.
        rarely = ["train.eval_every=1000000", "checkpoint.every=1000000"]
        settings = load(config, [*overrides, f"storage={storage}", *rarely])
        prepared = driver.prepare(settings, local=True)
        run, _ = driver.open_run(settings, prepared)
        job = driver.job_for(settings, prepared, run)
        train_worker(job.plain(), stop=lambda: len(read_metrics(run / METRICS_FILE)) >= steps)
        return [line["loss"] for line in read_metrics(run / METRICS_FILE)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=__doc__.partition("\n")[0])
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no nodes behind
    found = drill(Path(options.config), options.overrides)
    print(f"2 → 1 workers: {found.shrink:.0f} s    1 → 2 workers: {found.grow:.0f} s    {found.steps} steps")
    print(f"largest difference of the loss to the undisturbed run: {found.difference:.2g}")
    print("\n".join(line for line in found.told.splitlines() if re.search("→|continuing", line)))
    print(json.dumps([{k: e[k] for k in ("event", "attempt", "workers", "step")} for e in found.starts][:20]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
