"""Best-of-n: the highest-scoring of n samples of the policy.

How far that moves from the policy is known without an estimate: KL(best of n ‖ policy) ≤ log n − (n − 1)/n (Beirami et al.,
arXiv 2401.01879), equal only where no two responses can be alike. It is a bound, per prompt, against the policy as it is
sampled (temperature and filters included).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pipeline.decoding.contract import SCORER_FAILED, Completion, Prompt, Tools
from pipeline.decoding.sampling import draw


def best_of_n(tools: Tools, prompts: Sequence[Prompt]) -> list[Completion]:
    """Completion i of a prompt is the best of its samples i·n … i·n + n − 1; the first of equals."""
    n, copies = tools.decoding.n, tools.sampling.per_prompt
    found = draw(tools, prompts, n * copies)
    groups = [[found[p, i * n + j] for j in range(n)] for p in range(len(prompts)) for i in range(copies)]
    asked = [prompt for prompt in prompts for _ in range(n * copies)]
    scores = tools.score(asked, [c.token_ids for group in groups for c in group]).reshape(len(groups), n)
    return [_best(group, own) for group, own in zip(groups, scores, strict=True)]


def _best(group: list[Completion], scores: torch.Tensor) -> Completion:
    n, failed = len(group), int((~scores.isfinite()).sum())
    if failed:
        return Completion([], [], failure=f"{SCORER_FAILED} on {failed} of {n} samples")
    place = int(scores.argmax())
    details = {"n": float(n), "kl_bound": kl_bound(n), "mean_score_of_n": float(scores.mean())}
    return Completion(group[place].token_ids, group[place].logprobs, float(scores[place]), details)


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n: an upper bound of KL(best of n ‖ policy), nats per response."""
    return math.log(n) - (n - 1) / n
