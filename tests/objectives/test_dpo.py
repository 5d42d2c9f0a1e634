"""DPO, Plackett–Luce and TDPO: worked numbers, and what they have in common."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from pipeline.objectives.dpo import Dpo, dpo_loss
from pipeline.objectives.plackett_luce import PlackettLuce, plackett_luce_loss
from tests.batches import LENGTHS, as_out, assert_same_update, loss_of, make_batch, make_logprobs, with_ratios


def test_dpo_worked():
    """Rewards 1.5 and 0.5: Δ = 1, −log σ(1) = log(1 + e^{−1}) = 0.313262; flipped labels cost log(1 + e) = 1.313262."""
    chosen, rejected = torch.tensor([1.5, 0.5]), torch.tensor([0.5, 1.5])
    torch.testing.assert_close(dpo_loss(chosen, rejected), torch.tensor([0.3132617, 1.3132617]))
    smoothed = 0.9 * 0.3132617 + 0.1 * 1.3132617
    torch.testing.assert_close(dpo_loss(chosen, rejected, 0.1)[0], torch.tensor(smoothed))


def test_dpo_objective_worked():
    """ℓ = (2, −3), β 0.1: Δ = 0.5, loss log(1 + e^{−0.5}) = 0.474077. The chosen token's "log π" is ℓ − 1 = 1 (no
    probability, but easy to follow), so an NLL term with coefficient 0.5 takes 0.5 off."""
    batch, raw = with_ratios([[2.0, -3.0]])
    out = as_out(raw, batch)
    assert loss_of(Dpo(beta=0.1), out, batch).item() == pytest.approx(0.474077, abs=1e-6)
    assert loss_of(Dpo(beta=0.1, nll_weight=0.5), out, batch).item() == pytest.approx(0.474077 - 0.5, abs=1e-6)
    torch.testing.assert_close(Dpo(beta=0.1).implied_reward(out, batch), torch.tensor([[0.2, -0.3]]))


def test_label_smoothing_has_its_optimum_at_the_log_odds():
    """−(1−ε) log σ(Δ) − ε log σ(−Δ) is flat where σ(Δ) = 1 − ε, and lowest there."""
    epsilon = 0.2
    best = math.log((1 - epsilon) / epsilon)
    margin = torch.tensor([best - 0.5, best, best + 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin, torch.zeros_like(margin), epsilon)
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    assert slope[1].abs().item() < 1e-12
    assert slope[0].item() < 0 < slope[2].item()


def test_plackett_luce_worked():
    """Rewards log 4, log 2, log 1: P = 4/7 · 2/3 · 1 = 8/21."""
    reward = torch.tensor([[4.0, 2.0, 1.0]]).log()
    loss = plackett_luce_loss(reward, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor([math.log(21 / 8)]))


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    reward = torch.randn(4, dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(4))))
    loss = plackett_luce_loss(reward[orders], torch.ones(len(orders), 4, dtype=torch.bool))
    assert (-loss).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_plackett_luce_of_pairs_is_dpo():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    assert_same_update(PlackettLuce(beta=0.3), Dpo(beta=0.3), batch, make_logprobs(batch))


def test_ragged_rankings_equal_the_unpadded_ones():
    lengths = LENGTHS["ranking"]
    batch = make_batch(lengths, responses=6, tokens=9)
    raw = make_logprobs(batch)
    objective = PlackettLuce(beta=0.3)
    total = objective(as_out(raw, batch), batch).terms["ranking"].total
    (grad,) = torch.autograd.grad(total, raw)
    assert grad.isfinite().all()
    assert torch.equal(grad[~batch.response_mask], torch.zeros(int((~batch.response_mask).sum())))
    alone = 0.0
    for b, row in enumerate(lengths):
        index = torch.tensor([b])
        reward = objective.implied_reward(as_out(raw, batch), batch)[index, : len(row)]
        alone = alone + plackett_luce_loss(reward, torch.ones(1, len(row), dtype=torch.bool)).sum()
    torch.testing.assert_close(total, alone)
    torch.testing.assert_close(grad, torch.autograd.grad(alone, raw)[0])


def test_padding_of_plackett_luce_may_hold_anything():
    reward = torch.tensor([[1.0, 0.5, torch.inf, torch.nan]], requires_grad=True)
    valid = torch.tensor([[True, True, False, False]])
    loss = plackett_luce_loss(reward, valid)
    (grad,) = torch.autograd.grad(loss.sum(), reward)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-0.5))]))
    slope = 1 / (1 + math.exp(0.5))
    torch.testing.assert_close(grad, torch.tensor([[-slope, slope, 0.0, 0.0]]))
