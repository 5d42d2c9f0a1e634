"""What is logged, what it means, and how it is summed over micro-batches and ranks.

Everything travels as `Mean(total, weight)` and is divided once, at the very end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.contracts import Batch, Mean, Objective, PolicyOut

METRICS: dict[str, str] = {
    "loss": "the objective's loss, terms with their coefficients, over the whole optimizer step",
    "loss/<term>": "one term of the loss, before its coefficient",
    "reward/chosen": "mean implicit reward of the best response (β·log-ratio for DPO); falling is normal, see README",
    "reward/rejected": "mean implicit reward of the worst response",
    "reward/margin": "reward/chosen − reward/rejected",
    "accuracy": "share of response pairs whose implicit rewards are in the data's order; equal implicit rewards count one "
    "half, pairs of equal return not at all; each prompt counts as one",
    "log_ratio": "mean of log π − log π_ref per response token, on the data (not a KL: the data are not the policy's samples)",
    "return": "mean sum of rewards of a response, in the data",
    "logprob/chosen": "mean log π per token of the best response, nats",
    "logprob/rejected": "mean log π per token of the worst response, nats",
    "grad_norm": "global gradient norm before clipping",
    "lr": "learning rate of the step",
    "critic/grad_norm": "the same of the critic, where there is one",
    "critic/lr": "the critic's learning rate of the step",
    "tokens_per_second": "prompt and response tokens per second, all workers, without padding",
    "rows_per_second": "prompts (with all their responses) per second, all workers",
    "skipped": "1 in a step that was left out because its loss or gradient was not finite (train.skip_nan)",
    "epoch": "epochs done, fractional",
    "eval/<metric>": "the same on held-out rows",
    "data/quarantined": "records that could not be used; see quarantine.jsonl",
    "nll": "per-token cross-entropy of the best response, nats",
}
"""Definitions of every logged metric. Objectives may add their own, defined in their docstrings."""


@torch.no_grad()
def batch_metrics(objective: Objective, out: PolicyOut, batch: Batch) -> dict[str, Mean]:
    """The metrics that every objective shares.

    Preference metrics count only groups of two or more responses that the data order; where there are rewards, responses
    of equal return are not ordered. Those of log-probs are left out for a reward model, which has none.
    """
    metrics = {} if out.scores is not None else _likelihood_metrics(out, batch)
    if batch.valid.shape[1] > 1:
        metrics |= _preference_metrics(objective.implied_reward(out, batch), batch)
    if batch.token_rewards is not None:
        metrics["return"] = Mean.of(batch.returns, batch.valid * batch.weight[:, None])
    return metrics


def _likelihood_metrics(out: PolicyOut, batch: Batch) -> dict[str, Mean]:
    own = batch.response_mask & batch.valid[..., None]  # not those that answer another prompt
    tokens, row = own.sum(-1), batch.weight[:, None]  # [B, K], [B, 1]
    per_token = out.logprobs.sum(-1) / tokens.clamp(min=1)  # [B, K]
    best, worst = _ends(batch.valid)
    several = row * (batch.valid.sum(-1, keepdim=True) > 1)
    metrics = {"logprob/chosen": Mean.of(per_token, row * tokens * best)}
    if batch.valid.shape[1] > 1:
        metrics["logprob/rejected"] = Mean.of(per_token, several * tokens * worst)
    if batch.ref_logprobs is not None:
        metrics["log_ratio"] = Mean.of(out.logprobs - batch.ref_logprobs, own * row[..., None])
    return metrics


def _preference_metrics(reward: Tensor, batch: Batch) -> dict[str, Mean]:
    """Of implicit rewards [B, K]: those of the best and the worst response, and how many pairs they order rightly."""
    best, worst = _ends(batch.valid)
    ordered = ordered_pairs(batch)  # [B, K, K]
    # The best and the worst are ordered unless all returns are alike.
    groups = batch.weight * ordered.flatten(1).any(-1)
    chosen, rejected = ((reward.masked_fill(~end, 0.0)).sum(-1) for end in (best, worst))
    gap = reward[:, :, None] - reward[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    share = (right * ordered).sum((-2, -1)) / ordered.sum((-2, -1)).clamp(min=1)
    return {
        "reward/chosen": Mean.of(chosen, groups),
        "reward/rejected": Mean.of(rejected, groups),
        "reward/margin": Mean.of(chosen - rejected, groups),
        "accuracy": Mean.of(share, groups),
    }


def _ends(valid: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last of each row's own responses, which stand best first. [B, K] → two bool [B, K]"""
    count = valid.cumsum(-1)
    return valid & (count == 1), valid & (count == count[:, -1:])


def ordered_pairs(batch: Batch) -> Tensor:
    """True at (i, j) where the data hold response i to be better than j. [B, K, K]"""
    k = batch.valid.shape[1]
    pairs = torch.ones(k, k, dtype=torch.bool, device=batch.valid.device).triu(1)
    pairs = pairs & batch.valid[:, :, None] & batch.valid[:, None, :]
    if batch.token_rewards is None:
        return pairs
    better, worse = batch.returns[:, :, None], batch.returns[:, None, :]
    return pairs & (better > worse) & ~better.isclose(worse)  # float sums of equal rewards differ in their last digits


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
        """Sum over ranks and divide; metrics of weight 0 are left out.

        Ranks need not have the same ones: a rank without a group of several responses knows no rejected one.
        """
        names = sorted(all_names(self._sums))
        if not names:
            return {}
        own = next(iter(self._sums.values()), torch.zeros(2, dtype=torch.double))
        stacked = all_sum(torch.stack([self._sums.get(name, torch.zeros_like(own)) for name in names])).tolist()
        return {name: total / weight for name, (total, weight) in zip(names, stacked, strict=True) if weight != 0}


def all_names(names: Iterable[str]) -> set[str]:
    """Those of all ranks, on all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return set(names)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(names))
    return {name for own in gathered for name in own}


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks; the tensor itself where there is only one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
