"""The durable table of a sweep's trials: what was tried, how it ended, what it reached. It alone says what is done.

    <storage>/sweeps/<name>-<identity>/   sweep.json      the configuration, the identity
                                          trials.jsonl    a line at each change of a trial's state; the last one counts
                                          trials/<name>/  job.json: what its workers are told; tracking.json
                                          summary.csv     one row per trial, best first

Runs themselves lie in `<storage>/runs`, named by their content, as `jobs.train` names them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.durable import append_line, write_text
from pipeline.redaction import redact, sealed, unsealed
from tune.spaces import Point

logger = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "diverged", "failed"]
DONE: tuple[State, ...] = ("finished", "stopped", "diverged")
"""States that the same command does not try again. A failed trial it does: a person may have mended the cause."""
JOURNAL, SUMMARY, SWEEP_FILE = "trials.jsonl", "summary.csv", "sweep.json"


@dataclass(frozen=True, slots=True)
class Trial:
    """One row: a point of the space, and what became of it."""

    number: int
    point: Point
    overrides: dict[str, Any]
    run: str  # the run's folder; empty where the configuration was refused
    state: State = "running"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # newest value of each
    evaluation: dict[str, float] = field(default_factory=dict)  # of the finished model, where asked for
    seconds: float = 0.0  # from the trial's start to its end, in this state's process
    spent: dict[str, float] = field(default_factory=dict)  # these seconds by part: see `overhead`
    reason: str = ""  # why it diverged, failed or was stopped

    @property
    def name(self) -> str:
        return f"{self.number:03d}"

    @property
    def label(self) -> str:
        """What is special about it, for people."""
        return redact(" ".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in self.overrides.items()))

    def value(self, metric: str) -> float | None:
        """The metric, where there is a number that can be compared."""
        found = self.metrics.get(metric, math.nan)
        return found if math.isfinite(found) and self.state not in ("diverged", "failed") else None


def short(value: Any) -> str:
    """A value in few letters."""
    if isinstance(value, dict):
        return ",".join(str(inner) if key == "name" else f"{key}:{short(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Table:
    """Trials by number. `put` is on disk when it returns; a line that a crash cut off is forgotten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trials: dict[int, Trial] = {}
        self._path = folder / JOURNAL
        if self._path.is_file():
            self._read()

    def put(self, trial: Trial) -> Trial:
        """Add or replace a trial."""
        trial = replace(trial, reason=redact(trial.reason))
        self.trials[trial.number] = trial
        append_line(self._path, json.dumps(sealed(asdict(trial))).encode(), sync=True)
        return trial

    def change(self, number: int, **changes: Any) -> Trial:
        return self.put(replace(self.trials[number], **changes))

    def done(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state in DONE]

    def unfinished(self) -> list[Trial]:
        """Interrupted and failed ones."""
        return [trial for trial in self.trials.values() if trial.state not in DONE]

    def next_number(self) -> int:
        return max(self.trials, default=0) + 1

    def ranked(self, metric: str, maximise: bool) -> list[Trial]:
        """All trials: first the finished ones, best first; then the rest, in order."""
        sign = -1.0 if maximise else 1.0

        def rank(trial: Trial) -> tuple[bool, float, int]:
            value = trial.value(metric)
            return trial.state != "finished", math.inf if value is None else sign * value, trial.number

        return sorted(self.trials.values(), key=rank)

    def best(self, metric: str, maximise: bool) -> Trial | None:
        """The finished trial with the best value; None where none has one."""
        first = next(iter(self.ranked(metric, maximise)), None)
        return first if first is not None and first.state == "finished" and first.value(metric) is not None else None

    def write_summary(self, metric: str, maximise: bool) -> Path:
        """`summary.csv`, best first; renamed into place."""
        trials = self.ranked(metric, maximise)
        keys = list(dict.fromkeys(key for trial in trials for key in trial.overrides))
        held_out = sorted({name for trial in trials for name in trial.metrics if name.startswith("eval/")} | {metric})
        measured = sorted({name for trial in trials for name in trial.evaluation})
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        after = [f"evaluation/{name}" for name in measured]
        rows.writerow(["trial", "state", *keys, "step", *held_out, *after, "seconds", "reason", "run"])
        for t in trials:
            settings = [json.dumps(t.overrides[k]) if k in t.overrides else "" for k in keys]
            numbers = [t.metrics.get(n, "") for n in held_out] + [t.evaluation.get(n, "") for n in measured]
            rows.writerow([t.name, t.state, *settings, t.step, *numbers, f"{t.seconds:.1f}", t.reason, t.run])
        write_text(self.folder / SUMMARY, redact(text.getvalue()))
        return self.folder / SUMMARY

    def _read(self) -> None:
        for number, line in enumerate(self._path.read_bytes().split(b"\n"), 1):
            try:
                trial = _checked(unsealed(json.loads(line)))
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                if line.strip():
                    logger.warning("%s:%d: damaged; what it says of a trial is left out", self._path, number)
                continue
            self.trials[trial.number] = trial


def _checked(found: Any) -> Trial:
    """A line of the table; raises where one of its fields is not what `Table.put` writes."""
    trial = Trial(**found)
    kinds = {"number": int, "point": dict, "overrides": dict, "run": str, "state": str, "step": int, "reason": str}
    kinds |= {"metrics": dict, "evaluation": dict, "spent": dict}
    if not all(type(getattr(trial, name)) is kind for name, kind in kinds.items()) or trial.state not in get_args(
        State
    ):
        raise TypeError("no trial")
    numbers = [trial.seconds, *trial.metrics.values(), *trial.evaluation.values(), *trial.spent.values()]
    if not all(isinstance(value, int | float) for value in numbers):
        raise TypeError("no number")
    return trial
