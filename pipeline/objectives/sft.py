"""Supervised fine-tuning: maximum likelihood of the best response."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pipeline.contracts import Batch, LossOut, Needs, Objective, PolicyOut, Term


class Sft(Objective):
    """L = −Σ log π(token) / number of tokens, over the best response of each prompt.

    On pairs, rankings and trajectories only the chosen / best one is trained on (Preferred-FT of the DPO paper,
    arXiv 2305.18290 §6), so that SFT → DPO needs one data set; of a trajectory the policy's tokens alone. Its own metrics:
    none beside `loss`, which is the token-level cross-entropy in nats.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"demonstration", "preference", "ranking", "trajectory"}))

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"nll": (batch.response_mask[:, 0].sum(-1) * batch.weight).sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        nll = -out.logprobs[:, 0].sum(-1)  # [B]
        return LossOut({"nll": Term((nll * batch.weight).sum())})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log π itself: likelihood is all that SFT rewards. [B, K, R]"""
        return out.logprobs
