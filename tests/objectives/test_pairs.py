"""IPO, SimPO, ORPO and unlikelihood: worked numbers on pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pipeline.objectives.dpo import Dpo
from pipeline.objectives.ipo import Ipo, ipo_loss
from pipeline.objectives.orpo import Orpo, log_odds, odds_ratio_loss
from pipeline.objectives.simpo import SimPo, simpo_loss
from pipeline.objectives.unlikelihood import Unlikelihood, unlikelihood_loss
from tests.batches import as_out, assert_same_update, loss_of, make_batch, make_logprobs, rows_of


def test_ipo_worked():
    """β 0.25 aims at 1/(2β) = 2 nats: margins 5, 2 and −1 cost 9, 0 and 9."""
    torch.testing.assert_close(ipo_loss(torch.tensor([5.0, 2.0, -1.0]), 0.25), torch.tensor([9.0, 0.0, 9.0]))


def test_ipo_objective_worked():
    """ℓ = (3 · 0.5, 1 · −0.5): the sums' margin is 2, target 5, loss 9; the means' is 1, loss 16."""
    batch = make_batch([[3, 1]])
    ratio = torch.tensor([[[0.5, 0.5, 0.5], [-0.5, 0.0, 0.0]]])
    out = as_out(batch.ref_logprobs + ratio, batch)
    assert loss_of(Ipo(beta=0.1), out, batch).item() == pytest.approx(9.0, abs=1e-5)
    assert loss_of(Ipo(beta=0.1, length_normalised=True), out, batch).item() == pytest.approx(16.0, abs=1e-5)
    torch.testing.assert_close(Ipo(beta=0.1).implied_reward(out, batch), torch.tensor([[0.15, -0.05]]))
    normalised = Ipo(beta=0.1, length_normalised=True)
    torch.testing.assert_close(normalised.implied_reward(out, batch), torch.tensor([[0.05, -0.05]]))
    torch.testing.assert_close(normalised.token_reward(out, batch)[0, 0], torch.full((3,), 0.05 / 3))


def test_simpo_worked():
    """Mean log-probs −0.5 and −1.5, β 2, γ 1.5: −log σ(−1 + 3 − 1.5) = log(1 + e^{−0.5}) = 0.474077."""
    torch.testing.assert_close(simpo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), 1.5), torch.tensor([0.4740770]))
    batch = make_batch([[3, 2]])
    out = as_out(torch.tensor([[[-0.25, -0.5, -0.75], [-1.0, -2.0, 9.0]]]), batch)
    objective = SimPo(beta=2.0, gamma=1.5)
    assert loss_of(objective, out, batch).item() == pytest.approx(0.4740770, abs=1e-6)
    torch.testing.assert_close(objective.implied_reward(out, batch), torch.tensor([[-1.0, -3.0]]))
    assert objective.token_reward(out, batch)[0, 1].tolist() == [-1.0, -2.0, 0.0]


def test_simpo_without_margin_is_dpo_of_means_without_reference():
    batch = make_batch([[3, 3], [4, 4], [1, 1], [2, 2]], weight=[1, 2, 0.5, 0])
    raw = make_logprobs(batch)
    length = batch.response_mask.sum(-1)
    for n in (1, 3):  # rows of one length, where the mean is β/n times the sum
        rows = (length[:, 0] == n).nonzero().flatten().tolist()
        part = replace(rows_of(batch, rows), ref_logprobs=torch.zeros_like(batch.ref_logprobs[rows]))
        assert_same_update(SimPo(beta=0.6, gamma=0.0), Dpo(beta=0.6 / n), part, raw[rows])


def test_orpo_worked():
    """p = 3/4 and 1/3: odds 3 and 1/2, ratio 6, −log σ(log 6) = log(7/6)."""
    chosen, rejected = torch.tensor([0.75]).log(), torch.tensor([1 / 3]).log()
    torch.testing.assert_close(log_odds(chosen), torch.tensor([math.log(3)]))
    torch.testing.assert_close(odds_ratio_loss(chosen, rejected), torch.tensor([math.log(7 / 6)]))
    batch = make_batch([[2, 1]])
    out = as_out(torch.stack([chosen.repeat(2), rejected.repeat(2)])[None], batch)
    # Two tokens of log 3/4 each: the mean, not the sum, is what the odds are taken of.
    expected = -math.log(0.75) + 0.5 * math.log(7 / 6)
    assert loss_of(Orpo(odds_weight=0.5), out, batch).item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(Orpo().implied_reward(out, batch), torch.tensor([[math.log(3), math.log(0.5)]]))
    torch.testing.assert_close(Orpo().token_reward(out, batch)[0, 0], chosen.repeat(2) / 2)
    torch.testing.assert_close(Orpo().token_reward(out, batch)[0, 1, :1], rejected)
    assert Orpo()(out, batch).metrics["nll"].total.item() == pytest.approx(-2 * math.log(0.75), abs=1e-6)


def test_log_odds_are_exact_where_one_is_near():
    """1 − p = 1e-3 and 2e-4 from log p in float32, where 1 − exp(log p) would have lost three digits."""
    against = torch.tensor([1e-3, 2e-4], dtype=torch.float64)
    exact = (1 - against).log() - against.log()
    torch.testing.assert_close(log_odds((1 - against).log().float()).double(), exact, rtol=1e-6, atol=0)


def test_log_odds_go_on_finite_and_rising_up_to_certainty():
    logprob = torch.tensor([-1e4, -80.0, -1.0, -1.1e-4, -0.9e-4, -1e-8, 0.0], requires_grad=True)
    odds = log_odds(logprob)
    (slope,) = torch.autograd.grad(odds.sum(), logprob)
    assert odds.isfinite().all()
    assert (odds.diff() > 0).all()
    torch.testing.assert_close(slope, 1 / -torch.expm1(logprob.detach().clamp(max=-1e-4)))
    edge = log_odds(torch.tensor([-1.0001e-4, -0.9999e-4], dtype=torch.float64))
    assert edge.diff().item() == pytest.approx(2e-8 * 1e4, rel=1e-3), "value and slope match at the seam"


def test_unlikelihood_worked():
    """−log π = 2 and 5 nats in all: 2 − 0.1 · 5 = 1.5 per pair, whatever the number of tokens."""
    torch.testing.assert_close(unlikelihood_loss(torch.tensor([-2.0]), torch.tensor([-5.0]), 0.1), torch.tensor([1.5]))
    batch = make_batch([[2, 1]])
    out = as_out(torch.tensor([[[-0.5, -1.5], [-5.0, 9.0]]]), batch)
    assert loss_of(Unlikelihood(alpha=0.1), out, batch).item() == pytest.approx(1.5)
    assert loss_of(Unlikelihood(alpha=0.0), out, batch).item() == pytest.approx(2.0)
    nll = Unlikelihood()(out, batch).metrics["nll"]
    assert (nll.total.item(), nll.weight.item()) == (2.0, 2.0)
    assert Unlikelihood().token_reward(out, batch).tolist() == [[[-0.5, -1.5], [-5.0, 0.0]]]


@pytest.mark.parametrize("objective", [Dpo(nll_weight=0.5), Orpo(), Unlikelihood()])
def test_nll_is_a_mean_over_the_chosen_tokens(objective):
    """(1 · (1 + 2 + 3) + 2 · 6) nats over 1 · 3 + 2 · 1 tokens, as metric and as term; rejected ones have no say."""
    batch = make_batch([[3, 2], [1, 4]], weight=[1, 2])
    raw = torch.full(batch.response_mask.shape, -9.0)
    raw[0, 0, :3], raw[1, 0, 0] = torch.tensor([-1.0, -2.0, -3.0]), -6.0
    loss = objective(as_out(raw, batch), batch)
    assert loss.metrics["nll"].total.item() == pytest.approx(18.0)
    assert loss.metrics["nll"].weight.item() == 5.0
    if "nll" in loss.terms:
        assert loss.terms["nll"].total.item() == pytest.approx(18.0)
        assert objective.weight(batch)["nll"].item() == 5.0
