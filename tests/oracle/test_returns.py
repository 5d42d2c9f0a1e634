"""λ-returns: at the optimum all of them are V*, and anywhere they are the mixture of n-step returns that defines them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.ops import following, lambda_returns
from tests.oracle.cases import everything, larger, one_by_one, small
from tests.oracle.mdp import TokenMdp
from tests.oracle.policy import TabularPolicy, rewarded, visited
from tests.oracle.turns import TurnsMdp

LAMBDAS = [1.0, 0.95, 0.5, 0.0]


def at_the_optimum(mdp: TokenMdp) -> tuple[Tensor, Tensor, Tensor]:
    """r − βρ under π*, V*, and the mask, on every trajectory of every prompt; all [X, N, R]."""
    batch = rewarded(mdp, everything(mdp))
    best = TabularPolicy(mdp, mdp.conditionals(mdp.optimum))
    kept = batch.token_rewards - mdp.beta * (best(batch).logprobs - batch.ref_logprobs)
    values = torch.where(batch.response_mask, mdp.soft_values[visited(mdp, batch)], 0.0)
    return kept.detach(), values, batch.response_mask


@pytest.mark.parametrize("mdp", [small, larger])
def test_what_is_still_to_come_is_the_same_on_every_trajectory(mdp: Callable[[], TokenMdp]):
    """Σ_{i≥h} (r_i − βρ_i) = V*(s_h) at π*, without any look at a critic: it is given garbage."""
    kept, values, mask = at_the_optimum(mdp())
    torch.testing.assert_close(
        lambda_returns(kept, 1e3 * torch.ones_like(values), mask, 1.0), values, rtol=0, atol=1e-12
    )
    assert (kept.sum(-1) - values[..., 0]).abs().max() < 1e-12
    assert kept.abs().max() > 1, "no token's share vanishes"


@pytest.mark.parametrize("lam", LAMBDAS)
def test_lambda_return_of_the_optimum_is_its_value(lam):
    kept, values, mask = at_the_optimum(larger())
    torch.testing.assert_close(lambda_returns(kept, values, mask, lam), values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("stops", [False, True])
def test_lambda_return_is_the_value_on_average_over_what_the_environment_says(stops, lam):
    """One trajectory has luck; over the environment's tokens, drawn as ever, it evens out at every state of the policy."""
    mdp = TurnsMdp(stops)
    table = mdp.conditionals(mdp.optimum)
    drawn = mdp.with_environment(mdp.ref_logits.flip(1).log_softmax(-1))  # the policy's tokens by another policy
    batch = rewarded(mdp, one_by_one(mdp, mdp.path_sum(drawn).exp()))
    kept = batch.token_rewards - mdp.beta * (TabularPolicy(mdp, table)(batch).logprobs - batch.ref_logprobs)
    prompt, state = visited(mdp, batch)
    mask = batch.response_mask
    values = torch.where(mask, mdp.soft_values[prompt, state], 0.0)
    returns = lambda_returns(kept.detach(), values, mask, lam)
    total, weight = torch.zeros_like(mdp.soft_values), torch.zeros_like(mdp.soft_values)
    each = batch.weight[:, None, None].expand_as(returns)
    total.index_put_((prompt[mask], state[mask]), (each * returns)[mask], accumulate=True)
    weight.index_put_((prompt[mask], state[mask]), each[mask], accumulate=True)
    ours = mdp.policy_moves
    torch.testing.assert_close((total / weight)[:, ours], mdp.soft_values[:, ours], rtol=0, atol=1e-12)
    if lam == 1:
        assert (returns - values).abs().max() > 0.1, "luck"


def n_step(reward: list[float], values: list[float], mask: list[bool], start: int, n: int) -> tuple[float, bool]:
    """G^(n) from `start`: all rewards until n actions of the policy are done, then the value of the state that follows,
    if there is one. And whether there is."""
    total, actions = 0.0, 0
    for t in range(start, len(reward)):
        if mask[t]:
            if actions == n:
                return total + values[t], True
            actions += 1
        total += reward[t]
    return total, False


def direct(reward: list[float], values: list[float], mask: list[bool], lam: float) -> list[float]:
    """(1−λ) Σ_{n<N} λ^{n−1} G^(n) + λ^{N−1} G^(N) at each token of the policy, N = actions left; 0 elsewhere."""
    out = []
    for t in range(len(reward)):
        total, left = 0.0, sum(mask[t:])
        for n in range(1, left + 1):
            step, goes_on = n_step(reward, values, mask, t, n)
            assert goes_on == (n < left)
            total += ((1 - lam) if goes_on else 1.0) * lam ** (n - 1) * step
        out.append(total if mask[t] else 0.0)
    return out


# 1 = the policy's token, 0 = the environment's, . = padding
MASKS = ["1", "11111", "1.", "10", "01", "00101", "10011", "1100110", "0110100..", "1000001", "000."]


@pytest.mark.parametrize("lam", [*LAMBDAS, 0.3])
@pytest.mark.parametrize("turns", MASKS)
def test_recursion_is_the_sum_of_n_step_returns(turns, lam):
    rng = torch.Generator().manual_seed(len(turns))
    mask = [turn == "1" for turn in turns]
    reward, values = (torch.randn(len(turns), generator=rng, dtype=torch.float64) for _ in range(2))
    reward = reward.masked_fill(torch.tensor([turn == "." for turn in turns]), 0.0)
    got = lambda_returns(reward[None, None], values[None, None], torch.tensor(mask)[None, None], lam)[0, 0]
    assert got.tolist() == pytest.approx(direct(reward.tolist(), values.tolist(), mask, lam), abs=1e-12)


@pytest.mark.parametrize("turns", MASKS)
def test_what_follows_is_one_action_ahead(turns):
    """`following` of x: x at the policy's next token, and the environment's rewards until there."""
    rng = torch.Generator().manual_seed(len(turns))
    mask = torch.tensor([turn == "1" for turn in turns])
    reward, x = (torch.randn(len(turns), generator=rng, dtype=torch.float64) for _ in range(2))
    reward = reward.masked_fill(torch.tensor([turn == "." for turn in turns]), 0.0)
    got = following(x, reward, mask)
    for t in range(len(turns)):
        behind = list(range(t + 1, len(turns)))
        stop = next((u for u in behind if mask[u]), None)
        wanted = sum(reward[u].item() for u in behind if stop is None or u < stop)
        wanted += 0.0 if stop is None else x[stop].item()
        assert got[t].item() == pytest.approx(wanted, abs=1e-12)
