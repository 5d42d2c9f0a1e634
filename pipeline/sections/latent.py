"""Section of the configuration about latent thoughts: the prior that makes them, and what is trained beside it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.sections.base import Count, Place, Section


class LatentConfig(Section):
    """Latent thoughts between prompt and answer, for objectives that have them."""

    n_latents: Count = 4
    """Thoughts before each answer in training; decoding may take fewer (`sampling.n_latents`)."""
    assistant: Place | None = None
    """A small language model of the same vocabulary whose frozen states become the thoughts, through one trained projection
    (SoftCoT); default: a transformer block of random weights (LTA-Thinker)."""
    backbone: Literal["frozen", "trained"] = "frozen"
    """Whether the language model's own weights move. With `model.lora` its adapters do, and they alone."""
    positions: bool = False
    """Tell the block where in the prompt a token stands; without, as published, a prompt is a bag of tokens to it."""
    inner: Annotated[int, Field(ge=1, le=2**20)] | None = None
    """Width of the block's feed-forward layer; default: the language model's own."""
