"""SimPO: preference optimization on mean log-probabilities, without a reference model."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.contracts import Batch, LossOut, Needs, Objective, PolicyOut, Term


def simpo_loss(chosen: Tensor, rejected: Tensor, gamma: float) -> Tensor:
    """−log σ(chosen − rejected − γ): Bradley–Terry with a home advantage of γ to overcome; rewards [B] → [B]."""
    assert chosen.shape == rejected.shape and chosen.dim() == 1
    return -logsigmoid(chosen - rejected - gamma)


class SimPo(Objective):
    """L = −E log σ( β/|y_w| log π(y_w) − β/|y_l| log π(y_l) − γ ) (arXiv 2405.14734, Eq. 6).

    The reward is what generation goes by, the mean log-probability of a response, so no reference pass is needed; nor
    does anything hold the policy near its start but a small learning rate. β is far larger than DPO's, since it
    multiplies a mean; the authors use 2 to 2.5, with γ/β about 1/2. γ is in units of the reward (TRL: `simpo_gamma`).
    Own metrics: none beside the preference metrics; reward/margin should come to exceed γ.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}))

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Scale of the reward; reward = β · mean log-probability."""
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Margin by which the chosen reward is to exceed the rejected one."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"preference": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward = self.implied_reward(out, batch)  # [B, 2]
        loss = simpo_loss(reward[:, 0], reward[:, 1], self.gamma)  # [B]
        return LossOut({"preference": Term((loss * batch.weight).sum())})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β log π / |y|: each token's share of the mean. [B, K, R]"""
        return self.beta * out.logprobs / batch.response_mask.sum(-1, keepdim=True).clamp(min=1)
