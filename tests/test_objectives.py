"""Each objective by worked numbers, by identities with its siblings, and by the contract they all share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from pipeline import config_file
from pipeline.config import ConfigError
from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term
from pipeline.objectives import OBJECTIVES, resolve
from pipeline.objectives.dpo import Dpo, dpo_loss
from pipeline.objectives.f_dpo import FDpo, f_score
from pipeline.objectives.ipo import Ipo, ipo_loss
from pipeline.objectives.orpo import Orpo, log_odds, odds_ratio_loss
from pipeline.objectives.plackett_luce import PlackettLuce, plackett_luce_loss
from pipeline.objectives.rejection_sft import RejectionSft, best_of
from pipeline.objectives.sft import Sft
from pipeline.objectives.simpo import SimPo, simpo_loss
from pipeline.objectives.unlikelihood import Unlikelihood, unlikelihood_loss
from tests.batches import as_out, make_batch, make_logprobs, rows_of, with_ratios

DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")
VARIANTS = [
    *(objective() for objective in OBJECTIVES.values()),
    Dpo(label_smoothing=0.2, nll_weight=0.7),
    *(FDpo(divergence=divergence, label_smoothing=0.1) for divergence in DIVERGENCES),
    Ipo(length_normalised=True),
    RejectionSft(keep_fraction=1.0),
]
LENGTHS = {
    "demonstration": [[3], [1], [5], [2]],
    "preference": [[3, 2], [1, 4], [5, 5], [2, 1]],
    "ranking": [[3, 2], [1, 4, 2, 2], [5, 5, 1], [2, 1]],
}
CASES = [
    pytest.param(objective, kind, id=f"{type(objective).__name__}{i}-{kind}")
    for i, objective in enumerate(VARIANTS)
    for kind in sorted(objective.needs.records)
]


def loss_of(objective: Objective, out: PolicyOut, batch: Batch) -> Tensor:
    """What `loop` makes of it: Σ coefficient · total / weight."""
    weights = objective.weight(batch)
    return sum(t.coefficient * t.total / weights[name] for name, t in objective(out, batch).terms.items())


# ------------------------------------------------------------------------------------------ worked numbers


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


def test_sft_worked():
    """Token-level mean: (1 + 2 + 3 + 6) nats over 4 tokens = 3, not the mean of the rows' means (2 + 6) / 2 = 4."""
    batch = make_batch([[3], [1]])
    raw = torch.tensor([[[-1.0, -2.0, -3.0]], [[-6.0, 99.0, 99.0]]])
    assert loss_of(Sft(), as_out(raw, batch), batch).item() == pytest.approx(3.0)
    halved = replace(batch, weight=torch.tensor([0.5, 1.0]))
    assert loss_of(Sft(), as_out(raw, halved), halved).item() == pytest.approx((0.5 * 6 + 6) / (0.5 * 3 + 1))


def test_sft_trains_on_the_best_response_alone():
    batch = make_batch([[2, 3, 1]])
    raw = make_logprobs(batch)
    (grad,) = torch.autograd.grad(loss_of(Sft(), as_out(raw, batch), batch), raw)
    torch.testing.assert_close(grad[0, 0], torch.tensor([-0.5, -0.5, 0.0]))
    assert torch.equal(grad[0, 1:], torch.zeros(2, 3))


def test_plackett_luce_worked():
    """Rewards log 4, log 2, log 1: P = 4/7 · 2/3 · 1 = 8/21."""
    reward = torch.tensor([[4.0, 2.0, 1.0]]).log()
    loss = plackett_luce_loss(reward, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor([math.log(21 / 8)]))


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    from itertools import permutations

    reward = torch.randn(4, dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(4))))
    loss = plackett_luce_loss(reward[orders], torch.ones(len(orders), 4, dtype=torch.bool))
    assert (-loss).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


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


def test_rejection_keeps_the_better_part_and_always_one():
    valid = torch.arange(5) < torch.tensor([1, 2, 3, 4, 5])[:, None]
    assert best_of(valid, 0.5).sum(-1).tolist() == [1, 1, 1, 2, 2]
    assert best_of(valid, 0.25).sum(-1).tolist() == [1, 1, 1, 1, 1]
    assert torch.equal(best_of(valid, 1.0), valid)
    assert not best_of(torch.zeros(1, 3, dtype=torch.bool), 0.5).any(), "a filler has nothing to keep"
    assert best_of(torch.ones(1, 10, dtype=torch.bool), 0.7).tolist() == [[True] * 7 + [False] * 3]


