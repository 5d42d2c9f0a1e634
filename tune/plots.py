"""A sweep in pictures (SVG): the metric by each parameter, and reward against KL where both were measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.table import Trial, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tune.plan import Sweep

REWARD, KL = "samples/reward", "samples/kl"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # told apart by colour-blind people too; shapes differ as well


def metric_by_parameter(sweep: Sweep, trials: Sequence[Trial]) -> list[Path]:
    """One SVG with a panel per parameter; nothing where no trial has the metric."""
    metric = sweep.settings.metric
    shown = [trial for trial in trials if trial.value(metric) is not None]
    keys = list(dict.fromkeys(key for trial in shown for key in trial.overrides))
    if not keys:
        return []
    figure = _figure(4.2 * len(keys), 3.4)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        _panel(axes, key, metric, [trial for trial in shown if key in trial.overrides])
    return [_save(figure, sweep.folder / "metric_by_parameter.svg")]


def frontier(sweep: Sweep, trials: Sequence[Trial]) -> list[Path]:
    """Reward of own samples against what they cost in KL, each point labelled; nothing where neither was measured."""
    shown = [trial for trial in trials if trial.evaluation.keys() >= {REWARD, KL}]
    if not shown:
        return []
    figure = _figure(6.0, 4.2)
    axes = figure.subplots()
    x, y = [t.evaluation[KL] for t in shown], [t.evaluation[REWARD] for t in shown]
    bars = {
        "xerr": [t.evaluation.get(f"{KL}_se", 0.0) for t in shown],
        "yerr": [t.evaluation.get(f"{REWARD}_se", 0.0) for t in shown],
    }
    axes.errorbar(x, y, **bars, fmt="o", color=BLUE, ecolor=GREY, capsize=2)
    for trial in shown:
        at = trial.evaluation[KL], trial.evaluation[REWARD]
        axes.annotate(trial.label, at, xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="KL(π ‖ π_ref) on own samples, nats per response (± standard error)", ylabel="mean reward")
    return [_save(figure, sweep.folder / "reward_kl_frontier.svg")]


def _panel(axes: Axes, key: str, metric: str, trials: Sequence[Trial]) -> None:
    values: list[Any] = [trial.overrides[key] for trial in trials]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    names = list(dict.fromkeys(map(short, values)))
    for state, marker, colour in (("finished", "o", BLUE), ("stopped", "v", ORANGE)):
        x = [
            value if numbers else names.index(short(value))
            for value, t in zip(values, trials, strict=True)
            if t.state == state
        ]
        y = [t.value(metric) for t in trials if t.state == state]
        axes.scatter(x, y, marker=marker, color=colour, label=state, alpha=0.8)
    if not numbers:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    elif min(values) > 0 and max(values) / min(values) >= 20:
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=metric)
    axes.legend(fontsize=7)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
