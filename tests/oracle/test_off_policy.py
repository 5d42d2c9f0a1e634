"""Data that neither the reference nor the policy made, with and without importance weights.

Where all trajectories are in the data and the environment has no say, every residual vanishes at π*. So any weights that stay
positive lead there: right ones, wrong ones and none. What weights change is how fast: a trajectory that π* hardly makes
gets a weight near 0, and what it would teach is learnt last. If weights can go to 0 there is nothing to go back by.
"""

from __future__ import annotations

import pytest
import torch

from pipeline.contracts import Batch
from pipeline.objectives.dqo import Dqo
from tests.oracle.cases import BETA, drawn_from, small, third_policy, tiny
from tests.oracle.flow import Flow, rates, settle
from tests.oracle.mdp import TokenMdp, kl
from tests.oracle.policy import TabularPolicy, rewarded, rows


def third(mdp: TokenMdp) -> Batch:
    """Trajectories of a third policy, which logged its log-probs."""
    return drawn_from(mdp, third_policy(mdp))


def test_third_policy_is_neither():
    mdp = small()
    assert kl(mdp.path_sum(third_policy(mdp)), mdp.ref_logprob) > 0.4
    assert kl(mdp.path_sum(third_policy(mdp)), mdp.optimum) > 0.4


@pytest.mark.parametrize("importance", ["none", "behaviour", "reference"])
def test_full_support_needs_no_importance_weights_and_bears_wrong_ones(importance):
    mdp = small()
    policy = settle(mdp, Dqo(beta=BETA, importance=importance), third(mdp))
    assert abs(kl(policy.logprob(), mdp.optimum)) < 1e-10
    torch.testing.assert_close(policy.values.detach(), mdp.soft_values, rtol=0, atol=1e-6)


def test_importance_weights_are_slower_to_reach_it():
    """By a factor of 20 and more in the slowest direction here."""
    mdp, batch = small(), third(small())
    objectives = {name: Dqo(beta=BETA, importance=name) for name in ("none", "behaviour", "reference")}
    end = settle(mdp, objectives["none"], batch)
    slowest = {name: rates(mdp, objective, batch, end).min().item() for name, objective in objectives.items()}
    assert slowest["none"] > 20 * slowest["behaviour"] > 0
    assert slowest["none"] > 20 * slowest["reference"] > 0


def test_behaviour_weights_make_of_any_data_that_of_the_policy():
    """Uncapped, E_μ[w f] = E_π[f]: the field at a policy is the one of data drawn from that policy itself; weights
    against the reference make it another, unless the reference made the data."""
    mdp = small()
    policy = TabularPolicy(mdp, mdp.ref_logits.roll(1, dims=2), values=0.3 * mdp.soft_values)
    own = policy.logits.detach().log_softmax(-1)

    def field(importance: str, data: Batch) -> torch.Tensor:
        flow = Flow(mdp, Dqo(beta=BETA, importance=importance, importance_cap=1e9), data)
        return flow.gradient(flow.point(policy))

    wanted = field("none", drawn_from(mdp, own))
    from_reference = drawn_from(mdp, mdp.ref_logits.log_softmax(-1))
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(field("behaviour", third(mdp)), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(field("reference", from_reference), wanted, rtol=0, atol=1e-12)
    assert (field("reference", third(mdp)) - wanted).abs().max() > 0.01
    assert (field("none", third(mdp)) - wanted).abs().max() > 0.01


def test_importance_weights_make_leaving_the_data_absorbing():
    """Where the policy avoids all of the data by 20 nats, weighted residuals pull no more; plain ones do, and hard."""
    mdp = tiny()
    data = rewarded(mdp, rows(mdp, [(x, [0, 1, 2]) for x in range(mdp.prompts)], torch.ones(mdp.prompts)))
    logprob = mdp.ref_logprob.clone()
    logprob[:, :3] -= 20.0
    policy = TabularPolicy(mdp, mdp.conditionals(logprob.log_softmax(-1)))
    pull = {}
    for importance in ("none", "reference"):
        flow = Flow(mdp, Dqo(beta=BETA, importance=importance), data)
        pull[importance] = flow.gradient(flow.point(policy)).abs().max().item()
    assert pull["none"] > 1.0
    assert pull["reference"] < 1e-6
