"""DPO for rankings: the Plackett–Luce model over K responses."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Needs, Objective, PolicyOut, Term
from pipeline.ops import tail_logsumexp


def plackett_luce_loss(reward: Tensor, valid: Tensor) -> Tensor:
    """−log P(ranking): reward [B, K] sorted best → worst, valid [B, K] → [B].

    −Σ_k ( r_k − log Σ_{j ≥ k} e^{r_j} ) over the valid k (arXiv 2305.18290, Eq. 18–20). Padding must come last;
    it is taken out of the inner sums and its own terms are dropped. K = 2 is DPO.
    """
    assert reward.shape == valid.shape and reward.dim() == 2
    tail = tail_logsumexp(reward.masked_fill(~valid, -torch.inf))
    # where() twice: an invalid −inf − (−inf) would be nan in the value and in the gradient.
    term = torch.where(valid, tail, torch.zeros_like(tail)) - torch.where(valid, reward, torch.zeros_like(reward))
    return term.sum(-1)


class PlackettLuce(Objective):
    """L = −E log P_PL(y_1 ≻ y_2 ≻ … ≻ y_K) with rewards r = β ℓ; K may differ between prompts.

    Own metrics: none beside the preference metrics (chosen = best, rejected = worst, accuracy = all pairs ordered right).
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"ranking", "preference"}), reference="token")
    bradley_terry = True

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the KL leash; reward = β · log-ratio."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"ranking": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        loss = plackett_luce_loss(self.implied_reward(out, batch), batch.valid)
        return LossOut({"ranking": Term((loss * batch.weight).sum())})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ. [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)
