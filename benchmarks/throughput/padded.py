"""A straightforward implementation in plain PyTorch: padded rows, two models, all logits.

Every response is a row of its own with its own copy of the prompt, all rows of a step go through the policy and through
the reference in one forward each, and log-probs come from the log-softmax over the whole vocabulary at every position. It
knows nothing of the pipeline, so agreement with it says something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.throughput.pace import Pace
from benchmarks.throughput.tasks import Task, digests
from benchmarks.throughput.workloads import OPTIMIZER, Group


class Padded:
    """Policy, reference and AdamW, in float32."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoModelForCausalLM

        entry = task.entry
        assert (entry.precision, entry.checkpointing, entry.reference) == ("float32", False, "inline")
        self._steps, self._settings = task.groups(), task.workload.objective
        self._policy, self._reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
            for path in (task.policy, task.reference)
        )
        self._reference.requires_grad_(False)
        self._policy.train()
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=OPTIMIZER["lr"],
            betas=OPTIMIZER["betas"],
            eps=OPTIMIZER["eps"],
            weight_decay=OPTIMIZER["weight_decay"],
            fused=True,
        )

    @torch.no_grad()
    def logprobs(self) -> dict[int, list[float]]:
        groups = self._steps[0]
        ids, lengths, answers = pad(groups)
        found = (token_logprobs(self._logits(self._policy, ids, lengths), ids) * answers).double().sum(-1)
        return dict(enumerate(found.view(len(groups), -1).tolist()))

    def train(self, pace: Pace) -> None:
        for groups in self._steps:
            if not pace.begin():
                break
            ids, lengths, answers = pad(groups)
            loss, norm = self._step(ids, lengths, answers, len(groups))
            pace.end(loss, norm, lambda seen=(ids, lengths, answers): digests(_sequences(*seen)))

    def _step(self, ids: Tensor, lengths: Tensor, answers: Tensor, groups: int) -> tuple[float, float]:
        logits = self._logits(self._policy, ids, lengths)
        with torch.no_grad():
            ref_logits = self._logits(self._reference, ids, lengths)
        loss_of = LOSSES[self._settings["name"]]
        loss = loss_of(logits, ref_logits, ids, answers, groups, self._settings)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._policy.parameters(), OPTIMIZER["clip"])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    def _logits(self, model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
        """[N, T] → [N, T−1, V]: at each position for the token behind it."""
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]


def pad(groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (prompt, response) of all groups, a group's K one after another → ids [N, T], lengths [N], and a mask
    [N, T−1] of the positions whose next token is an answer's."""
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(p + r) for p, r in rows], batch_first=True)
    prompts, lengths = (torch.tensor(n) for n in zip(*((len(p), len(p) + len(r)) for p, r in rows), strict=True))
    place = torch.arange(1, ids.shape[1])
    return ids, lengths, (place >= prompts[:, None]) & (place < lengths[:, None])


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """[N, T−1, V], [N, T] → [N, T−1]."""
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def plackett_luce(
    logits: Tensor, ref_logits: Tensor, ids: Tensor, answers: Tensor, groups: int, settings: dict[str, Any]
) -> Tensor:
    """−Σ_k (r_k − log Σ_{j ≥ k} e^{r_j}), mean over groups; DPO where K = 2."""
    ratio = token_logprobs(logits, ids) - token_logprobs(ref_logits, ids)
    reward = settings["beta"] * (ratio * answers).sum(-1).view(groups, -1)
    losses = [reward[:, k:].logsumexp(-1) - reward[:, k] for k in range(reward.shape[1])]
    return torch.stack(losses).sum(0).mean()


def tdpo(
    logits: Tensor, ref_logits: Tensor, ids: Tensor, answers: Tensor, groups: int, settings: dict[str, Any]
) -> Tensor:
    """TDPO₂ (arXiv 2404.11999): −log σ(β(ℓ_w − ℓ_l) − αβ(D_l − sg D_w)), D the sum of KL(π_ref ‖ π) over tokens."""
    assert settings["variant"] == 2
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kl = ((ref_logp.exp() * (ref_logp - logp)).sum(-1) * answers).sum(-1).view(groups, 2)
    picked = ids[:, 1:, None]
    ratio = (logp.gather(-1, picked) - ref_logp.gather(-1, picked)).squeeze(-1)
    log_ratio = (ratio * answers).sum(-1).view(groups, 2)
    margin = log_ratio[:, 0] - log_ratio[:, 1] - settings["alpha"] * (kl[:, 1] - kl[:, 0].detach())
    return -logsigmoid(settings["beta"] * margin).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": plackett_luce, "plackett_luce": plackett_luce, "tdpo": tdpo}


def _sequences(ids: Tensor, lengths: Tensor, answers: Tensor) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) token ids, read back from what went through the model."""
    rows = zip(ids.tolist(), lengths.tolist(), answers.sum(-1).tolist(), strict=True)
    return [(row[: length - count], row[length - count : length]) for row, length, count in rows]
