"""What is logged, what it means, and how it is summed over micro-batches and ranks.

Everything travels as `Mean(total, weight)` and is divided once, at the very end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.contracts import Batch, Mean, Objective, PolicyOut

METRICS: dict[str, str] = {
    "loss": "the objective's loss, terms with their coefficients, over the whole optimizer step",
    "loss/<term>": "one term of the loss, before its coefficient",
    "reward/chosen": "mean implicit reward of the best response (β·log-ratio for DPO); falling is normal, see README",
    "reward/rejected": "mean implicit reward of the worst response",
    "reward/margin": "reward/chosen − reward/rejected",
    "accuracy": "share of response pairs whose implicit rewards are in the data's order; ties count one half",
    "log_ratio": "mean of log π − log π_ref per response token, on the data (not a KL: the data are not the policy's samples)",
    "logprob/chosen": "mean log π per token of the best response, nats",
    "logprob/rejected": "mean log π per token of the worst response, nats",
    "grad_norm": "global gradient norm before clipping",
    "lr": "learning rate of the step",
    "tokens_per_second": "prompt and response tokens per second, all workers, without padding",
    "rows_per_second": "prompts (with all their responses) per second, all workers",
    "epoch": "epochs done, fractional",
    "eval/<metric>": "the same on held-out rows",
    "data/quarantined": "records that could not be used; see quarantine.jsonl",
    "nll": "per-token cross-entropy of the best response, nats",
}
"""Definitions of every logged metric. Objectives may add their own, defined in their docstrings."""


@torch.no_grad()
def batch_metrics(objective: Objective, out: PolicyOut, batch: Batch) -> dict[str, Mean]:
    """The metrics that every objective shares; preference metrics count only groups of two or more responses."""
    tokens = batch.response_mask.sum(-1)  # [B, K]
    per_row = batch.weight
    last = (batch.valid.sum(-1) - 1).clamp(min=0)  # [B]: the worst response
    worst = torch.arange(batch.valid.shape[1], device=last.device)[None] == last[:, None]  # [B, K]
    groups = per_row * (batch.valid.sum(-1) > 1)
    per_token = out.logprobs.sum(-1) / tokens.clamp(min=1)  # [B, K]
    metrics = {"logprob/chosen": Mean.of(per_token[:, 0], per_row * tokens[:, 0])}
    if batch.valid.shape[1] > 1:
        reward = objective.implied_reward(out, batch)  # [B, K]
        chosen, rejected = reward[:, 0], (reward * worst).sum(-1)
        metrics |= {
            "logprob/rejected": Mean.of((per_token * worst).sum(-1), groups * (tokens * worst).sum(-1)),
            "reward/chosen": Mean.of(chosen, groups),
            "reward/rejected": Mean.of(rejected, groups),
            "reward/margin": Mean.of(chosen - rejected, groups),
            "accuracy": _pair_accuracy(reward, batch),
        }
    if batch.ref_logprobs is not None:
        ratio = (out.logprobs - batch.ref_logprobs).sum((-2, -1)) / tokens.sum(-1).clamp(min=1)
        metrics["log_ratio"] = Mean.of(ratio, per_row * tokens.sum(-1))
    return metrics


def _pair_accuracy(reward: Tensor, batch: Batch) -> Mean:
    """Share of ordered pairs (i before j) with reward_i > reward_j; ties ½; each group counts as one."""
    k = reward.shape[1]
    pairs = torch.ones(k, k, dtype=torch.bool, device=reward.device).triu(1)
    pairs = pairs & batch.valid[:, :, None] & batch.valid[:, None, :]  # [B, K, K]
    gap = reward[:, :, None] - reward[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    count = pairs.sum((-2, -1))
    return Mean.of((right * pairs).sum((-2, -1)) / count.clamp(min=1), batch.weight * (count > 0))


class Sums:
    """Running totals and weights by name; adding up is exact, dividing happens once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, means: Mapping[str, Mean]) -> None:
        """Add one micro-batch's totals."""
        for name, mean in means.items():
            pair = torch.stack([mean.total.detach().double(), mean.weight.detach().double()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def plain(self) -> dict[str, list[float]]:
        """Totals and weights as plain numbers, to send elsewhere."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def add_plain(self, sums: Mapping[str, list[float]]) -> None:
        """Add what `plain` of another worker gave."""
        for name, (total, weight) in sums.items():
            self.add({name: Mean(torch.tensor(total, dtype=torch.double), torch.tensor(weight, dtype=torch.double))})

    def reduce(self) -> dict[str, float]:
        """Sum over ranks (one collective) and divide; metrics of weight 0 are left out."""
        names = sorted(self._sums)
        if not names:
            return {}
        stacked = all_sum(torch.stack([self._sums[name] for name in names])).tolist()
        return {name: total / weight for name, (total, weight) in zip(names, stacked, strict=True) if weight != 0}


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks; the tensor itself where there is only one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
