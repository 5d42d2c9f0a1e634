"""OREO: soft Bellman residuals over whole trajectories, with the reverse KL to the reference beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from pipeline.contracts import Batch, LossOut, Mean, Needs, Objective, PolicyOut, Term
from pipeline.objectives.bellman import (
    bellman_metrics,
    bellman_terms,
    residuals_of,
    trajectory_mean,
    trajectory_weights,
)


class Oreo(Objective):
    """L = (E[mean_t (V − R + βρ + sg[β Σ_later ρ])²] + α E[mean_t KL(π ‖ π_ref)]) / β + E[mean_t (V − sg(R − β Σ_{≥t} ρ))²].

    R is the sum of rewards from token t on, α is `kl_weight` (arXiv 2412.16145, Eq. 9). That is DQO at λ = 1 without
    importance weights, plus the exact KL. The paper's policy loss as a whole is divided by β, as DQO's is, so that α means
    what it means there. `q` and `kl` move the policy, `value` the critic; `kl_weight` = 0 saves the reference's pass.
    Own metrics: `value`, `advantage`, `value_error`, `sequence_log_ratio` as in DQO, and `kl`, the mean per trained token, nats.
    """

    needs: ClassVar[Needs] = Needs(records=frozenset({"trajectory"}), reference="token", kl="reverse", critic=True)

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.03
    """Strength of the KL leash, in units of reward; reward = β · log-ratio."""
    kl_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """α, coefficient of the KL term beside the squared residual."""

    def needed(self) -> Needs:
        return self.needs if self.kl_weight else replace(self.needs, kl="none")

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        trajectories = trajectory_weights(batch).sum()
        return dict.fromkeys(["q", "value", *(["kl"] if self.kl_weight else [])], trajectories)

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        weight = trajectory_weights(batch)  # [B, K]
        left = residuals_of(out, batch, self.beta)
        terms, metrics = bellman_terms(left, batch, weight, self.beta), bellman_metrics(left, out, batch)
        if self.kl_weight:
            assert out.kl is not None
            divergence = (weight * trajectory_mean(out.kl, batch.response_mask)).sum()
            terms["kl"] = Term(divergence, coefficient=self.kl_weight / self.beta)
            metrics["kl"] = Mean.of(out.kl, batch.response_mask * weight[..., None])
        return LossOut(terms, metrics)

    def token_reward(self, out: PolicyOut, batch: Batch) -> Tensor:
        """β ρ, the advantage of each token. [B, K, R]"""
        assert batch.ref_logprobs is not None
        return self.beta * (out.logprobs - batch.ref_logprobs)
