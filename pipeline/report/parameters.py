"""A sweep's metric against each parameter that it varied: the picture behind "which β should I take?"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from pipeline.report.charts import Chart, Frame, Mark, Series, Table, error_bars
from pipeline.report.content import Trial
from pipeline.report.scales import Z95, Scale, Tick, number

FRAME = Frame(460, 300)
ASIDE = 24.0
"""Pixels on either side of a value in which its objectives stand."""


def parameter_charts(trials: Sequence[Trial], metric: str) -> list[Chart]:
    """One chart per parameter with two values or more, over the trials whose `metric` is finite."""
    usable = [t for t in trials if math.isfinite(t.metrics.get(metric, math.nan))]
    keys = list(dict.fromkeys(key for trial in usable for key in trial.parameters))
    charts = (_chart(key, [t for t in usable if t.parameters.get(key) is not None], metric) for key in keys)
    return [chart for chart in charts if chart]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _chart(key: str, trials: Sequence[Trial], metric: str) -> Chart | None:
    values = [t.parameters[key] for t in trials]
    if len(set(values)) < 2:
        return None
    numeric = all(map(_is_number, values))
    names = [] if numeric else list(dict.fromkeys(map(str, values)))
    places = [float(v) if numeric else float(names.index(str(v))) for v in values]
    log = numeric and min(places) > 0 and max(places) / min(places) >= 10
    x = Scale.over(places, FRAME.left + ASIDE, FRAME.width - FRAME.right - ASIDE, log)
    y = FRAME.y([edge for t in trials for edge in _edges(t, metric)])
    objectives = list(dict.fromkeys(t.objective for t in trials))
    marks: dict[str, list[Mark]] = {objective: [] for objective in objectives}
    for place, trial in sorted(zip(places, trials, strict=True), key=lambda pair: pair[0]):
        at = x(place) + _aside(objectives.index(trial.objective), len(objectives))
        marks[trial.objective].append(_mark(trial, key, metric, round(at, 1), y))
    ticks = (
        _value_ticks(sorted(set(places)), x) if numeric else [Tick(x(float(i)), _short(n)) for i, n in enumerate(names)]
    )
    notes = ["One point per trial; trials may differ in other parameters, too."]
    notes += ["Objectives stand side by side."] if len(objectives) > 1 else []
    notes += ["Bars: 95 %."] if any(f"{metric}_se" in t.metrics for t in trials) else []
    return Chart(
        id=f"parameter-{key.replace('.', '-')}",
        title=f"{metric} by {key}",
        caption=" ".join(notes),
        frame=FRAME,
        x_label=key + (", logarithmic" if x.log else ""),
        y_label=metric,
        x_ticks=ticks,
        y_ticks=y.ticks(),
        series=[Series(name, i, found) for i, (name, found) in enumerate(marks.items())],
        table=Table(
            [key, "objective", "trial", metric],
            [[_word(t.parameters[key]), t.objective, t.label, number(t.metrics[metric])] for t in trials],
        ),
    )  # fmt: skip


def _aside(index: int, count: int) -> float:
    """Pixels by which an objective's marks stand beside their value, so that equal values do not cover one another."""
    return (index - (count - 1) / 2) * min(9.0, 2 * ASIDE / count)


def _value_ticks(values: Sequence[float], x: Scale) -> list[Tick]:
    """A tick at each value that was tried, unless there are too many to write."""
    ticks = [Tick(x(value), number(value, 3)) for value in values]
    return ticks if all(b.at - a.at >= 40 for a, b in pairwise(ticks)) else x.ticks()


def _edges(trial: Trial, metric: str) -> tuple[float, float]:
    half = Z95 * trial.metrics.get(f"{metric}_se", 0.0)
    return trial.metrics[metric] - half, trial.metrics[metric] + half


def _mark(trial: Trial, key: str, metric: str, x: float, y: Scale) -> Mark:
    at = y(trial.metrics[metric])
    low, high = map(y, _edges(trial, metric))
    words = f"{trial.objective}: {trial.label}\n{key} = {_word(trial.parameters[key])}\n{metric} {number(trial.metrics[metric])}"
    return Mark(x, at, words, error_bars(x, at, None, (low, high)) if low != high else "")


def _word(value: float | int | str | bool | None) -> str:
    return number(value) if _is_number(value) else str(value)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
