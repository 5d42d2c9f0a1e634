"""A reward model from pairs and rankings: the scorer that Best-of-N, ARGS and Transfer-Q* need."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term
from pipeline.objectives.plackett_luce import plackett_luce_loss


class RewardModel(Objective):
    """L = −E log P_PL(y_1 ≻ … ≻ y_K) of scores s(x, y); for pairs −E log σ(s(y_w) − s(y_l)), Bradley–Terry.

    It trains a scorer, no policy: s is read at a response's last token (arXiv 2009.01325). Scores are fixed only up to
    a constant per prompt. `center_weight` · mean over prompts of (Σ_k s_k)² picks the one at which a prompt's scores sum
    to 0 (arXiv 2312.09244, Eq. 2, for pairs), which makes scores of different prompts comparable. A constant reaches that
    sum, so the differences of scores, and with them the probabilities of the labels, stay as they are; where a prompt's
    responses are in several rows that share only some of them, no constant makes all sums 0, and a large weight also
    shrinks differences. 0.01 is enough.
    Own metrics: `score` (mean) and `score_square` (mean square, which grows with the margins), over all responses.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference", "ranking"}), model="reward")
    bradley_terry = True

    center_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Coefficient of the squared sum of a prompt's scores, mean over prompts."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        weight = {"ranking": batch.weight.sum()}
        if self.center_weight:
            weight["center"] = batch.weight.sum()
        return weight

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        score, own = self.implied_reward(out, batch), batch.valid * batch.weight[:, None]  # [B, K] each
        terms = {"ranking": Term((plackett_luce_loss(score, batch.valid) * batch.weight).sum())}
        if self.center_weight:
            terms["center"] = Term((score.sum(-1).square() * batch.weight).sum(), coefficient=self.center_weight)
        return LossOut(terms, {"score": Mean.of(score, own), "score_square": Mean.of(score.square(), own)})

    def implied_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """The scores. [B, K], 0 where there is no response"""
        assert out.scores is not None
        return out.scores.masked_fill(~batch.valid, 0.0)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """The score, at each response's last trained token. [B, K, R]"""
        behind = batch.response_mask.flip(-1).cumsum(-1).flip(-1)  # trained tokens from here on
        last = batch.response_mask & (behind == 1)
        return torch.where(last, self.implied_reward(out, batch)[..., None], 0.0)
