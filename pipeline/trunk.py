"""Hidden states of packed rows: one pass for all responses of a prompt, in the cheapest layout that a model takes.

A packed row is `[prompt | response 1 | … | response K]` under a block mask, with positions that restart at the prompt's
end. Policy, critic and reward model read their states here; each has a head of its own.

    flat      all rows behind each other, no padding: FlexAttention on a GPU, `attention` on a CPU
    rows      rows padded to the longest, under a dense mask: what any model takes that takes a mask
    separate  each response as a row with its own copy of the prompt: for models that know causal order only

Left out: what becomes of a state (`model`, `critic`, `reward`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import attention, elementwise, last_layer, widening
from pipeline.collate import collate, group_mask
from pipeline.contracts import Batch, Row

Layout = Literal["flat", "rows", "separate"]
logger = logging.getLogger(__name__)


def pads(layout: Layout) -> bool:
    """Whether rows cost as much as the longest beside them."""
    return layout != "flat"


def token_states(lm: nn.Module, batch: Batch, layout: Layout, embeddings: Tensor | None = None) -> Tensor:
    """The states that predict the trained tokens, in the order of `batch.response_mask`'s True places. [N, D]

    embeddings: what the model reads in place of the tokens, [B, T, D]; default: their own.
    """
    b, k, r = batch.response_mask.nonzero(as_tuple=True)
    inputs = batch.input_ids if embeddings is None else embeddings
    return _states(lm, batch, inputs, b, k, batch.predictor[b, k, r], layout)


def final_states(lm: nn.Module, batch: Batch, layout: Layout) -> Tensor:
    """The state at the last token of each valid response, in the order of `batch.valid`'s True places. [M, D]"""
    b, k = batch.valid.nonzero(as_tuple=True)
    places = torch.arange(batch.segment.shape[1], device=batch.segment.device)
    last = torch.where(batch.segment[b] == k[:, None] + 1, places, -1).amax(-1)
    return _states(lm, batch, batch.input_ids, b, k, last, layout)


def _states(lm: nn.Module, batch: Batch, inputs: Tensor, b: Tensor, k: Tensor, t: Tensor, layout: Layout) -> Tensor:
    """The state at place t of packed row b, as response k sees it. Tokens or embeddings [B, T, …], indices [N] → [N, D]"""
    if layout == "flat":
        return _flat_states(lm, batch, inputs, b, t)
    if layout == "rows":
        return _run(lm, inputs, _masks(lm, _dense, batch), batch.position_ids)[b, t]
    pairs = torch.stack([b, k], dim=-1).unique(dim=0)  # [M, 2]: the rows `[prompt | response k]`
    segment = batch.segment[pairs[:, 0]]
    own = (segment == 0) | (segment == pairs[:, 1:] + 1)  # [M, T]
    rows = [row[mask] for row, mask in zip(inputs[pairs[:, 0]], own, strict=True)]
    apart = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    live = torch.arange(apart.shape[1], device=apart.device)[None] < own.sum(-1, keepdim=True)
    hidden = _run(lm, apart, live.long())
    row_of = torch.full(batch.valid.shape, -1, device=b.device)
    row_of[pairs[:, 0], pairs[:, 1]] = torch.arange(len(pairs), device=b.device)
    row = row_of[b, k]
    return hidden[row, own.cumsum(-1)[row, t] - 1]


def _flat_states(lm: nn.Module, batch: Batch, inputs: Tensor, b: Tensor, t: Tensor) -> Tensor:
    live = batch.segment >= 0
    form = _blocks if lm.config._attn_implementation == "flex_attention" else _groups
    flat = inputs[live][None]
    places = (live.flatten().cumsum(0).view(live.shape) - 1)[b, t]  # of a row's token among all
    prompts = (batch.segment == 0).sum(-1)
    with last_layer.read_at(lm, places, flat.shape[1], ends=bool((t >= prompts[b] - 1).all())):
        hidden = _run(lm, flat, _masks(lm, form, batch), batch.position_ids[live][None])
    return hidden[0].index_select(0, places)


def _run(lm: nn.Module, inputs: Tensor, mask: Any, position_ids: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D] behind tokens [B, T] or embeddings [B, T, D]."""
    at = {} if position_ids is None else {"position_ids": position_ids}
    read = {"input_ids" if inputs.dim() == 2 else "inputs_embeds": inputs}
    return lm.base_model(**read, attention_mask=mask, use_cache=False, **at).last_hidden_state


# --------------------------------------------------------------------------------------------------- masks


def _masks(lm: nn.Module, form: Any, batch: Batch) -> Any:
    """The mask as this model takes it: with its attention window, one mask per kind of layer where kinds differ."""
    config = lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    if len(kinds) > 1:
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: form(lm, batch, windows[kind]) for kind in kinds}
    sliding = "sliding_attention" in kinds or (not kinds and window is not None)
    return form(lm, batch, window if sliding else None)


def _dense(lm: nn.Module, batch: Batch, window: int | None) -> Tensor:
    """[B, 1, T, T]: bool for SDPA; 0 or the lowest number for eager attention, which adds its mask."""
    mask = group_mask(batch.segment)
    if window is not None:
        distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]  # [B, T, T]
        mask = mask & (distance < window)[:, None]
    if lm.config._attn_implementation != "eager":
        return mask
    return torch.zeros_like(mask, dtype=lm.dtype).masked_fill(~mask, torch.finfo(lm.dtype).min)


def _groups(lm: nn.Module, batch: Batch, window: int | None) -> Tensor:
    """The rows' lengths, for `attention`."""
    return attention.pack([torch.bincount(row[row >= 0]).tolist() for row in batch.segment], window)


