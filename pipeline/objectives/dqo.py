"""DQO: offline soft Q-learning on trajectories; the policy's log-ratio is the advantage, a critic holds the values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.contracts import Alarm, Batch, LossOut, Mean, Needs, Objective, PolicyOut
from pipeline.objectives.bellman import QTarget, bellman_metrics, bellman_terms, residuals_of, trajectory_weights
from pipeline.ops import importance_weights


class Dqo(Objective):
    """L = E[w mean_t (βρ − sg(r + X(next) − V))²] / β + E[w mean_t (V − sg G^λ)²] (arXiv 2410.09302).

    G^λ are the λ-returns of r − βρ, X is G^λ or V; mean_t runs over the policy's tokens of a trajectory, E over
    trajectories. The first term, `q`, moves the policy alone, the second, `value`, the critic alone. The paper's text
    was not at hand: the equations are those that its reviews quote and that OREO (arXiv 2412.16145) reproduced; with λ = 1
    and X = G^λ they are OREO's Eq. 9.
    The weights w = min(e^Σ, cap) correct for data that another policy made, Σ = log π − log μ of the whole trajectory; μ is
    what was logged or, only where the configuration says so, the reference. They are not divided by their sum.
    On data sampled from the reference, scale models did as well or better without. β is relative to the rewards: a reward of
    1/n at each of n steps wants a smaller β than one reward of 1. Returns and rewards are not discounted.
    Own metrics, per trained token: `value` (mean V), `advantage` (mean r + X(next) − V), `value_error` (mean |V − G^λ|); per
    trajectory: `importance_weight` (mean w), `sequence_log_ratio` (mean ℓ = Σρ, nats).
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"trajectory"}), reference="token", critic=True)
    alarms: ClassVar[tuple[Alarm, ...]] = (
        Alarm("importance_weight", "the data hardly count any more and cannot come back; lower optimizer.lr", low=0.05),
        Alarm(
            "sequence_log_ratio", "the policy has left its data; lower optimizer.lr or raise objective.beta", low=-8.0
        ),
    )

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the KL leash, in units of reward; reward = β · log-ratio."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ: 1 trusts the trajectory's own return, 0 the critic one step ahead."""
    q_target: QTarget = "return"
    """What a token leads to: the λ-return or the critic's value of the next state."""
    importance: Literal["none", "behaviour", "reference"] = "none"
    """Whose log-probs the weights are taken against; `behaviour` needs them in the data."""
    importance_cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] = math.e
    """Upper bound of the weights."""

    def needed(self) -> Needs:
        return replace(self.needs, behaviour=self.importance == "behaviour")

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        trajectories = trajectory_weights(batch).sum()
        return {"q": trajectories, "value": trajectories}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        weight, importance = trajectory_weights(batch), self._importance(out, batch)  # [B, K] each
        left = residuals_of(out, batch, self.beta, self.lam, self.q_target)
        metrics = bellman_metrics(left, out, batch) | {"importance_weight": Mean.of(importance, weight)}
        return LossOut(bellman_terms(left, batch, weight * importance, self.beta), metrics)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ, the advantage of each token. [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)

    def _importance(self, out: PolicyOut, batch: Batch) -> Tensor:
        """w of each trajectory, [B, K]; 1 without correction, and where nothing counts (0 · nan would be nan)."""
        if self.importance == "none":
            return torch.ones_like(batch.valid, dtype=out.logprobs.dtype)
        assert batch.ref_logprobs is not None
        other = batch.ref_logprobs.sum(-1) if self.importance == "reference" else batch.behaviour_logprobs
        assert other is not None
        log_ratio = out.logprobs.sum(-1) - other
        return importance_weights(log_ratio.where(trajectory_weights(batch) > 0, 0.0), self.importance_cap)
