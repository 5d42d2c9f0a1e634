"""DRO: regression of a whole trajectory's reward onto its log-ratio and the prompt's value."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term
from pipeline.objectives.bellman import trajectory_weights


def dro_residual(returns: Tensor, value: Tensor, reward: Tensor) -> Tensor:
    """R − V(x) − βℓ; returns, values and implicit rewards βℓ, any one shape (arXiv 2405.19107, Eq. 8). 0 at the optimum."""
    assert returns.shape == value.shape == reward.shape
    return returns - value - reward


class Dro(Objective):
    """L = E[(R − sg V(x) − βℓ)²] / β + E[(R − V(x) − sg βℓ)²] over single trajectories (DRO-V, arXiv 2405.19107).

    R is the sum of all rewards, V(x) the critic's value before the first token of the policy. Both terms are without the
    paper's ½, and the policy's (`policy`) is divided by β, as there: DQO on a trajectory of one token. Trajectories need no
    partner, but the critic has to see each prompt. The paper's β is 1 on rewards of mean 0 and variance 1.
    Own metrics: `value` (mean V(x)), `value_error` (mean |R − V(x) − βℓ|), `sequence_log_ratio` (mean ℓ, nats).
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"trajectory"}), reference="token", critic=True)

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Strength of the KL leash, in units of reward; reward = β · log-ratio."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        trajectories = trajectory_weights(batch).sum()
        return {"policy": trajectories, "value": trajectories}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        assert out.values is not None
        weight, reward = trajectory_weights(batch), self.implied_reward(out, batch)  # [B, K] each
        first = batch.response_mask.int().argmax(-1, keepdim=True)  # [B, K, 1]
        value = out.values.gather(-1, first).squeeze(-1)  # [B, K]
        policy = dro_residual(batch.returns, value.detach(), reward)
        critic = dro_residual(batch.returns, value, reward.detach())
        terms = {
            "policy": Term((weight * policy.square()).sum(), coefficient=1 / self.beta),
            "value": Term((weight * critic.square()).sum(), group="critic"),
        }
        metrics = {
            "value": Mean.of(value, weight),
            "value_error": Mean.of(critic.abs(), weight),
            "sequence_log_ratio": Mean.of(reward / self.beta, weight),
        }
        return LossOut(terms, metrics)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ: its sum is what is regressed. [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)
