"""Proxy tuning at decoding time: π ∝ π_base · (π_policy/π_ref)^w, token by token (arXiv 2404.12358, Eq. 14–15).

What alignment changed between a reference and its policy, both perhaps small, is added to another model of the same
vocabulary. w = 1 with the reference as base gives the policy back; larger w exaggerates it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.decoding.choice import next_tokens, stream
from pipeline.decoding.contract import Completion, Prompt, Tools, check_lengths, portions
from pipeline.decoding.prefixes import Prefixes
from pipeline.decoding.sampling import begin, filters_of

ROLES = ("base", "policy", "reference")


def decode(tools: Tools, prompts: Sequence[Prompt]) -> list[Completion]:
    """`per_prompt` completions of each prompt, drawn with the settings of `sampling`. They carry log π of the mixture."""
    settings = tools.sampling
    for role in ROLES:
        check_lengths(tools.model(role).config, prompts, settings.max_new_tokens)
    (order,) = portions(prompts, len(prompts)) or [[]]
    draws = [(p, i) for p in order for i in range(settings.per_prompt)]
    found: dict[tuple[int, int], Completion] = {}
    for start in range(0, len(draws), settings.batch_size):
        batch = draws[start : start + settings.batch_size]
        with torch.inference_mode():
            made = _decode(tools, [prompts[p] for p, _ in batch], [i for _, i in batch])
        found.update(zip(batch, made, strict=True))
        tools.told(len(batch))
    return [found[p, i] for p in range(len(prompts)) for i in range(settings.per_prompt)]


def _decode(tools: Tools, prompts: list[Prompt], copies: list[int]) -> list[Completion]:
    settings = tools.sampling
    own = {id(tools.model(role)): tools.model(role) for role in ROLES}  # two roles may be played by one model
    begun = {name: begin(model, [prompt.ids for prompt in prompts], tools.pad_id) for name, model in own.items()}
    models = {role: begun[id(tools.model(role))] for role in ROLES}
    device = models["base"].device
    streams = [stream(settings.seed, p.key, copy, device) for p, copy in zip(prompts, copies, strict=True)]
    filters = filters_of(tools)
    ends, done = (
        torch.tensor(list(tools.stop_ids), dtype=torch.long, device=device),
        [Completion([], []) for _ in prompts],
    )
    open_ = done[:]
    for step in range(settings.max_new_tokens):
        token, logprob = next_tokens(_mixed(models, tools.decoding.weight), filters, ends, step, streams)
        for completion, chosen, logp in zip(open_, token.tolist(), logprob.tolist(), strict=True):
            completion.token_ids.append(chosen)
            completion.logprobs.append(logp)
        kept = (~torch.isin(token, ends)).nonzero().flatten()
        if len(kept) == 0 or step + 1 == settings.max_new_tokens:
            break
        open_, streams = [open_[a] for a in kept.tolist()], [streams[a] for a in kept.tolist()]
        for prefixes in begun.values():
            prefixes.keep(kept)
            prefixes.append(token[kept])
    return done


def _mixed(models: dict[str, Prefixes], weight: float) -> torch.Tensor:
    """log π_base + w (log π_policy − log π_ref), not normalised. [A, V]"""
    base, policy, reference = (models[role].logprobs for role in ROLES)
    mixed = base + weight * (policy - reference)
    # A token that policy and reference both exclude: −inf − (−inf); it stays excluded.
    return mixed.nan_to_num(nan=float("-inf"))
