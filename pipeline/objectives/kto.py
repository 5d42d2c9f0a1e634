"""KTO: good and bad responses without partners, each compared with how far the policy has moved in general."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term

BASELINE = "mismatched_log_ratio"
"""The metric whose value in the step before is z₀."""


def kto_loss(reward: Tensor, baseline: float, desirable: Tensor) -> Tensor:
    """1 − σ(±(reward − baseline)), + where desirable; rewards βℓ and the baseline βz₀: [B, K] → [B, K]."""
    assert reward.shape == desirable.shape
    return torch.sigmoid(torch.where(desirable, baseline - reward, reward - baseline))


class Kto(Objective):
    """L = E λ_y (1 − σ(±β(ℓ(y) − z₀))), + and λ_D for good responses, − and λ_U for bad ones (arXiv 2402.01306).

    z₀ = max(0, mean ℓ of responses to *other* prompts): an estimate of the KL, without gradient. Here it is the global value
    of the optimizer step before (0 in the first), so that it does not depend on how a step is split; its mismatched
    responses are chosen by `prepare`. Class balance: keep λ_D n_D / λ_U n_U between 1 and 4/3 (the range outside which TRL warns); with
    twice as many good as bad responses, set `undesirable_weight` to 1.5 … 2. A label is the sign of the reward.
    Own metrics: `mismatched_log_ratio` (mean ℓ of the mismatched responses, nats), `reward/desirable`, `reward/undesirable`
    (mean βℓ of good and bad responses), `desirable_share` (share of λ n that is good: 1/2 to 4/7 is advised).
    """

    needs: ClassVar[Needs] = Needs(
        records=frozenset({"unpaired"}), reference="token", mismatched=True, carried=(BASELINE,)
    )

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the KL leash; reward = β · log-ratio."""
    desirable_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """λ_D, weight of good responses."""
    undesirable_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """λ_U, weight of bad responses."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"preference": (batch.valid * batch.weight[:, None]).sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward, desirable = self.implied_reward(out, batch), batch.returns > 0  # [B, K] each
        own = batch.valid * batch.weight[:, None]
        share = own * torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        loss = kto_loss(reward, self.beta * max(0.0, batch.carried.get(BASELINE, 0.0)), desirable)
        mismatched = batch.response_mask.any(-1) & ~batch.valid
        metrics = {
            BASELINE: Mean.of(reward / self.beta, mismatched * batch.weight[:, None]),
            "reward/desirable": Mean.of(reward, own * desirable),
            "reward/undesirable": Mean.of(reward, own * ~desirable),
            "desirable_share": Mean.of(desirable.to(reward.dtype), share),
        }
        return LossOut({"preference": Term((loss * share).sum())}, metrics)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ. [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)
