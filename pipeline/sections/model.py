"""Sections of the configuration about models: weights, precision, adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.sections.base import Attention, Count, Place, Positive, Precision, Section


class LoraSection(Section):
    """Low-rank adapters (peft). The reference is the same model with the adapter off."""

    r: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """The policy, and what it is compared with."""

    path: Place
    """Hub name, folder, `package:smollm2` (ships with the demo extra), or a run's folder (starts from its export)."""
    reference: Place | None = None
    """The frozen reference; default: the model that training starts from."""
    reference_states: Literal["auto", "cached", "live"] = "auto"
    """For an exact KL (`tdpo`): the reference's last hidden states are read from a cache, or the reference runs beside the policy.
    `auto` measures both on the first rows, and takes the cheaper one that fits the disk."""
    dtype: Precision = "auto"
    """`auto`: bfloat16 where the workers' processor has a unit for its matrix products (GPUs, CPUs with AMX), else float32; the
    driver settles it for all. Master weights are float32 either way."""
    attention: Attention = "auto"
    """Attention implementation of transformers. `auto`: flex_attention for workers with a GPU (it skips what a response may not see), else sdpa."""
    lora: LoraSection | None = None
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models whose code you have read."""

    @property
    def unpacked_attention(self) -> Attention:
        """For rows of one text (generation): a block mask would gain nothing."""
        return "eager" if self.attention == "eager" else "sdpa"