def test_rejection_sft_worked():
    """Best two of four: (1 + 3) + 4 nats over 2 + 1 tokens; the worse half has no say."""
    batch = make_batch([[2, 1, 1, 2]])
    raw = torch.tensor([[[-1.0, -3.0], [-4.0, 9.0], [-7.0, 9.0], [-7.0, -7.0]]], requires_grad=True)
    out = as_out(raw, batch)
    loss = loss_of(RejectionSft(), out, batch)
    assert loss.item() == pytest.approx(8 / 3)
    (grad,) = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(grad[0], torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]) / 3)
    kept = RejectionSft()(out, batch).metrics["kept"]
    assert (kept.total.item(), kept.weight.item()) == (2.0, 1.0)
    assert RejectionSft().token_reward(out, batch)[0, 3].tolist() == [-7.0, -7.0]


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


def test_defaults_are_the_published_ones():
    """β 0.1 as in the DPO and IPO code; SimPO's 2 with γ/β = 1/2; ORPO's λ 0.1."""
    for objective in (Dpo, FDpo, PlackettLuce, Ipo):
        assert objective().beta == 0.1
    assert (SimPo().beta, SimPo().gamma) == (2.0, 1.0)
    assert (Orpo().odds_weight, Unlikelihood().alpha, RejectionSft().keep_fraction) == (0.1, 0.1, 0.5)
    assert not Ipo().length_normalised
    assert (FDpo().divergence, FDpo().alpha) == ("reverse_kl", 0.5)


# ---------------------------------------------------------------------------------------------- identities