def _blocks(lm: nn.Module, batch: Batch, window: int | None) -> Any:
    """The same rule for FlexAttention, over all rows behind each other; it skips blocks that nobody looks at."""
    from torch.nn.attention.flex_attention import create_block_mask

    live = batch.segment >= 0
    row, segment, position = live.nonzero()[:, 0], batch.segment[live], batch.position_ids[live]

    def visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (row[query] == row[key]) & ((segment[key] == 0) | (segment[key] == segment[query]))
        return seen if window is None else seen & (position[query] - position[key] < window)

    return create_block_mask(visible, 1, None, len(row), len(row), device=row.device)


# -------------------------------------------------------------------------------------------------- choice

PROBE = [Row(0, [5, 11, 7], [[13, 4], [9, 3]]), Row(1, [2], [[8, 6, 12]])]
"""Two tiny groups of different shape."""


def probe_batch(lm: nn.Module, rows: Sequence[Row] = PROBE) -> Batch:
    """`rows` within this model's vocabulary, on its device."""
    size = lm.config.get_text_config().vocab_size

    def within(ids: list[int]) -> list[int]:
        return [i % size for i in ids]

    return collate([Row(r.row_id, within(r.prompt_ids), list(map(within, r.response_ids))) for r in rows]).to(lm.device)


def refuses_embeddings(lm: nn.Module) -> str | None:
    """Why this model cannot read embeddings in place of tokens, or None: both give the same states."""
    batch, was_training = probe_batch(lm), lm.training
    lm.eval()
    try:
        with torch.no_grad(), uncompiled_attention(lm):
            read = token_states(lm, batch, "separate", lm.get_input_embeddings()(batch.input_ids))
            gap = (read - token_states(lm, batch, "separate")).abs().max().float()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return " ".join(str(error).split())[:200]
    finally:
        lm.train(was_training)
    return None if gap <= (1e-3 if lm.dtype == torch.float32 else 0.05) else "they change what it computes"


def choose_layout(lm: nn.Module) -> Layout:
    """The cheapest layout that changes no state, and `lm` made ready for it. Says in the log why if it is `separate`.

    Two tiny groups are computed each way: that costs milliseconds, and catches architectures that ignore masks or positions
    (recurrent ones).
    """
    elementwise.attach(lm)
    widening.attach(lm)
    if lm.config._attn_implementation == "flex_attention":
        _allow_variants()
    with torch.no_grad():
        batch = probe_batch(lm)
        was_training = lm.training
        lm.eval()
        try:
            with uncompiled_attention(lm):
                exact = token_states(lm, batch, "separate")
            reason = None
            for layout in _candidates(lm):
                reason = _try(lm, batch, layout, exact)
                if reason is None:
                    return layout
        finally:
            lm.train(was_training)
    _uncompile(lm)
    logger.warning("%s: each response is computed with its own copy of the prompt (%s)", type(lm).__name__, reason)
    return "separate"


@contextmanager
def uncompiled_attention(lm: nn.Module) -> Iterator[None]:
    """With an attention that every processor has: FlexAttention's kernels are compiled, and not for every CPU."""
    asked = lm.config._attn_implementation
    _uncompile(lm)
    try:
        yield
    finally:
        if asked == "flex_attention":
            lm.set_attn_implementation(asked)


def _uncompile(lm: nn.Module) -> None:
    if lm.config._attn_implementation == "flex_attention":
        lm.set_attn_implementation("sdpa" if getattr(lm, "_supports_sdpa", False) else "eager")


def _allow_variants() -> None:
    """FlexAttention is compiled for each kind of layer, device, shape and mode; beyond dynamo's limit of 8 it would run unfused, with
    all scores in memory."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def _candidates(lm: nn.Module) -> list[Layout]:
    asked = lm.config._attn_implementation
    on_cpu = asked == "sdpa" and not torch.cuda.is_available()
    return ["flat", "rows"] if on_cpu or asked == "flex_attention" else ["rows"]


def _try(lm: nn.Module, batch: Batch, layout: Layout, exact: Tensor) -> str | None:
    """None where the states are `exact`, relative to their size; else the reason why they are not."""
    asked = lm.config._attn_implementation
    try:
        if layout == "flat" and asked == "sdpa":
            attention.register()
            lm.set_attn_implementation(attention.GROUPS)
        if layout == "flat":
            last_layer.attach(lm)
        else:
            _uncompile(lm)
        states = token_states(lm, batch, layout)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        reason = f"it does not accept a block mask: {' '.join(str(error).split())[:200]}"
    else:
        gap = float((exact.float() - states.float()).abs().max() / exact.abs().max().float().clamp(min=1e-6))
        if gap <= (1e-3 if lm.dtype == torch.float32 else 0.05):
            return None
        reason = f"its hidden states change by {gap:.2g} of their size under a block mask"
    lm.set_attn_implementation(asked)
    return reason
