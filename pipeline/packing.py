"""Which layout of packed rows (`trunk`) a language model takes without a change to what it computes.

The measure is the plainest forward of transformers: each sequence `[prompt | response]` alone, without padding or mask. A layout
that shares prompts is taken where two things hold:

- The architecture is one of `PACKS`. The tests compare each of these, in all layouts, with the plain forward on sequences
  that are longer than its attention windows and whatever else depends on distance, made small. A window of thousands of tokens
  cannot be seen at start-up, where a probe may cost milliseconds; and a configuration has too many names for one.
- The model at hand agrees on `PROBE`. That sees what its own settings change at any length: ALiBi, positions that are counted
  from a mask, convolutions, recurrences, experts with a capacity.

All other models compute each response with its own copy of the prompt; where padding changes their states, too, rows of one
length at a time. Models that look ahead are refused. The log says why a layout is slower than "rows".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline import attention, elementwise, last_layer, rope, widening
from pipeline.collate import collate
from pipeline.config import ConfigError
from pipeline.contracts import Batch, Row
from pipeline.trunk import Layout, token_states, trunk_of

logger = logging.getLogger(__name__)

PACKS = frozenset(
    [
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "axk1",
        "axk2",
        "beam",
        "biogpt",
        "bitnet",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "ctrl",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "diffllama",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "falcon",
        "flex_olmo",
        "flint",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4_unified_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hrm_text",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hy_v4",
        "hyperclovax",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jetmoe",
        "kolibri1",
        "laguna",
        "lfm2",
        "llama",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
        "youtu",
    ]
)
"""Architectures (`model_type`) of transformers that compute the same in packed rows: proven by `tests/test_architectures.py`."""

ALONE = frozenset({"doge"})
"""Architectures that are right only without padding or a cache, which shows on sequences longer than a probe's alone."""

PROBE = [
    Row(0, [5, 11, 7, 14, 3, 12, 8], [[13, 4, 6, 15, 9], [9, 3]]),
    Row(1, [2, 10], [[8, 6, 12, 5, 4, 11, 7, 13, 3]]),
    Row(2, [6, 4, 9], [[12], [5, 8, 14, 7]]),
]
"""A few ragged groups, two of whose sequences are of one length."""

FAILURES = (
    TypeError,
    ValueError,
    RuntimeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    NotImplementedError,
)
"""What models raise for inputs that they do not take."""


def probe_batch(lm: nn.Module, rows: Sequence[Row] = PROBE) -> Batch:
    """`rows` within this model's vocabulary, on its device."""
    size = lm.config.get_text_config().vocab_size

    def within(ids: list[int]) -> list[int]:
        return [i % size for i in ids]

    return collate([Row(r.row_id, within(r.prompt_ids), list(map(within, r.response_ids))) for r in rows]).to(lm.device)


def choose_layout(lm: nn.Module) -> Layout:
    """The cheapest layout that changes no state, and `lm` made ready for it. Says in the log why if rows share no prompt.

    Raises ConfigError for a model that cannot be trained on rows of text: it looks ahead, or fails on plain tokens.
    """
    elementwise.attach(lm)
    widening.attach(lm)
    rope.attach(lm)
    if lm.config._attn_implementation == "flex_attention":
        _allow_variants()
    batch, was_training = probe_batch(lm), lm.training
    lm.eval()
    try:
        with torch.no_grad():
            with uncompiled_attention(lm):
                check_causal(lm)
                exact = plain_states(lm, batch)
            reason = _unproven(lm)
            for layout in _candidates(lm) if reason is None else []:
                reason = _try(lm, batch, layout, exact)
                if reason is None:
                    return layout
            _uncompile(lm)
            apart: list[Layout] = ["unpadded"] if lm.config.model_type in ALONE else ["separate", "unpadded"]
            for layout in apart:
                changed = _try(lm, batch, layout, exact)
                if changed is None:
                    _tell(lm, layout, reason)
                    return layout
                reason = changed
    finally:
        lm.train(was_training)
    raise ConfigError(
        f"model.path: what {type(lm).__name__} computes for a row depends on rows beside it; use another model"
    )


