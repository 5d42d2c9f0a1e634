"""Attention over rows that lie behind each other without padding, for CPUs.

A group is `[prompt | response 1 | … | response K]`. Its prompt is plain causal attention; its responses look at the prompt, which
hides nothing from them, and each at itself, causally. A query that looks at two blocks of keys gets the mean of what it finds in
either, by their sums of exponentials. So no score is computed only to be masked: neither between groups or responses, nor for
padding. transformers' models call this like any other implementation, under the name `GROUPS`; they get lengths in place of a mask.

Left out: GPUs, where FlexAttention skips what nobody looks at (`trunk`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline import last_layer
from pipeline.collate import group_mask
from pipeline.widening import widens

GROUPS = "qalign_groups"
"""Name of this implementation in transformers' registry (`register`)."""

BUNDLE = 256
"""Short groups go together, up to so many tokens, and so do a group's short responses: below that, calls cost more than the scores
between them."""

Group = tuple[int, ...]
"""(tokens of the prompt, of response 1, …, of response K)"""


@dataclass(frozen=True, slots=True)
class Block:
    """One call of the kernel: queries [start, stop) against keys [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    causal: bool = False  # of as many queries as keys
    mask: Tensor | None = None  # added to the scores

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a range of queries sees: the keys of `block`, and those of `own`, whose queries are parts of the range."""

    block: Block
    own: tuple[Block, ...] = ()


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
    rounded = query.dtype
    if widens(query):
        query, key, value = query.float(), key.float(), value.float()
    key, value = repeat_kv(key, heads), repeat_kv(value, heads)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    widest = max(query.shape[-1], width)
    query, key, value = (_read(x, widest) for x in (query, key, value))
    groups = tuple(tuple(n for n in row if n) for row in rows)
    sights = plan(groups, window, query.dtype, last_layer.reads_ends(module))
    return _Attention.apply(query, key, value, sights, scale)[..., :width].to(rounded), None


def _read(x: Tensor, width: int) -> Tensor:
    """As the kernels read it: heads of one width, whose numbers lie next to each other. Zeros behind them change no score."""
    x = pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
    return x if x.stride(-1) == 1 else x.contiguous()


# ----------------------------------------------------------------------------------------------------- plan


@lru_cache(maxsize=4)  # all layers of a forward, and their recomputation, ask for the same ones
def plan(groups: tuple[Group, ...], window: int, dtype: torch.dtype, ends: bool = False) -> tuple[Sight, ...]:
    """What the queries see, in their order.

    window: 0 for none; dtype: of the masks, which is the queries'; ends: of a long prompt only the last token looks.
    """
    if window >= max(prompt + max(responses, default=0) for prompt, *responses in groups):
        window = 0  # it hides nothing
    sights, start = [], 0
    for bundle in _bundles(groups):
        sights += _sights(bundle, start, window, dtype, ends)
        start += sum(map(sum, bundle))
    return tuple(sights)


def _bundles(groups: Sequence[Group]) -> list[list[Group]]:
    """Consecutive groups; more than `BUNDLE` tokens only where that is one group."""
    bundles: list[list[Group]] = [[]]
    for group in groups:
        if bundles[-1] and sum(map(sum, [*bundles[-1], group])) > BUNDLE:
            bundles.append([])
        bundles[-1].append(group)
    return bundles


def _sights(bundle: list[Group], start: int, window: int, dtype: torch.dtype, ends: bool) -> Iterator[Sight]:
    tokens = sum(map(sum, bundle))
    if tokens <= BUNDLE or window:
        mask = _mask(bundle, window, dtype)
        yield Sight(Block(start, start + tokens, start, start + tokens, mask=mask))
        return
    ((prompt, *responses),) = bundle  # a group that is longer than a bundle is alone in it
    behind, end = start + prompt, start + tokens
    yield Sight(Block(behind - 1 if ends else start, behind, start, behind, causal=not ends))
    if responses:
        yield Sight(Block(behind, end, start, behind), tuple(_own(responses, behind, dtype)))


def _own(responses: list[int], start: int, dtype: torch.dtype) -> Iterator[Block]:
    for bundle in _bundles([(tokens,) for tokens in responses]):
        end = start + sum(map(sum, bundle))
        if len(bundle) == 1:
            yield Block(start, end, start, end, causal=True)
        else:
            yield Block(start, end, start, end, mask=_mask(bundle, 0, dtype))
        start = end


