"""Rewards and wins: averaged by prompt, ties one half, failures nowhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.estimates import share
from pipeline.evaluation.findings import Unmeasurable
from pipeline.evaluation.rewards import side_by_side, win_rate
from pipeline.evaluation.samples import Samples

NAN = math.nan


def samples(scores: list[list[float]]) -> Samples:
    groups = [[{"text": f"{score}", "token_ids": [1]} for score in group] for group in scores]
    prompts = [f"p{i}" for i in range(len(scores))]
    return Samples([[1]] * len(scores), prompts, groups, np.array(scores, dtype=np.float64), [])


def test_wins_by_hand() -> None:
    """Prompt 1: 3 and 1 against 2 and 1: win, win, loss, tie = 2.5/4. Prompt 2: a loss. Prompt 3: a tie."""
    found = win_rate(samples([[3, 1], [0, 0], [5, 5]]), samples([[2, 1], [1, 1], [5, 5]]))
    assert found.value == pytest.approx((2.5 / 4 + 0 + 0.5) / 3)
    assert found == share(found.value, 3)


def test_a_model_against_itself_wins_half() -> None:
    own = samples([[0.3, 0.7], [0.1, 0.2]])
    assert win_rate(own, own).value == 0.5


def test_what_was_not_scored_counts_nowhere() -> None:
    found = win_rate(samples([[1, NAN], [NAN, NAN]]), samples([[0, 2], [0, 0]]))
    assert (found.value, found.n) == (0.5, 1)
    with pytest.raises(Unmeasurable, match="no prompt has scored completions of both"):
        win_rate(samples([[NAN]]), samples([[1]]))


def test_rewards_leave_out_failures_before_prompts_are_averaged() -> None:
    own = samples([[1, NAN], [NAN, NAN], [2, 4]])
    assert own.rewards().tolist() == [1.0, 3.0]
    assert own.metrics()["samples/reward"] == 2.0


def test_side_by_side_shows_the_first_completions_with_scores() -> None:
    before, after = samples([[1.0, 9.0], [NAN, 9.0]]), samples([[2.0, 9.0], [3.0, 9.0]])
    pairs = side_by_side(before, after, 5)
    assert [(p.prompt, p.before, p.after, p.score_before, p.score_after) for p in pairs] == [
        ("p0", "1.0", "2.0", 1.0, 2.0),
        ("p1", "nan", "3.0", None, 3.0),
    ]
    assert len(side_by_side(before, after, 1)) == 1
