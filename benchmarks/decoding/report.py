"""The results as Markdown: every point, curves at equal KL, beams, and the papers' claims beside ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.decoding.beams import Gain
from benchmarks.decoding.measures import Measured
from benchmarks.decoding.points import Point
from benchmarks.reasoning.report import machine

BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 28.0)
"""Nats at which curves are compared."""
CURVES = ("best of n", "proxy", "ARGS", "CD", "TQ* direct", "TQ* indirect")
START = "SFT-sampled"
FROM_START = ("best of n", "proxy")
"""Curves that start there, at a KL of 0 (n = 1, w = 0). However long the leash, a guided decoder has the candidates alone to choose
from, and its KL ends at what leaving out the others costs."""

Found = Mapping[str, tuple[Point, Measured]]
"""Point's name → what was measured."""
Value = tuple[float, float]
"""Mean ± standard error."""


def page(found: Found, tabular: Mapping[str, Gain], arithmetic: Mapping[str, Gain], command: str) -> str:
    """The whole report."""
    parts = [
        f"`{command}`\n\n{machine()}\n",
        f"### Every decoder\n\n{every_point(found)}",
        f"### Reward at equal KL\n\n{at_equal_kl(found)}",
        f"### Beams\n\n{beams(found, tabular, arithmetic)}",
        f"### Claims\n\n{claims(found, tabular)}",
    ]
    return "\n".join(parts)


def every_point(found: Found) -> str:
    """One line a point."""
    head = ["decoder", "setting", "reward", "KL, nats", "diversity", "coherence", "tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for point, m in found.values():
        sign = "≤ " if point.kl == "bound" else ""
        cells = [point.curve, point.setting or "–", shown(m.reward), sign + shown(m.kl, 2), shown(m.diversity)]
        cells += [shown(m.coherence), f"{m.tokens_per_second:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: Value, digits: int = 3) -> str:
    """Mean ± standard error."""
    mean, error = value
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error > 0 else "")


# ------------------------------------------------------------------------------------------- at equal KL


def at_equal_kl(found: Found) -> str:
    """Reward of each curve at each budget."""
    lines = ["| KL, nats | " + " | ".join(CURVES) + " |", "|---" * (1 + len(CURVES)) + "|"]
    for budget in BUDGETS:
        cells = [reward_at(found, curve, budget) for curve in CURVES]
        lines.append(f"| {budget:g} | " + " | ".join("–" if cell is None else shown(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def reward_at(found: Found, curve: str, kl: float) -> Value | None:
    """Reward at this KL, on the straight line between the two settings next to it; None outside of the settings."""
    points = sorted((m.kl[0], m.reward) for p, m in found.values() if p.curve == curve)
    if curve in FROM_START:
        points = [(0.0, found[START][1].reward), *points]
    for (left, low), (right, high) in pairwise(points):
        if left <= kl <= right and right > left:
            share = (kl - left) / (right - left)
            value = low[0] + share * (high[0] - low[0])
            return value, math.hypot((1 - share) * low[1], share * high[1])
    return None


# ------------------------------------------------------------------------------------------------- beams


def beams(found: Found, tabular: Mapping[str, Gain], arithmetic: Mapping[str, Gain]) -> str:
    """Greedy decoding and beams on everything."""
    widths = ("1", "2", "5", "10")
    lines = ["| model | " + " | ".join(f"{w} beams" for w in widths) + " | 5 − 1 |", "|---" * 6 + "|"]
    for title, curve in (("reviews, SFT", "SFT"), ("reviews, aligned", "aligned")):
        rewards = {"1": found[f"{curve}-greedy"][1].reward}
        rewards |= {w: found[f"{curve}-beam-beams{w}"][1].reward for w in widths[1:]}
        lines.append(_line(title, rewards | {"5 − 1": difference(rewards["5"], rewards["1"])}, widths))
    lines += [_line(f"tabular optimum, {beta}", gain, widths) for beta, gain in tabular.items()]
    lines += [_line(f"arithmetic, {model}", gain, widths) for model, gain in arithmetic.items()]
    return "\n".join(lines) + "\n"


def _line(title: str, gain: Gain, widths: Sequence[str]) -> str:
    cells = [shown(gain[w]) if w in gain else "–" for w in (*widths, "5 − 1")]
    return f"| {title} | " + " | ".join(cells) + " |"


# ------------------------------------------------------------------------------------------------ claims


def claims(found: Found, tabular: Mapping[str, Gain]) -> str:
    """What the papers say, what was seen here, and whether they agree: beyond two standard errors, or not separable."""
    lines = ["| claim | says | here | |", "|---|---|---|---|"]
    settings = [p.setting for p, _ in found.values() if p.curve == "CD"]
    for other in ("CD", "ARGS"):
        pairs = {s: [_at(found, curve, s) for curve in ("TQ* direct", other)] for s in settings}
        best = max(pairs, key=lambda s: pairs[s][0][0])
        gain = difference(*pairs[best])
        says = "up to 1.45 × its reward" if other == "CD" else "ahead"
        here = f"{best}: {shown(pairs[best][0])} against {shown(pairs[best][1])} ({_times(*pairs[best])})"
        lines.append(f"| Transfer-Q* ahead of {other}, equal α | arXiv 2405.20495: {says} | {here} | {verdict(gain)} |")
        for kl in BUDGETS:
            own, theirs = reward_at(found, "TQ* direct", kl), reward_at(found, other, kl)
            if own is not None and theirs is not None:
                here = f"{shown(own)} against {shown(theirs)} ({_times(own, theirs)})"
                word = verdict(difference(own, theirs))
                lines.append(f"| the same at {kl:g} nats | – | {here} | {word} |")
    five, one = (found[name][1].reward for name in ("aligned-beam-beams5", "aligned-greedy"))
    gain = difference(five, one)
    lines.append(
        f"| 5 beams on the aligned policy | arXiv 2404.12358: +10–15 points | {shown(gain)} | {verdict(gain)} |"
    )
    for name, table in tabular.items():
        gain = table["5 − 1"]
        lines.append(f"| the same on the exact optimum, {name} | – | {shown(gain)} | {verdict(gain)} |")
    return "\n".join(lines) + "\n"


def _at(found: Found, curve: str, setting: str) -> Value:
    return next(m.reward for p, m in found.values() if (p.curve, p.setting) == (curve, setting))


def _times(one: Value, other: Value) -> str:
    return f"{one[0] / other[0]:.2f} ×" if one[0] > 0 and other[0] > 0 else "no ratio: a mean is not positive"


def difference(one: Value, other: Value) -> Value:
    """one − other, as if they were independent: they share their prompts, so that the error is too large rather than too small."""
    return one[0] - other[0], math.hypot(one[1], other[1])


def verdict(gain: Value) -> str:
    """What a difference says about a claim that it is positive."""
    if abs(gain[0]) <= 2 * gain[1]:
        return "not separable"
    return "**seen**" if gain[0] > 0 else "**contradicted**"
