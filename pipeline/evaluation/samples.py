"""What a policy does on its own: samples, their reward under a scorer, and what that reward cost in KL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import ConfigError, ModelConfig, RunConfig, digest
from pipeline.decoding.stage import Decoded, decode_prompts
from pipeline.durable import write_json
from pipeline.evaluation.divergence import mean_se, sequence_kl
from pipeline.evaluation.scorers import resolve, score_all
from pipeline.pretrained import fingerprint, load_causal_lm, precision
from pipeline.stage import Item, Resources, run_stage

PIECE_PROMPTS = 32
_MEANING = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "per_prompt", "seed")
"""Sampling settings that change what is sampled; the batch size doesn't."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of a set of prompts with their scores."""

    prompts: list[list[int]]  # token ids
    texts: list[str]  # the same prompts as the scorer reads them
    completions: list[list[Decoded]]  # per prompt
    scores: np.ndarray | None  # [prompts, per_prompt], nan where the scorer failed
    failures: list[tuple[int, str]]  # (place in scores.flat, reason)

    def metrics(self) -> dict[str, float]:
        """Mean reward with its standard error over prompts (completions of one prompt are not independent), and length."""
        lengths = [float(np.mean([len(c["token_ids"]) for c in group])) for group in self.completions]
        found = dict(zip(("samples/length", "samples/length_se"), mean_se(lengths), strict=True))
        if self.scores is not None:
            usable = self.scores[~np.isnan(self.scores).all(axis=1)]
            mean, error = mean_se(np.nanmean(usable, axis=1).tolist())
            found |= {"samples/reward": mean, "samples/reward_se": error, "samples/unscored": float(len(self.failures))}
        return found


def draw(
    config: RunConfig,
    model: str,
    prompts: Sequence[list[int]],
    texts: Sequence[str],
    stop_ids: Sequence[int],
    local: bool,
) -> Samples:
    """Sample from the weights at `model` and score the completions with `config.sampling.scorer`.

    prompts: token ids; texts: the same prompts as the scorer should read them. Raises ConfigError for an unknown scorer,
    before anything is sampled, or for one that fails on every completion.
    """
    scorer = resolve(config.sampling.scorer) if config.sampling.scorer else None
    completions = _decode_cached(config, model, prompts, sorted(stop_ids), local)
    if scorer is None:
        return Samples(list(prompts), list(texts), completions, None, [])
    pairs = [(text, c["text"]) for text, group in zip(texts, completions, strict=True) for c in group]
    scores, failures = score_all(scorer, pairs)
    if len(failures) == len(pairs):
        raise ConfigError(f"sampling.scorer: {config.sampling.scorer} failed on every completion ({failures[0][1]})")
    return Samples(list(prompts), list(texts), completions, scores.reshape(len(completions), -1), failures)


def _decode_cached(
    config: RunConfig, model: str, prompts: Sequence[list[int]], stop_ids: list[int], local: bool
) -> list[list[Decoded]]:
    """Completions per prompt, kept under a hash of all that they depend on."""
    cache = Path(config.storage) / "cache"
    settings, dtype = config.sampling.model_dump(include=set(_MEANING)), str(precision(config.model.dtype))
    key = digest(1, fingerprint(model, cache), [list(p) for p in prompts], settings, stop_ids, dtype)
    kept = cache / f"samples-{key}.json"
    if not kept.is_file():
        scaling = config.scaling
        found = decode_prompts(
            model,
            prompts,
            config.sampling,
            config=config.model,
            stop_ids=stop_ids,
            resources=Resources(cpus=scaling.cpus_per_worker, gpus=scaling.gpus_per_worker, actors=scaling.data_actors),
            local=local,
            label="sample",
        )
        cache.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)
    flat = json.loads(kept.read_text())
    return [flat[i : i + config.sampling.per_prompt] for i in range(0, len(flat), config.sampling.per_prompt)]


class MeasureKL:
    """The actor: samples of the policy → their KL estimates."""

    def __init__(self, policy: str, reference: str, config: dict[str, Any], budget: int, gpu: bool) -> None:
        own = ModelConfig.model_validate(config)
        place, dtype = "cuda" if gpu else "cpu", precision(own.dtype)
        models = [
            load_causal_lm(p, dtype, own.unpacked_attention, own.trust_remote_code).to(place)
            for p in (policy, reference)
        ]
        self.policy, self.reference, self.budget = models[0].eval(), models[1].eval(), budget

    def __call__(self, item: Item) -> Item:
        kl = sequence_kl(self.policy, self.reference, item["prompts"], item["completions"], self.budget)
        return {"exact": kl.exact.tolist(), "sampled": kl.sampled.tolist()}


def kl_to_reference(config: RunConfig, model: str, reference: str, samples: Samples, local: bool) -> dict[str, float]:
    """KL(π ‖ π_ref) in nats per response on samples that the weights at `model` drew; standard errors over prompts.

    Empty unless they were drawn at temperature 1 without filters: of other samples the estimates would not be a KL.
    """
    sampling = config.sampling
    if sampling.temperature != 1.0 or sampling.top_k or sampling.top_p < 1.0 or sampling.min_new_tokens:
        return {}
    pairs = [(p, c["token_ids"]) for p, group in zip(samples.prompts, samples.completions, strict=True) for c in group]
    size = PIECE_PROMPTS * sampling.per_prompt
    pieces = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    items = [{"prompts": [p for p, _ in piece], "completions": [c for _, c in piece]} for piece in pieces]
    gpus = config.scaling.gpus_per_worker
    arguments = {
        "policy": model,
        "reference": reference,
        "config": config.model.model_dump(mode="json"),
        "budget": config.train.tokens_per_micro_batch,
        "gpu": gpus > 0,
    }
    resources = Resources(cpus=config.scaling.cpus_per_worker, gpus=gpus, actors=config.scaling.data_actors)
    found: dict[str, list[float]] = {"exact": [], "sampled": []}
    for part in run_stage(MeasureKL, arguments, items, label="KL", resources=resources, local=local, unit="piece"):
        for name in found:
            found[name] += list(part[name])
    per_prompt = {
        name: np.reshape(values, (len(samples.prompts), -1)).mean(axis=1).tolist() for name, values in found.items()
    }
    exact, error = mean_se(per_prompt["exact"])
    sampled, sampled_error = mean_se(per_prompt["sampled"])
    return {
        "samples/kl": exact,
        "samples/kl_se": error,
        "samples/kl_monte_carlo": sampled,
        "samples/kl_monte_carlo_se": sampled_error,
    }
