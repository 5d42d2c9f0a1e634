"""Training curves from a run's metrics.jsonl: one small panel per question, training and held-out rows together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from pipeline.report.charts import Chart, Frame, Mark, Series, Table
from pipeline.report.scales import Scale, number

FRAME = Frame(460, 300)
POINTS, MARKS, ROWS = 160, 10, 40
"""Vertices of a line, marks on it, and rows of its table: longer runs are averaged down to these."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that are read together; a panel none of whose metrics was logged is left out."""

    id: str
    title: str
    meaning: str
    unit: str
    names: tuple[str, ...]


PANELS = (
    Panel("loss", "Loss", "The objective's loss.", "loss", ("loss", "eval/loss")),
    Panel(
        "rewards",
        "Implicit rewards",
        "They start at 0 where they are log-ratios to a reference. The gap is what preference objectives train, not the levels.",
        "implicit reward",
        ("reward/chosen", "reward/rejected", "eval/reward/chosen", "eval/reward/rejected"),
    ),
    Panel(
        "rewards-unpaired",
        "Implicit rewards",
        "Of responses labelled good and bad.",
        "implicit reward",
        ("reward/desirable", "reward/undesirable", "eval/reward/desirable", "eval/reward/undesirable"),
    ),
    Panel("margin", "Margin", "Chosen minus rejected reward.", "reward", ("reward/margin", "eval/reward/margin")),
    Panel("accuracy", "Accuracy", "Share of pairs in the data's order.", "share", ("accuracy", "eval/accuracy")),
    Panel(
        "logprob",
        "Likelihood of the data",
        "Mean log π per response token.",
        "nats per token",
        ("logprob/chosen", "logprob/rejected", "eval/logprob/chosen", "eval/logprob/rejected"),
    ),
    Panel(
        "drift",
        "Drift from the reference",
        "Mean log π − log π_ref on the data, per token: not a KL, for the data are not the policy's samples.",
        "nats per token",
        ("log_ratio", "eval/log_ratio"),
    ),
    Panel("value", "Critic", "Error of the values.", "error", ("value_error", "eval/value_error")),
    Panel(
        "gradient", "Gradient norm", "Before clipping.", "norm", ("grad_norm", "critic/grad_norm")
    ),
)  # fmt: skip


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each panel with something to show. `lines`: what `pipeline.progress.read_metrics` gives."""
    charts = (_chart(panel, lines) for panel in PANELS)
    return [chart for chart in charts if chart]


def last_values(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each metric's last value: held-out metrics are not logged at every step."""
    found: dict[str, float] = {}
    for line in lines:
        found |= line
    return found


def _chart(panel: Panel, lines: Sequence[Mapping[str, Any]]) -> Chart | None:
    logged = {name: [(line["step"], line[name]) for line in lines if name in line] for name in panel.names}
    finite = {name: [(s, v) for s, v in found if math.isfinite(v)] for name, found in logged.items()}
    lost = sum(map(len, logged.values())) - sum(map(len, finite.values()))
    binned = {name: averaged(found, POINTS) for name, found in finite.items() if found}
    if not binned:
        return None
    x = FRAME.x([step for found in binned.values() for step, _ in found])
    y = FRAME.y([value for found in binned.values() for _, value in found])
    longest = max(map(len, finite.values()))
    notes = [panel.meaning]
    if longest > POINTS:
        notes.append(f"Each point is the mean of about {math.ceil(longest / POINTS)} steps.")
    if lost:
        notes.append(f"{lost} values that are not finite are left out.")
    return Chart(
        id=f"curve-{panel.id}",
        title=panel.title,
        caption=" ".join(notes),
        frame=FRAME,
        x_label="optimizer step",
        y_label=panel.unit,
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        series=[_series(name, panel, found, x, y) for name, found in binned.items()],
        table=_table({name: averaged(found, ROWS) for name, found in binned.items()}),
    )


def averaged(found: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """(step, value) averaged in `most` stretches of equal length, or as it is if it is short. The last stretch ends at the last step."""
    if len(found) <= most:
        return list(found)
    cuts = [round(i * len(found) / most) for i in range(most + 1)]
    stretches = [found[a:b] for a, b in pairwise(cuts)]
    return [(fmean(s for s, _ in part), fmean(v for _, v in part)) for part in stretches]


def _series(name: str, panel: Panel, found: Sequence[tuple[float, float]], x: Scale, y: Scale) -> Series:
    """The same colour for training and held-out rows; dashes and hollow marks for these."""
    held_out, trained = name.startswith("eval/"), name.removeprefix("eval/")
    index = list(dict.fromkeys(n.removeprefix("eval/") for n in panel.names)).index(trained)
    every = max(1, (len(found) - 1) // (MARKS - 1))
    marked = [*found[::-1][::every]][::-1]  # from the end: the last value is the one that people ask for
    marks = [
        Mark(x(s), y(v), f"{name}\nstep {number(round(s))}: {number(v)}", hollow=held_out, size=0.75) for s, v in marked
    ]
    shown = trained + (", held-out" if held_out else "")
    return Series(shown, index, marks, [(x(s), y(v)) for s, v in found], "6 4" if held_out else "", held_out)


def _table(found: Mapping[str, Sequence[tuple[float, float]]]) -> Table:
    steps = sorted({round(step) for values in found.values() for step, _ in values})
    by_step = {name: {round(step): value for step, value in values} for name, values in found.items()}
    rows = [[str(step), *(number(by_step[name].get(step)) for name in found)] for step in steps]
    return Table(["step", *found], rows)
