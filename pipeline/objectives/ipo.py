"""Identity Preference Optimization: regress the log-ratio margin of a pair onto a fixed target."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Needs, Objective, PolicyOut, Term


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))² for the log-ratio margins h = ℓ(y_w) − ℓ(y_l), [B] → [B], nats² (arXiv 2310.12036, Eq. 17)."""
    assert margin.dim() == 1
    return (margin - 1 / (2 * beta)).square()


class Ipo(Objective):
    """L = E (ℓ(y_w) − ℓ(y_l) − 1/(2β))², ℓ(y) = Σ_t log π(y_t)/π_ref(y_t) (arXiv 2310.12036; β is the paper's τ).

    Unlike DPO's, its margin is bounded: with labels that never flip it stops at 1/(2β). With labels drawn from
    p(y ≻ y′) its optimum is π ∝ π_ref · exp(E_{y′} p(y ≻ y′) / β): no Bradley–Terry reward, but how often y wins.
    That theorem is about whole responses, hence the sum over tokens is the default, as in the paper and the DPO
    authors' code. TRL averages over the tokens (`length_normalised`), which keeps 1/(2β) meaningful for long responses
    of unlike length, but is another objective: the same β asks for a margin |y| times as large.
    Own metrics: none beside the preference metrics, in which reward/margin tends to 1/2.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"preference"}), reference="token")

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Strength of the KL leash: the margin aimed at is 1/(2β) nats; reward = β · log-ratio."""
    length_normalised: bool = False
    """Mean log-ratio per token instead of the sum."""

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"preference": batch.weight.sum()}

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        reward = self.implied_reward(out, batch)  # [B, 2]
        loss = ipo_loss((reward[:, 0] - reward[:, 1]) / self.beta, self.beta)  # [B]
        return LossOut({"preference": Term((loss * batch.weight).sum())})

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ, or β ρ / |y| where normalised. [B, K, R]"""
        assert batch.ref_logprobs is not None
        reward = self.beta * (out.logprobs - batch.ref_logprobs)
        if self.length_normalised:
            reward = reward / batch.response_mask.sum(-1, keepdim=True).clamp(min=1)
        return reward
