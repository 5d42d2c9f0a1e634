"""One world (a starting model with wrong beliefs, and right solutions) and one run (a method in that world), with its scores.

The starting model learns as that of `benchmarks.reasoning` does, but behind each prompt it has met 0 to 8 idle colons: a model that
has only ever answered at one fixed distance loses its place when anything stands in between (without them it was
right on 10 % instead of 57 % behind four trained thoughts), which large models do not. All results are files, so that calling again continues.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.chain_arithmetic import MID, Teacher, demonstrations, split_lines, write_model
from benchmarks.latent.methods import ASSISTANT, BASE, DECODED, METHODS, NUMBERS, PROMPTS
from benchmarks.reasoning import runs
from benchmarks.reasoning.methods import SFT, SFT_PROMPTS, merge
from benchmarks.reasoning.records import write
from benchmarks.reasoning.runs import Place
from pipeline import driver
from pipeline.config import ModelConfig, SamplingConfig
from pipeline.durable import write_json
from pipeline.latent import PLACE, Text
from pipeline.pretrained import load_tokenizer
from pipeline.thinker import Thinker, load_thinker, with_places

WORLD, IDLE = "idle", ":"
RIGHT = Teacher(misconceived=0.0, slip=0.0)
SCORES = "latent.json"
SPREAD_PROMPTS = 256
VOTES = 8


def make_world(place: Place, seed: int) -> dict[str, Any]:
    """The starting model with its scores, and the solutions that all methods learn from."""
    folder, chance = place.world(WORLD, seed), random.Random(f"idle/{seed}")  # noqa: S311
    if not (folder / "init").is_dir():
        write_model(folder / ".init", seed).rename(folder / "init")
    if not (folder / "sft.jsonl").is_file():
        prompts = runs.training_prompts(SFT_PROMPTS, f"sft/{seed}")
        pairs = zip(prompts, demonstrations(MID, prompts, seed), strict=True)
        write(
            folder / "sft.jsonl",
            ({"prompt": p + IDLE * chance.randint(0, max(NUMBERS)), "response": t} for p, t in pairs),
        )
    if not (folder / "solutions.jsonl").is_file():
        prompts = runs.training_prompts(PROMPTS, f"solutions/{seed}")
        texts = demonstrations(RIGHT, prompts, seed)
        write(folder / "solutions.jsonl", map(solution, prompts, texts))
    changes = merge(SFT, {"tracking": {"enabled": False}})
    config = runs.configure(
        place, f"{WORLD}-sft", folder / "init", "demonstration", folder / "sft.jsonl", changes, seed
    )
    return runs.fit_and_score(place, config, f"{WORLD}/sft", seed, validation=False)


def solution(prompt: str, text: str) -> dict[str, Any]:
    """A trajectory whose steps are lines; the last one holds the answer."""
    return {"prompt": prompt, "steps": [{"text": line} for line in split_lines(text)], "reward": 1.0}


def run_method(place: Place, name: str, start: str, seed: int) -> dict[str, Any]:
    """Train method `name` from the model at `start`; accuracies, what its thoughts are like, and what it cost."""
    data = place.world(WORLD, seed) / "solutions.jsonl"
    changes = json.loads(json.dumps(merge(BASE, METHODS[name].config)).replace(ASSISTANT, start))
    config = runs.configure(place, f"latent-{name}", start, "trajectory", data, changes, seed)
    scores = runs.fit_and_score(place, config, f"latent/{name}", seed, validation=False)
    export = Path(scores["model"])
    kept = export.parent / SCORES
    if not kept.is_file():
        last = driver.last_metrics(export.parent)
        found = {key: last[key] for key in ("latent_variance", "latent_cosine", "focus_hit") if key in last}
        found |= spread(str(export))
        if name == DECODED:
            found["fewer"] = {n: greedy(config, str(export), n) for n in (0, *NUMBERS)}
        if name == "lta":
            found["vote"] = vote(config, str(export), noise=0.0)
            found["vote_noise"] = vote(config, str(export), noise=0.5)
        write_json(kept, found)
    return scores | json.loads(kept.read_text())


def greedy(config: Any, model: str, n: int) -> float:
    """Accuracy on the test prompts with n thoughts."""
    asked = config.model_copy(update={"sampling": config.sampling.model_copy(update={"n_latents": n})})
    found = runs.sample(asked, model, runs.test_prompts(), temperature=0.0)
    return sum(s.correct for s in found) / len(found)


def vote(config: Any, model: str, noise: float) -> float:
    """Accuracy of the commonest last digit of 8 samples at temperature 1, each with thoughts of its own where there is noise."""
    asked = config.model_copy(update={"sampling": config.sampling.model_copy(update={"thought_noise": noise})})
    found = runs.sample(asked, model, runs.test_prompts(), temperature=1.0, per_prompt=VOTES)
    right = 0
    for first in range(0, len(found), VOTES):
        group = found[first : first + VOTES]
        said = [s.response[-2:-1] for s in group]
        right += group[said.index(max(said, key=said.count))].correct
    return right / (len(found) // VOTES)


@torch.no_grad()
def spread(model: str) -> dict[str, float]:
    """Variance of thoughts within a prompt and between prompts, each over the mean square of their values."""
    loaded = load_thinker(model, torch.float32, ModelConfig(path=model, dtype="float32"), SamplingConfig())
    if not isinstance(loaded, Thinker):
        return {}
    tokenizer = load_tokenizer(model)
    ids = torch.tensor([with_places(loaded, tokenizer(p)["input_ids"]) for p in runs.test_prompts()[:SPREAD_PROMPTS]])
    text = Text(ids.clamp(min=0), ids != PLACE)
    thoughts = loaded.prior(loaded.lm.get_input_embeddings(), text, loaded.n).thoughts  # [B, n, D]
    square = thoughts.square().mean()
    return {
        "within": float(thoughts.var(1, unbiased=False).mean() / square),
        "between": float(thoughts.var(0, unbiased=False).mean() / square),
        "parameters": float(sum(p.numel() for p in loaded.prior.parameters())),
    }
