"""Attention over rows that lie behind each other without padding, for CPUs.

A group is `[prompt | response 1 | … | response K]`. Its prompt is plain causal attention; its responses' queries see the
prompt and themselves, by a mask. No group meets another one's keys, so nothing is computed between them, nor for padding.
transformers' models call this like any other implementation, under the name `GROUPS`; they get `Group`s in place of a mask.

Left out: GPUs, where FlexAttention skips what nobody looks at (`trunk`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.collate import group_mask

GROUPS = "qalign_groups"
"""Name of this implementation in transformers' registry (`register`)."""

BUNDLE = 256
"""Short groups go together, up to so many tokens: below that, calls cost more than the scores between groups."""

Group = tuple[int, ...]
"""(tokens of the prompt, of response 1, …, of response K)"""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the kernel: a bundle's queries [start, stop) against its keys [0, stop) under `mask`; None: causal."""

    start: int
    stop: int
    mask: Tensor | None


def register() -> None:
    """Make `GROUPS` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(GROUPS, group_attention)
    AttentionMaskInterface.register(GROUPS, sdpa_mask)  # for calls with an ordinary mask


def pack(groups: list[Group], window: int | None) -> Tensor:
    """The groups as models hand them on: int64 [1, 1, 1 + B, 1 + K], the attention window first (0: none)."""
    width = max(map(len, groups))
    rows = [[window or 0] + [0] * (width - 1), *([*group] + [0] * (width - len(group)) for group in groups)]
    return torch.tensor([[rows]])


def group_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, G, N, D] → [1, N, H, D]; H is a multiple of G.

    attention_mask: what `pack` made of groups whose tokens add up to N; an ordinary mask is passed on to SDPA.
    Raises ValueError for what SDPA cannot do, either.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention has {name}, which has no form without padding here")
    (window, *_), *rows = attention_mask[0, 0].tolist()
    heads = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    bundles = plan(tuple(tuple(n for n in row if n) for row in rows), window)
    lengths = [bundle[-1].stop for bundle in bundles]
    parts = []
    for calls, q, k, v in zip(bundles, *(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        for call in calls:
            part = q[:, :, call.start : call.stop], k[:, :, : call.stop], v[:, :, : call.stop]
            parts.append(scaled_dot_product_attention(*part, call.mask, is_causal=call.mask is None, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None


@lru_cache(maxsize=4)  # all layers of a forward, and their recomputation, ask for the same ones
def plan(groups: tuple[Group, ...], window: int) -> tuple[tuple[Call, ...], ...]:
    """Bundles of consecutive groups, each with the calls that compute it. window: 0 for none."""
    bundles: list[list[Group]] = [[]]
    for group in groups:
        if bundles[-1] and sum(map(sum, [*bundles[-1], group])) > BUNDLE:
            bundles.append([])
        bundles[-1].append(group)
    return tuple(_calls(bundle, window) for bundle in bundles)


def _calls(bundle: list[Group], window: int) -> tuple[Call, ...]:
    tokens = sum(map(sum, bundle))
    visible = torch.block_diag(*(_visible(group, window) for group in bundle))
    prompt = bundle[0][0]
    if tokens <= BUNDLE or window or tokens == prompt:
        return (Call(0, tokens, visible),)
    return Call(0, prompt, None), Call(prompt, tokens, visible[prompt:])


def _visible(group: Group, window: int) -> Tensor:
    """[T, T], true where a query sees a key: in the prompt and in its own response, not in the future."""
    segment = torch.arange(len(group)).repeat_interleave(torch.tensor(group))
    seen = group_mask(segment[None])[0, 0]
    if not window:
        return seen
    starts = torch.tensor([0, *group]).cumsum(0)[:-1]
    position = torch.arange(len(segment)) - starts[segment] + torch.where(segment > 0, group[0], 0)
    return seen & (position[:, None] - position[None] < window)
