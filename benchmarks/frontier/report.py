"""The benchmark's results: a Markdown page, and the reward–KL frontier as a page of the sweeps' kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.frontier.claims import KL_LEVELS, REWARD, Curves, Judged, common_reward, drift, judge
from benchmarks.frontier.curves import Policy, at
from benchmarks.frontier.methods import METHODS
from benchmarks.reasoning.report import machine
from pipeline.report import Point, Trial, write_sweep_report

PAGE = "frontier.html"
SHOWN = {
    "samples/reward": ("reward", 3),
    "samples/kl": ("KL(π‖ref)", 2),
    "reference/kl": ("KL(ref‖π)", 2),
    "samples/entropy": ("entropy", 3),
    "samples/distinct_1": ("distinct-1", 3),
    "samples/distinct_2": ("distinct-2", 3),
    "samples/self_bleu_across": ("self-BLEU", 1),
    "ece": ("ECE", 3),
    "eval/accuracy": ("accuracy", 3),
}
"""Metric → title and decimals of its column."""


def markdown(curves: Curves, seeds: Sequence[int], command: str) -> str:
    """All tables. curves: (method, seed) → policies."""
    parts = [f"`{command}`\n", f"{machine()}\n", "### Policies\n", policy_table(curves)]
    parts += ["### Reward at equal KL\n", level_table(curves, seeds), "### Claims\n", claim_table(judge(curves))]
    return "\n".join([*parts, "### Drift of the chosen responses\n", drift_table(curves)])


def policy_table(curves: Curves) -> str:
    """A line per method and strength: means over seeds, and the seeds' range where it shows."""
    reference = next((p for policies in curves.values() for p in policies if p.measured), None)
    lines = _head(["policy", "β (α)", *(title for title, _ in SHOWN.values())])
    if reference is not None:
        cells = [reference.numbers.get(name.replace("samples/", "reference/")) for name in SHOWN]
        shown = [
            _number(0.0 if n.endswith("/kl") else c, d) if n.startswith(("samples/", "reference/")) else "–"
            for c, (n, (_, d)) in zip(cells, SHOWN.items(), strict=True)
        ]
        lines.append(_line(["the review model (reference)", "–", *shown]))
    for method, strength, policies in _by_strength(curves):
        measured = [p for p in policies if p.measured]
        cells = [
            _spread([p.numbers[name] for p in measured if name in p.numbers], digits)
            for name, (_, digits) in SHOWN.items()
        ]
        ended = sorted({p.state for p in policies} - {"finished"})
        lines.append(
            _line([METHODS[method].title, f"{strength:g}" + (f" ({', '.join(ended)})" if ended else ""), *cells])
        )
    return "\n".join(lines) + "\n"


def level_table(curves: Curves, seeds: Sequence[int]) -> str:
    """Interpolated along each curve: reward at equal KL, entropy and distinct-2 at equal reward."""
    level = common_reward(curves, [name for name in METHODS if name not in ("unlikelihood", "dpo_after_sft")])
    columns: dict[str, Callable[[Sequence[Policy]], tuple[float, float] | None]] = {
        f"reward at {kl:g} nats": lambda c, kl=kl: at(c, "kl", kl, REWARD) for kl in KL_LEVELS
    }
    if level is not None:
        for title, metric in (
            ("KL", "samples/kl"),
            ("entropy", "samples/entropy"),
            ("distinct-2", "samples/distinct_2"),
        ):
            columns[f"{title} at reward {level:.2f}"] = lambda c, m=metric: at(c, "reward", level, m)
    lines = _head(["method", *columns])
    for method in _methods(curves):
        if METHODS[method].after_sft:  # its KL is to another model
            continue
        cells = []
        for measure in columns.values():
            values = [measure(curves[method, seed]) for seed in seeds if (method, seed) in curves]
            cells.append("–" if None in values else _spread([v[0] for v in values], 3))
        lines.append(_line([METHODS[method].title, *cells]))
    return "\n".join(lines) + "\n"


def claim_table(judged: Sequence[Judged]) -> str:
    """Each claim, the gap in each world, and the verdict."""
    lines = _head(["claim", "says", "here", "gap, seed by seed", "± s.e.", ""])
    for one in judged:
        gaps = ", ".join(f"{gap:+.3f}" for gap in one.gaps)
        lines.append(
            _line([one.claim.text, one.claim.source, one.where, gaps, f"{one.error:.3f}", f"**{one.verdict}**"])
        )
    return "\n".join(lines) + "\n"


def drift_table(curves: Curves) -> str:
    """The chosen and rejected log-ratio of held-out pairs over the steps, without and with SFT first."""
    lines = _head(["start", "β", "chosen log-ratio, nats, over training", "at the end, seed by seed"])
    for method, start in (("dpo", "without SFT"), ("dpo_after_sft", "after SFT on the chosen")):
        for strength, ends in drift(curves, method).items():
            own = [p for (name, _), found in curves.items() if name == method for p in found if p.strength == strength]
            steps = [step for step, _, _ in own[0].drift]
            means = [fmean(p.drift[i][1] / strength for p in own) for i in range(min(len(p.drift) for p in own))]
            path = ", ".join(f"{step}: {mean:+.2f}" for step, mean in zip(steps, means, strict=False))
            lines.append(_line([start, f"{strength:g}", path, ", ".join(f"{end:+.2f}" for end in ends)]))
    return "\n".join(lines) + "\n"


def write_page(curves: Curves, folder: Path) -> Path:
    """The frontier with all policies, as a sweep's page."""
    policies = [p for own in curves.values() for p in own if not METHODS[p.method].after_sft]
    title = "Controlled sentiment: reward and KL of every objective"
    return write_sweep_report(title, [_trial(p) for p in policies], folder / PAGE, REWARD)


def _trial(policy: Policy) -> Trial:
    numbers, method = policy.numbers, METHODS[policy.method]
    points = ()
    if policy.measured:
        errors = {"kl_error": numbers.get("samples/kl_se"), "reward_error": numbers.get("samples/reward_se")}
        place = {"kl": numbers["samples/kl"], "reward": numbers[REWARD], "label": f"{policy.strength:g}"}
        points = (Point(**place, **errors),)
    return Trial(
        label=f"{method.knob} {policy.strength:g}, seed {policy.seed}",
        objective=method.title,
        parameters={f"objective.{method.knob}": policy.strength, "seed": policy.seed},
        metrics=numbers,
        status=policy.state,
        reason=policy.reason,
        points=points,
    )


# -------------------------------------------------------------------------------------------------- tables


def _methods(curves: Curves) -> list[str]:
    return [name for name in METHODS if any(method == name for method, _ in curves)]


def _by_strength(curves: Curves) -> Iterator[tuple[str, float, list[Policy]]]:
    for name in _methods(curves):
        own = [p for (method, _), policies in curves.items() if method == name for p in policies]
        for strength in sorted({p.strength for p in own}):
            yield name, strength, [p for p in own if p.strength == strength]


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|---" * len(titles) + "|"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean, and least to most where there are several."""
    if not values:
        return "–"
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"
