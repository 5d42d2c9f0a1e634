"""From samples to training files: what each kind of method reads, all made of the same samples.

The rewards: the *outcome* is 1 on the last token of a response that ended by itself with the right digit; *process* is
1 / (number of operations) on the last token of each sound line. Left out: sampling (`runs`) and judging (`chain_arithmetic`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chain_arithmetic import EOS_ID, OPERATIONS, is_correct, is_strict, sound_lines, split_lines
from benchmarks.reasoning.methods import Dataset
from pipeline.decoding.stage import Decoded

KIND = {
    "outcome": "trajectory",
    "process": "trajectory",
    "correct": "trajectory",
    "pairs": "preference",
    "unpaired": "unpaired",
}
"""data.kind of each data set."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One response of a model to a prompt."""

    prompt: str
    response: str
    logprobs: list[float]  # [R] nats, of the model that wrote it
    ended: bool  # by itself, with EOS

    @classmethod
    def of(cls, prompt: str, decoded: Decoded) -> Sample:
        return cls(prompt, decoded["text"], decoded["logprobs"], decoded["token_ids"][-1] == EOS_ID)

    @property
    def correct(self) -> bool:
        return self.ended and is_correct(self.prompt, self.response)

    @property
    def strict(self) -> bool:
        return self.ended and is_strict(self.prompt, self.response)


def data_sets(samples: Sequence[Sample], seed: int) -> dict[Dataset, list[Record]]:
    """The records of every data set. Responses that did not end, or are empty, are in none of them."""
    usable = [sample for sample in samples if sample.ended and sample.response]
    outcome = [trajectory(sample, process=False) for sample in usable]
    return {
        "outcome": outcome,
        "process": [trajectory(sample, process=True) for sample in usable],
        "correct": [record for record in outcome if record["reward"] == 1.0],
        "pairs": list(pairs(usable, seed)),
        "unpaired": [{"prompt": s.prompt, "response": s.response, "label": s.correct} for s in usable],
    }


def trajectory(sample: Sample, process: bool) -> Record:
    """One line, one step; the log-probability of the last step includes EOS. No reward at the end with `process`."""
    lines, steps, start = split_lines(sample.response), [], 0
    sound = sound_lines(sample.prompt, sample.response)
    for place, line in enumerate(lines):
        end = len(sample.logprobs) if place == len(lines) - 1 else start + len(line)
        step: Record = {"text": line, "logprob": sum(sample.logprobs[start:end])}
        if process and place < OPERATIONS and sound[place]:
            step["reward"] = 1 / OPERATIONS
        steps.append(step)
        start = end
    return {"prompt": sample.prompt, "steps": steps, "reward": 0.0 if process else float(sample.correct)}


def pairs(samples: Iterable[Sample], seed: int) -> Iterable[Record]:
    """Right against wrong responses of one prompt, each used once, and of the rarer kind again until the other is used up."""
    chance = random.Random(f"pairs/{seed}")  # noqa: S311
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, ([], []))[not sample.correct].append(sample.response)
    for prompt, (right, wrong) in groups.items():
        chance.shuffle(right)
        chance.shuffle(wrong)
        for i in range(max(len(right), len(wrong)) if right and wrong else 0):
            yield {"prompt": prompt, "chosen": right[i % len(right)], "rejected": wrong[i % len(wrong)]}


def write(path: Path, records: Iterable[Record]) -> None:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    aside.rename(path)
