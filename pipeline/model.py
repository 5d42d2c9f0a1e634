"""The policy: a causal language model (with or without LoRA) that turns a Batch into a PolicyOut.

The prompt of a group is computed once: `[prompt | response 1 | … | response K]` under a block mask, with positions that
restart at the prompt's end. The vocabulary projection runs at response positions only, in chunks. A model that cannot take
such a mask runs its responses as separate rows instead, and says so.

Left out: where weights come from (`pretrained`), how they are trained (`engine`), what is made of log-probs (`objectives`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.collate import collate, group_mask
from pipeline.config import ConfigError, LoraSection, ModelConfig
from pipeline.contracts import Batch, PolicyOut, Row
from pipeline.ops import selected_logprobs
from pipeline.pretrained import load_causal_lm, precision

logger = logging.getLogger(__name__)


class Policy(nn.Module):
    """log π(response | prompt) per token, for any causal language model of transformers.

    Args:
        lm: the language model; LoRA layers are injected into it when `lora` is given.
        lora: adapter settings, or None to train all weights.
    """

    def __init__(self, lm: nn.Module, lora: LoraSection | None = None) -> None:
        super().__init__()
        _remove_dropout(lm)
        reason = _why_separate(lm)
        self.shared_prompt = reason is None
        if reason is not None:
            logger.warning(
                "%s: each response is computed with its own copy of the prompt (%s)", type(lm).__name__, reason
            )
        self.lm = lm
        self._adapter: Any = None
        if lora is not None:
            object.__setattr__(self, "_adapter", add_lora(lm, lora))  # not a submodule: parameters keep one name

    def forward(self, batch: Batch) -> PolicyOut:
        """Log-probs at every response token, [B, K, R] float32."""
        hidden = _hidden(self.lm, batch) if self.shared_prompt else _hidden_separate(self.lm, batch)  # [N, D]
        ids = batch.response_ids[batch.response_mask]  # [N]
        flat = selected_logprobs(hidden, ids, self.project, self.lm.config.get_text_config().vocab_size)
        zeros = torch.zeros(batch.response_mask.shape, dtype=flat.dtype, device=flat.device)
        return PolicyOut(logprobs=zeros.masked_scatter(batch.response_mask, flat))

    def project(self, hidden: Tensor) -> Tensor:
        """[N, D] → logits [N, V], through the head *module*: under ZeRO-3 its weight exists only while it runs."""
        return _logits(self.lm, hidden)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The reference policy of a LoRA run: the same weights with the adapter off."""
        assert self._adapter is not None
        with self._adapter.disable_adapter():
            yield

    def merged(self) -> nn.Module:
        """The plain language model, adapters folded into its weights (for export; ends training)."""
        return self.lm if self._adapter is None else self._adapter.merge_and_unload()

    def enable_activation_checkpointing(self) -> None:
        """Recompute each layer in the backward pass."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def load_policy(config: ModelConfig, path: str | Path, dtype: torch.dtype | None = None) -> Policy:
    """The policy of a run, from the folder or hub name that `pretrained.locate` gave; weights in `dtype` (default: config)."""
    lm = load_causal_lm(str(path), dtype or precision(config.dtype), config.attention, config.trust_remote_code)
    policy = Policy(lm, config.lora)
    if config.activation_checkpointing:
        policy.enable_activation_checkpointing()
    return policy


# ------------------------------------------------------------------------------------------- hidden states


def _backbone(lm: nn.Module) -> nn.Module:
    return getattr(lm, lm.base_model_prefix)


def _hidden(lm: nn.Module, batch: Batch) -> Tensor:
    """Hidden states that predict the response tokens, from one pass over the packed rows. [N, D]"""
    out = _backbone(lm)(
        input_ids=batch.input_ids,
        attention_mask=_attention_mask(lm, batch),
        position_ids=batch.position_ids,
        use_cache=False,
    )
    rows = torch.arange(len(batch.weight), device=batch.segment.device)[:, None, None].expand_as(batch.predictor)
    return out.last_hidden_state[rows[batch.response_mask], batch.predictor[batch.response_mask]]


def _hidden_separate(lm: nn.Module, batch: Batch) -> Tensor:
    """The same states from B·K rows `[prompt | response]`, for models that cannot take a block mask. [N, D]"""
    rows = []
    for b, k in batch.valid.nonzero().tolist():
        own = (batch.segment[b] == 0) | (batch.segment[b] == k + 1)
        rows.append(batch.input_ids[b][own])
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
    mask = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]
    hidden = _backbone(lm)(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    prompts = (batch.segment == 0).sum(-1)  # [B]
    states = []
    for row, (b, k) in zip(hidden, batch.valid.nonzero().tolist(), strict=True):
        steps = batch.response_mask[b, k].nonzero().squeeze(-1)
        states.append(row[prompts[b] - 1 + steps])
    return torch.cat(states)


def _attention_mask(lm: nn.Module, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The group mask as this model takes it: with its attention window, one mask per kind of layer where kinds differ."""
    config = lm.config.get_text_config()
    full = group_mask(batch.segment)
    masks = {"full_attention": full}
    if (window := getattr(config, "sliding_window", None)) is not None:
        distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]  # [B, T, T]
        masks["sliding_attention"] = full & (distance < window)[:, None]
    if lm.config._attn_implementation != "sdpa":  # eager attention adds its mask
        lowest = torch.finfo(lm.dtype).min
        masks = {k: torch.zeros_like(m, dtype=lm.dtype).masked_fill(~m, lowest) for k, m in masks.items()}
    kinds = set(getattr(config, "layer_types", None) or [])
    if len(kinds) > 1:
        return masks
    sliding = "sliding_attention" in kinds or (not kinds and window is not None)
    return masks["sliding_attention" if sliding else "full_attention"]


