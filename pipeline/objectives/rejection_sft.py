"""Rejection-sampling fine-tuning: maximum likelihood of the good responses alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.contracts import Alarm, Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term


def best_of(valid: Tensor, fraction: float) -> Tensor:
    """The best `fraction` of each prompt's responses, rounded down, but at least one: valid [B, K] → bool [B, K]."""
    count = (fraction * valid.sum(-1, keepdim=True)).clamp(min=1)
    return valid & (valid.cumsum(-1) <= count)


class RejectionSft(Objective):
    """L = −Σ log π(token) / number of tokens, over all good responses of each prompt (RAFT, arXiv 2304.06767).

    "Good" is a bound on the rank, the best `keep_fraction` of a prompt's responses (of a pair the chosen one, as in `sft`;
    of rankings `sft` takes the single best), or with `min_reward` a bound on the sum of rewards, for which data are needed
    that have rewards: trajectories, or unpaired responses, whose good ones have +1 and bad ones −1. A prompt counts by its
    tokens that are kept, so one without a good response has no say.
    The reward is log π, lower for longer responses: accuracy and margins say little where lengths differ.
    Own metric: `kept`, responses trained on per prompt.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"ranking", "preference", "trajectory", "unpaired"}))

    alarms: ClassVar[tuple[Alarm, ...]] = (
        Alarm("kept", "no response of this step reaches objective.min_reward; lower it or check the rewards", low=1e-9),
    )

    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a prompt's responses to train on, best first; rounded down, at least one. Unused with `min_reward`."""
    min_reward: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Lowest sum of rewards of a response to train on; null: go by `keep_fraction`."""

    def needed(self) -> Needs:
        """A bound on rewards needs rewards; unpaired responses have nothing but their rewards to go by."""
        other = {"ranking", "preference"} if self.min_reward is not None else {"unpaired"}
        return replace(self.needs, records=self.needs.records - other)

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"nll": ((batch.response_mask.sum(-1) * self._kept(batch)).sum(-1) * batch.weight).sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        kept = self._kept(batch)  # [B, K]
        nll = -(out.logprobs.sum(-1) * kept).sum(-1)  # [B]
        count = Mean.of(kept.sum(-1).to(nll.dtype), batch.weight)
        return LossOut({"nll": Term((nll * batch.weight).sum())}, {"kept": count})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log π itself: likelihood is all that it rewards. [B, K, R]"""
        return out.logprobs

    def _kept(self, batch: Batch) -> Tensor:
        """The responses to train on. bool [B, K]"""
        if self.min_reward is None:
            return best_of(batch.valid, self.keep_fraction)
        return batch.valid & (batch.returns >= self.min_reward)
