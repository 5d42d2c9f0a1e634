"""Direct Preference Optimization, with label smoothing and an optional likelihood term."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term


def dpo_loss(chosen: Tensor, rejected: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Bradley–Terry negative log-likelihood of implicit rewards; all tensors [B], rewards in units of β.

    −(1−ε) log σ(Δ) − ε log σ(−Δ), Δ = chosen − rejected (arXiv 2305.18290, Eq. 7; ε: the authors' cDPO note, Eq. 3).
    With ε > 0 the optimum is at Δ = log((1−ε)/ε) instead of infinity.
    """
    assert chosen.shape == rejected.shape and chosen.dim() == 1
    margin = chosen - rejected
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


class Dpo(Objective):
    """L = −E log σ(β ℓ(y_w) − β ℓ(y_l)), ℓ(y) = Σ_t log π(y_t)/π_ref(y_t).

    "From r to Q*" (arXiv 2404.12358, Eq. 9) shows that this is also the token-level loss: the value of the prompt cancels.
    `nll_weight` adds the cross-entropy of the chosen responses, which holds their likelihood up: the mean over all their
    tokens in the step, as in SFT, so that long responses weigh more. TRL's loss type `sft` takes the same mean, over the
    tokens of one device's batch. Iterative RPO (arXiv 2404.19733, version 3) has the mean over responses of each one's
    cross-entropy per token instead. Own metric: `nll`, in nats per token.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}), reference="token")
    bradley_terry = True

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the KL leash; reward = β · log-ratio."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """ε: share of labels taken to be flipped."""
    nll_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Coefficient of the cross-entropy per token of the chosen responses."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        weight = {"preference": batch.weight.sum()}
        if self.nll_weight:
            weight["nll"] = (batch.response_mask[:, 0].sum(-1) * batch.weight).sum()
        return weight

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward = self.implied_reward(out, batch)  # [B, 2]
        loss = dpo_loss(reward[:, 0], reward[:, 1], self.label_smoothing)  # [B]
        nll = -out.logprobs[:, 0].sum(-1)  # [B]
        terms = {"preference": Term((loss * batch.weight).sum())}
        if self.nll_weight:
            terms["nll"] = Term((nll * batch.weight).sum(), coefficient=self.nll_weight)
        tokens = batch.response_mask[:, 0].sum(-1)
        return LossOut(terms, {"nll": Mean.of(nll / tokens.clamp(min=1), tokens * batch.weight)})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ, the advantage of each token (arXiv 2404.12358, Eq. 11). [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)
