"""Hidden states of packed rows: one pass for all responses of a prompt, in the cheapest layout that a model takes.

A packed row is `[prompt | response 1 | … | response K]` under a block mask, with positions that restart at the prompt's
end. Policy, critic and reward model read their states here; each has a head of its own.

    flat      all rows behind each other, no padding: FlexAttention on a GPU, `attention` on a CPU
    rows      rows padded to the longest, under a dense mask: what any model takes that takes a mask
    separate  each response as a row with its own copy of the prompt, padded on the right: for models that know causal order only
    unpadded  the same, rows of one length at a time: for models whose states change with padding

Left out: which layout a model takes (`packing`), and what becomes of a state (`model`, `critic`, `reward`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline import attention, last_layer, rope
from pipeline.collate import group_mask
from pipeline.contracts import Batch
from pipeline.distributed import greatest

Layout = Literal["flat", "rows", "separate", "unpadded"]


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


def trunk_of(lm: nn.Module) -> nn.Module:
    """The transformer below the output head; `lm` itself where it has none."""
    return lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)


def _states(lm: nn.Module, batch: Batch, inputs: Tensor, b: Tensor, k: Tensor, t: Tensor, layout: Layout) -> Tensor:
    """The state at place t of packed row b, as response k sees it. Tokens or embeddings [B, T, …], indices [N] → [N, D]

    Responses on both sides of a border of `rope` cannot share a prompt: such a batch is computed as separate rows.
    """
    if layout in ("flat", "rows") and (limit := rope.border(lm)) is not None and _longest(batch) > limit:
        layout = "separate"
    if layout == "flat":
        return _flat_states(lm, batch, inputs, b, t)
    if layout == "rows":
        return _run(lm, inputs, _masks(lm, _dense, batch), batch.position_ids)[b, t]
    return _separate_states(lm, batch, inputs, b, k, t, padded=layout == "separate")


def _longest(batch: Batch) -> int:
    return int(batch.position_ids.max()) + 1


def _separate_states(
    lm: nn.Module, batch: Batch, inputs: Tensor, b: Tensor, k: Tensor, t: Tensor, padded: bool
) -> Tensor:
    pairs = torch.stack([b, k], dim=-1).unique(dim=0)  # [M, 2]: the rows `[prompt | response k]`
    segment = batch.segment[pairs[:, 0]]
    own = (segment == 0) | (segment == pairs[:, 1:] + 1)  # [M, T]
    rows = [row[mask] for row, mask in zip(inputs[pairs[:, 0]], own, strict=True)]
    hidden = (_padded if padded else _unpadded)(lm, rows)
    row_of = torch.full(batch.valid.shape, -1, device=b.device)
    row_of[pairs[:, 0], pairs[:, 1]] = torch.arange(len(pairs), device=b.device)
    row = row_of[b, k]
    return hidden[row, own.cumsum(-1)[row, t] - 1]


def _padded(lm: nn.Module, rows: list[Tensor]) -> Tensor:
    """Sequences [T_m, …] side by side, padded on the right → [M, T, D]."""
    apart = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=apart.device)[:, None]
    places = torch.arange(apart.shape[1], device=apart.device)[None]
    live = places < lengths
    if rope.border(lm) is None:
        return _run(lm, apart, live.long())
    return _run(lm, apart, live.long(), torch.minimum(places, lengths - 1))  # padding makes no row longer


def _unpadded(lm: nn.Module, rows: list[Tensor]) -> Tensor:
    """Sequences [T_m, …], those of one length in one forward without a mask → [M, T, D], zeros behind each one."""
    lengths = torch.tensor([len(row) for row in rows])
    kinds = lengths.unique()
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for length in kinds:
        places = (lengths == length).nonzero()[:, 0].tolist()
        hidden = _run(lm, torch.stack([rows[m] for m in places]))
        for m, states in zip(places, hidden, strict=True):
            found[m] = states
    if any(hasattr(p, "ds_id") for p in lm.parameters()):  # ZeRO-3: all ranks gather each layer's weights equally often
        for _ in range(greatest(len(kinds), rows[0].device) - len(kinds)):
            found[0] = found[0] + 0 * _run(lm, rows[0][None, :1]).sum()
    return nn.utils.rnn.pad_sequence(found, batch_first=True)


def _flat_states(lm: nn.Module, batch: Batch, inputs: Tensor, b: Tensor, t: Tensor) -> Tensor:
    live = batch.segment >= 0
    form = _blocks if lm.config._attn_implementation == "flex_attention" else _groups
    flat = inputs[live][None]
    places = (live.flatten().cumsum(0).view(live.shape) - 1)[b, t]  # of a row's token among all
    prompts = (batch.segment == 0).sum(-1)
    with last_layer.read_at(lm, places, flat.shape[1], ends=bool((t >= prompts[b] - 1).all())):
        hidden = _run(lm, flat, _masks(lm, form, batch), batch.position_ids[live][None])
    return hidden[0].index_select(0, places)


def _run(lm: nn.Module, inputs: Tensor, mask: Any = None, position_ids: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D] behind tokens [B, T] or embeddings [B, T, D]."""
    at = {} if position_ids is None else {"position_ids": position_ids}
    read = {"input_ids" if inputs.dim() == 2 else "inputs_embeds": inputs}
    seen = {} if mask is None else {"attention_mask": mask}
    return trunk_of(lm)(**read, **seen, use_cache=False, **at).last_hidden_state


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
