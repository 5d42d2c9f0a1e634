"""Calibration of preference-trained policies, computed exactly: no bins, no samples.

With one bin per distinct confidence, the expected calibration error is the mean |confidence − frequency|. Two readings:

- of the policy as a classifier of responses, C(π) = Σ_y |q(y) − π(y)| for data drawn from q. The reverse triangle
  inequality gives |C(π₁) − C(π₂)| ≤ Σ_y |π₁ − π₂| = 2 TV(π₁, π₂) ≤ 2 ψ_f(D_f(π₁ ‖ π₂)), where ψ_f bounds the total
  variation by the divergence. The f-DPO paper's bound (arXiv 2309.16240) has this form; this is the reading of it that
  can be proved.
- of its preference probabilities σ(β(ℓ_i − ℓ_j)), where no function of D_f bounds the gap for arbitrary pairs (a response
  of tiny probability may have any log-ratio). For pairs drawn from π₁ and the reverse KL there is one, derived below.

Binned errors are left out: the bins move with the policy, so that neither statement holds for them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Objective
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.f_dpo import FDpo
from tests.oracle.cases import BETA, everything, pairs, small, soft_pairs, trained_dpo, trained_f_dpo
from tests.oracle.mdp import TokenMdp, f_divergence
from tests.oracle.policy import TabularPolicy, fit

PSI: dict[str, Callable[[Tensor], Tensor]] = {
    # Pinsker, for either direction: TV² ≤ KL/2.
    "reverse_kl": lambda d: (d / 2).sqrt(),
    "forward_kl": lambda d: (d / 2).sqrt(),
    # D_f = KL(p ‖ m) + KL(q ‖ m) with m the midpoint, TV(p, m) = TV(q, m) = TV/2; Pinsker twice: TV² ≤ D_f.
    "jensen_shannon": lambda d: d.sqrt(),
    # α = 1/2: D_f = 4(1 − Σ√(pq)) = 4 H², and TV² ≤ H²(2 − H²) ≤ 2 H² = D_f/2.
    "alpha": lambda d: (d / 2).sqrt(),
}


def confidence(objective: Objective, policy: TabularPolicy) -> Tensor:
    """The objective's own probability that y_i is preferred to y_j. [X, N, N]"""
    batch = everything(policy.mdp)
    reward = objective.implied_reward(policy(batch), batch).detach()
    return torch.sigmoid(reward[:, :, None] - reward[:, None, :])


def preference_error(objective: Objective, policy: TabularPolicy, drawn: Tensor) -> Tensor:
    """E |σ(Δr̂) − p| over pairs whose members are drawn independently from `drawn` [X, N]. [X]"""
    gap = (confidence(objective, policy) - policy.mdp.preference).abs()
    return (drawn[:, :, None] * drawn[:, None, :] * gap).sum((-2, -1))


def response_error(mdp: TokenMdp, logprob: Tensor) -> Tensor:
    """C(π) = Σ_y |q(y) − π(y)|, q how often y is the chosen one of two distinct responses. [X]"""
    wins = mdp.preference.sum(-1) - 0.5
    return (wins / wins.sum(-1, keepdim=True) - logprob.exp()).abs().sum(-1)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"])
def test_soft_labels_calibrate_every_divergence(divergence):
    """At its own optimum each f-DPO states the true preference probabilities, for all pairs alike; before, it does not."""
    uniform = torch.full_like(small().reward, 1 / small().size)
    objective = FDpo(beta=BETA, divergence=divergence)
    trained = trained_f_dpo(divergence, 0.5)
    assert preference_error(objective, trained, uniform).max() < 1e-4
    assert preference_error(objective, TabularPolicy(small()), uniform).min() > 0.1


