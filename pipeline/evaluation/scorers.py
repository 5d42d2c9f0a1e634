"""Scorers: a number for a (prompt, response) pair of texts, higher = better.

`resolve` gives one by name or dotted path, `score_all` applies it and counts what it could not score. Left out: reward
models, which score token rows and need a device.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.config import ConfigError

Scorer = Callable[[str, str], float]


def vader() -> Scorer:
    """Sentiment of prompt and response together, −1 … 1, by VADER's lexicon and rules. Raises `ConfigError`."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError("sampling.scorer: vader needs vaderSentiment; pip install 'qalign[demo]'") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompt, response: analyzer.polarity_scores(prompt + response)["compound"]


SCORERS: dict[str, Callable[[], Scorer]] = {"vader": vader}
"""Built-in scorers by name; each entry builds one."""


def resolve(name: str) -> Scorer:
    """The scorer behind a name of `SCORERS` or a dotted path `package.module:function`. Raises `ConfigError`."""
    if name in SCORERS:
        return SCORERS[name]()
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ConfigError(
            f"sampling.scorer: {name!r} is none of {', '.join(SCORERS)}, nor a dotted path package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"sampling.scorer: cannot load {name!r} ({error}); is the module installed on every node?"
        ) from None
    if not callable(found):
        raise ConfigError(f"sampling.scorer: {name!r} is a {type(found).__name__}; name a function (prompt, response)")
    return found


def score_all(scorer: Scorer, pairs: Iterable[tuple[str, str]]) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Score n (prompt, response) pairs → (scores [n] float64, failures as (place, reason)).

    A scorer that raises, or returns no finite number, leaves nan in its place and an entry among the failures.
    """
    scores: list[float] = []
    failures: list[tuple[int, str]] = []
    for place, (prompt, response) in enumerate(pairs):
        try:
            score = float(scorer(prompt, response))
        except Exception as error:  # the scorer is a user's code; what it raised is reported by the caller
            score, reason = math.nan, f"{type(error).__name__}: {error}"
        else:
            reason = f"the score is {score}"
        if not math.isfinite(score):
            failures.append((place, reason))
            score = math.nan
        scores.append(score)
    return np.array(scores, dtype=np.float64), failures
