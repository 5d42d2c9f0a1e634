"""Best-of-n: the right one of the right draws, its exact distribution, and the bound on how far it moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.decoding import best_of_n, sampling
from pipeline.decoding.best_of_n import kl_bound
from tests.decoding.tabular import prompts_of, tools
from tests.oracle.cases import small
from tests.oracle.mdp import kl


def exact_best_of(logprob: Tensor, reward: Tensor, n: int) -> Tensor:
    """log-probability that a response is the best of n: F(r)^n − F(r−)^n. One prompt, [N]."""
    order = reward.argsort()
    up_to = logprob[order].exp().cumsum(0).clamp(max=1.0)
    below = torch.cat([up_to.new_zeros(1), up_to[:-1]])
    chance = torch.empty_like(up_to)
    chance[order] = up_to**n - below**n
    return chance.clamp(min=1e-300).log()  # what is next to impossible adds nothing, instead of 0 · ∞


def test_it_is_the_best_of_the_very_draws_that_sampling_makes():
    mdp = small()
    own = tools(mdp, {"policy": mdp.ref_logits}, {"scorer": mdp.token_reward}, n=5, per_prompt=3, seed=4)
    drawn = sampling.sample(replace(own, sampling=own.sampling.model_copy(update={"per_prompt": 15})), prompts_of(mdp))
    rewards = [mdp.reward[i // 15, mdp.responses.index(tuple(c.token_ids))].item() for i, c in enumerate(drawn)]
    for i, completion in enumerate(best_of_n.best_of_n(own, prompts_of(mdp))):
        group = rewards[5 * i : 5 * i + 5]
        assert completion.score == pytest.approx(max(group), abs=1e-12)
        assert completion.token_ids == drawn[5 * i + group.index(max(group))].token_ids
        assert completion.logprobs == drawn[5 * i + group.index(max(group))].logprobs
        assert completion.details["mean_score_of_n"] == pytest.approx(sum(group) / 5, abs=1e-12)
        assert completion.details["kl_bound"] == pytest.approx(math.log(5) - 4 / 5)


def test_frequencies_are_those_of_the_best_of_three():
    mdp, draws = small(), 1500
    own = tools(mdp, {"policy": mdp.ref_logits}, {"scorer": mdp.token_reward}, n=3, per_prompt=draws)
    found = best_of_n.best_of_n(own, prompts_of(mdp)[:1])
    exact = exact_best_of(mdp.ref_logprob[0], mdp.reward[0], 3).exp()
    drawn = [mdp.responses.index(tuple(c.token_ids)) for c in found]
    frequency = torch.tensor(drawn).bincount(minlength=mdp.size).double() / draws
    assert ((frequency - exact).abs() <= 4 * (exact * (1 - exact) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("n", [1, 2, 4, 16, 256])
def test_the_bound_holds_and_is_nearly_reached_where_responses_hardly_repeat(n):
    mdp = small()
    exact = torch.stack([exact_best_of(mdp.ref_logprob[x], mdp.reward[x], n) for x in range(2)])
    assert -1e-9 <= kl(exact, mdp.ref_logprob) <= kl_bound(n) + 1e-9
    many = torch.full((1, 100_000), -math.log(100_000), dtype=torch.float64)
    fine = exact_best_of(many[0], torch.arange(100_000), n)[None]
    assert kl(fine, many) == pytest.approx(kl_bound(n), abs=2e-3)


def test_a_scorer_that_fails_on_a_sample_fails_the_completion():
    mdp = small()
    broken = mdp.token_reward.clone()
    broken[0] = float("nan")
    own = tools(mdp, {"policy": mdp.ref_logits}, {"scorer": broken}, n=4)
    first, second = best_of_n.best_of_n(own, prompts_of(mdp))
    assert first.failure == "the scorer failed on 4 of 4 samples"
    assert second.failure is None
