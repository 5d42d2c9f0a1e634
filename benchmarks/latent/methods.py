"""Every setting of the benchmark, as data. A method's `config` is laid over `BASE`; the result is an ordinary `RunConfig`.

All methods learn from the same right solutions, in as many steps, from the same starting model; only `sft` moves its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.reasoning import methods as reasoning

Plain = Mapping[str, Any]
SEEDS = (0, 1, 2)
PROMPTS = 4096
EPOCHS = 4
NUMBERS = (1, 2, 4, 8)
"""n_latents."""
USUAL = 4
ASSISTANT = "{start}"
"""Stands for the folder of the starting model, which is its own assistant."""

BASE: Plain = reasoning.merge(
    reasoning.BASE,
    {"tracking": {"enabled": False}, "train": {"epochs": EPOCHS}, "data": {"max_length": 48}},
)


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    title: str
    config: Plain


def _lta(title: str, n: int = USUAL, assistant: str | None = None, lr: float = 3e-3, **objective: Any) -> Method:
    latent = {"n_latents": n, "assistant": assistant}
    return Method(title, {"objective": {"name": "lta", **objective}, "latent": latent, "optimizer": {"lr": lr}})


METHODS: dict[str, Method] = {
    "sft": Method("SFT, all weights", {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-3}}),
    "softcot": _lta(
        "SoftCoT: frozen assistant, trained projection", assistant=ASSISTANT, align_weight=0, focus_weight=0
    ),
    "nll": _lta("LTA's block, likelihood alone", align_weight=0, focus_weight=0),
    "lta": _lta("LTA: all three terms"),
    "no_focus": _lta("LTA without the focus", focus_weight=0),
    "no_align": _lta("LTA without the alignment", align_weight=0),
    "no_nll": _lta("LTA without the likelihood", nll_weight=0),
    "lta_places": Method(
        "LTA, block that knows places", reasoning.merge(_lta("").config, {"latent": {"positions": True}})
    ),
    "lta_mean": _lta("LTA, mean thought aligned", alignment="mean"),
    **{f"lta_{n}": _lta(f"LTA, n = {n}", n) for n in NUMBERS if n != USUAL},
}
DECODED = f"lta_{max(NUMBERS)}"
"""Also decoded with fewer thoughts than it was trained with."""
QUICK = ("softcot", "lta")
