"""Samples of a model: drawn on all nodes, kept under a hash of what they depend on, and scored.

Left out: decoding itself (`pipeline.decoding`), scorers (`scorers`), and what is made of the scores (`rewards`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig, digest
from pipeline.decoding.stage import Decoded, decode_prompts
from pipeline.durable import recall_json, write_json
from pipeline.evaluation.divergence import kl_to_reference
from pipeline.evaluation.estimates import mean_se
from pipeline.evaluation.held_out import resources
from pipeline.evaluation.judging import Failure, Texts
from pipeline.evaluation.scorers import judge_for
from pipeline.generation import own_stop_ids
from pipeline.model_files import fingerprint
from pipeline.pretrained import precision

__all__ = ["Samples", "draw", "kl_to_reference"]

_MEANING = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "per_prompt",
    "seed",
    "n_latents",
    "thought_noise",
)
"""Sampling settings that change what is sampled; the batch size doesn't."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of a set of prompts with their scores."""

    prompts: list[list[int]]  # token ids
    texts: list[str]  # the same prompts as the scorer reads them
    completions: list[list[Decoded]]  # per prompt
    scores: np.ndarray | None  # [prompts, per_prompt], nan where the scorer failed
    failures: list[Failure]  # places are those in scores.flat

    def lengths(self) -> np.ndarray:
        """Mean tokens of each prompt's completions, [prompts]."""
        return np.array([np.mean([len(c["token_ids"]) for c in group]) for group in self.completions])

    def rewards(self) -> np.ndarray:
        """Mean score of each prompt's scored completions, [≤ prompts]: prompts without any are left out."""
        assert self.scores is not None
        usable = self.scores[~np.isnan(self.scores).all(axis=1)]
        return np.nanmean(usable, axis=1) if len(usable) else np.zeros(0)

    def metrics(self) -> dict[str, float]:
        """Mean reward with its standard error over prompts (completions of one prompt are not independent), and length."""
        found = dict(zip(("samples/length", "samples/length_se"), mean_se(self.lengths()), strict=True))
        if self.scores is not None:
            reward, error = mean_se(self.rewards())
            found |= {"samples/reward": reward, "samples/reward_se": error, "scorer/failed": float(len(self.failures))}
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

    prompts: token ids; texts: the same prompts as the scorer should read them; stop_ids: tokens that end a completion, beside
    the model's own. Raises ConfigError for an unknown scorer, before anything is sampled, or for one that fails on every
    completion.
    """
    judge = judge_for(config, model, texts) if config.sampling.scorer else None
    stops = sorted({*stop_ids, *own_stop_ids(model, config.model.trust_remote_code)})
    completions = _decode_cached(config, model, prompts, stops, local)
    if judge is None:
        return Samples(list(prompts), list(texts), completions, None, [])
    flat = [
        Texts(text, c["text"], ids, c["token_ids"])
        for ids, text, group in zip(prompts, texts, completions, strict=True)
        for c in group
    ]
    scores, failures = judge(flat, local)
    return Samples(list(prompts), list(texts), completions, scores.reshape(len(completions), -1), failures)


def _decode_cached(
    config: RunConfig, model: str, prompts: Sequence[list[int]], stop_ids: list[int], local: bool
) -> list[list[Decoded]]:
    """Completions per prompt, kept under a hash of all that they depend on."""
    cache = Path(config.storage) / "cache"
    settings, dtype = config.sampling.model_dump(include=set(_MEANING)), str(precision(config.model.dtype))
    key = digest(1, fingerprint(model, cache), [list(p) for p in prompts], settings, stop_ids, dtype)
    kept = cache / f"samples-{key}.json"
    flat = recall_json(kept, partial(_checked, count=len(prompts) * config.sampling.per_prompt))
    if flat is None:
        flat = decode_prompts(
            model,
            prompts,
            config.sampling,
            config=config.model,
            stop_ids=stop_ids,
            resources=resources(config),
            local=local,
            label="sample",
        )
        cache.mkdir(parents=True, exist_ok=True)
        write_json(kept, flat)
    return [flat[i : i + config.sampling.per_prompt] for i in range(0, len(flat), config.sampling.per_prompt)]


def _checked(found: Any, count: int) -> list[Decoded]:
    """So many completions as `decode_prompts` gives them."""
    if len(found) != count:
        raise ValueError(f"{len(found)} completions instead of {count}")
    return [
        Decoded(
            prompt=int(one["prompt"]),
            index=int(one["index"]),
            text=str(one["text"]),
            token_ids=[int(token) for token in one["token_ids"]],
            logprobs=[float(value) for value in one["logprobs"]],
        )
        for one in found
    ]
