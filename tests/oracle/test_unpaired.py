"""KTO on a table: its gradient, its own optimum where it has one, and what happens where it has none.

With labels that call y good with probability g(y), the loss is constant − Σ_y c(y) σ(β(ℓ(y) − z₀)), with the balance
c = λ_D g − λ_U (1 − g). A policy is stationary where β c(y) σ′(β(ℓ(y) − z₀)) = κ π(y), one κ per prompt. If every c > 0 that is one
policy, found below by root search; a response with c ≤ 0 can only be driven out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.contracts import Batch
from pipeline.objectives.kto import Kto
from tests.oracle.cases import BETA, small
from tests.oracle.mdp import TokenMdp, kl, normalised
from tests.oracle.policy import TabularPolicy, fit, loss_of, rows


def good(mdp: TokenMdp) -> Tensor:
    """How often each response is called good. [X, N]"""
    return torch.sigmoid(mdp.reward)


def labelled(mdp: TokenMdp, carried: float | None = None) -> Batch:
    """Every response under both labels, as often as it gets them, with a response to another prompt behind each.
    `carried` is the step before's mean ℓ of those; None in the first step."""
    groups = [(x, [n, (n + 3) % mdp.size]) for x in range(mdp.prompts) for n in range(mdp.size)]
    weight = torch.cat([good(mdp).flatten(), 1 - good(mdp).flatten()])
    batch = rows(mdp, [*groups, *groups], weight, mismatched=True)
    label = torch.ones(len(weight), dtype=torch.float64)
    label[len(groups) :] = -1
    last = batch.response_mask & (batch.response_mask.flip(-1).cumsum(-1).flip(-1) == 1)
    rewards = torch.where(last & batch.valid[..., None], label[:, None, None], 0.0)
    return replace(batch, token_rewards=rewards, carried={} if carried is None else {"mismatched_log_ratio": carried})


@pytest.mark.parametrize("carried", [None, -1.0, 0.7])
def test_gradient_is_the_expectation_over_responses_and_labels(carried):
    """z₀ is what was carried over, 0 where that is negative or there is nothing; mismatched responses move nothing."""
    mdp, objective = small(), Kto(beta=BETA, desirable_weight=1.25, undesirable_weight=0.75)
    noise = torch.randn(mdp.ref_logits.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    policy = TabularPolicy(mdp, mdp.ref_logits + noise)
    reward = BETA * (mdp.sequence_logprob(policy.logits) - mdp.ref_logprob - max(0.0, carried or 0.0))
    value = 1.25 * good(mdp) * torch.sigmoid(reward) + 0.75 * (1 - good(mdp)) * torch.sigmoid(-reward)
    (wanted,) = torch.autograd.grad(-value.sum() / value.numel(), policy.logits)
    batch = labelled(mdp, carried)
    (got,) = torch.autograd.grad(loss_of(objective, policy(batch), batch), policy.logits)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def tolerant(mdp: TokenMdp) -> Tensor:
    """The balance with bad labels at a sixteenth of the weight: no response is bad on balance. [X, N]"""
    return good(mdp) - 0.0625 * (1 - good(mdp))


@cache
def kto_optimum(baseline: float) -> Tensor:
    """log π [X, N] of β c σ′(β(ℓ − z₀)) = κ π for `tolerant` c: Newton for ℓ(y) at a given log κ, bisection for log κ.

    log(e^ℓ / σ′) is convex in ℓ and has a slope between 1 − β and 1 + β, so that Newton's steps cannot go astray.
    """
    mdp = small()

    def logprob(log_kappa: Tensor) -> Tensor:
        ratio = torch.zeros_like(mdp.reward)
        for _ in range(12):
            x = mdp.beta * (ratio - baseline)
            gap = (
                mdp.ref_logprob + ratio + log_kappa - (mdp.beta * tolerant(mdp)).log() - logsigmoid(x) - logsigmoid(-x)
            )
            ratio = ratio - gap / (1 + mdp.beta * torch.tanh(x / 2))
        assert gap.abs().max() < 1e-9
        return mdp.ref_logprob + ratio

    edge = torch.full((mdp.prompts, 1), 30.0, dtype=torch.float64)
    return normalised(logprob, -edge, edge)


@pytest.mark.parametrize("baseline", [0.0, 1.0])
def test_it_reaches_its_own_optimum_where_no_response_is_bad_on_balance(baseline):
    mdp, own = small(), kto_optimum(baseline)
    assert tolerant(mdp).min() > 0
    policy = fit(mdp, Kto(beta=BETA, undesirable_weight=0.0625), labelled(mdp, baseline))
    assert kl(mdp.ref_logprob, own) > 0.1
    assert abs(kl(policy.logprob(), own)) < 1e-10
    assert kl(policy.logprob(), mdp.optimum) > 0.1
    assert kl(kto_optimum(0.0), kto_optimum(1.0)) > 1e-3, "the baseline tells"


def test_what_is_bad_on_balance_is_driven_out():
    """With equal weights a response that is called good less than half the time has no place in the end."""
    mdp = small()
    bad = good(mdp) < 0.5
    policies = [fit(mdp, Kto(beta=BETA), labelled(mdp), rounds=n) for n in (1, 8)]
    left = [(policy.logprob().exp() * bad).sum(-1) for policy in policies]
    assert (left[1] < 1e-3).all() and (left[1] < left[0]).all()
    assert (mdp.ref_logprob.exp() * bad).sum(-1).min() > 0.1
