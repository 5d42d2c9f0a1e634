"""Where TDPO ends: variant 1 at an optimum of its own, variant 2 at neither."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.objectives.tdpo import Tdpo
from tests.oracle.cases import BETA, small, soft_pairs, tiny, trained_dpo
from tests.oracle.flow import settle
from tests.oracle.mdp import TokenMdp, kl
from tests.oracle.policy import TabularPolicy, divergence, fit


def tdpo_values(mdp: TokenMdp, alpha: float) -> Tensor:
    """W(s) = (1−α) β log E_ref[e^{q/β}] + α E_ref[q], q = r + W(s′): from the soft maximum to the plain mean. [X, S]"""
    values = torch.zeros_like(mdp.soft_values)
    for state in reversed(range(len(mdp.next_state))):
        q = mdp.token_reward[:, state] + mdp.after(values)[:, state]
        reference = mdp.ref_logits[:, state].log_softmax(-1)
        soft = mdp.beta * (reference + q / mdp.beta).logsumexp(-1)
        values[:, state] = (1 - alpha) * soft + alpha * (reference.exp() * q).sum(-1)
    return values


def tdpo_optimum(mdp: TokenMdp, alpha: float) -> Tensor:
    """log π of π ∝ π_ref e^{(r + W(s′))/β}. [X, N]"""
    q = mdp.token_reward + mdp.after(tdpo_values(mdp, alpha))
    return mdp.sequence_logprob(mdp.ref_logits + q / mdp.beta)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_its_own_optimum_explains_the_labels(alpha):
    """β (ℓ + α Σ KL) of the claimed optimum is r up to the prompt: Bradley–Terry probabilities are met exactly."""
    mdp = small()
    q = mdp.token_reward + mdp.after(tdpo_values(mdp, alpha))
    table, reference = (mdp.ref_logits + q / mdp.beta).log_softmax(-1), mdp.ref_logits.log_softmax(-1)
    sequential = divergence(table, reference, "forward")[..., None].expand_as(table)
    implied = mdp.beta * mdp.path_sum(table - reference + alpha * sequential)
    constant = implied - mdp.reward
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), rtol=0, atol=1e-12)


def test_variant_1_alone_reaches_the_papers_optimum():
    """π ∝ π_ref · exp(Q_{π_ref}/β), Q_{π_ref} the plain expected reward of going on with the reference."""
    mdp = small()
    policy = fit(mdp, Tdpo(beta=BETA, variant=1), soft_pairs(mdp))
    assert abs(kl(policy.logprob(), tdpo_optimum(mdp, 1.0))) < 1e-10


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_variant_1_with_soft_labels_reaches_its_own_optimum(alpha):
    mdp, own = small(), tdpo_optimum(small(), alpha)
    assert kl(own, mdp.optimum) > 0.02
    policy = fit(mdp, Tdpo(beta=BETA, variant=1, alpha=alpha), soft_pairs(mdp))
    assert abs(kl(policy.logprob(), own)) < 1e-10


def test_variant_2_reaches_neither():
    """The stopped gradient moves its end: away from π*, and from variant 1's."""
    mdp = small()
    policy = settle(mdp, Tdpo(beta=BETA, variant=2, alpha=0.5), soft_pairs(mdp))
    assert kl(policy.logprob(), mdp.optimum) > 0.1
    assert kl(policy.logprob(), tdpo_optimum(mdp, 0.5)) > 0.1


@pytest.mark.parametrize("variant", [1, 2])
def test_without_its_kl_it_is_dpo(variant):
    policy = settle(tiny(), Tdpo(beta=BETA, variant=variant, alpha=0.0), soft_pairs(tiny()))
    assert abs(kl(policy.logprob(), tiny().optimum)) < 1e-10


def test_variant_2_holds_the_divergence_down():
    """Variant 1 also pushes the chosen response's KL up. At the start state the second stays within a tenth of the forward
    KL of either variant 1 or DPO."""
    mdp = small()
    reference = mdp.ref_logits.log_softmax(-1)

    def moved(policy: TabularPolicy) -> Tensor:
        return divergence(policy.logits.detach().log_softmax(-1), reference, "forward")[:, 0]

    first = fit(mdp, Tdpo(beta=BETA, variant=1, alpha=1.0), soft_pairs(mdp))
    second = settle(mdp, Tdpo(beta=BETA, variant=2, alpha=1.0), soft_pairs(mdp))
    assert (moved(second) < 0.1 * moved(first)).all()
    assert (moved(second) < 0.1 * moved(trained_dpo(mdp))).all()