def _same(first: Objective, second: Objective, batch: Batch, raw: Tensor) -> None:
    losses = [loss_of(objective, as_out(raw, batch), batch) for objective in (first, second)]
    grads = [torch.autograd.grad(loss, raw)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().sum() > 0


def test_plackett_luce_of_pairs_is_dpo():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    _same(PlackettLuce(beta=0.3), Dpo(beta=0.3), batch, make_logprobs(batch))


def test_f_dpo_with_reverse_kl_is_dpo():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    _same(FDpo(beta=0.3, label_smoothing=0.1), Dpo(beta=0.3, label_smoothing=0.1), batch, make_logprobs(batch))


def test_rejection_sft_of_pairs_is_sft():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    _same(RejectionSft(), Sft(), batch, make_logprobs(batch))


def test_simpo_without_margin_is_dpo_of_means_without_reference():
    batch = make_batch([[3, 3], [4, 4], [1, 1], [2, 2]], weight=[1, 2, 0.5, 0])
    raw = make_logprobs(batch)
    length = batch.response_mask.sum(-1)
    for n in (1, 3):  # rows of one length, where the mean is β/n times the sum
        rows = (length[:, 0] == n).nonzero().flatten().tolist()
        part = replace(rows_of(batch, rows), ref_logprobs=torch.zeros_like(batch.ref_logprobs[rows]))
        _same(SimPo(beta=0.6, gamma=0.0), Dpo(beta=0.6 / n), part, raw[rows])


def test_alpha_divergence_runs_from_reverse_to_forward_kl():
    """(1 − e^{−αℓ})/α → ℓ as α → 0, and −e^{−αℓ}/α = −e^{−ℓ} at α = 1."""
    ratio = torch.linspace(-5, 5, 21, dtype=torch.float64)
    tiny = 1e-6
    torch.testing.assert_close(f_score(ratio, "alpha", tiny) + 1 / tiny, ratio, atol=2e-5, rtol=0)
    torch.testing.assert_close(f_score(ratio, "alpha", 1.0), f_score(ratio, "forward_kl"))
    torch.testing.assert_close(f_score(ratio, "alpha"), f_score(ratio, "alpha", 0.5))
    torch.testing.assert_close(f_score(ratio, "alpha", 1 - tiny), f_score(ratio, "forward_kl"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_score_is_the_derivative_of_its_divergence(divergence):
    """f′(u) by autograd from the paper's f, up to one constant for all u."""
    ratio = torch.linspace(-3, 3, 13, dtype=torch.float64)
    u = ratio.exp().requires_grad_()
    alpha = 0.3
    f = {
        "reverse_kl": u * u.log(),
        "forward_kl": -u.log(),
        "jensen_shannon": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
    }[divergence]
    (slope,) = torch.autograd.grad(f.sum(), u)
    constant = slope - f_score(ratio, divergence, alpha)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------- padding, extreme ratios


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


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_score_stays_finite_and_rising_at_extreme_ratios(divergence):
    ratio = torch.tensor([-1e4, -200.0, -90.0, -40.0, 0.0, 40.0, 90.0, 200.0, 1e4], requires_grad=True)
    score = f_score(ratio, divergence)
    (slope,) = torch.autograd.grad(score.sum(), ratio)
    assert score.isfinite().all()
    assert slope.isfinite().all()
    assert (slope > 0).all()


@pytest.mark.parametrize("beta", [0.1, 1e-5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_f_dpo_pushes_a_wildly_wrong_pair_the_right_way(divergence, beta):
    """ℓ = (−200, +200): descending has to raise the chosen and lower the rejected log-probability.

    A pair that is already right by such a margin has σ(−Δ) = 0 in float32, in f-DPO as in DPO itself, so for
    ℓ = (+200, −200) only finiteness and the absence of a push the wrong way can be asked.
    """
    batch, raw = with_ratios([[-200.0, 200.0], [200.0, -200.0]])
    objective = FDpo(beta=beta, divergence=divergence)
    loss = objective(as_out(raw, batch), batch).terms["preference"].total
    (grad,) = torch.autograd.grad(loss, raw)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad[0, 0].item() < 0 < grad[0, 1].item()
    assert grad[1, 0].item() <= 0 <= grad[1, 1].item()


# ------------------------------------------------------------------------------------- the contract, for all


def test_registry_names_are_importable_classes():
    for name, objective in OBJECTIVES.items():
        assert resolve(name) is objective
        assert objective.needs.records
        assert objective.needs.reference in {"none", "token", "distribution"}
        assert objective.model_config["frozen"]
        assert objective.model_config["extra"] == "forbid"
        assert objective.__doc__
        assert all(f.default is not None or f.default_factory for f in objective.model_fields.values()), "no defaults"


@pytest.mark.parametrize(("objective", "kind"), CASES)
class TestContract:
    """Properties that `loop` and evaluation rely on, for every objective and every kind of record it takes."""

    def test_terms_and_denominators_match(self, objective, kind):
        batch = make_batch(LENGTHS[kind])
        out = as_out(make_logprobs(batch), batch)
        weights, loss = objective.weight(batch), objective(out, batch)
        assert set(weights) == set(loss.terms)
        for tensor in [*weights.values(), *(term.total for term in loss.terms.values())]:
            assert tensor.shape == ()
            assert tensor.isfinite()
        for mean in loss.metrics.values():
            assert isinstance(mean, Mean)
            assert mean.total.shape == mean.weight.shape == ()
            assert not mean.total.requires_grad

    def test_denominators_come_from_masks_alone(self, objective, kind):
        batch = make_batch(LENGTHS[kind])
        other = replace(batch, ref_logprobs=None, input_ids=batch.input_ids * 0, response_ids=batch.response_ids * 0)
        assert objective.weight(batch) == objective.weight(other)
        assert all(weight > 0 for weight in objective.weight(batch).values())

    def test_totals_and_denominators_are_linear_in_the_weight(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0.5, 1])
        heavier = replace(batch, weight=3 * batch.weight)
        out = as_out(make_logprobs(batch), batch)
        for name, weight in objective.weight(batch).items():
            torch.testing.assert_close(objective.weight(heavier)[name], 3 * weight)
            got, base = objective(out, heavier).terms[name].total, objective(out, batch).terms[name].total
            torch.testing.assert_close(got, 3 * base)
            assert base != 0

    def test_rows_add_up(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0.5, 1])
        raw = make_logprobs(batch)
        whole, weights = objective(as_out(raw, batch), batch), objective.weight(batch)
        parts = [(rows_of(batch, [b]), raw[b : b + 1]) for b in range(4)]
        losses = [objective(as_out(part_raw, part), part) for part, part_raw in parts]
        for name, term in whole.terms.items():
            torch.testing.assert_close(term.total, sum(loss.terms[name].total for loss in losses))
            torch.testing.assert_close(weights[name], sum(objective.weight(part)[name] for part, _ in parts))
        for name, mean in whole.metrics.items():
            torch.testing.assert_close(mean.total, sum(loss.metrics[name].total for loss in losses))
            torch.testing.assert_close(mean.weight, sum(loss.metrics[name].weight for loss in losses))

    def test_a_row_of_weight_zero_changes_nothing(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0, 1])
        raw = make_logprobs(batch).detach()
        raw[2] = torch.linspace(-1e4, 1e4, raw[2].numel()).view_as(raw[2])  # no real row looks like this
        raw.requires_grad_()
        loss = objective(as_out(raw, batch), batch)
        total = sum(term.coefficient * term.total for term in loss.terms.values())
        (grad,) = torch.autograd.grad(total, raw)
        kept = rows_of(batch, [0, 1, 3])
        kept_raw = raw.detach()[[0, 1, 3]].requires_grad_()
        kept_loss = objective(as_out(kept_raw, kept), kept)
        kept_total = sum(term.coefficient * term.total for term in kept_loss.terms.values())
        (kept_grad,) = torch.autograd.grad(kept_total, kept_raw)
        torch.testing.assert_close(total, kept_total)
        torch.testing.assert_close(grad[[0, 1, 3]], kept_grad)
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        for name, weight in objective.weight(kept).items():
            torch.testing.assert_close(objective.weight(batch)[name], weight)
        for name, mean in kept_loss.metrics.items():
            torch.testing.assert_close(loss.metrics[name].total, mean.total)
            torch.testing.assert_close(loss.metrics[name].weight, mean.weight)

    def test_a_batch_of_fillers_is_zero_and_can_go_backward(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[0, 0, 0, 0])
        raw = make_logprobs(batch)
        assert all(weight == 0 for weight in objective.weight(batch).values())
        total = sum(term.total for term in objective(as_out(raw, batch), batch).terms.values())
        (grad,) = torch.autograd.grad(total, raw)
        assert total.item() == 0
        assert torch.equal(grad, torch.zeros_like(raw))

    def test_a_row_without_any_token_changes_nothing(self, objective, kind):
        batch = make_batch(LENGTHS[kind], weight=[1, 2, 0, 1])
        filled = torch.tensor([True, True, False, True])
        empty = replace(
            batch,
            response_mask=batch.response_mask & filled[:, None, None],
            valid=batch.valid & filled[:, None],
            ref_logprobs=batch.ref_logprobs * filled[:, None, None],
        )
        raw = make_logprobs(batch)
        loss = loss_of(objective, as_out(raw, empty), empty)
        (grad,) = torch.autograd.grad(loss, raw)
        kept = rows_of(batch, [0, 1, 3])
        kept_raw = raw.detach()[filled].requires_grad_()
        kept_loss = loss_of(objective, as_out(kept_raw, kept), kept)
        (kept_grad,) = torch.autograd.grad(kept_loss, kept_raw)
        torch.testing.assert_close(loss, kept_loss)
        torch.testing.assert_close(grad[filled], kept_grad)
        assert objective.implied_reward(as_out(raw, empty), empty).isfinite().all()
        assert (objective.token_reward(as_out(raw, empty), empty)[2] == 0).all()
        assert torch.equal(grad[2], torch.zeros_like(grad[2]))
        for name, mean in objective(as_out(raw, empty), empty).metrics.items():
            torch.testing.assert_close(mean.total, objective(as_out(kept_raw, kept), kept).metrics[name].total)

    def test_gradient_flows_and_only_where_trained(self, objective, kind):
        batch = make_batch(LENGTHS[kind], responses=5, tokens=8)
        raw = make_logprobs(batch)
        (grad,) = torch.autograd.grad(loss_of(objective, as_out(raw, batch), batch), raw)
        assert grad.isfinite().all()
        assert torch.equal(grad[~batch.response_mask], torch.zeros(int((~batch.response_mask).sum())))
        best = grad[:, 0][batch.response_mask[:, 0]]
        assert (best < 0).all(), "a step down the gradient makes each token of the best response likelier"

    def test_padding_changes_nothing(self, objective, kind):
        tight = make_batch(LENGTHS[kind])
        _, k, r = tight.response_mask.shape
        wide = make_batch(LENGTHS[kind], responses=k + (kind == "ranking"), tokens=r + 3)
        wide.ref_logprobs.zero_()[:, :k, :r] = tight.ref_logprobs
        raw = make_logprobs(wide).detach()
        got = loss_of(objective, as_out(raw, wide), wide)
        torch.testing.assert_close(got, loss_of(objective, as_out(raw[:, :k, :r], tight), tight))

    def test_rewards_have_their_shapes_and_zeros(self, objective, kind):
        batch = make_batch(LENGTHS[kind], tokens=7)
        out = as_out(make_logprobs(batch), batch)
        reward, credit = objective.implied_reward(out, batch), objective.token_reward(out, batch)
        assert reward.shape == batch.valid.shape
        assert credit.shape == batch.response_mask.shape
        assert torch.equal(credit[~batch.response_mask], torch.zeros(int((~batch.response_mask).sum())))
        assert (credit[batch.response_mask] != 0).all()

    def test_config_section_round_trips(self, objective, kind):
        plain = objective.model_dump(mode="json")
        assert type(objective)(**plain) == objective


def test_metrics_are_weighted_and_ignore_what_weighs_nothing():
    """(1·1 + 3·2) / 3, whatever stands beside them."""
    mean = Mean.of(torch.tensor([1.0, 3.0, torch.nan, torch.inf]), torch.tensor([1.0, 2.0, 0.0, 0.0]))
    assert (mean.total.item(), mean.weight.item()) == (7.0, 3.0)


# ------------------------------------------------------------------------------- a user's own, in one class


class Hinge(Objective):
    """max(0, margin − (ℓ_w − ℓ_l)): what adding an objective costs."""

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}), reference="token")
    margin: float = 1.0

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"hinge": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward = self.implied_reward(out, batch)
        loss = (self.margin - reward[:, 0] + reward[:, 1]).clamp(min=0)
        return LossOut({"hinge": Term((loss * batch.weight).sum())})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        return out.logprobs - batch.ref_logprobs


