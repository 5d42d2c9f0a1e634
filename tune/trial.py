"""A trial as Ray Tune sees it: an actor without resources of its own that steers a warm group of workers.

Tune reuses the actor for the next trial, and with it the group, which lives in the bundles of the actor's placement group.
Results are the lines of the run's `metrics.jsonl` that have the sweep's metric, in order, then one with the outcome.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray.tune

from pipeline.config_file import validate
from pipeline.progress import METRICS_FILE, Follower, parse_line
from pipeline.redaction import unsealed
from tune.group import STOP_FILE, Group, Outcome
from tune.plan import read_job

POLL_SECONDS = 0.1
STOP_SECONDS = 120.0
"""A worker that has not come to the end of its step by then is killed."""


class TrialActor(ray.tune.Trainable):
    """`config["job"]`: the file that tells what to do, written by `tune.plan`."""

    _group: Group | None = None

    def setup(self, config: dict[str, Any]) -> None:
        self._begin(read_job(Path(config["job"])))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune: go on with another trial in this process."""
        self._end()
        self._begin(read_job(Path(new_config["job"])))
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next value of the metric, or for the end."""
        while True:
            if self._ended is None:
                self._ended = self._group.outcome(POLL_SECONDS)
            self._read()
            if self._waiting and self._waiting[0]["step"] < self._total:
                return {**self._waiting.pop(0), "state": "running"}
            if self._ended is not None and not self._again():
                break
        # The last step's value comes with the outcome: nobody shall stop a trial that is about to end.
        last = self._waiting[-1] if self._waiting else {"step": self._seen}
        state = "failed" if self._ended.state == "died" else self._ended.state
        return {**last, "state": state, "reason": self._ended.reason, "done": True}

    def cleanup(self) -> None:
        """Tune: no further trial comes."""
        if self._group is not None:
            self._group.close()

    # ------------------------------------------------------------------------------------------------- parts

    def _begin(self, job: dict[str, Any]) -> None:
        self._job, self._plain = job, job["plain"]
        self._run = Path(self._plain["run"])
        self._metric, self._total = job["metric"], job["total_steps"]
        self._seen, self._waiting, self._failures = 0, [], 0
        self._ended: Outcome | None = None
        self._follower = Follower(self._run / METRICS_FILE)
        if self._group is None:
            self._group = Group(validate(unsealed(self._plain["config"])).scaling)
        self._group.start(self._plain)

    def _read(self) -> None:
        """New lines with the metric; what a resumed worker repeats was seen before."""
        for line in filter(None, map(parse_line, self._follower.new_lines())):  # the recorder tells of damaged ones
            if line["step"] > self._seen and self._metric in line:
                self._waiting.append({"step": line["step"], self._metric: line[self._metric]})
            self._seen = max(self._seen, line["step"])

    def _again(self) -> bool:
        """After a breakdown: start anew from the last checkpoint, as often as is allowed."""
        self._failures += 1
        if self._ended.state != "died" or self._failures > self._job["max_failures"]:
            return False
        self._ended = None
        self._group.start(self._plain)
        return True

    def _end(self) -> None:
        """Have the workers return from a trial that was stopped, so that they can take the next one."""
        if not self._group.busy:
            return
        (self._run / STOP_FILE).touch()
        until = time.monotonic() + STOP_SECONDS
        while self._group.outcome(POLL_SECONDS) is None:
            if time.monotonic() > until:
                self._group.close()
                return
