"""TDPO: direct preference optimization with an exact KL at every token."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term
from pipeline.objectives.dpo import dpo_loss

ALPHA = {1: 1.0, 2: 0.5}
"""The paper's α of each variant."""


class Tdpo(Objective):
    """L = −E log σ(u − αδ), u = βℓ(y_w) − βℓ(y_l), δ = βD(y_l) − βD(y_w) (arXiv 2404.11999 and its code).

    D(y) = Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)) over the policy's tokens of y, exact, from both models' full distributions.
    Variant 1 is the paper's TDPO₁, which has no α, or α = 1: its gradient also *raises* the KL on y_w. Variant 2, TDPO₂,
    stops the gradient of D(y_w), which is what keeps the divergence down in the paper's experiments with α = 0.5.
    α = 0 is DPO. With soft labels variant 1 has an optimum of its own: at α = 1 that is π_ref · exp(Q_{π_ref}/β), not
    DPO's; variant 2 has none that is known. Both are the mean over pairs.
    Own metrics: `kl/chosen`, `kl/rejected`, D of the chosen and the rejected response, summed over tokens, nats.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}), reference="token", kl="forward")
    bradley_terry = True

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the KL leash; reward = β · (log-ratio + α KL)."""
    variant: Literal[1, 2] = 2
    """2 stops the gradient of the chosen response's KL."""
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False, default_factory=lambda given: ALPHA[given["variant"]])]
    """Weight of the KL difference; default: the paper's, 1 for variant 1 and 0.5 for variant 2."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"preference": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        assert out.kl is not None
        kl = out.kl.sum(-1)  # [B, 2]
        reward = self.implied_reward(out, batch)  # [B, 2]
        chosen = reward[:, 0]
        if self.variant == 2:  # the same number, without the gradient of its KL
            chosen = chosen - self.beta * self.alpha * (kl[:, 0] - kl[:, 0].detach())
        loss = dpo_loss(chosen, reward[:, 1])  # [B]
        metrics = {"kl/chosen": Mean.of(kl[:, 0], batch.weight), "kl/rejected": Mean.of(kl[:, 1], batch.weight)}
        return LossOut({"preference": Term((loss * batch.weight).sum())}, metrics)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β (ρ + α KL): its sums' difference is u − αδ. [B, K, R]"""
        assert batch.ref_logprobs is not None and out.kl is not None
        return self.beta * (out.logprobs - batch.ref_logprobs + self.alpha * out.kl)
