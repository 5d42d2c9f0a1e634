"""ORPO: supervised fine-tuning and preference optimization in one stage, by an odds ratio, without a reference."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term

CERTAIN = -1e-4
"""Mean log-probability above which the odds are continued linearly: closer to 0, float32 log-probs are mostly noise."""


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p ≤ 0, any shape, elementwise.

    1 − p is −expm1(log p), exact where p is near 1. Above `CERTAIN` it is continued by its tangent: log p = 0, which
    float32 does reach, would be infinite; a clamp would stop the gradient just where a rejected response is certain.
    """
    at = logprob.clamp(max=CERTAIN)
    chance_against = -torch.expm1(at)  # 1 − p, also 1 / slope
    return at - chance_against.log() + (logprob - at) / chance_against


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(log odds(y_w) − log odds(y_l)) of mean log-probs [B] → [B] (arXiv 2403.07691, Eq. 7)."""
    assert chosen.shape == rejected.shape and chosen.dim() == 1
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


class Orpo(Objective):
    """L = L_NLL(y_w) + λ E[−log σ(log odds(y_w) − log odds(y_l))], odds = p/(1 − p) (arXiv 2403.07691, Eq. 6).

    p(y) = exp(mean log-probability of y's tokens), as in the paper. L_NLL is the token-level cross-entropy of the
    chosen response alone (TRL's includes the prompt), so it starts from a base model: no SFT stage, no reference.
    Own metric: `nll`, that cross-entropy in nats per token; reward/margin is the log odds ratio.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}))
    bradley_terry = True

    odds_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """λ, coefficient of the odds ratio (TRL: `beta`)."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"nll": (batch.response_mask[:, 0].sum(-1) * batch.weight).sum(), "odds_ratio": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        tokens = batch.response_mask.sum(-1)  # [B, 2]
        mean_logprob = out.logprobs.sum(-1) / tokens.clamp(min=1)  # [B, 2]
        loss = odds_ratio_loss(mean_logprob[:, 0], mean_logprob[:, 1])  # [B]
        nll = -out.logprobs[:, 0].sum(-1)  # [B]
        terms = {
            "nll": Term((nll * batch.weight).sum()),
            "odds_ratio": Term((loss * batch.weight).sum(), coefficient=self.odds_weight),
        }
        return LossOut(terms, {"nll": Mean.of(-mean_logprob[:, 0], tokens[:, 0] * batch.weight)})

    def implied_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log odds of the whole response: no sum over tokens. [B, K]"""
        tokens = batch.response_mask.sum(-1)
        return log_odds(out.logprobs.sum(-1) / tokens.clamp(min=1))

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """log π / |y|: the odds rise with the mean log-probability, so its shares order the tokens. [B, K, R]"""
        return out.logprobs / batch.response_mask.sum(-1, keepdim=True).clamp(min=1)
