"""f-DPO: direct preference optimization under other divergences than the reverse KL."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.contracts import Batch, LossOut, Needs, Objective, PolicyOut, Term
from pipeline.objectives.dpo import dpo_loss
from pipeline.ops import exp_neg

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


def f_score(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f′(u) at u = e^ℓ, up to a constant: the implicit reward in units of β. Any shape, elementwise.

    | reverse KL | forward KL | Jensen–Shannon | α-divergence   |
    | ℓ          | −e^{−ℓ}    | log σ(ℓ)       | −e^{−αℓ}/α     |   (arXiv 2309.16240, Table 1 and the authors' code)

    α → 0 gives the reverse KL (up to the constant −1/α), α = 1 the forward KL. TRL's coefficient is 1 − α.
    Where e^{−ℓ} leaves the representable range it is continued linearly (`ops.exp_neg`), so that a wildly wrong pair
    still has a finite, non-zero gradient that points the right way.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return -exp_neg(log_ratio)
    if divergence == "alpha":
        return -exp_neg(alpha * log_ratio) / alpha
    # log σ(ℓ) = −log(1 + e^{−ℓ}) is −e^{−ℓ} to float precision where the continuation takes over (ℓ > 40).
    return torch.where(log_ratio > 40.0, -exp_neg(log_ratio), logsigmoid(log_ratio))


class FDpo(Objective):
    """L = −E log σ(β f′(u_w) − β f′(u_l)), u = π(y)/π_ref(y) (arXiv 2309.16240).

    Admissible are divergences whose f′ is invertible and that keep 0 out of its domain; total variation and χ² are not.
    β has to shrink with the divergence: the authors use 0.1 for reverse KL and JS, 0.01 for α, 1e-5 for forward KL.
    Own metrics: none beside the preference metrics, whose rewards are β f′(u).
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}), reference="token")
    bradley_terry = True

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the leash; reward = β · f′(u)."""
    divergence: Divergence = "reverse_kl"
    """Regulariser D_f(π ‖ π_ref)."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """α of the α-divergence, in the paper's convention."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """ε: share of labels taken to be flipped."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"preference": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward = self.implied_reward(out, batch)  # [B, 2]
        loss = dpo_loss(reward[:, 0], reward[:, 1], self.label_smoothing)
        return LossOut({"preference": Term((loss * batch.weight).sum())})

    def implied_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β f′(u) of the whole response: f′ is taken of the sequence ratio, so this is no sum over tokens. [B, K]"""
        log_ratio = self.token_reward(out, batch).sum(-1) / self.beta
        return self.beta * f_score(log_ratio, self.divergence, self.alpha)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ: f′ is monotone in ℓ = Σρ, so ρ orders the tokens' credit under every divergence. [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)
