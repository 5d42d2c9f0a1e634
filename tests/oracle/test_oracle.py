"""The shipped objectives, trained on a token MDP whose optimum is known: where each one ends up, to rounding.

Each fixed point is given in closed form, and each that is not π* is also shown to be away from π*, so that the claims
tell objectives apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Batch, Objective
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.f_dpo import FDpo
from pipeline.objectives.ipo import Ipo
from pipeline.objectives.orpo import Orpo
from pipeline.objectives.plackett_luce import PlackettLuce
from pipeline.objectives.rejection_sft import RejectionSft
from pipeline.objectives.sft import Sft
from pipeline.objectives.simpo import SimPo
from pipeline.objectives.unlikelihood import Unlikelihood
from tests.oracle.cases import (
    BETA,
    everything,
    larger,
    pairs,
    rankings,
    small,
    soft_pairs,
    tiny,
    trained_dpo,
    trained_f_dpo,
)
from tests.oracle.mdp import TokenMdp, f_optimum, kl, normalised
from tests.oracle.policy import TabularPolicy, fit, loss_of

DIVERGENCES = [("forward_kl", 0.5), ("jensen_shannon", 0.5), ("alpha", 0.3), ("alpha", 0.7)]


# --------------------------------------------------------------------------- objectives that reach the optimum


@pytest.mark.parametrize("mdp", [small, larger])
def test_dpo_with_soft_labels_reaches_the_optimum(mdp: Callable[[], TokenMdp]):
    mdp = mdp()
    assert kl(mdp.ref_logprob, mdp.optimum) > 0.3, "there is a way to go"
    assert abs(kl(trained_dpo(mdp).logprob(), mdp.optimum)) < 1e-10


def test_plackett_luce_with_soft_labels_reaches_the_optimum():
    """Pairs and triples in one batch: K is ragged."""
    policy = fit(tiny(), PlackettLuce(beta=BETA), rankings(tiny())[0])
    assert kl(tiny().ref_logprob, tiny().optimum) > 0.3, "there is a way to go"
    assert abs(kl(policy.logprob(), tiny().optimum)) < 1e-10


def test_plackett_luce_on_pairs_reaches_the_optimum():
    policy = fit(small(), PlackettLuce(beta=BETA), soft_pairs(small()))
    assert abs(kl(policy.logprob(), small().optimum)) < 1e-10


@pytest.mark.parametrize("mdp", [small, larger])
def test_token_reward_of_trained_dpo_is_the_optimal_advantage(mdp: Callable[[], TokenMdp]):
    """Trained on sequences alone, DPO assigns credit to tokens: β ρ_t = r_t + V*(s_{t+1}) − V*(s_t), so the partial
    sums telescope to the rewards so far plus the value of the prefix, and the whole to r − V*(prompt)."""
    mdp = mdp()
    batch, objective = everything(mdp), Dpo(beta=mdp.beta)
    out = trained_dpo(mdp)(batch)
    credit, reward = objective.token_reward(out, batch).detach(), objective.implied_reward(out, batch).detach()
    for n, response in enumerate(mdp.responses):
        state, so_far = 0, torch.zeros(mdp.prompts, dtype=torch.float64)
        for t, token in enumerate(response):
            so_far = so_far + mdp.token_reward[:, state, token]
            ahead = mdp.after(mdp.soft_values)[:, state, token]
            expected = so_far + ahead - mdp.soft_values[:, 0]
            torch.testing.assert_close(credit[:, n, : t + 1].sum(-1), expected, rtol=0, atol=2e-6)
            state = int(mdp.next_state[state, token])
    torch.testing.assert_close(credit.sum(-1), reward, rtol=0, atol=1e-12)
    torch.testing.assert_close(reward, mdp.reward - mdp.soft_values[:, :1], rtol=0, atol=2e-6)


# ------------------------------------------------------------------- objectives with an optimum of their own


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_f_dpo_reaches_the_optimum_of_its_own_divergence(divergence, alpha):
    mdp, policy = small(), trained_f_dpo(divergence, alpha)
    assert abs(kl(policy.logprob(), f_optimum(mdp, divergence, alpha))) < 1e-6
    assert kl(policy.logprob(), mdp.optimum) > 0.1


@pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
def test_implied_reward_of_f_dpo_is_the_reward_up_to_the_prompt(divergence, alpha):
    batch = everything(small())
    objective = FDpo(beta=BETA, divergence=divergence, alpha=alpha)
    out = trained_f_dpo(divergence, alpha)(batch)
    constant = objective.implied_reward(out, batch).detach() - small().reward
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), rtol=0, atol=1e-3)
    ratio = trained_f_dpo(divergence, alpha).logprob() - small().ref_logprob
    torch.testing.assert_close(objective.token_reward(out, batch).sum(-1).detach(), BETA * ratio, rtol=0, atol=1e-12)


def _ipo_optimum(mdp: TokenMdp, behaviour: Tensor, length: Tensor) -> Tensor:
    """Least squares of ℓ_i − ℓ_j on (2 p_ij − 1)/(2β) with weights μ_i μ_j has ℓ_i = Σ_j μ_j p_ij / β + constant.

    μ is `behaviour` [X, N]; ℓ is per unit of `length` [N]. log π [X, N].
    """
    wins = (mdp.preference * behaviour[:, None, :]).sum(-1) / mdp.beta
    low, high = wins.min(-1, keepdim=True).values, wins.max(-1, keepdim=True).values
    return normalised(lambda c: mdp.ref_logprob + length * (wins - c), low, high)


@dataclass(frozen=True)
class Claim:
    """An objective, its data, and where it must end."""

    objective: Objective
    batch: Callable[[TokenMdp], Batch]
    optimum: Callable[[TokenMdp], Tensor]  # log π [X, N]
    only: str | None = None
    """Train on this term of the loss alone."""
    mdp: Callable[[], TokenMdp] = small


def _drawn_from_the_reference(mdp: TokenMdp) -> Batch:
    """Both responses of a pair drawn from π_ref, the winner from p."""
    drawn = mdp.ref_logprob.exp()
    return pairs(mdp, mdp.preference * drawn[:, :, None] * drawn[:, None, :])


def _wins(mdp: TokenMdp) -> Tensor:
    """How often each response is the chosen one among all ordered pairs. [X, N]"""
    return mdp.preference.sum(-1) - 0.5


def _losses(mdp: TokenMdp) -> Tensor:
    return mdp.preference.sum(-2) - 0.5


CLAIMS = {
    "ipo: π_ref · exp(E_{y' ~ π_ref} p(y ≻ y')/β)": Claim(
        Ipo(beta=BETA), _drawn_from_the_reference, lambda m: _ipo_optimum(m, m.ref_logprob.exp(), torch.ones(m.size))
    ),
    "ipo, mean over tokens: π_ref · exp(|y| (E_{y'} p(y ≻ y')/β − c)), y' uniform": Claim(
        Ipo(beta=BETA, length_normalised=True),
        soft_pairs,
        lambda m: _ipo_optimum(m, torch.full_like(m.reward, 1 / m.size), m.length),
    ),
    "simpo without margin: β log π / |y| = r + c": Claim(
        SimPo(beta=2.0, gamma=0.0),
        soft_pairs,
        lambda m: normalised(
            lambda c: m.length * (m.reward - c) / 2.0,
            m.reward.max(-1, keepdim=True).values,
            m.reward.max(-1, keepdim=True).values + 2.0 * torch.tensor(m.size).log(),
        ),
    ),
    "odds ratio: log odds(y) = r + c": Claim(
        Orpo(),
        soft_pairs,
        lambda m: normalised(
            lambda c: m.length * torch.nn.functional.logsigmoid(m.reward - c),
            m.reward.min(-1, keepdim=True).values - 20,
            m.reward.max(-1, keepdim=True).values + torch.tensor(m.size).log(),
        ),
        only="odds_ratio",
    ),
    "sft: how often y is chosen": Claim(Sft(), soft_pairs, lambda m: _wins(m).log().log_softmax(-1)),
    "orpo's likelihood: how often y is chosen": Claim(
        Orpo(), soft_pairs, lambda m: _wins(m).log().log_softmax(-1), only="nll"
    ),
    "unlikelihood: how often y is chosen, less α times how often it is rejected": Claim(
        Unlikelihood(alpha=0.05), soft_pairs, lambda m: (_wins(m) - 0.05 * _losses(m)).log().log_softmax(-1)
    ),
    "rejection sft: how often y is kept": Claim(
        RejectionSft(keep_fraction=0.7),
        lambda m: rankings(m)[0],
        lambda m: rankings(m)[1].log().log_softmax(-1),
        mdp=tiny,
    ),
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=[name.partition(":")[0] for name in CLAIMS])
def test_objective_reaches_its_own_optimum_which_is_not_the_kl_optimum(claim: Claim):
    mdp = claim.mdp()
    own = claim.optimum(mdp)
    assert own.logsumexp(-1).abs().max() < 1e-12
    policy = fit(mdp, claim.objective, claim.batch(mdp), only=claim.only)
    assert abs(kl(policy.logprob(), own)) < 1e-10
    assert kl(policy.logprob(), mdp.optimum) > 0.02


# ----------------------------------------------------------------------------------- those that never stop


def test_dpo_with_hard_labels_runs_past_the_optimum():
    """If the better response always wins, no finite margin is enough: the loss falls to 0 and KL to π* only grows."""
    mdp = small()
    batch = pairs(mdp, (mdp.preference > 0.5).double())
    policies = [fit(mdp, Dpo(beta=BETA), batch, rounds=n) for n in (1, 3)]
    distance = [kl(policy.logprob(), mdp.optimum) for policy in policies]
    loss = [loss_of(Dpo(beta=BETA), policy(batch), batch).item() for policy in policies]
    assert 0.1 < distance[0] < distance[1]
    assert 0.01 > loss[0] > loss[1] >= 0


def test_unlikelihood_has_no_floor_once_rejections_outweigh():
    """At α = 1 a response that loses more often than it wins pays for each nat it is made less likely."""
    mdp, objective = small(), Unlikelihood(alpha=1.0)
    excess = _losses(mdp) - _wins(mdp)
    lost = [int(row.argmax()) for row in excess]
    losses = []
    for depth in (100.0, 200.0, 300.0):
        logprob = mdp.ref_logprob.clone()
        logprob[range(mdp.prompts), lost] -= depth
        policy = TabularPolicy(mdp, mdp.conditionals(logprob.log_softmax(-1)))
        losses.append(loss_of(objective, policy(soft_pairs(mdp)), soft_pairs(mdp)).item())
    slope = excess.max(-1).values.sum().item() / mdp.preference.triu(1).add(mdp.preference.tril(-1)).sum().item()
    assert losses[0] - losses[1] == pytest.approx(100 * slope, rel=1e-9)
    assert losses[1] - losses[2] == pytest.approx(100 * slope, rel=1e-9)
    assert slope > 0.05
