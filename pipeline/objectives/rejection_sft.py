"""Rejection-sampling fine-tuning: maximum likelihood of the good responses alone."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term


def best_of(valid: Tensor, fraction: float) -> Tensor:
    """The best `fraction` of each prompt's responses, rounded down, but at least one: valid [B, K] → bool [B, K]."""
    count = (fraction * valid.sum(-1, keepdim=True)).floor().clamp(min=1)
    return valid & (torch.arange(valid.shape[1], device=valid.device) < count)


class RejectionSft(Objective):
    """L = −Σ log π(token) / number of tokens, over all good responses of each prompt (RAFT, arXiv 2304.06767).

    Rows hold responses best first and no scores, so "good" is a bound on the rank: the best `keep_fraction` of a
    prompt's responses. Of a pair that is the chosen one, as in `sft`; of rankings `sft` takes the single best. For a
    bound on the score drop what is below it from the data. A prompt counts by its tokens that are kept.
    The reward is log π, lower for longer responses: accuracy and margins say little where lengths differ.
    Own metric: `kept`, responses trained on per prompt.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"ranking", "preference"}))

    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a prompt's responses to train on, best first; rounded down, at least one."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        kept = best_of(batch.valid, self.keep_fraction)
        return {"nll": ((batch.response_mask.sum(-1) * kept).sum(-1) * batch.weight).sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        kept = best_of(batch.valid, self.keep_fraction)  # [B, K]
        nll = -(out.logprobs.sum(-1) * kept).sum(-1)  # [B]
        count = Mean.of(kept.sum(-1).to(nll.dtype), batch.weight)
        return LossOut({"nll": Term((nll * batch.weight).sum())}, {"kept": count})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log π itself: likelihood is all that it rewards. [B, K, R]"""
        return out.logprobs
