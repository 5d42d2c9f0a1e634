"""Reward model: Bradley–Terry and Plackett–Luce on scores, and where a score stands."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.contracts import PolicyOut
from pipeline.objectives.reward_model import RewardModel
from tests.batches import as_trajectories, loss_of, make_batch


def scored(scores: list[list[float]], lengths: list[list[int]]):
    batch = make_batch(lengths)
    tensor = torch.tensor(scores, requires_grad=True)
    return batch, tensor, PolicyOut(torch.zeros(batch.response_mask.shape), scores=tensor)


def test_pairs_worked():
    """Scores 2 and 0.5: −log σ(1.5) = 0.201413; 0.1 · (2 + 0.5)² more to keep their sum near 0."""
    batch, scores, out = scored([[2.0, 0.5]], [[3, 1]])
    assert loss_of(RewardModel(), out, batch).item() == pytest.approx(0.2014133, abs=1e-6)
    loss = loss_of(RewardModel(center_weight=0.1), out, batch)
    assert loss.item() == pytest.approx(0.2014133 + 0.1 * 6.25, abs=1e-6)
    (grad,) = torch.autograd.grad(loss, scores)
    slope = 1 / (1 + math.exp(1.5))
    torch.testing.assert_close(grad, torch.tensor([[-slope + 0.2 * 2.5, slope + 0.2 * 2.5]]))


def test_rankings_worked():
    """Scores log 4, log 2, log 1: P = 4/7 · 2/3; the second prompt has a pair, 3/4, and what stands at its padding is nothing."""
    batch, _, out = scored([[math.log(4), math.log(2), 0.0], [math.log(3), 0.0, 99.0]], [[1, 2, 1], [2, 2]])
    assert loss_of(RewardModel(), out, batch).item() == pytest.approx((math.log(21 / 8) + math.log(4 / 3)) / 2)
    assert RewardModel().implied_reward(out, batch)[1].tolist() == pytest.approx([math.log(3), 0.0, 0.0])
    centered = RewardModel(center_weight=1.0)
    squares = math.log(4) ** 2 + math.log(2) ** 2 + math.log(3) ** 2
    extra = loss_of(centered, out, batch) - loss_of(RewardModel(), out, batch)
    sums = math.log(8) ** 2 + math.log(3) ** 2
    assert extra.item() == pytest.approx(sums / 2, rel=1e-5), "a mean over the two prompts"
    metrics = centered(out, batch).metrics
    assert (metrics["score"].total.item(), metrics["score"].weight.item()) == pytest.approx((math.log(24), 5))
    assert metrics["score_square"].total.item() == pytest.approx(squares)


def test_a_weight_counts_in_the_centring_as_everywhere():
    """Sums 2 and −3 of weights 1 and 3: (4 + 3 · 9) / 4."""
    batch = make_batch([[1, 2], [2, 2]], weight=[1, 3])
    out = PolicyOut(torch.zeros(batch.response_mask.shape), scores=torch.tensor([[1.5, 0.5], [-1.0, -2.0]]))
    extra = loss_of(RewardModel(center_weight=1.0), out, batch) - loss_of(RewardModel(), out, batch)
    assert extra.item() == pytest.approx(31 / 4, rel=1e-5)


def test_the_score_stands_on_the_last_trained_token():
    batch, _, out = scored([[2.0, 0.5]], [[3, 1]])
    torch.testing.assert_close(
        RewardModel().token_reward(out, batch), torch.tensor([[[0.0, 0.0, 2.0], [0.5, 0.0, 0.0]]])
    )
    batch = as_trajectories(make_batch([[5, 1]]))  # tokens 1 and 4 are the environment's
    assert RewardModel().token_reward(out, batch)[0, 0].tolist() == [0.0, 0.0, 0.0, 2.0, 0.0]
    batch = as_trajectories(make_batch([[6, 1]]))
    assert RewardModel().token_reward(out, batch)[0, 0].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
