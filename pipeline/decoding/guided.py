"""Value-guided decoding, one token at a time: π(z|s) ∝ π_ref(z|s) · exp(Q(s, z)/α) over the reference's likeliest tokens.

ARGS, controlled decoding and Transfer-Q* are this loop with another Q (arXiv 2405.20495). Log-probabilities of candidates come
from the reference, normalised: never from the aligned model, whose preference would count twice. With as many candidates as
the vocabulary has tokens the distribution is exact; fewer cut it off.

Left out: what a candidate is worth (`args`, `controlled`, `transfer_q`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.decoding.choice import COLD, barred, gumbel, stream
from pipeline.decoding.contract import SCORER_FAILED, Completion, Prompt, Role, Tools, check_lengths, portions
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.sampling import begin


class Draw(NamedTuple):
    """One completion to make."""

    prompt: Prompt
    place: int  # of the prompt in the caller's list
    copy: int


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    draw: Draw
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # under the guided distribution
    failure: str | None = None

    def take(self, token: int, logprob: float, scorer_failed: bool) -> bool:
        """Append a token; where the scorer failed there is none, and the row ends here: False."""
        if scorer_failed:
            self.failure = f"{SCORER_FAILED} on a candidate for token {len(self.token_ids) + 1}"
            return False
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        return True


@dataclass(frozen=True, slots=True)
class Fork:
    """A step of A completions, each with k tokens that may come next."""

    draws: Sequence[Draw]  # A
    responses: Sequence[Sequence[int]]  # A, so far
    candidates: Tensor  # [A, k] int64

    @property
    def step(self) -> int:
        """Tokens decoded so far: alike for all rows, which start together."""
        return len(self.responses[0])


Value = Callable[[Tools, Fork, Prefixes], Tensor]
"""(tools, fork, its A prefixes in the model that makes roll-outs) → Q(s, z) of each candidate [A, k] float64, nan where the
scorer failed."""


def guided(tools: Tools, prompts: Sequence[Prompt], value: Value, roller: Role, sequences: int) -> list[Completion]:
    """`per_prompt` completions of each prompt. temperature 0 takes the best candidate, 1 draws from π, as above.

    roller: the role of the model whose prefixes `value` is given. sequences: how many `value` decodes per completion, which
    together with `sampling.batch_size` says how many completions advance at a time. Completions carry log π.
    """
    settings = tools.sampling
    for role in dict.fromkeys(("reference", roller)):
        check_lengths(tools.model(role).config, prompts, settings.max_new_tokens)
    (order,) = portions(prompts, len(prompts)) or [[]]
    draws = [Draw(prompts[p], p, i) for p in order for i in range(settings.per_prompt)]
    size = max(1, settings.batch_size // max(1, sequences))
    rows: list[_Row] = []
    for start in range(0, len(draws), size):
        with torch.inference_mode():
            rows += _decode(tools, draws[start : start + size], value, roller)
        tools.told(len(draws[start : start + size]))
    rows.sort(key=lambda row: (row.draw.place, row.draw.copy))
    return [Completion(row.token_ids, row.logprobs, failure=row.failure) for row in rows]


def _decode(tools: Tools, draws: list[Draw], value: Value, roller: Role) -> list[_Row]:
    """Decode B completions to their ends; A ≤ B of them are in the models at a time."""
    settings, ends = tools.sampling, set(tools.stop_ids)
    starts = [draw.prompt.ids for draw in draws]
    reference = begin(tools.model("reference"), starts, tools.pad_id)
    same = tools.model(roller) is tools.model("reference")
    models = {"reference": reference}
    models[roller] = reference if same else begin(tools.model(roller), starts, tools.pad_id)
    streams = [stream(settings.seed, d.prompt.key, d.copy, reference.device, "choice") for d in draws]
    done = [_Row(draw) for draw in draws]
    rows = done
    for step in range(settings.max_new_tokens):
        candidates, logprobs = _candidates(tools, reference, step)
        fork = Fork([row.draw for row in rows], [row.token_ids for row in rows], candidates)
        worth = value(tools, fork, models[roller]).to(logprobs)
        failed = (worth.isnan() & logprobs.isfinite()).any(-1)
        guided_by = (logprobs + _divided(worth, tools.decoding.alpha)).log_softmax(-1)
        place = _choose(guided_by.nan_to_num(nan=float("-inf")), settings.temperature, streams)
        token = candidates.gather(-1, place).squeeze(-1)
        own = guided_by.gather(-1, place).squeeze(-1)
        going = [
            a
            for a, chosen in enumerate(zip(token.tolist(), own.tolist(), failed.tolist(), strict=True))
            if rows[a].take(*chosen) and chosen[0] not in ends
        ]
        if not going or step + 1 == settings.max_new_tokens:
            break
        rows, streams = [rows[a] for a in going], [streams[a] for a in going]
        for prefixes in dict.fromkeys(models.values()):
            kept = torch.tensor(going, device=prefixes.device)
            prefixes.keep(kept)
            prefixes.append(token[kept])
    return done


def _candidates(tools: Tools, reference: Prefixes, step: int) -> tuple[Tensor, Tensor]:
    """The reference's k likeliest next tokens and their log-probabilities, [A, k] each."""
    logits = reference.logits
    if step < tools.sampling.min_new_tokens:
        logits = barred(logits, torch.tensor(list(tools.stop_ids), dtype=torch.long, device=logits.device))
    found = logits.topk(min(tools.decoding.candidates, logits.shape[-1]), dim=-1)
    return found.indices, found.values - reference.logits.logsumexp(-1, keepdim=True)


def _divided(worth: Tensor, alpha: float) -> Tensor:
    """Q/α [A, k]; where float32 cannot hold it, of Q's distance from the best candidate's: the same distribution."""
    divided = worth / alpha
    if bool((divided.isinf() & worth.isfinite()).any()):
        return (worth - worth.amax(-1, keepdim=True)) / alpha
    return divided


def _choose(logprobs: Tensor, temperature: float, streams: Sequence[torch.Generator]) -> Tensor:
    """Place of the chosen candidate, [A, 1]."""
    scores = logprobs
    if temperature > COLD:
        scores = logprobs / temperature + gumbel(streams, logprobs)
    return scores.argmax(-1, keepdim=True)
