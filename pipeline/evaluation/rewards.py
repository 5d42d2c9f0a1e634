"""What samples are worth under the scorer: mean rewards of policy and reference, and how often one beats the other.

Completions of one prompt are not independent: every number is averaged by prompt first, and intervals are over prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluation.estimates import mean, share
from pipeline.evaluation.findings import Findings, Unmeasurable
from pipeline.evaluation.results import Metric, SamplePair
from pipeline.evaluation.samples import Samples

if TYPE_CHECKING:
    from pipeline.evaluation.study import Study


def measure(study: Study) -> Findings:
    """Rewards of policy and reference, the policy's wins over it, failures of the scorer, and a few completions side by side."""
    ours, theirs = study.samples, study.reference_samples
    failed, total = len(ours.failures) + len(theirs.failures), 2 * sum(map(len, ours.completions))
    return Findings(
        metrics={
            "samples/reward": mean(ours.rewards()),
            "reference/reward": mean(theirs.rewards()),
            "samples/win_rate_over_reference": win_rate(ours, theirs),
            "scorer/failed": Metric(value=failed, n=total),
        }
    )


def measure_second(study: Study) -> Findings:
    """The policy against `evaluation.against`, on the same prompts."""
    ours, theirs = study.samples, study.second_samples
    return Findings(
        metrics={
            "second/reward": mean(theirs.rewards()),
            "samples/win_rate": win_rate(ours, theirs),
            "scorer/failed_second": Metric(value=len(theirs.failures), n=sum(map(len, theirs.completions))),
        }
    )


def win_rate(ours: Samples, theirs: Samples) -> Metric:
    """P(score of ours > score of theirs), ties one half: all pairs of a prompt's scored completions, then the mean over prompts.

    The interval is Wilson's over prompts. Raises Unmeasurable where no prompt has a score on both sides.
    """
    assert ours.scores is not None and theirs.scores is not None
    wins = []
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        gap = mine[~np.isnan(mine)][:, None] - other[~np.isnan(other)][None, :]
        if gap.size:
            wins.append(float(np.mean((gap > 0) + 0.5 * (gap == 0))))
    if not wins:
        raise Unmeasurable("no prompt has scored completions of both models")
    return share(float(np.mean(wins)), len(wins))


def side_by_side(before: Samples, after: Samples, count: int) -> list[SamplePair]:
    """The first completions of the first `count` prompts."""

    def score(samples: Samples, i: int) -> float | None:
        if samples.scores is None or np.isnan(samples.scores[i, 0]):
            return None
        return float(samples.scores[i, 0])

    return [
        SamplePair(
            prompt=after.texts[i],
            before=before.completions[i][0]["text"],
            after=after.completions[i][0]["text"],
            score_before=score(before, i),
            score_after=score(after, i),
        )
        for i in range(min(count, len(after.texts)))
    ]