def _tell(lm: nn.Module, layout: Layout, reason: str | None) -> None:
    lengths = ", rows of one length at a time" if layout == "unpadded" else ""
    logger.warning(
        "%s: each response is computed with its own copy of the prompt%s (%s)", type(lm).__name__, lengths, reason
    )


def _unproven(lm: nn.Module) -> str | None:
    own = lm.config.model_type
    if own in PACKS and type(lm).__module__.startswith("transformers."):
        return None
    return f"whether it computes the same in packed rows is not known of the architecture {own}"


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
    except FAILURES as error:
        reason = f"it does not accept a block mask: {one_line(error)}"
    else:
        gap = _gap(states, exact)
        if gap <= _tolerance(lm):
            return None
        under = "beside other rows" if layout in ("separate", "unpadded") else "under a block mask"
        reason = f"its hidden states change by {gap:.2g} of their size {under}"
    lm.set_attn_implementation(asked)
    return reason


# ------------------------------------------------------------------------------------------------- measure


def plain_states(lm: nn.Module, batch: Batch) -> Tensor:
    """`token_states` by the plain forward of each sequence alone. Raises ConfigError where there is none."""
    found = []
    for b, segment in enumerate(batch.segment):
        for k in range(int(segment.max())):
            own = (segment == 0) | (segment == k + 1)
            prompt, count = int((segment == 0).sum()), int(batch.response_mask[b, k].sum())
            found.append(_plain(lm, batch.input_ids[b, own][None])[0, prompt - 1 : prompt - 1 + count])
    return torch.cat(found)


@torch.no_grad()
def check_causal(lm: nn.Module, key: str = "model.path") -> None:
    """Raises ConfigError for a model whose states of a text's beginning depend on how it goes on."""
    size = lm.config.get_text_config().vocab_size
    ids = torch.tensor([[5, 11, 7, 13, 4, 9, 3, 8], [5, 11, 7, 13, 6, 2, 10, 14]], device=lm.device) % size
    hidden = _plain(lm, ids, key)
    if _gap(hidden[1, :4], hidden[0, :4]) > _tolerance(lm):
        raise ConfigError(
            f"{key}: {type(lm).__name__} looks ahead (it is no causal language model, or not set up as one: is_decoder); "
            "use a decoder-only model"
        )


def _plain(lm: nn.Module, ids: Tensor, key: str = "model.path") -> Tensor:
    try:
        return trunk_of(lm)(input_ids=ids, use_cache=False).last_hidden_state
    except FAILURES as error:
        raise ConfigError(
            f"{key}: {type(lm).__name__} does not turn tokens into hidden states as decoder-only models do ({one_line(error)}); "
            "use another model"
        ) from None


def _gap(states: Tensor, exact: Tensor) -> float:
    """The greatest difference, relative to the greatest state; inf where one is not a number."""
    gap = (exact.float() - states.float()).abs().max() / exact.abs().max().float().clamp(min=1e-6)
    return float(gap.nan_to_num(nan=float("inf")))


def _tolerance(lm: nn.Module) -> float:
    return 1e-3 if lm.dtype == torch.float32 else 0.05


def one_line(error: Exception) -> str:
    """An error as part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def refuses_embeddings(lm: nn.Module) -> str | None:
    """Why this model cannot read embeddings in place of tokens, or None: both give the same states."""
    batch, was_training = probe_batch(lm), lm.training
    lm.eval()
    try:
        with torch.no_grad(), uncompiled_attention(lm):
            read = token_states(lm, batch, "separate", lm.get_input_embeddings()(batch.input_ids))
            gap = (read - token_states(lm, batch, "separate")).abs().max().float()
    except FAILURES as error:
        return one_line(error)
    finally:
        lm.train(was_training)
    return None if gap <= _tolerance(lm) else "they change what it computes"


# ----------------------------------------------------------------------------------------------- attention


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
