"""The token MDPs that the tests train on, their data with soft labels, and policies that several tests look at.

Labels are soft: every ordered pair, or every order of a ranking, is in the batch with the probability of that outcome
as its weight, so that a loss is the exact expectation and nothing is left to sampling.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, permutations

import torch
from torch import Tensor

from pipeline.contracts import Batch
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.f_dpo import FDpo
from tests.oracle.mdp import TokenMdp
from tests.oracle.policy import TabularPolicy, fit, rewarded, rows

BETA = 0.5


@cache
def small() -> TokenMdp:
    """15 responses of 1 to 3 tokens, 2 prompts."""
    return TokenMdp(vocabulary=3, horizon=3, beta=BETA)


@cache
def tiny() -> TokenMdp:
    """7 responses of 1 or 2 tokens, 2 prompts, for rankings: 504 orders."""
    return TokenMdp(vocabulary=3, horizon=2, beta=BETA)


@cache
def larger() -> TokenMdp:
    """31 responses of 1 to 4 tokens, 2 prompts, a firmer leash."""
    return TokenMdp(vocabulary=3, horizon=4, beta=1.0, seed=3)


def pairs(mdp: TokenMdp, weight: Tensor) -> Batch:
    """Every ordered pair of different responses, (i, j) of prompt x with `weight`[x, i, j]."""
    groups = [(x, pair) for x in range(mdp.prompts) for pair in permutations(range(mdp.size), 2)]
    return rows(mdp, groups, torch.stack([weight[x, i, j] for x, (i, j) in groups]))


@cache
def rankings(mdp: TokenMdp) -> tuple[Batch, Tensor]:
    """All orders of all pairs and triples, weighted by their Plackett–Luce probability; and how often each response is
    among the first K − 1 [X, N].

    The probability is multiplied out as the chance of drawing the best of what is left, again and again.
    """
    groups, weights = [], []
    counts = torch.zeros_like(mdp.reward)
    for x in range(mdp.prompts):
        strength = mdp.reward[x].exp().tolist()
        for order in [o for k in (2, 3) for group in combinations(range(mdp.size), k) for o in permutations(group)]:
            chance = 1.0
            for k in range(len(order) - 1):
                chance *= strength[order[k]] / sum(strength[n] for n in order[k:])
            groups.append((x, order))
            weights.append(chance)
            counts[x, list(order[:-1])] += chance
    return rows(mdp, groups, torch.tensor(weights, dtype=torch.float64)), counts


def everything(mdp: TokenMdp) -> Batch:
    """One row per prompt that holds all N responses."""
    return rows(mdp, [(x, range(mdp.size)) for x in range(mdp.prompts)], torch.ones(mdp.prompts))


def one_by_one(mdp: TokenMdp, weight: Tensor) -> Batch:
    """Every response of every prompt in a row of its own, with `weight` [X, N]."""
    return rows(mdp, [(x, [n]) for x in range(mdp.prompts) for n in range(mdp.size)], weight.flatten())


def drawn_from(mdp: TokenMdp, policy: Tensor) -> Batch:
    """Rewarded trajectories, each as often as `policy` [X, S, V] (log-probabilities) draws it, which is also logged."""
    return rewarded(mdp, one_by_one(mdp, mdp.path_sum(policy).exp()), policy)


def third_policy(mdp: TokenMdp) -> Tensor:
    """A policy that is neither the reference nor the optimum, with full support: log-probabilities [X, S, V]."""
    return mdp.ref_logits.flip(1).log_softmax(-1)


@cache
def soft_pairs(mdp: TokenMdp) -> Batch:
    return pairs(mdp, mdp.preference)


@cache
def trained_dpo(mdp: TokenMdp) -> TabularPolicy:
    return fit(mdp, Dpo(beta=mdp.beta), soft_pairs(mdp))


@cache
def trained_f_dpo(divergence: str, alpha: float) -> TabularPolicy:
    return fit(small(), FDpo(beta=BETA, divergence=divergence, alpha=alpha), soft_pairs(small()), rounds=12)
