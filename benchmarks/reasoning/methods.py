"""Every setting of the benchmark, as data: two blocks, what each method trains on, and what it changes in the configuration.

A method's `config` is laid over `BASE`; the result is an ordinary `RunConfig`. Settings were fixed beforehand, except for the
methods in `Block.tuned`: there the best of four on the validation prompts of one seed goes on to the other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.chain_arithmetic import HARD, MID, Teacher

Plain = Mapping[str, Any]
SEEDS = (0, 1, 2)
TUNING_SEED = 3
VALIDATION_PROMPTS, TEST_PROMPTS = 400, 1000
SFT_PROMPTS = 60_000

Dataset = Literal["outcome", "process", "correct", "pairs", "unpaired"]
"""What is made of the same samples: trajectories with a reward at the end, or on each line; the right ones alone; right
against wrong ones of a prompt; right and wrong ones apart."""

SCHEDULE: Plain = {
    "betas": [0.9, 0.95],
    "weight_decay": 0.0,
    "clip": 1.0,
    "warmup_steps": 20,
    "schedule": "hold_decay",
    "decay_fraction": 0.5,
    "final_lr_fraction": 0.05,
}

BASE: Plain = {
    "data": {"max_length": 64},
    "model": {"dtype": "float32"},
    "optimizer": SCHEDULE,
    "critic": {"optimizer": SCHEDULE},
    "train": {"rows_per_step": 64, "tokens_per_micro_batch": 4096},
    "checkpoint": {"every": 1000},
    "tracking": {"experiment": "reasoning"},
}

SFT: Plain = {
    "objective": {"name": "sft"},
    "optimizer": {"lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup_steps": 50, "decay_fraction": 0.4},
    "train": {"max_steps": 900},
}
"""On the teacher's demonstrations: where every method starts from."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table."""

    title: str
    data: Dataset
    config: Plain


@dataclass(frozen=True, slots=True)
class Block:
    """A teacher, an amount of samples, and the methods that learn from them."""

    title: str
    teacher: Teacher
    prompts: int
    samples: int  # per prompt
    methods: Mapping[str, Method]
    tuned: Mapping[str, tuple[Method, ...]] = field(default_factory=dict)

    def all_methods(self, chosen: Mapping[str, int]) -> dict[str, Method]:
        """The fixed methods, and of each tuned one the chosen setting."""
        return {**self.methods, **{name: self.tuned[name][place] for name, place in chosen.items()}}


def merge(base: Plain, over: Plain) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _policy(name: str, lr: float, epochs: int, **objective: Any) -> dict[str, Any]:
    return {"objective": {"name": name, **objective}, "optimizer": {"lr": lr}, "train": {"epochs": epochs}}


def _critic(lr: float, alone: int = 0) -> dict[str, Any]:
    return {"critic": {"optimizer": {"lr": lr}, "steps_alone": alone}}


def _rejection_sft(lr: float, epochs: int) -> Method:
    return Method(f"rejection SFT, {epochs} epochs", "correct", _policy("rejection_sft", lr, epochs, min_reward=0.5))


def _dpo(epochs: int) -> Method:
    plain = _policy("dpo", 1e-4, epochs, beta=1.0)
    return Method("DPO", "pairs", merge(plain, {"train": {"rows_per_step": 32}}))


def _dro(beta: float, epochs: int, data: Dataset = "outcome") -> Method:
    title = "DRO" if data == "outcome" else "DRO, summed process reward"
    return Method(title, data, _policy("dro", 1e-4, epochs, beta=beta) | _critic(1e-3))


def _dqo(
    title: str,
    beta: float,
    lr: float,
    critic: float,
    epochs: int,
    alone: int,
    data: Dataset = "outcome",
    importance: str = "behaviour",
    lam: float = 1.0,
) -> Method:
    plain = _policy("dqo", lr, epochs, beta=beta, importance=importance, lam=lam)
    return Method(title, data, plain | _critic(critic, alone))


def _kto(beta: float, lr: float, epochs: int) -> Method:
    return Method(f"KTO (β {beta:g}, lr {lr:g})", "unpaired", _policy("kto", lr, epochs, beta=beta))


def _oreo(beta: float, critic: float, lr: float, epochs: int, alone: int) -> Method:
    plain = _policy("oreo", lr, epochs, beta=beta) | _critic(critic, alone)
    return Method(f"OREO (β {beta:g}, critic {critic:g})", "outcome", plain)


BLOCKS: dict[str, Block] = {
    "mid": Block(
        "MID: 512 prompts × 8 samples, 2 epochs",
        MID,
        prompts=512,
        samples=8,
        methods={
            "rejection_sft": _rejection_sft(1e-3, 2),
            "dpo": _dpo(2),
            "dro": _dro(0.3, 2),
            "dqo": _dqo("DQO", 0.1, 1e-4, 1e-3, 2, 20),
            "dqo_no_is": _dqo("DQO, no importance weights", 0.1, 1e-4, 1e-3, 2, 20, importance="none"),
            "dqo_lambda": _dqo("DQO, λ = 0.95", 0.1, 1e-4, 1e-3, 2, 20, lam=0.95),
        },
        tuned={
            "kto": tuple(_kto(beta, lr, 2) for beta in (0.1, 1.0) for lr in (1e-4, 3e-4)),
            "oreo": tuple(_oreo(beta, critic, 1e-4, 2, 20) for beta in (0.1, 0.3) for critic in (1e-3, 2e-4)),
        },
    ),
    "hard": Block(
        "HARD: 2048 prompts × 2 samples, 4 epochs",
        HARD,
        prompts=2048,
        samples=2,
        methods={
            "rejection_sft": _rejection_sft(3e-3, 4),
            "dpo": _dpo(12),
            "dro": _dro(0.3, 4),
            "dro_process": _dro(0.06, 4, "process"),
            "dqo": _dqo("DQO", 0.3, 1.5e-4, 1e-3, 4, 64),
            "dqo_slow": _dqo("DQO, critic 5e-5", 0.3, 1.5e-4, 5e-5, 4, 64),
            "dqo_slow_no_is": _dqo(
                "DQO, critic 5e-5, no importance weights", 0.3, 1.5e-4, 5e-5, 4, 64, importance="none"
            ),
            "dqo_slow_lambda": _dqo(
                "DQO, critic 5e-5, no importance weights, λ = 0.95",
                0.3,
                1.5e-4,
                5e-5,
                4,
                64,
                importance="none",
                lam=0.95,
            ),
            "dqo_process": _dqo("DQO, process rewards", 0.06, 1.5e-4, 1e-3, 4, 64, "process"),
            "dqo_process_no_is": _dqo(
                "DQO, process rewards, no importance weights", 0.06, 1.5e-4, 1e-3, 4, 64, "process", importance="none"
            ),
        },
        tuned={
            "kto": tuple(_kto(beta, lr, 4) for beta in (0.1, 1.0) for lr in (1e-4, 3e-4)),
            "oreo": tuple(_oreo(beta, critic, 1.5e-4, 4, 64) for beta in (0.3, 0.1) for critic in (1e-3, 5e-5)),
        },
    ),
}
