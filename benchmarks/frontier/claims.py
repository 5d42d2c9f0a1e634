"""What the papers say, and whether the scale model agrees: each claim compares two curves, world by world.

A claim counts as seen when it holds in every world and the mean gap is beyond twice its standard error (that of the held-out samples:
the worlds share their prompts, so it is on the safe side), as contradicted when the same is true of its opposite; all else is not
separable. What a curve does not reach is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from benchmarks.frontier.curves import Policy, at, most

Curves = Mapping[tuple[str, int], Sequence[Policy]]
"""(method, seed) → its policies."""
Value = tuple[float, float]
Verdict = Literal["seen", "not separable", "contradicted"]
KL_LEVELS = (1.0, 3.0, 6.0)
"""Nats per completion at which rewards are compared."""
DIVERGENCES = ("dpo", "f_dpo_js", "f_dpo_alpha", "f_dpo_forward")
ENTROPY, DISTINCT, REWARD = "samples/entropy", "samples/distinct_2", "samples/reward"
DPO, F_DPO, TDPO = "DPO, arXiv 2305.18290", "f-DPO, arXiv 2309.16240", "TDPO, arXiv 2404.11999"


@dataclass(frozen=True, slots=True)
class Claim:
    """`more` has more of something than `less`, says `source`."""

    text: str
    source: str
    more: str
    less: str
    measure: Literal["reward at KL", "entropy at reward", "distinct-2 at reward", "highest reward"]


CLAIMS = (
    Claim("DPO's frontier is above unlikelihood's", DPO, "dpo", "unlikelihood", "reward at KL"),
    Claim("TDPO₂'s frontier is above DPO's", TDPO, "tdpo2", "dpo", "reward at KL"),
    Claim("TDPO₂'s frontier is above TDPO₁'s", TDPO, "tdpo2", "tdpo1", "reward at KL"),
    Claim("TDPO₂'s frontier is above f-DPO's with forward KL", TDPO, "tdpo2", "f_dpo_forward", "reward at KL"),
    Claim("TDPO₂ keeps more entropy than DPO", TDPO, "tdpo2", "dpo", "entropy at reward"),
    Claim("reverse KL reaches more reward than forward KL", F_DPO, "dpo", "f_dpo_forward", "highest reward"),
    Claim("reverse KL reaches more reward than JS", F_DPO, "dpo", "f_dpo_js", "highest reward"),
    Claim("forward KL is more diverse than reverse KL", F_DPO, "f_dpo_forward", "dpo", "entropy at reward"),
    Claim("forward KL is more diverse than reverse KL", F_DPO, "f_dpo_forward", "dpo", "distinct-2 at reward"),
    Claim("forward KL is more diverse than JS", F_DPO, "f_dpo_forward", "f_dpo_js", "entropy at reward"),
    Claim("rankings of four beat pairs (our question)", "–", "plackett_luce", "dpo", "reward at KL"),
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim beside what was seen: the gap in each world, and the standard error of their mean."""

    claim: Claim
    where: str
    gaps: list[float]
    error: float

    @property
    def verdict(self) -> Verdict:
        gap = fmean(self.gaps)
        if len(self.gaps) < 2 or abs(gap) <= 2 * self.error:
            return "not separable"
        if min(self.gaps) > 0:
            return "seen"
        return "contradicted" if max(self.gaps) < 0 else "not separable"


def judge(curves: Curves) -> list[Judged]:
    """All claims whose curves are there, at each level that both reach in every world."""
    found = [_compare(claim, where, measure, curves) for claim in CLAIMS for where, measure in _measures(claim, curves)]
    return [judged for judged in found if judged is not None]


def common_reward(curves: Curves, methods: Sequence[str]) -> float | None:
    """Half-way from the reference's reward to the best that all of these methods reach in all worlds."""
    own = [
        policies for (method, _), policies in curves.items() if method in methods and any(p.measured for p in policies)
    ]
    if not own:
        return None
    start = fmean(p.numbers["reference/reward"] for policies in own for p in policies if p.measured)
    return (start + min(most(policies, REWARD)[0] for policies in own)) / 2


def _measures(claim: Claim, curves: Curves) -> list[tuple[str, Callable[[Sequence[Policy]], Value | None]]]:
    if claim.measure == "reward at KL":
        return [(f"reward at {kl:g} nats", lambda c, kl=kl: at(c, "kl", kl, REWARD)) for kl in KL_LEVELS]
    if claim.measure == "highest reward":
        return [("highest reward", lambda c: most(c, REWARD) if any(p.measured for p in c) else None)]
    level = common_reward(curves, [claim.more, claim.less])
    if level is None:
        return []
    name, metric = ("entropy", ENTROPY) if claim.measure.startswith("entropy") else ("distinct-2", DISTINCT)
    return [(f"{name} at reward {level:.2f}", lambda c: at(c, "reward", level, metric))]


def _compare(
    claim: Claim, where: str, measure: Callable[[Sequence[Policy]], Value | None], curves: Curves
) -> Judged | None:
    seeds = sorted({seed for method, seed in curves if method == claim.more and (claim.less, seed) in curves})
    pairs = [(measure(curves[claim.more, seed]), measure(curves[claim.less, seed])) for seed in seeds]
    if not pairs or any(value is None for pair in pairs for value in pair):
        return None
    gaps = [more[0] - less[0] for more, less in pairs]
    error = math.sqrt(sum(more[1] ** 2 + less[1] ** 2 for more, less in pairs)) / len(pairs)
    return Judged(claim, where, gaps, error)


# ---------------------------------------------------------------------------------------------------- drift


def drift(curves: Curves, method: str) -> dict[float, list[float]]:
    """β → the chosen log-ratio of held-out pairs at the end of training, one per seed, nats."""
    found: dict[float, list[float]] = {}
    for (name, _), policies in sorted(curves.items()):
        if name == method:
            for policy in policies:
                if policy.drift:
                    found.setdefault(policy.strength, []).append(policy.drift[-1][1] / policy.strength)
    return found
