"""One world (a model that learned from imperfect demonstrations, and its samples) and one run (a method in that world).

Everything goes through the pipeline: `driver.fit` trains, the decoding stage samples. All results are files, so that calling
again continues: fits resume, finished ones return at once, and scores lie in the run's folder. Both functions may be called
from several processes on one Ray cluster at a time, for different worlds or runs.

Workers train under Ray Train. Preparing rows and decoding take a second or two here, a tenth of what starting an actor for
them takes: they run in the calling process, as everything does where the place is `local`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chain_arithmetic import RESPONSE_TOKENS, demonstrations, draw_prompts, write_model
from benchmarks.reasoning.methods import BASE, SFT, SFT_PROMPTS, TEST_PROMPTS, VALIDATION_PROMPTS, Block, Method, merge
from benchmarks.reasoning.records import KIND, Sample, data_sets, write
from pipeline import driver
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.decoding.stage import decode_prompts
from pipeline.durable import write_json
from pipeline.pretrained import load_tokenizer
from pipeline.progress import METRICS_FILE, read_metrics
from pipeline.rendering import Renderer
from pipeline.stage import Resources
from pipeline.tracking import Tracker

SCORES = "benchmark.json"
SAMPLED_SEED = 1000
"""Streams of the sampled accuracy; those of the training samples are the seeds."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a benchmark keeps its files, and how it runs."""

    storage: str
    local: bool = False  # without Ray
    parent: str | None = None  # MLflow run above all others

    def world(self, block: str, seed: int) -> Path:
        return Path(self.storage).absolute() / "reasoning" / f"{block}-s{seed}"


def validation_prompts() -> list[str]:
    return draw_prompts(VALIDATION_PROMPTS, "validation")


def test_prompts() -> list[str]:
    return draw_prompts(TEST_PROMPTS, "test", validation_prompts())


def training_prompts(count: int, stream: str) -> list[str]:
    """Disjoint from the validation and test prompts."""
    return draw_prompts(count, stream, [*validation_prompts(), *test_prompts()])


# --------------------------------------------------------------------------------------------------- world


def make_world(place: Place, name: str, block: Block, seed: int) -> dict[str, Any]:
    """Supervised training and samples of one block and seed. Returns the starting model's scores and its `model` folder."""
    folder = place.world(name, seed)
    if not (folder / "init").is_dir():
        write_model(folder / ".init", seed).rename(folder / "init")
    if not (folder / "sft.jsonl").is_file():
        prompts = training_prompts(SFT_PROMPTS, f"sft/{seed}")
        texts = demonstrations(block.teacher, prompts, seed)
        write(folder / "sft.jsonl", ({"prompt": p, "response": t} for p, t in zip(prompts, texts, strict=True)))
    config = configure(place, f"{name}-sft", folder / "init", "demonstration", folder / "sft.jsonl", SFT, seed)
    scores = fit_and_score(place, config, f"{name}/sft", seed, validation=False)
    sample_data(config, scores["model"], folder, block, seed)
    return scores


def sample_data(config: RunConfig, model: str, folder: Path, block: Block, seed: int) -> dict[str, int]:
    """Sample the model at temperature 1 and write every data set into `folder`; returns the number of records of each."""
    if not (folder / "samples.json").is_file():
        started = time.monotonic()
        prompts = training_prompts(block.prompts, f"prompts/{seed}")
        samples = sample(config, model, prompts, temperature=1.0, per_prompt=block.samples, seed=seed)
        sets = data_sets(samples, seed)
        for kind, records in sets.items():
            write(folder / f"{kind}.jsonl", records)
        counts = {kind: len(records) for kind, records in sets.items()} | {"samples": len(samples)}
        write_json(folder / "samples.json", counts | {"seconds": round(time.monotonic() - started, 1)})
    return json.loads((folder / "samples.json").read_text())


# ----------------------------------------------------------------------------------------------------- run