def test_hard_labels_make_dpo_overconfident():
    """Every pair ends up at probability 0 or 1, so the error is the mean distance of the true ones from that."""
    mdp = small()
    policy = fit(mdp, Dpo(beta=BETA), pairs(mdp, (mdp.preference > 0.5).double()), rounds=3)
    uniform = torch.full_like(mdp.reward, 1 / mdp.size)
    error = preference_error(Dpo(beta=BETA), policy, uniform)
    doubt = (mdp.preference * (mdp.preference < 0.5) + (1 - mdp.preference) * (mdp.preference > 0.5)).mean((-2, -1))
    torch.testing.assert_close(error, doubt, rtol=0, atol=0.01)
    assert error.min() > 0.1


@pytest.mark.parametrize("divergence", PSI)
def test_divergence_bounds_the_change_in_calibration(divergence):
    """|C(π₁) − C(π₂)| ≤ 2 ψ_f(D_f(π₁ ‖ π₂)), for f-DPO's policy at every weight of the data against the reference,
    from hardly trained to its optimum and past it."""
    mdp = small()
    trained = trained_f_dpo(divergence, 0.5).logprob()
    ratio = trained - mdp.ref_logprob
    tightest = 0.0
    for strength in (-0.5, 0.05, 0.3, 1.0, 2.0):
        policy = (mdp.ref_logprob + strength * ratio).log_softmax(-1)
        change = (response_error(mdp, policy) - response_error(mdp, mdp.ref_logprob)).abs()
        total_variation = 0.5 * (policy.exp() - mdp.ref_logprob.exp()).abs().sum(-1)
        bound = PSI[divergence](f_divergence(policy, mdp.ref_logprob, divergence, 0.5))
        assert (total_variation <= bound).all()
        assert (change <= 2 * bound).all()
        tightest = max(tightest, (change / (2 * bound)).max().item())
    assert tightest > 0.25, "the bound is of the size of what it bounds"


def test_reverse_kl_bounds_the_change_in_preference_calibration():
    """E_{i,j ~ π₁} |P₁ − P₂| ≤ (β/2)(K + √(2K)), K = KL(π₁ ‖ π₂), for preference probabilities P = σ(β(ℓ_i − ℓ_j)).

    σ is ¼-Lipschitz and π_ref cancels: |P₁ − P₂| ≤ (β/4) |d_i − d_j|, d = log π₁/π₂; its mean is at most (β/2) E_π₁|d|.
    And E_π₁|d| = K + 2 E_π₁[d⁻] with E_π₁[d⁻] ≤ E_π₁[(π₂/π₁ − 1)⁺] = TV ≤ √(K/2). The calibration errors
    themselves, against the same truth and on the same pairs, differ by no more.
    """
    mdp, objective = small(), Dpo(beta=BETA)
    half_way = (0.5 * (mdp.ref_logprob + mdp.optimum)).log_softmax(-1)
    near = (mdp.optimum + 0.05 * torch.cos(torch.arange(mdp.size) * 2.0)).log_softmax(-1)
    policies = [
        trained_dpo(mdp),
        TabularPolicy(mdp),
        *(TabularPolicy(mdp, mdp.conditionals(logprob)) for logprob in (half_way, near)),
        fit(mdp, Dpo(beta=BETA, label_smoothing=0.1), soft_pairs(mdp)),
    ]
    tightest = 0.0
    for first in policies:
        for second in policies:
            if first is second:
                continue
            drawn = first.logprob().exp()
            k = (drawn * (first.logprob() - second.logprob())).sum(-1)
            bound = BETA / 2 * (k + (2 * k).sqrt())
            gap = (confidence(objective, first) - confidence(objective, second)).abs()
            moved = (drawn[:, :, None] * drawn[:, None, :] * gap).sum((-2, -1))
            errors = [preference_error(objective, policy, drawn) for policy in (first, second)]
            assert (moved <= bound).all()
            assert ((errors[0] - errors[1]).abs() <= bound).all()
            tightest = max(tightest, (moved / bound).max().item())
    assert tightest > 0.25, "the bound is of the size of what it bounds"
