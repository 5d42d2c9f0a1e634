"""Sampling from a causal language model: greedy, with a temperature, top-k, top-p, min-p.

What sets it apart from a library's generate: each completion draws from a random stream of its own, so that it does
not depend on which others share its batch or on how many machines work (up to the rounding of the forward pass); a
prompt runs through the model once for all of its completions; completions that ended leave the batch; and each token
comes with its log-probability. Left out: the choice of one token (`choice`), and where the model runs (`stage`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.decoding.choice import Filters, next_tokens, stream
from pipeline.decoding.contract import Completion, Prompt, Tools, check_lengths, portions
from pipeline.decoding.prefixes import Prefixes
from pipeline.thinker import Thinker


def sample(tools: Tools, prompts: Sequence[Prompt]) -> list[Completion]:
    """`sampling.per_prompt` completions of each prompt by the policy. Log-probabilities are the policy's."""
    settings = tools.sampling
    found = draw(tools, prompts, settings.per_prompt)
    return [found[p, i] for p in range(len(prompts)) for i in range(settings.per_prompt)]


def draw(tools: Tools, prompts: Sequence[Prompt], copies: int) -> dict[tuple[int, int], Completion]:
    """Completions 0 … copies − 1 of each prompt, by (place of the prompt, copy)."""
    settings, model = tools.sampling, tools.model("policy")
    check_lengths(model, prompts, settings.max_new_tokens)
    (order,) = portions(prompts, len(prompts)) or [[]]
    draws = [(p, i) for p in order for i in range(copies)]
    done: dict[tuple[int, int], Completion] = {}
    for start in range(0, len(draws), settings.batch_size):
        batch = draws[start : start + settings.batch_size]
        with torch.inference_mode():
            prefixes = begin(model, [prompts[p].ids for p, _ in batch], tools.pad_id, _thoughts(tools, prompts, batch))
            streams = [stream(settings.seed, prompts[p].key, i, prefixes.device) for p, i in batch]
            found = continue_to_end(prefixes, settings.max_new_tokens, filters_of(tools), tools.stop_ids, streams)
        done.update((name, Completion(ids, logprobs)) for name, (ids, logprobs) in zip(batch, found, strict=True))
        tools.told(len(batch))
    return done


def _thoughts(
    tools: Tools, prompts: Sequence[Prompt], batch: Sequence[tuple[int, int]]
) -> list[torch.Generator] | None:
    """Streams of the thoughts of each completion, where they are sampled: they take nothing from those of its tokens."""
    model, seed = tools.model("policy"), tools.sampling.seed
    if not isinstance(model, Thinker) or not model.noise:
        return None
    device = next(model.parameters()).device
    return [stream(seed, prompts[p].key, i, device, "thoughts") for p, i in batch]


def filters_of(tools: Tools) -> Filters:
    """What the configuration says about single tokens."""
    settings = tools.sampling
    return Filters(settings.temperature, settings.top_k, settings.top_p, tools.decoding.min_p, settings.min_new_tokens)


def begin(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    streams: Sequence[torch.Generator] | None = None,
) -> Prefixes:
    """One row per prompt; equal neighbours (copies of one prompt) run through the model once, unless thoughts differ."""
    if streams is not None:
        return Prefixes.of(model, prompts, pad_id, streams)
    distinct: list[Sequence[int]] = []
    rows = []
    for prompt in prompts:
        if not distinct or distinct[-1] is not prompt:
            distinct.append(prompt)
        rows.append(len(distinct) - 1)
    prefixes = Prefixes.of(model, distinct, pad_id)
    prefixes.keep(torch.tensor(rows))
    return prefixes


def continue_to_end(
    prefixes: Prefixes, new: int, filters: Filters, stop_ids: Sequence[int], streams: Sequence[torch.Generator]
) -> list[tuple[list[int], list[float]]]:
    """Up to `new` tokens behind each of B sequences (`prefixes` is used up) → token ids and log-probabilities of each.

    A ≤ B of them are in the model's batch at a time.
    """
    device, count = prefixes.device, len(prefixes)
    ends = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    ids = torch.zeros(count, new, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, new, dtype=prefixes.logits.dtype, device=device)
    lengths = torch.full((count,), new, device=device)
    row = torch.arange(count, device=device)  # [A] place among the B
    running = torch.ones_like(row, dtype=torch.bool)  # [A] false: ended, not yet taken out
    for step in range(new):
        token, logprob = next_tokens(prefixes.logits, filters, ends, step, streams)
        # What is written after a row's end is cut off by its length.
        ids[row, step], logprobs[row, step] = token, logprob
        ended = running & torch.isin(token, ends)
        lengths[row[ended]] = step + 1
        running &= ~ended
        left = int(running.sum())
        if left == 0 or step + 1 == new:
            break
        if left <= 0.75 * len(row):  # taking rows out copies the cache: worth it when a quarter of the work goes
            kept = running.nonzero().squeeze(-1)
            prefixes.keep(kept)
            streams = [streams[a] for a in kept.tolist()]
            row, token, running = (x[kept] for x in (row, token, running))
        prefixes.append(token)
    return _cut(ids, logprobs, lengths)


def _cut(ids: Tensor, logprobs: Tensor, lengths: Tensor) -> list[tuple[list[int], list[float]]]:
    rows = zip(ids.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    return [(tokens[:length], values[:length]) for tokens, values, length in rows]
