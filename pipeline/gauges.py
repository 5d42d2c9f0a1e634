"""A run's state as Prometheus metrics, through the Ray that it runs on: `ray_qalign_…` beside Ray's own.

Set in the driver, which outlives its workers: the age of the last checkpoint goes on growing while they hang.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from pipeline import checkpoint
from pipeline.run_log import last_start

GAUGES = {
    "qalign_step": "optimizer steps that are done",
    "qalign_total_steps": "optimizer steps of the whole run",
    "qalign_loss": "loss of the last step",
    "qalign_tokens_per_second": "tokens per second of the last step, all workers",
    "qalign_checkpoint_age_seconds": "seconds since the last checkpoint was committed; since the start where there is none",
    "qalign_workers": "workers of the newest start",
    "qalign_attempts": "starts of the workers so far",
}
LOOK_SECONDS = 5.0


class Gauges:
    """The gauges of one run, with its name as the label `run`. Needs a connected Ray."""

    def __init__(self, run: Path, total_steps: int) -> None:
        from ray.util.metrics import Gauge

        self._run, self._started, self._look_at = run, time.time(), 0.0
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in GAUGES.items()}
        self._set("qalign_total_steps", total_steps)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._set("qalign_step", step)
        for name in ("loss", "tokens_per_second"):
            if name in metrics:
                self._set(f"qalign_{name}", metrics[name])

    def tick(self) -> None:
        """Called often; looks at the run's folder every few seconds."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        saved = checkpoint.saved(self._run)
        since = max(self._started, saved[-1].stat().st_mtime) if saved else self._started
        self._set("qalign_checkpoint_age_seconds", max(0.0, time.time() - since))
        if (start := last_start(self._run)) is not None:
            self._set("qalign_workers", start["workers"])
            self._set("qalign_attempts", start["attempt"])

    def _set(self, name: str, value: float) -> None:
        self._gauges[name].set(value, tags={"run": self._run.name})
