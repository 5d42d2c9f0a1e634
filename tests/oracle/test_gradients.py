"""The shipped objectives' gradients against autograd on losses written out here, response by response and state by state.

Only tables and loops over listed responses on this side; batches, masks, λ-returns, weights and denominators are the
shipped ones on the other. Stopped gradients are written as a second, frozen copy of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.contracts import Batch, Objective
from pipeline.objectives.dqo import Dqo
from pipeline.objectives.dro import Dro
from pipeline.objectives.oreo import Oreo
from pipeline.objectives.tdpo import Tdpo
from tests.oracle.cases import BETA, drawn_from, everything, small, soft_pairs, third_policy
from tests.oracle.mdp import TokenMdp
from tests.oracle.policy import TabularPolicy, loss_of, rewarded

Tables = tuple[Tensor, Tensor]
"""Logits [X, S, V] and values [X, S]."""
Written = Callable[[Tables, Tables], Tensor]
"""A loss of (tables, frozen copies of them)."""


def somewhere(mdp: TokenMdp) -> TabularPolicy:
    """A policy and a critic off every special point: near enough to the reference that no weight is all or nothing."""
    rng = torch.Generator().manual_seed(11)
    noise = torch.randn(mdp.ref_logits.shape, generator=rng, dtype=torch.float64)
    values = torch.randn(mdp.soft_values.shape, generator=rng, dtype=torch.float64)
    return TabularPolicy(mdp, mdp.ref_logits + 0.4 * noise, values)


def gradients(loss: Tensor, tables: Tables) -> Tables:
    return torch.autograd.grad(loss, tables, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same_gradient(mdp: TokenMdp, objective: Objective, batch: Batch, written: Written) -> None:
    """`written(tables, frozen tables)` has the gradient of the shipped loss, for policy and critic."""
    policy = somewhere(mdp)
    tables = policy.logits, policy.values
    shipped = gradients(loss_of(objective, policy(batch, objective.needed()), batch), tables)
    ours = gradients(written(tables, (policy.logits.detach(), policy.values.detach())), tables)
    assert shipped[0].abs().max() > 1e-3
    for got, wanted in zip(shipped, ours, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def path(mdp: TokenMdp, response: tuple[int, ...]) -> list[tuple[int, int]]:
    """(state, token) along a response."""
    state, steps = 0, []
    for token in response:
        steps.append((state, token))
        state = int(mdp.next_state[state, token])
    return steps


# ------------------------------------------------------------------------------------------------------- TDPO


@pytest.mark.parametrize(("variant", "alpha"), [(1, 1.0), (1, 0.5), (2, 0.5), (2, 2.0)])
def test_tdpo_is_the_expectation_over_pairs(variant, alpha):
    mdp = small()
    reference = mdp.ref_logits.log_softmax(-1)

    def written(tables: Tables, frozen: Tables) -> Tensor:
        def sums(logits: Tensor, x: int, n: int) -> tuple[Tensor, Tensor]:
            """ℓ(y) and the KL(π_ref ‖ π) of its states, added up token by token."""
            ratio, kl = torch.zeros(()), torch.zeros(())
            for state, token in path(mdp, mdp.responses[n]):
                logp = logits[x, state] - logits[x, state].exp().sum().log()
                ratio = ratio + logp[token] - reference[x, state, token]
                for v in range(mdp.vocabulary):
                    p = reference[x, state, v]
                    kl = kl + p.exp() * (p - logp[v])
            return ratio, kl

        total, weight = torch.zeros(()), 0.0
        for x in range(mdp.prompts):
            live = [sums(tables[0], x, n) for n in range(mdp.size)]
            fixed = [sums(frozen[0], x, n) for n in range(mdp.size)]
            for w in range(mdp.size):
                for l in range(mdp.size):  # noqa: E741
                    if w == l:
                        continue
                    u = BETA * (live[w][0] - live[l][0])
                    chosen = live[w][1] if variant == 1 else fixed[w][1]
                    delta = BETA * (live[l][1] - chosen)
                    p = mdp.preference[x, w, l]
                    total, weight = total - p * logsigmoid(u - alpha * delta), weight + p
        return total / weight

    assert_same_gradient(mdp, Tdpo(beta=BETA, variant=variant, alpha=alpha), soft_pairs(mdp), written)


# ------------------------------------------------------------------------------------------ DQO, OREO and DRO


def written_dqo(mdp: TokenMdp, drawn: Tensor, objective: Dqo, other: Tensor | None = None) -> Written:
    """Expectation over trajectories with probabilities `drawn` [X, N]; n-step returns are added up one by one, weights
    taken against `other` [X, S, V]."""
    reference, lam = mdp.ref_logits.log_softmax(-1), objective.lam

    def written(tables: Tables, frozen: Tables) -> Tensor:
        logp, fixed = tables[0].log_softmax(-1), frozen[0].log_softmax(-1)
        total = torch.zeros(())
        for x in range(mdp.prompts):
            for n, response in enumerate(mdp.responses):
                steps = path(mdp, response)
                kept = [mdp.token_reward[x, s, a] - BETA * (fixed[x, s, a] - reference[x, s, a]) for s, a in steps]
                values = [frozen[1][x, s] for s, _ in steps]

                def mixed(h: int) -> Tensor:
                    """G^λ(s_h) by its definition; 0 at the end."""
                    left = len(kept) - h  # noqa: B023
                    value = torch.zeros(())
                    for m in range(1, left + 1):
                        share = lam ** (m - 1) * ((1 - lam) if m < left else 1.0)
                        tail = values[h + m] if m < left else 0.0  # noqa: B023
                        value = value + share * (sum(kept[h : h + m]) + tail)  # noqa: B023
                    return value

                squares = torch.zeros(())
                for h, (s, a) in enumerate(steps):
                    follows = values[h + 1] if h + 1 < len(steps) else 0.0
                    ahead = mixed(h + 1) if objective.q_target == "return" else follows
                    advantage = mdp.token_reward[x, s, a] + ahead - values[h]
                    q = BETA * (logp[x, s, a] - reference[x, s, a]) - advantage
                    squares = squares + q**2 / BETA + (tables[1][x, s] - mixed(h)) ** 2
                weight = 1.0
                if other is not None:
                    ratio = sum((fixed[x, s, a] - other[x, s, a]).item() for s, a in steps)
                    weight = min(objective.importance_cap, math.exp(ratio))
                total = total + drawn[x, n] * weight * squares / len(steps)
        return total / drawn.sum()

    return written


@pytest.mark.parametrize("lam", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("q_target", ["return", "value"])
def test_dqo_is_the_expectation_over_trajectories(lam, q_target):
    mdp, objective = small(), Dqo(beta=BETA, lam=lam, q_target=q_target)
    drawn = mdp.path_sum(third_policy(mdp)).exp()
    batch = drawn_from(mdp, third_policy(mdp))
    assert_same_gradient(mdp, objective, batch, written_dqo(mdp, drawn, objective))


@pytest.mark.parametrize("importance", ["behaviour", "reference"])
def test_dqo_weighs_trajectories_as_it_says(importance):
    mdp, objective = small(), Dqo(beta=BETA, lam=0.7, importance=importance, importance_cap=1.2)
    drawn = mdp.path_sum(third_policy(mdp)).exp()
    other = third_policy(mdp) if importance == "behaviour" else mdp.ref_logits.log_softmax(-1)
    batch = drawn_from(mdp, third_policy(mdp))
    assert_same_gradient(mdp, objective, batch, written_dqo(mdp, drawn, objective, other))


def test_oreo_is_dqo_and_the_reverse_kl_per_token():
    mdp, weight = small(), 0.2
    uniform = torch.ones_like(mdp.reward)
    bellman = written_dqo(mdp, uniform, Dqo(beta=BETA))
    reference = mdp.ref_logits.log_softmax(-1)

    def written(tables: Tables, frozen: Tables) -> Tensor:
        logp = tables[0].log_softmax(-1)
        kl = torch.zeros(())
        for x in range(mdp.prompts):
            for response in mdp.responses:
                states = [state for state, _ in path(mdp, response)]
                each = [(logp[x, s].exp() * (logp[x, s] - reference[x, s])).sum() for s in states]
                kl = kl + sum(each) / len(each)
        return bellman(tables, frozen) + weight / BETA * kl / uniform.sum()

    assert_same_gradient(mdp, Oreo(beta=BETA, kl_weight=weight), rewarded(mdp, everything(mdp)), written)


def test_dro_is_the_expectation_over_trajectories():
    mdp = small()
    drawn = mdp.path_sum(third_policy(mdp)).exp()

    def written(tables: Tables, frozen: Tables) -> Tensor:
        ratio = mdp.sequence_logprob(tables[0]) - mdp.ref_logprob
        policy = mdp.reward - frozen[1][:, :1] - BETA * ratio
        critic = mdp.reward - tables[1][:, :1] - BETA * ratio.detach()
        return (drawn * (policy**2 / BETA + critic**2)).sum() / drawn.sum()

    assert_same_gradient(mdp, Dro(beta=BETA), drawn_from(mdp, third_policy(mdp)), written)


# -------------------------------------------------------------------------------------------- terms by group

TRAJECTORY_OBJECTIVES = [
    Dqo(beta=BETA, lam=0.7),
    Dqo(beta=BETA, lam=0.7, q_target="value", importance="behaviour"),
    Dqo(beta=BETA, importance="reference"),
    Oreo(beta=BETA, kl_weight=0.1),
    Dro(beta=BETA),
]


@pytest.mark.parametrize("objective", TRAJECTORY_OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{o.needed().behaviour}")
def test_policy_terms_move_the_policy_alone_and_critic_terms_the_critic(objective: Objective):
    mdp = small()
    batch, policy = drawn_from(mdp, third_policy(mdp)), somewhere(mdp)
    terms = objective(policy(batch, objective.needed()), batch).terms
    assert {term.group for term in terms.values()} == {"policy", "critic"}
    for term in terms.values():
        logits, values = gradients(term.total, (policy.logits, policy.values))
        assert (logits.count_nonzero() > 0) == (term.group == "policy")
        assert (values.count_nonzero() > 0) == (term.group == "critic")
