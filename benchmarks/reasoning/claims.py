"""What the papers say, and whether the scale model agrees: each claim is a comparison of two rows of the table.

A claim counts as seen when every seed says so and the mean gap is beyond twice its binomial standard error, as contradicted
when the same holds for the opposite. All else is not separable, and so is everything with fewer than three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.reasoning.methods import TEST_PROMPTS

Scores = Mapping[str, float]
Rows = Mapping[str, Sequence[Scores]]
"""Method → scores, one per seed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`better` beats `worse` in `block`, says `source`."""

    text: str
    source: str
    block: str
    better: str
    worse: str


ENOUGH_SEEDS = 3
PAPER = "DQO, arXiv 2410.09302"
CLAIMS = (
    Claim("DQO lifts greedy accuracy (GSM8K 59.1 → 87.3 %)", PAPER, "mid", "dqo", "sft"),
    Claim("DQO lifts greedy accuracy (GSM8K 59.1 → 87.3 %)", PAPER, "hard", "dqo_slow_no_is", "sft"),
    Claim("DQO is ahead of rejection SFT", PAPER, "mid", "dqo", "rejection_sft"),
    Claim("DQO is ahead of rejection SFT", PAPER, "hard", "dqo_slow_no_is", "rejection_sft"),
    Claim("DQO is ahead of DPO", PAPER, "mid", "dqo", "dpo"),
    Claim("DQO is ahead of DPO", PAPER, "hard", "dqo_slow_no_is", "dpo"),
    Claim("DQO is ahead of KTO", PAPER, "mid", "dqo", "kto"),
    Claim("DQO is ahead of KTO", PAPER, "hard", "dqo_slow_no_is", "kto"),
    Claim("DQO is ahead of DRO", PAPER, "mid", "dqo", "dro"),
    Claim("DQO is ahead of DRO", PAPER, "hard", "dqo_slow_no_is", "dro"),
    Claim("DQO is ahead of DRO, both with process rewards", PAPER, "hard", "dqo_process", "dro_process"),
    Claim("process rewards help DQO", PAPER, "hard", "dqo_process", "dqo"),
    Claim("importance weights help", PAPER, "mid", "dqo", "dqo_no_is"),
    Claim("importance weights help (slow critic)", PAPER, "hard", "dqo_slow", "dqo_slow_no_is"),
    Claim("importance weights help (process rewards)", PAPER, "hard", "dqo_process", "dqo_process_no_is"),
    Claim("λ = 1 is ahead of 0.95", PAPER, "mid", "dqo", "dqo_lambda"),
    Claim("λ = 1 is ahead of 0.95", PAPER, "hard", "dqo_slow_no_is", "dqo_slow_lambda"),
    Claim("OREO is ahead of DQO", "OREO, arXiv 2412.16145", "mid", "oreo", "dqo"),
    Claim("OREO is ahead of DQO", "OREO, arXiv 2412.16145", "hard", "oreo", "dqo_slow_no_is"),
)


def mean(scores: Sequence[Scores], name: str = "greedy") -> float:
    """Over seeds."""
    return sum(score[name] for score in scores) / len(scores)


def verdict(better: Sequence[Scores], worse: Sequence[Scores]) -> str:
    """seen | not separable | contradicted."""
    gaps = [one["greedy"] - other["greedy"] for one, other in zip(better, worse, strict=True)]
    if len(gaps) < ENOUGH_SEEDS or abs(sum(gaps)) <= 2 * math.sqrt(
        sum(_variance(score) for score in [*better, *worse])
    ):
        return "not separable"
    if min(gaps) > 0:
        return "seen"
    return "contradicted" if max(gaps) < 0 else "not separable"


def _variance(score: Scores) -> float:
    """Binomial, of one greedy accuracy."""
    return score["greedy"] * (1 - score["greedy"]) / TEST_PROMPTS


def claims_table(results: Mapping[str, Rows]) -> str:
    """Markdown; claims whose rows are not there (yet) are left out. results: block → rows."""
    lines = ["| claim | says | block | here: mean greedy accuracy | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        rows = results.get(claim.block, {})
        if claim.better in rows and claim.worse in rows:
            better, worse = rows[claim.better], rows[claim.worse]
            numbers = f"`{claim.better}` {mean(better):.3f}, `{claim.worse}` {mean(worse):.3f}"
            lines.append(
                f"| {claim.text} | {claim.source} | {claim.block} | {numbers} | **{verdict(better, worse)}** |"
            )
    return "\n".join(lines) + "\n"