def _mask(bundle: list[Group], window: int, dtype: torch.dtype) -> Tensor:
    """As the kernels read it, over all tokens of the bundle: 0 where a query sees a key, −∞ elsewhere."""
    seen = torch.block_diag(*(_visible(group, window) for group in bundle))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _visible(group: Group, window: int) -> Tensor:
    """[T, T], true where a query sees a key: in the prompt and in its own response, not in the future."""
    segment = torch.arange(len(group)).repeat_interleave(torch.tensor(group))
    seen = group_mask(segment[None])[0, 0]
    if not window:
        return seen
    starts = torch.tensor([0, *group]).cumsum(0)[:-1]
    position = torch.arange(len(segment)) - starts[segment] + torch.where(segment > 0, group[0], 0)
    return seen & (position[:, None] - position[None] < window)


# -------------------------------------------------------------------------------------------------- kernels


class _Attention(torch.autograd.Function):
    """query, key, value [1, H, N, D] → [1, N, H, D].

    The kernels are those behind `scaled_dot_product_attention`. Called by their own names they tell each query's sum of exponentials,
    by which blocks are put together, and their gradients go where they belong without a tensor of zeros per slice. In the
    backward pass a block gets the whole output and the whole sum: its part of the gradient is then exact (FlashAttention,
    arXiv 2205.14135, app. B.2, says so for its tiles of keys).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sights: tuple[Sight, ...], scale: float) -> Tensor:
        _, heads, tokens, width = query.shape
        all_look = sum(sight.block.stop - sight.block.start for sight in sights) == tokens
        out = (query.new_empty if all_look else query.new_zeros)(1, tokens, heads, width)
        sums = []
        for sight in sights:
            found, total = _forward(query, key, value, sight.block, scale)
            for own in sight.own:
                part = slice(own.start - sight.block.start, own.stop - sight.block.start)
                _merge(found[:, :, part], total[:, :, part], *_forward(query, key, value, own, scale))
            out[:, sight.block.queries] = found.transpose(1, 2)
            sums.append(total)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.sights, ctx.scale, ctx.all_look = sights, scale, all_look
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *sums = ctx.saved_tensors
        like = torch.empty_like if ctx.all_look else torch.zeros_like
        grads = like(query), torch.empty_like(key), torch.empty_like(value)
        by_out, out = grad.contiguous().transpose(1, 2), out.transpose(1, 2)
        written = 0  # keys before this one have their first gradient, all those behind it none
        for sight, total in zip(ctx.sights, sums, strict=True):
            for block in (sight.block, *sight.own):
                part = slice(block.start - sight.block.start, block.stop - sight.block.start)
                found = _backward(by_out, query, key, value, out, total[:, :, part], block, ctx.scale)
                _add(grads[0], block.queries, found[0], first=block is sight.block)
                for into, more in zip(grads[1:], found[1:], strict=True):
                    _add(into, block.keys, more, first=block.first >= written)
                written = max(written, block.last)
        return *grads, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """What the block's queries find, [1, H, n, D], and the logarithm of their sums of exponentials, [1, H, n]."""
    keys, values = key[:, :, block.keys], value[:, :, block.keys]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query[:, :, block.queries], keys, values, 0.0, block.causal, attn_mask=block.mask, scale=scale)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    block: Block,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's part of the gradients of its queries, keys and values; grad and out are [1, H, N, D], total is the block's."""
    at, keys = block.queries, block.keys
    tensors = grad[:, :, at], query[:, :, at], key[:, :, keys], value[:, :, keys], out[:, :, at], total
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(*tensors, 0.0, block.causal, attn_mask=block.mask, scale=scale)


def _merge(found: Tensor, total: Tensor, more: Tensor, more_total: Tensor) -> None:
    """What queries find in two blocks of keys together; replaces `found` and `total`."""
    both = torch.logaddexp(total, more_total)
    found.lerp_(more, (more_total - both).exp()[..., None].to(more.dtype))
    total.copy_(both)


def _add(into: Tensor, places: slice, part: Tensor, first: bool) -> None:
    at = into[:, :, places]
    if first:
        at.copy_(part)
    else:
        at.add_(part)
