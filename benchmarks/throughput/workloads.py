"""What is raced: models, rows, contenders and the targets they are held to. Plain data, no tensors.

A workload is drawn from its seed, so every process that knows its name knows its rows. Adding a contender to a workload
is an `Entry` here; a new kind of contender is a file and a line in `CONTENDERS`.

Left out: weights (`materials`), running (`race`), judging (`report`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

CONTENDERS = {
    "ours": "benchmarks.throughput.ours:Ours",
    "padded": "benchmarks.throughput.padded:Padded",
    "trl": "benchmarks.throughput.trl_dpo:Trl",
}
"""Kind → the class that a child process drives (see `child.Contender`)."""

BETA = 0.1
OPTIMIZER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}
"""The same AdamW for all; its rate is constant."""
RESERVED_IDS = 3
"""The lowest token ids (padding, begin, end) are never drawn."""
AGREEMENT_STEPS = 5
"""Losses are compared after so many optimizer steps."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A clipped distribution of token counts; `spread` is a standard deviation, of the logarithm where `log` is set."""

    middle: float
    spread: float
    low: int
    high: int
    log: bool = False

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        drawn = rng.normal(0.0, self.spread, count)
        values = self.middle * np.exp(drawn) if self.log else self.middle + drawn
        return [int(n) for n in values.round().clip(self.low, self.high)]


@dataclass(frozen=True, slots=True)
class Llama:
    """A randomly initialised Llama; embeddings and output head are two matrices."""

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    spread: float = 0.02  # standard deviation of its initial weights


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender as it is set up: each row of the report states these."""

    name: str
    contender: str  # of CONTENDERS
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    reference: Literal["cached", "inline", "precomputed"] = "inline"
    workers: int = 1
    pinned: bool = False  # each worker on a core of its own, with one thread
    apart: bool = False  # workers that share nothing, each with its part of the rows
    always_zero: bool = False  # ZeRO also where one worker has nobody to share with; qalign leaves it out there

    def threads(self, given: int) -> int:
        """Of each worker: as many as its core, or as all are given."""
        return 1 if self.pinned else given


@dataclass(frozen=True, slots=True)
class Target:
    """`ours` against `other`: how many times faster (`time`), what share of its memory (`memory`); or the share of the
    step that `ours` spends in its own matrix products (`products`)."""

    measure: Literal["time", "memory", "products"]
    ours: str
    other: str | None
    bound: float

    def met(self, value: float) -> bool:
        return value <= self.bound if self.measure == "memory" else value >= self.bound


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with its K responses, best first."""

    prompt: list[int]
    responses: list[list[int]]

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Every (better, worse) pair: 1 of a pair, 6 of four."""
        return list(combinations(self.responses, 2))


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows of one kind through one model, and who is timed on them."""

    name: str
    title: str
    objective: dict[str, Any]
    model: Llama | str  # a string is what `pipeline.model_files.locate` takes
    vocabulary: int
    prompts: Lengths
    answers: Lengths
    entries: tuple[Entry, ...]
    targets: tuple[Target, ...] = ()
    agreement: tuple[str, str] | None = None  # entries whose numbers have to be equal
    kind: Literal["preference", "ranking"] = "preference"
    responses: int = 2
    groups_per_step: int = 4
    token_budget: int = 4096

    def only(self, names: Sequence[str]) -> Workload:
        """The same work for some of the contenders, with the targets and the agreement that they can show."""
        entries = tuple(entry for entry in self.entries if entry.name in names)
        there = {entry.name for entry in entries} | {None}
        targets = tuple(t for t in self.targets if {t.ours, t.other} <= there)
        agreement = self.agreement if self.agreement and set(self.agreement) <= there else None
        return replace(self, entries=entries, targets=targets, agreement=agreement)

    def steps(self, count: int, seed: int = 0) -> list[list[Group]]:
        """The rows of the first `count` optimizer steps, the same in every process."""
        rng = np.random.default_rng(seed)
        return [[self._group(rng) for _ in range(self.groups_per_step)] for _ in range(count)]

    def _group(self, rng: np.random.Generator) -> Group:
        lengths = [*self.prompts.draw(rng, 1), *self.answers.draw(rng, self.responses)]
        prompt, *responses = [rng.integers(RESERVED_IDS, self.vocabulary, n).tolist() for n in lengths]
        return Group(prompt, responses)

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)


def _ours(name: str = "ours-fp32", **changes: Any) -> Entry:
    return replace(Entry(name, "ours", reference="cached"), **changes)


