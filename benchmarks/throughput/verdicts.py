"""From what contenders did to figures: medians, ratios, agreement, targets. Pure arithmetic on `race.Result`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.throughput.race import Result
from benchmarks.throughput.workloads import AGREEMENT_STEPS, Target, Workload

TOLERANCE = 1e-4
"""Largest relative difference between two implementations of one loss in float32."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Ratio:
    """`other` in units of `ours`; with equal precision and checkpointing, or not."""

    ours: str
    other: str
    alike: bool
    time: Spread  # of the rounds' own ratios: what slows a round down slows both
    memory: float  # ours / other, peak resident


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target beside what was measured."""

    target: Target
    value: float
    met: bool


def seconds(result: Result, steps: int) -> Spread:
    """Of the timed steps, the last ones."""
    return Spread.of(result.seconds[-steps:])


def paired(ours: Result, other: Result, steps: int) -> Spread:
    """How many times faster `ours` was, round by round."""
    rounds = zip(ours.seconds[-steps:], other.seconds[-steps:], strict=True)
    return Spread.of([slow / fast for fast, slow in rounds])


def ratios(results: Mapping[str, Result], steps: int) -> list[Ratio]:
    """Each of ours against each other contender, equal precision first."""
    found = []
    for ours in (r for r in results.values() if r.entry.contender == "ours"):
        for other in (r for r in results.values() if r.entry.contender != "ours"):
            alike = (ours.entry.precision, ours.entry.checkpointing) == (
                other.entry.precision,
                other.entry.checkpointing,
            )
            time, memory = paired(ours, other, steps), ours.peak_rss / other.peak_rss
            found.append(Ratio(ours.entry.name, other.entry.name, alike, time, memory))
    return sorted(found, key=lambda ratio: not ratio.alike)


def agreement(workload: Workload, results: Mapping[str, Result]) -> dict[str, float]:
    """Largest relative difference of the workload's two comparable contenders, by what is compared."""
    if workload.agreement is None:
        return {}
    ours, other = (results[name] for name in workload.agreement)
    assert ours.logprobs.keys() == other.logprobs.keys()
    logprobs = [
        _relative(a, b)
        for row, values in ours.logprobs.items()
        for a, b in zip(values, other.logprobs[row], strict=True)
    ]
    return {
        "log-probs of the first step's sequences": max(logprobs),
        "loss": _relative(ours.losses[0], other.losses[0]),
        "gradient norm": _relative(ours.grad_norms[0], other.grad_norms[0]),
        f"loss after {AGREEMENT_STEPS} steps": _relative(ours.losses[AGREEMENT_STEPS], other.losses[AGREEMENT_STEPS]),
    }


def agrees(differences: Mapping[str, float]) -> bool:
    """Whether every difference is within `TOLERANCE` (nan is not)."""
    return all(difference < TOLERANCE for difference in differences.values())


def judge(workload: Workload, results: Mapping[str, Result], steps: int) -> list[Verdict]:
    """Each target of the workload, met or missed."""
    verdicts = []
    for target in workload.targets:
        value = _measured(target, results, steps)
        verdicts.append(Verdict(target, value, target.met(value)))
    return verdicts


def _measured(target: Target, results: Mapping[str, Result], steps: int) -> float:
    ours = results[target.ours]
    if target.measure == "products":
        assert ours.products is not None
        return ours.products["seconds"] / min(ours.again)  # least times both: what else the machine did is in neither
    assert target.other is not None
    other = results[target.other]
    return paired(ours, other, steps).median if target.measure == "time" else ours.peak_rss / other.peak_rss


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)
