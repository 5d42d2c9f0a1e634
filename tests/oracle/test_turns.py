"""Trajectories in which an environment speaks, too: which objectives find the optimum, and what importance weights do.

One trajectory's residuals no longer vanish at π*, only their means over the environment's tokens. What correlates a
residual with later tokens then shifts the end.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from pipeline.contracts import Batch, Objective
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.dro import Dro
from pipeline.objectives.oreo import Oreo
from tests.oracle.cases import BETA, drawn_from, one_by_one, third_policy
from tests.oracle.flow import settle
from tests.oracle.mdp import kl
from tests.oracle.policy import TabularPolicy, rewarded
from tests.oracle.turns import TurnsMdp


@cache
def turns(stops: bool = False) -> TurnsMdp:
    return TurnsMdp(stops, beta=BETA)


def third(mdp: TurnsMdp) -> torch.Tensor:
    return mdp.with_environment(third_policy(mdp))


def missing(mdp: TurnsMdp, policy: TabularPolicy) -> float:
    """KL(π ‖ π*) of whole trajectories, the environment's tokens drawn as ever."""
    return kl(mdp.path_sum(mdp.with_environment(policy.logits.detach().log_softmax(-1))), mdp.optimum)


def distance(objective: Objective, batch: Batch, mdp: TurnsMdp | None = None) -> float:
    """Of where `objective` ends on `batch` to π*."""
    mdp = mdp or turns()
    return missing(mdp, settle(mdp, objective, batch))


@pytest.mark.parametrize("stops", [False, True])
def test_optimum_maximises_reward_less_kl(stops):
    """The recursion against the sum over every listed trajectory, by its slope and by policies nearby."""
    mdp = turns(stops)
    best = (mdp.conditionals(mdp.optimum)).requires_grad_()
    value = mdp.objective(best.log_softmax(-1))
    torch.testing.assert_close(value.detach(), mdp.soft_values[:, 0], rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), best)
    assert slope.abs().max() < 1e-12, "stationary; and with full support only the maximum is"
    others = torch.randn(20, *best.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for other in others:
        assert (mdp.objective((best + 0.1 * other).log_softmax(-1)) < value).all()
    naive = (mdp.ref_logprob + mdp.reward / mdp.beta).log_softmax(-1)
    assert kl(naive, mdp.optimum) > 0.1, "bending the environment's dice is another optimum"


@pytest.mark.parametrize(
    "objective",
    [
        Dqo(beta=BETA),
        Dqo(beta=BETA, lam=0.5),
        Dqo(beta=BETA, lam=0.0, q_target="value"),
        Oreo(beta=BETA, kl_weight=0.0),
    ],
    ids=["λ=1", "λ=.5", "λ=0", "oreo"],
)
def test_token_level_objectives_see_through_the_environments_chance(objective: Objective):
    mdp = turns()
    policy = settle(mdp, objective, drawn_from(mdp, third(mdp)))
    assert abs(missing(mdp, policy)) < 1e-10
    ours = mdp.policy_moves
    torch.testing.assert_close(policy.values.detach()[:, ours], mdp.soft_values[:, ours], rtol=0, atol=1e-8)
    assert policy.values[:, ~ours].count_nonzero() == 0, "nobody asks for values where the environment moves"
    untouched = policy.logits.detach() == mdp.ref_logits
    assert untouched[:, ~ours].all() and not untouched[:, ours].any()


def test_dro_takes_the_environments_chance_for_the_policys_merit():
    """It regresses the whole return, luck included, on every token's log-ratio."""
    mdp = turns()
    assert distance(Dro(beta=BETA), drawn_from(mdp, third(mdp))) > 0.1


def test_importance_weights_must_be_right_and_uncapped_where_there_is_chance():
    mdp, uncapped = turns(), 1e9
    data = drawn_from(mdp, third(mdp))
    ours = torch.where(mdp.policy_moves[:, None], third(mdp), 0.0)
    assert (data.behaviour_logprobs == mdp.path_sum(ours).flatten()[:, None]).all(), "the policy's tokens alone"
    assert abs(distance(Dqo(beta=BETA, importance="behaviour", importance_cap=uncapped), data)) < 1e-10
    assert distance(Dqo(beta=BETA, importance="behaviour"), data) > 1e-2
    assert distance(Dqo(beta=BETA, importance="reference", importance_cap=uncapped), data) > 1e-2


def test_mean_over_a_trajectorys_tokens_is_biased_where_chance_decides_its_length():
    """1/length weighs a token by what the environment said later. Undone by a weight of the length, the bias is gone;
    where no environment speaks there is none (`test_soft_q`)."""
    mdp = turns(stops=True)
    made = mdp.path_sum(third(mdp)).exp()
    length = mdp.path_sum(mdp.policy_moves.double()[None, :, None].expand_as(mdp.ref_logits))
    assert {int(n) for n in length.flatten()} == {1, 2}
    assert distance(Dqo(beta=BETA), rewarded(mdp, one_by_one(mdp, made)), mdp) > 5e-3
    assert abs(distance(Dqo(beta=BETA), rewarded(mdp, one_by_one(mdp, made * length)), mdp)) < 1e-10
