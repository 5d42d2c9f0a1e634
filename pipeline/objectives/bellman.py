"""Soft Bellman residuals on trajectories: the arithmetic that DQO and OREO share. No objective of its own."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.contracts import Batch, Mean, PolicyOut, Term
from pipeline.ops import following, lambda_returns

QTarget = Literal["return", "value"]


class Residuals(NamedTuple):
    """What is left of the soft Bellman equations at each trained token; all [B, K, R], in units of reward."""

    q: Tensor  # βρ − advantage: a gradient to the policy alone
    value: Tensor  # V − G^λ: a gradient to the critic alone
    advantage: Tensor  # r + X(next) − V: no gradient


def bellman_residuals(
    beta_rho: Tensor, reward: Tensor, values: Tensor, mask: Tensor, lam: float = 1.0, q_target: QTarget = "return"
) -> Residuals:
    """Residuals of βρ = r + X(next) − V and of V = G^λ; all tensors [B, K, R]; they are meaningless where masked.

    G^λ are the λ-returns of r − βρ, X is G^λ ("return") or V ("value"). λ = 1 with "return" is OREO's residual
    V − R + βρ + sg[β Σ_later ρ] (arXiv 2412.16145, Eq. 9); λ = 0 with "value" is the one-step form. At the optimum of the
    KL-regularised problem all of them are 0, on any data, where nothing but the policy is random. With a random environment
    their expectations are.
    """
    assert beta_rho.shape == reward.shape == values.shape == mask.shape
    fixed = values.detach()
    returns = lambda_returns(reward - beta_rho.detach(), fixed, mask, lam)
    advantage = reward + following(returns if q_target == "return" else fixed, reward, mask) - fixed
    return Residuals(beta_rho - advantage, values - returns, advantage)


def residuals_of(
    out: PolicyOut, batch: Batch, beta: float, lam: float = 1.0, q_target: QTarget = "return"
) -> Residuals:
    """`bellman_residuals` of a batch of trajectories."""
    assert batch.ref_logprobs is not None and batch.token_rewards is not None and out.values is not None
    beta_rho = beta * (out.logprobs - batch.ref_logprobs)
    return bellman_residuals(beta_rho, batch.token_rewards, out.values, batch.response_mask, lam, q_target)


def trajectory_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over each trajectory's trained tokens, [B, K, R] → [B, K]; 0 where there are none.

    Where a random environment decides how many tokens the policy gets to write, the 1/length weighs its outcomes unequally:
    the fixed point then is off by a little (`tests/oracle/test_turns.py`).
    """
    return torch.where(mask, x, torch.zeros_like(x)).sum(-1) / mask.sum(-1).clamp(min=1)


def trajectory_weights(batch: Batch) -> Tensor:
    """The row's weight at each of its own trajectories, 0 at padding. [B, K]"""
    return batch.valid * batch.weight[:, None]


def bellman_terms(left: Residuals, batch: Batch, weights: Tensor, beta: float) -> dict[str, Term]:
    """Σ weights · mean_t residual², [B, K] each: "q" for the policy, divided by β, and "value" for the critic.

    ∇(βρ − A)²/β = 2 (βρ − A) ∇log π: the division makes one learning rate fit any β.
    """
    q, value = (trajectory_mean(x.square(), batch.response_mask) for x in (left.q, left.value))
    return {
        "q": Term((weights * q).sum(), coefficient=1 / beta),
        "value": Term((weights * value).sum(), group="critic"),
    }


def bellman_metrics(left: Residuals, out: PolicyOut, batch: Batch) -> dict[str, Mean]:
    """`value`, `advantage`, `value_error` and `sequence_log_ratio`, as DQO's docstring defines them."""
    assert batch.ref_logprobs is not None and out.values is not None
    trajectories = trajectory_weights(batch)  # [B, K]
    tokens = batch.response_mask * trajectories[..., None]  # [B, K, R]
    return {
        "value": Mean.of(out.values, tokens),
        "advantage": Mean.of(left.advantage, tokens),
        "value_error": Mean.of(left.value.abs(), tokens),
        "sequence_log_ratio": Mean.of((out.logprobs - batch.ref_logprobs).sum(-1), trajectories),
    }
