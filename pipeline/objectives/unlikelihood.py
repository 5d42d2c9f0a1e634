"""Unlikelihood: raise the likelihood of the chosen response, lower that of the rejected one."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term


def unlikelihood_loss(chosen: Tensor, rejected: Tensor, alpha: float) -> Tensor:
    """−log π(y_w) + α log π(y_l); summed log-probabilities [B] → [B], nats."""
    assert chosen.shape == rejected.shape and chosen.dim() == 1
    return -chosen + alpha * rejected


class Unlikelihood(Objective):
    """L = E[−log π(y_w) + α log π(y_l)], the baseline of the DPO paper's experiments (arXiv 2305.18290 §6).

    The paper gives it in words; this is the reading that both of its halves, "maximise" and "minimise the probability",
    share. Token-level unlikelihood, −log(1 − π(y_t)) (arXiv 1908.04319), is something else. The loss has no lower
    bound: a response that is rejected more than 1/α times as often as it is chosen is pushed down without end, and the
    text degenerates with it. Small α, few steps; it is here to be compared with. The reward is log π, lower for longer
    responses: accuracy and margins say little where lengths differ.
    Own metric: `nll`, cross-entropy of the chosen response in nats per token.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}))

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Coefficient of the rejected response; the paper tries 0.05, 0.1, 0.5 and 1."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"preference": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        logprob = self.implied_reward(out, batch)  # [B, 2]
        loss = unlikelihood_loss(logprob[:, 0], logprob[:, 1], self.alpha)  # [B]
        tokens = batch.response_mask[:, 0].sum(-1)
        nll = Mean.of(-logprob[:, 0] / tokens.clamp(min=1), tokens * batch.weight)
        return LossOut({"preference": Term((loss * batch.weight).sum())}, {"nll": nll})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log π itself: likelihood is all that it rewards. [B, K, R]"""
        return out.logprobs
