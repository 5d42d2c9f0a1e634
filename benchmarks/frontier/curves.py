"""One curve: an objective swept over the strengths of its leash, and the policies that this led to.

The sweep is the product's own (`tune.sweep`, in this process): each trial trains, each finished one is evaluated on its own samples of
the held-out prompts. Interpolation along a curve compares methods at equal KL or equal reward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from benchmarks.frontier.methods import METHODS, Size, grid_of
from benchmarks.frontier.worlds import Place, configure
from pipeline.progress import METRICS_FILE, read_metrics

Numbers = dict[str, float]
Axis = Literal["kl", "reward"]


@dataclass(frozen=True, slots=True)
class Policy:
    """One trained model and what was measured of it; also one entry of results.json."""

    method: str
    strength: float  # β, or α of the unlikelihood
    seed: int
    state: str  # of its trial
    reason: str
    run: str
    steps: int
    seconds: float  # of its training
    numbers: Numbers  # of its evaluation; `<name>_se` is a standard error
    drift: list[tuple[int, float, float]]  # (step, chosen, rejected): implicit rewards of held-out pairs

    @property
    def measured(self) -> bool:
        return {"samples/kl", "samples/reward"} <= self.numbers.keys()


def run_curve(place: Place, size: Size, name: str, seed: int) -> list[Policy]:
    """Sweep one method in one world; what an earlier call finished is not repeated."""
    from tune.sweep import conduct

    method = METHODS[name]
    model = json.loads(place.sft(seed).read_text()) if method.after_sft else place.model
    space = {f"objective.{method.knob}": grid_of(method, size.points)}
    sweep = {"space": space, "metric": "eval/accuracy", "evaluate": True}
    own = {"name": f"frontier-{name}-s{seed}", "objective": dict(method.objective), "sweep": sweep}
    own["sampling"] = {"per_prompt": size.per_prompt}
    table = conduct(configure(place, method.data, model, seed, own), local=True).sweep.table
    return [
        Policy(
            method=name,
            strength=float(trial.overrides[f"objective.{method.knob}"]),
            seed=seed,
            state=trial.state,
            reason=trial.reason,
            run=trial.run,
            steps=trial.step,
            seconds=trial.seconds,
            numbers=trial.evaluation,
            drift=_drift(Path(trial.run)),
        )
        for trial in table.trials.values()
    ]


def _drift(run: Path) -> list[tuple[int, float, float]]:
    names = "eval/reward/chosen", "eval/reward/rejected"
    lines = read_metrics(run / METRICS_FILE)
    return [(int(line["step"]), line[names[0]], line[names[1]]) for line in lines if names[0] in line]


# -------------------------------------------------------------------------------------------- along a curve


def at(policies: Sequence[Policy], axis: Axis, level: float, metric: str) -> tuple[float, float] | None:
    """A metric and its standard error where a curve's KL or reward is `level`; None where it does not get there.

    policies: one method in one world. Between two policies, and between the reference (KL 0) and the first one, it is
    interpolated linearly; where the curve passes a level more than once, the first time counts.
    """
    points = sorted((p.numbers for p in policies if p.measured), key=lambda n: n["samples/kl"])
    if not points:
        return None
    points = [_reference(points[0]), *points]
    for one, other in pairwise(points):
        low, high = one[f"samples/{axis}"], other[f"samples/{axis}"]
        if min(low, high) <= level <= max(low, high) and low != high:
            share = (level - low) / (high - low)
            value = (1 - share) * one[metric] + share * other[metric]
            errors = (1 - share) * one.get(f"{metric}_se", 0.0), share * other.get(f"{metric}_se", 0.0)
            return value, math.hypot(*errors)
    return None


def _reference(numbers: Numbers) -> Numbers:
    """The reference as a policy of KL 0."""
    own = {name.replace("reference/", "samples/", 1): v for name, v in numbers.items() if name.startswith("reference/")}
    return own | {"samples/kl": 0.0, "samples/kl_se": 0.0}


def most(policies: Sequence[Policy], metric: str) -> tuple[float, float]:
    """The highest value along a curve, with its standard error."""
    best: Any = max((p.numbers for p in policies if p.measured), key=lambda n: n[metric])
    return best[metric], best.get(f"{metric}_se", 0.0)
