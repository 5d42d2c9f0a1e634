"""The parts of a sweep's page that are not charts: headline, the table of trials, diversity by trial."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pipeline.report.charts import Table
from pipeline.report.content import Status, Trial
from pipeline.report.evaluation import Card, is_diversity
from pipeline.report.scales import Z95, number, range_text

Mode = Literal["max", "min"]
WORDS: dict[Status, str] = {
    "finished": "finished",
    "stopped": "stopped early",
    "running": "running",
    "diverged": "diverged",
    "failed": "failed",
}


def ranked(trials: Sequence[Trial], metric: str | None, mode: Mode) -> list[Trial]:
    """Best first; trials without a finite value of the metric last, in their order."""

    def place(trial: Trial) -> tuple[bool, float]:
        value = _value(trial, metric)
        return (value is None, 0.0 if value is None else -value if mode == "max" else value)

    return sorted(trials, key=place)


def cards(trials: Sequence[Trial], metric: str | None, mode: Mode) -> list[Card]:
    """How many trials there are and how they ended; the best one."""
    count = Counter(trial.status for trial in trials)
    ends = ", ".join(f"{count[status]} {word}" for status, word in WORDS.items() if count[status])
    found = [Card("Trials", str(len(trials)), "", ends or "none")]
    best = next((t for t in ranked(trials, metric, mode) if _value(t, metric) is not None), None)
    if best is not None and metric is not None:
        error = best.metrics.get(f"{metric}_se")
        value = best.metrics[metric]
        spread = "" if error is None else range_text(value - Z95 * error, value + Z95 * error)
        found.append(Card(f"Best {metric}", number(value), spread, f"{best.objective}: {best.label}"))
        found += [Card(key, _word(value), "", "of the best trial") for key, value in best.parameters.items()][:4]
    return found


def trial_table(trials: Sequence[Trial], metric: str | None) -> Table:
    """Every trial with its parameters, how it ended and why."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    shown = [metric] if metric else []
    rows = [
        [
            trial.label,
            trial.objective,
            *(_word(trial.parameters.get(key)) for key in keys),
            *(number(trial.metrics.get(name)) for name in shown),
            WORDS[trial.status] + (f": {trial.reason}" if trial.reason else ""),
        ]
        for trial in trials
    ]
    return Table(["trial", "objective", *keys, *shown, "end"], rows)


def metric_table(trials: Sequence[Trial], diversity: bool) -> Table:
    """Trials against their metrics: those of diversity, or all the others; the policy's before the reference's, which are most often
    the same in all rows. Without rows where there are none."""
    names = dict.fromkeys(name for trial in trials for name in trial.metrics if not name.endswith("_se"))
    kept = sorted(
        (name for name in names if is_diversity(name) == diversity), key=lambda n: (not n.startswith("samples/"), n)
    )
    rows = [
        [trial.label, trial.objective, *(_with_error(trial, name) for name in kept)]
        for trial in trials
        if any(name in trial.metrics for name in kept)
    ]
    return Table(["trial", "objective", *kept], rows)


def _with_error(trial: Trial, name: str) -> str:
    error = trial.metrics.get(f"{name}_se")
    return number(trial.metrics.get(name)) + ("" if error is None else f" ± {number(error, 2)}")


def _value(trial: Trial, metric: str | None) -> float | None:
    value = trial.metrics.get(metric, math.nan) if metric else math.nan
    return value if math.isfinite(value) else None


def _word(value: float | int | str | bool | None) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value or "–")