SMALL_LLAMA = Llama(layers=6, width=384, heads=6, inner=1024, vocabulary=32_000)
ANSWERS = Lengths(96, 0.4, 16, 320, log=True)
OURS_BF16 = _ours("ours-bf16", precision="bfloat16")
TRL_FP32 = Entry("trl-fp32", "trl")
TRL_PRECOMPUTED = Entry("trl-fp32-precomputed", "trl", reference="precomputed")
TRL_BF16 = Entry("trl-bf16", "trl", precision="bfloat16")
TRL_DEFAULTS = Entry("trl-defaults", "trl", precision="bfloat16", checkpointing=True)
PADDED = Entry("padded-fp32", "padded")

W1 = Workload(
    name="w1",
    title="DPO, 6-layer Llama, vocabulary 32,000, prompts ≈ 256, responses ≈ 96 tokens, 4 pairs a step",
    objective={"name": "dpo", "beta": BETA},
    model=SMALL_LLAMA,
    vocabulary=SMALL_LLAMA.vocabulary,
    prompts=Lengths(256, 40, 64, 400),
    answers=ANSWERS,
    entries=(_ours(), OURS_BF16, TRL_FP32, TRL_PRECOMPUTED, TRL_BF16, TRL_DEFAULTS),
    targets=(
        Target("time", "ours-fp32", "trl-fp32", 8.0),
        Target("time", "ours-bf16", "trl-bf16", 12.0),
        Target("time", "ours-fp32", "trl-fp32-precomputed", 6.0),
        Target("memory", "ours-fp32", "trl-fp32", 0.35),
        Target("products", "ours-fp32", None, 0.7),
    ),
    agreement=("ours-fp32", "trl-fp32"),
)
W2 = replace(
    W1,
    name="w2",
    title="DPO, SmolLM2-135M, prompts ≈ 8, responses ≈ 32 tokens, 8 pairs a step",
    model="package:smollm2",
    vocabulary=49_152,
    prompts=Lengths(8, 2, 4, 16),
    answers=Lengths(32, 0.4, 8, 96, log=True),
    groups_per_step=8,
    targets=(Target("time", "ours-fp32", "trl-fp32", 2.0),),
)
W3 = replace(
    W1,
    name="w3",
    title="rankings of 4 (Plackett–Luce; TRL: DPO on the group's 6 pairs), model of w1, prompts ≈ 512, 2 groups a step",
    objective={"name": "plackett_luce", "beta": BETA},
    prompts=Lengths(512, 80, 128, 800),
    entries=(_ours(), TRL_FP32, PADDED),
    targets=(Target("time", "ours-fp32", "trl-fp32", 6.0), Target("time", "ours-fp32", "padded-fp32", 6.0)),
    agreement=("ours-fp32", "padded-fp32"),
    kind="ranking",
    responses=4,
    groups_per_step=2,
)
W4 = replace(
    W1,
    name="w4",
    title="TDPO₂ on the rows of w1, against two models and whole logits in plain PyTorch",
    objective={"name": "tdpo", "beta": BETA, "variant": 2, "alpha": 0.5},
    entries=(_ours(), _ours("ours-live", reference="inline"), PADDED),
    targets=(Target("time", "ours-fp32", "padded-fp32", 5.0),),
    agreement=("ours-fp32", "padded-fp32"),
)
SCALING = replace(
    W1,
    name="scaling",
    title="two ZeRO-2 workers with one core each against one such worker, rows of w1, 8 pairs a step",
    groups_per_step=8,
    entries=(
        _ours("two-workers", workers=2, pinned=True),
        _ours("one-worker", pinned=True),
        _ours("one-worker-zero2", pinned=True, always_zero=True),
        _ours("two-apart", workers=2, pinned=True, apart=True),
    ),
    targets=(
        Target("time", "two-workers", "one-worker-zero2", 1.7),
        Target("time", "two-workers", "one-worker", 1.7),
        Target("time", "two-apart", "one-worker", 1.7),
    ),
    agreement=("two-workers", "one-worker"),
)
WORKLOADS = {workload.name: workload for workload in (W1, W2, W3, W4)}
"""What a plain `python -m benchmarks.throughput` runs."""


def named(name: str, quick: bool = False) -> Workload:
    """A workload; `quick`: with a tiny model and short rows, to see that everything runs."""
    workload = (WORKLOADS | {SCALING.name: SCALING})[name]
    if not quick:
        return workload
    tiny = Llama(layers=2, width=32, heads=4, inner=64, vocabulary=199, spread=0.3)
    short = {"prompts": Lengths(12, 3, 4, 20), "answers": Lengths(6, 0.4, 2, 12, log=True)}
    title = f"quick: a tiny model and short rows in place of: {workload.title}"
    return replace(workload, title=title, model=tiny, vocabulary=tiny.vocabulary, **short)
