"""Every setting of the benchmark, as data: the objectives, the strengths that each one is swept over, and all that they share.

The grids were chosen once, on a seed that is not reported, so that each curve spans weak to strong; everything else is the same for
all: model, prompts, samples, steps, learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.reviews import MAX_LENGTH, RESPONSE_TOKENS, SCORER

Plain = Mapping[str, Any]
Dataset = Literal["pairs", "rankings"]
KIND: Mapping[Dataset, str] = {"pairs": "preference", "rankings": "ranking"}


@dataclass(frozen=True, slots=True)
class Method:
    """One curve: an objective and the strengths of its leash."""

    title: str
    objective: Plain
    grid: Sequence[float]
    knob: str = "beta"
    data: Dataset = "pairs"
    after_sft: bool = False  # start from, and refer to, the model after SFT on the chosen completions


DPO_GRID = (0.03, 0.1, 0.3, 1.0)
METHODS: Mapping[str, Method] = {
    "dpo": Method("DPO (f-DPO, reverse KL)", {"name": "dpo"}, DPO_GRID),
    "f_dpo_js": Method("f-DPO, Jensen–Shannon", {"name": "f_dpo", "divergence": "jensen_shannon"}, DPO_GRID),
    "f_dpo_alpha": Method(
        "f-DPO, α = 0.5", {"name": "f_dpo", "divergence": "alpha", "alpha": 0.5}, (0.003, 0.01, 0.03, 0.1)
    ),
    "f_dpo_forward": Method(
        "f-DPO, forward KL", {"name": "f_dpo", "divergence": "forward_kl"}, (1e-4, 1e-3, 0.01, 0.1)
    ),
    "tdpo1": Method("TDPO₁", {"name": "tdpo", "variant": 1, "alpha": 1.0}, DPO_GRID),
    "tdpo2": Method("TDPO₂", {"name": "tdpo", "variant": 2, "alpha": 0.5}, DPO_GRID),
    "plackett_luce": Method("Plackett–Luce, rankings", {"name": "plackett_luce"}, DPO_GRID, data="rankings"),
    "unlikelihood": Method("unlikelihood", {"name": "unlikelihood"}, (0.05, 0.1, 0.5, 1.0), knob="alpha"),
    "dpo_after_sft": Method("DPO after SFT on the chosen", {"name": "dpo"}, (0.1, 0.3), after_sft=True),
}
"""f-DPO under the reverse KL is DPO, the same loss: it is run once."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    prompts: int  # training prompts, each completed `COMPLETIONS` times
    held_out: int  # held-out prompts that policies are sampled from
    per_prompt: int  # completions of each
    seeds: Sequence[int]
    methods: Sequence[str]
    points: int  # of each grid, both ends included


COMPLETIONS = 4
"""Of each training prompt: best and worst make a pair, all of them a ranking."""
FULL = Size(prompts=900, held_out=300, per_prompt=2, seeds=(0, 1), methods=tuple(METHODS), points=4)
QUICK = Size(
    prompts=250,
    held_out=100,
    per_prompt=2,
    seeds=(0,),
    methods=("dpo", "f_dpo_forward", "tdpo2", "dpo_after_sft"),
    points=2,
)
HELD_OUT_SEED = 1000
"""Streams of the held-out completions; those of the training samples are the seeds."""

BASE: Plain = {
    "data": {"max_length": MAX_LENGTH, "append_eos": False},
    "model": {"dtype": "float32"},
    "optimizer": {"lr": 5e-4, "schedule": "linear", "warmup_steps": 8, "final_lr_fraction": 0.1},
    "train": {"rows_per_step": 32, "epochs": 2, "eval_every": 16},
    "checkpoint": {"every": 1000, "keep": 1, "export_dtype": "float32"},
    "sampling": {"max_new_tokens": RESPONSE_TOKENS, "scorer": SCORER, "batch_size": 256, "seed": HELD_OUT_SEED},
    "evaluation": {"evaluators": ["held_out", "calibration", "rewards", "divergence", "diversity"]},
    "tracking": {"experiment": "frontier"},
}
SFT: Plain = {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-3}}
"""On the chosen completions, as the DPO paper's Preferred-FT."""


def grid_of(method: Method, points: int) -> list[float]:
    """`points` strengths of the method's grid, evenly spaced, both ends included."""
    last = len(method.grid) - 1
    places = sorted({round(i * last / max(points - 1, 1)) for i in range(points)})
    return [method.grid[place] for place in places]
