"""Where DQO, OREO and DRO end: policy and critic tables, trained together from the reference and V = 0.

At π* every residual vanishes on every trajectory, so that no weighting of the data moves the end, as long as all
responses are in it. (A random environment changes that: `test_turns`.)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.contracts import Batch, Objective
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.dro import Dro
from pipeline.objectives.oreo import Oreo
from tests.oracle.cases import BETA, drawn_from, everything, larger, small, third_policy, tiny
from tests.oracle.flow import rates, settle
from tests.oracle.mdp import TokenMdp, kl
from tests.oracle.policy import TabularPolicy, loss_of, minimise, rewarded, rows


def uniform(mdp: TokenMdp) -> Batch:
    """All N trajectories of a prompt in one row."""
    return rewarded(mdp, everything(mdp))


def from_reference(mdp: TokenMdp) -> Batch:
    return drawn_from(mdp, mdp.ref_logits.log_softmax(-1))


def ragged(mdp: TokenMdp) -> Batch:
    """Rows of one to five trajectories and of various weights; each trajectory is in one of them."""
    groups, rng = [], torch.Generator().manual_seed(7)
    for x in range(mdp.prompts):
        order = torch.randperm(mdp.size, generator=rng).tolist()
        while order:
            count = int(torch.randint(1, 6, (1,), generator=rng))
            groups.append((x, order[:count]))
            order = order[count:]
    return rewarded(mdp, rows(mdp, groups, 0.5 + torch.rand(len(groups), generator=rng)))


def assert_solved(mdp: TokenMdp, policy: TabularPolicy) -> None:
    """π is π*, V is V* at every state, and so Q = βρ + V is Q* = r + V*(s′) at every token."""
    assert kl(mdp.ref_logprob, mdp.optimum) > 0.3, "there is a way to go"
    assert abs(kl(policy.logprob(), mdp.optimum)) < 1e-10
    torch.testing.assert_close(policy.values.detach(), mdp.soft_values, rtol=0, atol=1e-8)
    ratio = policy.logits.detach().log_softmax(-1) - mdp.ref_logits.log_softmax(-1)
    q = mdp.beta * ratio + policy.values.detach()[..., None]
    torch.testing.assert_close(q, mdp.token_reward + mdp.after(mdp.soft_values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("data", [uniform, from_reference])
@pytest.mark.parametrize("q_target", ["return", "value"])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.5, 0.0])
def test_dqo_reaches_the_optimum_and_its_values(lam, q_target, data: Callable[[TokenMdp], Batch]):
    assert_solved(tiny(), settle(tiny(), Dqo(beta=BETA, lam=lam, q_target=q_target), data(tiny())))


@pytest.mark.parametrize("data", [ragged, lambda mdp: drawn_from(mdp, third_policy(mdp))], ids=["ragged", "third"])
def test_dqo_reaches_the_optimum_whatever_the_mixture_of_the_data(data: Callable[[TokenMdp], Batch]):
    assert_solved(small(), settle(small(), Dqo(beta=BETA), data(small())))


def test_dqo_reaches_the_optimum_of_longer_responses():
    assert_solved(larger(), settle(larger(), Dqo(beta=larger().beta, lam=0.95), uniform(larger())))


def test_oreo_without_its_kl_reaches_the_optimum_and_its_values():
    assert_solved(small(), settle(small(), Oreo(beta=BETA, kl_weight=0.0), uniform(small())))


def test_kl_of_oreo_holds_it_back():
    """The more of it, the farther from π*, and the closer to the reference."""
    mdp = small()
    policies = [settle(mdp, Oreo(beta=BETA, kl_weight=weight), uniform(mdp)).logprob() for weight in (0.03, 0.3)]
    missing = [kl(policy, mdp.optimum) for policy in policies]
    moved = [kl(policy, mdp.ref_logprob) for policy in policies]
    assert 1e-3 < missing[0] < missing[1] / 5
    assert moved[1] < moved[0] < kl(mdp.optimum, mdp.ref_logprob)


@pytest.mark.parametrize(("data", "tolerance"), [(uniform, 1e-10), (from_reference, 1e-8)])
@pytest.mark.parametrize("mdp", [small, larger])
def test_dro_reaches_the_optimum_and_the_prompts_value(mdp: Callable[[], TokenMdp], data, tolerance):
    """Its critic is asked for V(x) alone and learns nothing of later states."""
    mdp = mdp()
    policy = settle(mdp, Dro(beta=mdp.beta), data(mdp))
    assert abs(kl(policy.logprob(), mdp.optimum)) < tolerance
    torch.testing.assert_close(policy.values[:, 0].detach(), mdp.soft_values[:, 0], rtol=0, atol=1e-8)
    assert policy.values[:, 1:].count_nonzero() == 0


@pytest.mark.parametrize(
    "objective", [Dqo(beta=BETA), Dqo(beta=BETA, lam=0.0, q_target="value"), Oreo(beta=BETA, kl_weight=0.1)]
)
def test_the_end_attracts(objective: Objective):
    """Every small push away from it dies out under gradient descent."""
    batch = uniform(tiny())
    assert rates(tiny(), objective, batch, settle(tiny(), objective, batch)).min() > 1e-3


def test_plain_gradient_descent_ends_where_settle_does():
    """Nothing of this depends on the solver: 400 steps of equal length, policy and critic at once."""
    mdp, objective, batch = tiny(), Dqo(beta=BETA, lam=0.9), uniform(tiny())
    policy = TabularPolicy(mdp)
    for _ in range(400):
        loss = loss_of(objective, policy(batch, objective.needed()), batch)
        for table, slope in zip(
            (policy.logits, policy.values), torch.autograd.grad(loss, (policy.logits, policy.values)), strict=True
        ):
            table.data -= 2.0 * slope
    assert_solved(mdp, policy)


@pytest.mark.parametrize("known", [True, False])
def test_dro_is_right_only_with_the_right_value(known):
    """V(x) is no mere baseline off-policy: held at V*(x) the policy's term alone ends at π*, held at 0 elsewhere."""
    mdp, batch, objective = tiny(), uniform(tiny()), Dro(beta=BETA)
    policy = TabularPolicy(mdp, values=mdp.soft_values if known else None)
    minimise(policy.logits, lambda: loss_of(objective, policy(batch, objective.needed()), batch, "policy"), rounds=3)
    assert (abs(kl(policy.logprob(), mdp.optimum)) < 1e-6) == known
    assert (kl(policy.logprob(), mdp.optimum) > 0.1) != known