def _logits(lm: nn.Module, hidden: Tensor) -> Tensor:
    """Output head, with what some architectures do to logits after it (Granite, Cohere, Gemma)."""
    config = lm.config.get_text_config()
    logits = lm.get_output_embeddings()(hidden)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scaling
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


# ------------------------------------------------------------------------------------------------- checks


@torch.no_grad()
def _why_separate(lm: nn.Module) -> str | None:
    """None if the packed forward gives this model's own log-probs, else the reason why it does not.

    A tiny group is computed three ways. That costs milliseconds, and catches architectures that ignore masks or
    positions (recurrent ones) and ones that transform logits in a way that `_logits` does not know (an error).
    """
    vocabulary = lm.config.get_text_config().vocab_size
    prompt, responses = [5, 11, 7], [[13, 4], [9, 3]]
    prompt, responses = [i % vocabulary for i in prompt], [[i % vocabulary for i in r] for r in responses]
    batch = collate([Row(0, prompt, responses)])
    batch = batch.to(lm.device)
    was_training = lm.training
    lm.eval()
    try:
        separate = _logits(lm, _hidden_separate(lm, batch)).float().log_softmax(-1)
        rows = torch.tensor([prompt + r[:1] for r in responses], device=lm.device)
        own = lm(input_ids=rows).logits[:, -2:].flatten(0, 1).float().log_softmax(-1)
        tolerance = 1e-3 if lm.dtype == torch.float32 else 0.2
        if (separate - own).abs().max() > tolerance:
            raise ConfigError(f"model.path: {type(lm).__name__} transforms its logits in a way qalign does not know")
        try:
            shared = _logits(lm, _hidden(lm, batch)).float().log_softmax(-1)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            return f"it does not accept a block mask: {' '.join(str(error).split())[:200]}"
    finally:
        lm.train(was_training)
    if (gap := float((separate - shared).abs().max())) > tolerance:
        return f"its log-probs change by {gap:.2g} under a block mask"
    return None


def _remove_dropout(lm: nn.Module) -> None:
    """Preference objectives compare two models: the policy at step 0 has to be the reference."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def add_lora(lm: nn.Module, lora: LoraSection) -> Any:
    """Inject adapters into `lm` in place; returns peft's handle. Only the adapters stay trainable."""
    import peft

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return peft.get_peft_model(lm, settings)
    except ValueError as error:
        raise ConfigError(f"model.lora.target_modules: {' '.join(str(error).split())[:200]}") from None