def run_method(
    place: Place, name: str, method: Method, model: str, seed: int, label: str, validation: bool = False
) -> dict[str, Any]:
    """Train `method` from the world's model on the world's samples, and score it: on the test prompts, read only here, or
    on the validation prompts alone."""
    folder = place.world(name, seed)
    data = folder / f"{method.data}.jsonl"
    config = configure(place, f"{name}-{label}", model, KIND[method.data], data, method.config, seed)
    return fit_and_score(place, config, f"{name}/{label}", seed, validation)


def configure(place: Place, name: str, model: str | Path, kind: str, data: Path, changes: Any, seed: int) -> RunConfig:
    """`changes` laid over the benchmark's base configuration."""
    own = {
        "name": f"{name}-s{seed}",
        "seed": seed,
        "storage": place.storage,
        "data": {"kind": kind, "sources": [{"path": str(data)}]},
        "model": {"path": str(model)},
    }
    return validate(merge(merge(BASE, changes), own))


def fit_and_score(place: Place, config: RunConfig, label: str, seed: int, validation: bool) -> dict[str, Any]:
    """Train to the end, then decode; scores are kept in the run's folder and logged to its MLflow run."""
    started = time.monotonic()

    def score(result: driver.Result, tracker: Tracker) -> None:
        seconds = time.monotonic() - started
        found = accuracies(config, str(result.export), validation)
        steps = read_metrics(result.run / METRICS_FILE)
        found |= {
            "model": str(result.export),
            "steps": len(steps),
            "train_seconds": round(
                len(steps) * config.train.rows_per_step / median(s["rows_per_second"] for s in steps), 1
            ),
            "fit_seconds": round(seconds, 1),
            "total_seconds": round(time.monotonic() - started, 1),
        }
        write_json(result.run / SCORES, found)
        tracker.log_summary({f"benchmark/{k}": v for k, v in found.items() if k != "model"})
        tracker.log_summary({"benchmark.run": label, "benchmark.seed": str(seed)})
        if place.parent is not None:
            tracker.log_summary({"mlflow.parentRunId": place.parent})

    driver.prepare(config, local=True)
    result = driver.fit(config, place.local, score)
    if not (result.run / SCORES).is_file():  # killed between the export and the scores
        score(result, Tracker())
    return json.loads((result.run / SCORES).read_text())


def accuracies(config: RunConfig, model: str, validation: bool) -> dict[str, float]:
    """Greedy and strict accuracy of a model, and sampled at temperature 1; on the validation prompts greedy alone."""
    if validation:
        greedy = sample(config, model, validation_prompts(), temperature=0.0)
        return {"validation": _share([s.correct for s in greedy])}
    prompts = test_prompts()
    greedy = sample(config, model, prompts, temperature=0.0)
    sampled = sample(config, model, prompts, temperature=1.0, seed=SAMPLED_SEED)
    return {
        "greedy": _share([s.correct for s in greedy]),
        "strict": _share([s.strict for s in greedy]),
        "sampled": _share([s.correct for s in sampled]),
    }


def sample(
    config: RunConfig,
    model: str,
    prompts: Sequence[str],
    *,
    temperature: float,
    per_prompt: int = 1,
    seed: int = 0,
) -> list[Sample]:
    """Responses of the model, prompt by prompt."""
    render = Renderer(load_tokenizer(model), config.data)
    settings = config.sampling.model_copy(
        update={
            "max_new_tokens": RESPONSE_TOKENS,
            "temperature": temperature,
            "per_prompt": per_prompt,
            "batch_size": 1024,
            "seed": seed,
        }
    )
    decoded = decode_prompts(
        model,
        [render.prompt_ids(prompt, RESPONSE_TOKENS) for prompt in prompts],
        settings,
        config=config.model,
        stop_ids=sorted(render.stop_ids),
        resources=Resources(),
        local=True,
    )
    return [Sample.of(prompts[d["prompt"]], d) for d in decoded]


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)
