"""One world per seed: completions of the review model, scored and made into training files; and the held-out files of all worlds.

All results are files, named by what they hold: calling again does what is missing. Left out: training on them (`curves`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.frontier.methods import BASE, COMPLETIONS, HELD_OUT_SEED, SFT, Dataset, Size
from benchmarks.reasoning.methods import merge
from benchmarks.reviews import held_out_prompts, training_prompts
from jobs.sentiment import pairs
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.driver import fit
from pipeline.evaluation.samples import Samples, draw
from pipeline.pretrained import load_tokenizer
from pipeline.rendering import Renderer

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a benchmark keeps its files."""

    storage: str
    folder: str  # for what is not the pipeline's
    model: str  # the review model

    @property
    def prompts(self) -> Path:
        return Path(self.folder) / "held-out-prompts.jsonl"

    def held_out(self, kind: Dataset) -> Path:
        """The same pairs, as what a method trains on: as rankings they have two responses."""
        return Path(self.folder) / f"held-out-{kind}.jsonl"

    def data(self, kind: Dataset, seed: int) -> Path:
        return Path(self.folder) / f"{kind}-s{seed}.jsonl"

    def sft(self, seed: int) -> Path:
        """Names the model after SFT on a world's chosen completions."""
        return Path(self.folder) / f"sft-s{seed}.json"


def make_held_out(place: Place, size: Size) -> None:
    """Prompts that policies are sampled from, and pairs for accuracy, calibration and rewards; the same for all seeds."""
    if not (place.held_out("pairs").is_file() and place.held_out("rankings").is_file()):
        prompts = held_out_prompts(size.held_out)
        write(place.prompts, ({"prompt": prompt} for prompt in prompts))
        found = as_pairs(_completed(place, prompts, HELD_OUT_SEED + 1))
        write(place.held_out("rankings"), map(as_ranking, found))
        write(place.held_out("pairs"), found)


def make_world(place: Place, size: Size, seed: int, sft: bool) -> dict[str, int]:
    """Sample the review model, write both data sets, and train the SFT model where it is asked for. Returns how many records."""
    if not place.data("rankings", seed).is_file():
        samples = _completed(place, training_prompts(size.prompts, seed), seed)
        write(place.data("pairs", seed), as_pairs(samples))
        write(place.data("rankings", seed), as_rankings(samples))
    if sft and not place.sft(seed).is_file():
        own = {"name": f"frontier-sft-s{seed}", "seed": seed}
        result = fit(configure(place, "pairs", place.model, seed, merge(SFT, own)), local=True)
        place.sft(seed).write_text(json.dumps(str(result.export)))
    with place.data("pairs", seed).open() as one, place.data("rankings", seed).open() as other:
        return {"pairs": sum(1 for _ in one), "rankings": sum(1 for _ in other)}


def configure(place: Place, data: Dataset, model: str, seed: int, changes: Any) -> RunConfig:
    """`changes` laid over the benchmark's base configuration."""
    from benchmarks.frontier.methods import KIND

    own = {
        "storage": place.storage,
        "seed": seed,
        "data": {"kind": KIND[data], "sources": [{"path": str(place.data(data, seed))}]},
        "model": {"path": model},
        "sampling": {"prompts": {"path": str(place.prompts)}},
    }
    if place.held_out(data).is_file():
        own["data"]["eval_sources"] = [{"path": str(place.held_out(data))}]
    return validate(merge(merge(BASE, own), changes))


# -------------------------------------------------------------------------------------------------- records


def _completed(place: Place, prompts: Sequence[str], seed: int) -> Samples:
    """Completions of the review model with their scores, kept by the pipeline's own cache."""
    config = configure(place, "pairs", place.model, 0, {"name": "frontier-samples", "objective": {"name": "dpo"}})
    sampling = config.sampling.model_copy(update={"per_prompt": COMPLETIONS, "seed": seed})
    config = config.model_copy(update={"sampling": sampling})
    render = Renderer(load_tokenizer(place.model), config.data)
    ids = [render.prompt_ids(prompt, config.sampling.max_new_tokens) for prompt in prompts]
    return draw(config, place.model, ids, prompts, sorted(render.stop_ids), local=True)


def as_pairs(samples: Samples) -> list[Record]:
    """Best against worst completion of each prompt, where they are told clearly apart."""
    assert samples.scores is not None
    return pairs(samples.texts, texts_of(samples), samples.scores.tolist())


def as_ranking(pair: Record) -> Record:
    """A pair as a ranking of two."""
    return {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"]], "scores": [1.0, 0.0]}


def as_rankings(samples: Samples) -> list[Record]:
    """All completions of the very same prompts with their scores; of equal scores the first one."""
    assert samples.scores is not None
    kept = {record["prompt"] for record in as_pairs(samples)}
    records = []
    for prompt, texts, scores in zip(samples.texts, texts_of(samples), samples.scores.tolist(), strict=True):
        if prompt in kept:
            usable = [(s, t) for s, t in zip(scores, texts, strict=True) if t.strip() and not math.isnan(s)]
            by_score: dict[float, str] = {}
            for score, text in usable:
                by_score.setdefault(score, text)
            records.append({"prompt": prompt, "responses": list(by_score.values()), "scores": list(by_score)})
    return records


def texts_of(samples: Samples) -> list[list[str]]:
    return [[completion["text"] for completion in group] for group in samples.completions]


def write(path: Path, records: Iterable[Record]) -> None:
    """A jsonl file, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    aside.rename(path)
