"""The reward–KL frontier: what each objective's reward cost, one point per policy, with β beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from pipeline.report.charts import DASHES, Chart, Frame, Mark, Series, Table, error_bars, place_texts
from pipeline.report.content import Point, Trial
from pipeline.report.scales import Z95, Scale, number

FRAME = Frame(940, 520)
REFERENCE = "reference"
"""Series of the models before training."""


def efficient(points: Sequence[Point]) -> list[bool]:
    """Which points no other point beats: none has as much reward at less KL, or more reward at as much KL."""
    return [not any(_beats(other, point) for other in points) for point in points]


def _beats(a: Point, b: Point) -> bool:
    return a.kl <= b.kl and a.reward >= b.reward and (a.kl, a.reward) != (b.kl, b.reward)


def frontier(trials: Sequence[Trial]) -> Chart | None:
    """Reward against KL with 95 % intervals, a series per objective; None where no trial measured both."""
    placed = [(trial, point) for trial in trials for point in trial.points]
    if not placed:
        return None
    placed += [(start, point) for start in _starts(trials) for point in start.points]
    points = [point for _, point in placed]
    x = FRAME.x([edge for p in points for edge in _edges(p.kl, p.kl_error)], include=[0.0])
    y = FRAME.y([edge for p in points for edge in _edges(p.reward, p.reward_error)])
    best = efficient(points)
    texts = place_texts([(x(p.kl), y(p.reward), p.label) for p in points], FRAME)
    marks: dict[str, list[Mark]] = defaultdict(list)
    for (trial, point), keep, at in zip(placed, best, texts, strict=True):
        marks[trial.objective].append(_mark(trial, point, keep, at, x, y))
    series = [
        Series(name, i, found, _line(name, placed, x, y), DASHES[i % len(DASHES)])
        for i, (name, found) in enumerate(marks.items())
    ]
    return Chart(
        id="frontier",
        title="Reward and what it cost in KL",
        caption="Up and to the left is better. Filled: no other policy has as much reward at less KL; hollow: another one "
        "does. Beside a point: its β, where the sweep varied it. Lines join the means of each β. Bars: 95 % intervals.",
        frame=FRAME,
        x_label="KL(π ‖ π_ref), nats per response",
        y_label="mean reward",
        x_ticks=x.ticks(7),
        y_ticks=y.ticks(),
        series=series,
        table=Table(
            ["objective", "trial", "β or label", "KL", "± s.e.", "reward", "± s.e.", "on the frontier"],
            [_row(trial, point, keep) for (trial, point), keep in zip(placed, best, strict=True)],
        ),
    )


def _starts(trials: Sequence[Trial]) -> list[Trial]:
    """The references of trials with points, where they were measured: policies that paid no KL. One for each reward."""
    found = {}
    for trial in trials:
        reward = trial.metrics.get("reference/reward")
        if trial.points and reward is not None:
            point = Point(kl=0.0, reward=reward, reward_error=trial.metrics.get("reference/reward_se"))
            found[reward] = Trial(label="before training", objective=REFERENCE, parameters={}, points=(point,))
    return list(found.values())


def _edges(value: float, error: float | None) -> tuple[float, float]:
    return value - Z95 * (error or 0.0), value + Z95 * (error or 0.0)


def _mark(trial: Trial, point: Point, keep: bool, text_at: tuple[float, float, str], x: Scale, y: Scale) -> Mark:
    across = None if point.kl_error is None else tuple(map(x, _edges(point.kl, point.kl_error)))
    along = None if point.reward_error is None else tuple(map(y, _edges(point.reward, point.reward_error)))
    words = f"{trial.objective}: {trial.label}\nreward {_with_error(point.reward, point.reward_error)}"
    words += f"\nKL {_with_error(point.kl, point.kl_error)} nats" + ("\non the frontier" if keep else "")
    at = x(point.kl), y(point.reward)
    return Mark(*at, words, error_bars(*at, across, along), point.label, text_at, hollow=not keep)


def _with_error(value: float, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error, 2)} s.e."


def _line(name: str, placed: Sequence[tuple[Trial, Point]], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Through the means of the points with equal labels, by KL; none where labels are missing."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for trial, point in placed:
        if trial.objective == name:
            groups[point.label].append(point)
    if "" in groups:
        return []
    means = sorted((fmean(p.kl for p in g), fmean(p.reward for p in g)) for g in groups.values())
    return [(x(kl), y(reward)) for kl, reward in means] if len(means) > 1 else []


def _row(trial: Trial, point: Point, keep: bool) -> list[str]:
    numbers = [
        number(point.kl), number(point.kl_error, 2), number(point.reward), number(point.reward_error, 2)
    ]  # fmt: skip
    return [trial.objective, trial.label, point.label or "–", *numbers, "yes" if keep else "no"]
