"""What the decoders work with: a review model (the SFT model), its samples, and two models aligned to it by DPO.

Both aligned models learn from pairs of the same samples, best against worst of four: one by VADER's sentiment, which is the
reward that decoders are asked for; the other by how emotional a text is, whichever way: the other reward that indirect
transfer starts from. All of it is made by the pipeline in this process and kept: a second call does what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.reviews import MAX_LENGTH, SCORER, held_out_prompts, review_model, training_prompts
from jobs.decode import decoded
from jobs.sentiment import pairs
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.driver import fit

EMOTION = "benchmarks.decoding.world:emotion"
BETA = 0.1
"""Leash of both aligned models."""
SEED = 0
NEW_TOKENS = 16
"""Of a response: the work of roll-outs to its end grows with the square."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    name: str
    training_prompts: int
    steps: int
    prompts: int  # held-out ones, that every decoder completes
    copies: int  # completions of each, of decoders that cost little
    quick: bool = False  # fewer settings, and a review model that was trained for less long


FULL = Size("full", training_prompts=3000, steps=200, prompts=128, copies=4)
QUICK = Size("quick", training_prompts=200, steps=8, prompts=8, copies=1, quick=True)


@dataclass(frozen=True, slots=True)
class World:
    """Folders of models, and what a configuration begins with."""

    storage: str
    size: Size
    reference: str
    sentiment: str  # aligned to SCORER
    emotional: str  # aligned to EMOTION
    prompts: Path  # jsonl, held out

    def config(self, name: str, changes: Mapping[str, Any]) -> RunConfig:
        """Of one call of `jobs.decode`: `changes` by section; the output is named by `name`."""
        return validate(
            merged(_base(self.storage, self.reference, self.prompts, self.folder / f"{name}.jsonl"), changes)
        )

    @property
    def folder(self) -> Path:
        """Where results go."""
        return folder_of(self.storage, self.size)


def folder_of(storage: str, size: Size) -> Path:
    return Path(storage).absolute() / "decoding" / size.name


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def emotion(prompt: str, response: str) -> float:
    """Share of a text that VADER finds not neutral, 0 … 1: a scorer by its dotted path."""
    return 1.0 - float(_analyzer().polarity_scores(prompt + response)["neu"])


def make_world(storage: str, size: Size) -> World:
    """Everything that decoding starts from; finished parts are found again."""
    folder = folder_of(storage, size)
    folder.mkdir(parents=True, exist_ok=True)
    reference = str(review_model(storage, quick=size.quick))
    held_out = _written(folder / "prompts.jsonl", [{"prompt": text} for text in held_out_prompts(size.prompts)])
    asked = [{"prompt": text} for text in training_prompts(size.training_prompts, SEED)]
    config = _base(storage, reference, _written(folder / "training.jsonl", asked), folder / "samples.jsonl")
    own = {"checkpoint_from": reference, "sampling": {"per_prompt": 4, "batch_size": 512, "seed": 1}}
    task, _ = decoded(validate(merged(config, own)), local=True)
    rows = [json.loads(line) for line in task.output.read_text(encoding="utf-8").splitlines()]
    sentiment = _aligned(storage, size, reference, "sentiment", _pairs(rows, [row["score"] for row in rows], 0.3))
    scores = [emotion(row["prompt"], row["text"]) for row in rows]
    emotional = _aligned(storage, size, reference, "emotion", _pairs(rows, scores, 0.05))
    return World(storage, size, reference, sentiment, emotional, held_out)


def _pairs(rows: Sequence[Mapping[str, Any]], scores: Sequence[float], gap: float) -> list[dict[str, str]]:
    """Best against worst of each prompt's samples, where `gap` or more is between them."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row["prompt"], []).append(place)
    texts = [[rows[i]["text"] for i in places] for places in groups.values()]
    return pairs(list(groups), texts, [[scores[i] for i in places] for places in groups.values()], gap)


def _aligned(storage: str, size: Size, reference: str, name: str, records: Sequence[Mapping[str, str]]) -> str:
    """The exported model of one DPO run."""
    data = _written(folder_of(storage, size) / f"pairs-{name}.jsonl", records)
    config = {
        "name": f"decoding-{size.name}-{name}",
        "storage": storage,
        "seed": SEED,
        "model": {"path": reference, "dtype": "float32"},
        "data": {"kind": "preference", "sources": [{"path": str(data)}], "max_length": MAX_LENGTH, "append_eos": False},
        "objective": {"name": "dpo", "beta": BETA},
        "optimizer": {"lr": 3e-4, "warmup_steps": 10},
        "train": {"rows_per_step": 32, "epochs": 3, "max_steps": size.steps, "tokens_per_micro_batch": 4096},
        "checkpoint": {"every": 100, "keep": 1, "export_dtype": "float32"},
        "tracking": {"experiment": "decoding"},
    }
    return str(fit(validate(config), local=True).export)


def _base(storage: str, reference: str, prompts: Path, output: Path) -> dict[str, Any]:
    """A configuration of `jobs.decode`, as plain data."""
    return {
        "name": "decoding",
        "storage": storage,
        "model": {"path": reference, "dtype": "float32"},
        # Prompts are named, so that no rows are prepared: only the tokenisation settings count.
        "data": {"kind": "preference", "sources": [{"path": "unused"}], "max_length": MAX_LENGTH, "append_eos": False},
        "objective": {"name": "dpo", "beta": BETA},
        "sampling": {
            "prompts": {"path": str(prompts)},
            "max_new_tokens": NEW_TOKENS,
            "scorer": SCORER,
            "output": str(output),
            "seed": 2,
        },
        "decoding": {"logprobs": ["reference"], "rows_per_piece": 64},
        "tracking": {"enabled": False},
    }


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = {**found[key], **value} if both else value
    return found


def _written(path: Path, records: Sequence[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