def _plain(name: str, **parameters: object) -> dict:
    return {
        "data": {"kind": "preference", "sources": [{"path": "pairs.jsonl"}]},
        "model": {"path": "some/model"},
        "objective": {"name": name, **parameters},
    }


def test_own_objective_loads_by_dotted_path():
    name = f"{__name__}:Hinge"
    loaded = config_file.validate(_plain(name, margin=2.0))
    assert loaded.objective == Hinge(margin=2.0)
    assert loaded.objective_name == name
    assert config_file.validate(loaded.dump()) == loaded
    batch, raw = with_ratios([[0.5, 0.25]])
    assert loss_of(loaded.objective, as_out(raw, batch), batch).item() == pytest.approx(1.75)


def test_own_objective_needs_one_class_and_one_registry_line(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", Hinge)
    loaded = config_file.validate(_plain("hinge"))
    assert loaded.objective == Hinge()
    assert loaded.dump()["objective"] == {"name": "hinge", "margin": 1.0}
    branches = config_file.json_schema()["properties"]["objective"]["anyOf"]
    assert any(branch["properties"]["name"].get("const") == "hinge" for branch in branches)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("dpoo", f"none of {', '.join(OBJECTIVES)}, nor a dotted path"),
        ("no_such_module:Thing", "cannot load"),
        (f"{__name__}:Missing", "cannot load"),
        ("collections:OrderedDict", "not a subclass"),
    ],
)
def test_unknown_objectives_are_refused_in_one_line(name, cause):
    with pytest.raises(ConfigError, match=r"^objective: name: ") as error:
        config_file.validate(_plain(name))
    assert cause in str(error.value)
    assert "\n" not in str(error.value)
