"""Hidden states of packed rows: one pass for all responses of a prompt, or one row per response where that cannot be.

A packed row is `[prompt | response 1 | … | response K]` under a block mask, with positions that restart at the prompt's
end. Policy, critic and reward model read their states here; each has a head of its own.

Left out: what becomes of a state (`model`, `critic`, `reward`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.collate import collate, group_mask
from pipeline.contracts import Batch, Row


def token_states(lm: nn.Module, batch: Batch, shared_prompt: bool) -> Tensor:
    """The states that predict the trained tokens, in the order of `batch.response_mask`'s True places. [N, D]"""
    b, k, r = batch.response_mask.nonzero(as_tuple=True)
    return _states(lm, batch, b, k, batch.predictor[b, k, r], shared_prompt)


def final_states(lm: nn.Module, batch: Batch, shared_prompt: bool) -> Tensor:
    """The state at the last token of each valid response, in the order of `batch.valid`'s True places. [M, D]"""
    b, k = batch.valid.nonzero(as_tuple=True)
    places = torch.arange(batch.segment.shape[1], device=batch.segment.device)
    last = torch.where(batch.segment[b] == k[:, None] + 1, places, -1).amax(-1)
    return _states(lm, batch, b, k, last, shared_prompt)


def _states(lm: nn.Module, batch: Batch, b: Tensor, k: Tensor, t: Tensor, shared_prompt: bool) -> Tensor:
    """The state at place t of packed row b, as response k sees it. All indices [N] → [N, D]"""
    if shared_prompt:
        out = lm.base_model(
            input_ids=batch.input_ids,
            attention_mask=_attention_mask(lm, batch),
            position_ids=batch.position_ids,
            use_cache=False,
        )
        return out.last_hidden_state[b, t]
    pairs = torch.stack([b, k], dim=-1).unique(dim=0)  # [M, 2]: the rows `[prompt | response k]`
    segment = batch.segment[pairs[:, 0]]
    own = (segment == 0) | (segment == pairs[:, 1:] + 1)  # [M, T]
    rows = [ids[mask] for ids, mask in zip(batch.input_ids[pairs[:, 0]], own, strict=True)]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    live = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < own.sum(-1, keepdim=True)
    hidden = lm.base_model(input_ids=input_ids, attention_mask=live.long(), use_cache=False).last_hidden_state
    row_of = torch.full(batch.valid.shape, -1, device=b.device)
    row_of[pairs[:, 0], pairs[:, 1]] = torch.arange(len(pairs), device=b.device)
    row = row_of[b, k]
    return hidden[row, own.cumsum(-1)[row, t] - 1]


def _attention_mask(lm: nn.Module, batch: Batch) -> Any:
    """The group mask as this model takes it: with its attention window, one mask per kind of layer where kinds differ."""
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    form = {"sdpa": _dense, "eager": _added, "flex_attention": _blocks}[lm.config._attn_implementation]
    if len(kinds) > 1:
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: form(batch, windows[kind], lm.dtype) for kind in kinds}
    sliding = "sliding_attention" in kinds or (not kinds and window is not None)
    return form(batch, window if sliding else None, lm.dtype)


def _dense(batch: Batch, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T] bool, for SDPA."""
    full = group_mask(batch.segment)
    if window is None:
        return full
    distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]  # [B, T, T]
    return full & (distance < window)[:, None]


def _added(batch: Batch, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], 0 or the lowest number: eager attention adds its mask."""
    mask = _dense(batch, window, dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _blocks(batch: Batch, window: int | None, dtype: torch.dtype) -> Any:
    """The same rule for FlexAttention, which skips blocks that nobody looks at: siblings cost nothing."""
    from torch.nn.attention.flex_attention import create_block_mask

    segment, position = batch.segment, batch.position_ids

    def visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of, to = segment[b, query], segment[b, key]
        seen = (query >= key) & (to >= 0) & ((to == 0) | (to == of))
        if window is not None:
            seen = seen & (position[b, query] - position[b, key] < window)
        return seen | (query == key)

    rows, width = segment.shape
    return create_block_mask(visible, rows, None, width, width, device=segment.device)


PROBE = Row(0, [5, 11, 7], [[13, 4], [9, 3]])
"""A tiny group: two responses of two tokens."""


def probe_batch(lm: nn.Module) -> Batch:
    """`PROBE` within this model's vocabulary, on its device."""
    size = lm.config.get_text_config().vocab_size
    row = Row(0, [i % size for i in PROBE.prompt_ids], [[i % size for i in r] for r in PROBE.response_ids])
    return collate([row]).to(lm.device)


@torch.no_grad()
def why_separate(lm: nn.Module) -> str | None:
    """None if this model takes packed rows, else the reason why not.

    A tiny group is computed both ways: that costs milliseconds, and catches architectures that ignore masks or
    positions (recurrent ones). Distances are relative to the states' size.
    """
    batch, was_training = probe_batch(lm), lm.training
    lm.eval()
    try:
        separate = token_states(lm, batch, shared_prompt=False).float()
        shared = token_states(lm, batch, shared_prompt=True).float()
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        return f"it does not accept a block mask: {' '.join(str(error).split())[:200]}"
    finally:
        lm.train(was_training)
    gap = float((separate - shared).abs().max() / separate.abs().max().clamp(min=1e-6))
    if gap > (1e-3 if lm.dtype == torch.float32 else 0.05):
        return f"its hidden states change by {gap:.2g} of their size under a block mask"
    return None
