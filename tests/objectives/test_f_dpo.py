"""f-DPO: its scores against their divergences, its limits, and its behaviour at wild ratios."""

from __future__ import annotations

import pytest
import torch

from pipeline.objectives.dpo import Dpo
from pipeline.objectives.f_dpo import FDpo, f_score
from tests.batches import LENGTHS, as_out, assert_same_update, make_batch, make_logprobs, with_ratios
from tests.oracle.mdp import papers_f

DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")


def test_f_dpo_with_reverse_kl_is_dpo():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    assert_same_update(
        FDpo(beta=0.3, label_smoothing=0.1), Dpo(beta=0.3, label_smoothing=0.1), batch, make_logprobs(batch)
    )


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
    (slope,) = torch.autograd.grad(papers_f(u, divergence, alpha).sum(), u)
    constant = slope - f_score(ratio, divergence, alpha)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=0, atol=1e-12)


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
