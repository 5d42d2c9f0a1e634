"""Scorers: a number for a prompt and a response, higher = better. Named by `sampling.scorer`.

    vader                       sentiment of the whole text (VADER's lexicon)
    verifiable                  1 where the response's answer is the prompt's, else 0 (evaluation.answer)
    classifier:NAME             a sequence classifier of transformers, or a reward model (`classifier`)
    package.module:function     a user's function from (prompt, response) to a number

A scorer that raises, or returns no finite number, fails on that completion: it is counted and left out of every mean. One that
fails on all of them is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline import dotted
from pipeline.columns import answer_of, matches
from pipeline.config import ConfigError, RunConfig
from pipeline.evaluation.answers import check_column, read_answers
from pipeline.evaluation.classifier import Classifier
from pipeline.evaluation.judging import Failure, Judge, Scores, Texts

Scorer = Callable[[str, str], float]


class Task(NamedTuple):
    """What a built-in scorer is built from."""

    config: RunConfig
    model: str | None  # located weights that sample; None: nothing will be scored, only check
    prompts: Sequence[str]
    argument: str  # what follows the colon of its name


# ----------------------------------------------------------------------------------------------- built in


def vader(task: Task) -> Judge:
    """Sentiment of prompt and response together, −1 … 1, by VADER's lexicon and rules. Raises `ConfigError`."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError("sampling.scorer: vader needs vaderSentiment; pip install 'qalign[demo]'") from None
    analyzer = SentimentIntensityAnalyzer()
    return each(lambda prompt, response: analyzer.polarity_scores(prompt + response)["compound"])


def verifiable(task: Task) -> Judge:
    """1.0 where the response's answer is the prompt's, else 0.0. Raises `ConfigError` where no record has the column."""
    check_column(task.config)
    answers = read_answers(task.config, task.model, set(task.prompts)) if task.model is not None else {}
    return each(answer_scorer(answers, task.config.evaluation.answer_pattern))


def answer_scorer(answers: Mapping[str, str], pattern: str) -> Scorer:
    """Scores by the right answers of the prompts' texts; both sides' answers are what `pattern` finds last, if it does."""

    def score(prompt: str, response: str) -> float:
        if prompt not in answers:
            raise LookupError("no answer for this prompt")
        said, known = answer_of(response, pattern), answer_of(answers[prompt], pattern)
        # A response without a marked answer may be nothing but the answer; a number somewhere in it is not one.
        right = answers[prompt] if known is None else known
        return float(matches(response if said is None else said, right, within=said is not None))

    return score


SCORERS: dict[str, Callable[[Task], Judge]] = {
    "vader": vader,
    "verifiable": verifiable,
    "classifier": lambda task: Classifier(task.config, task.model, task.argument),
}
"""Built-in scorers by name; each entry builds one, and refuses in one line what cannot work."""


# ------------------------------------------------------------------------------------------------- lookup


def judge_for(config: RunConfig, model: str | None, prompts: Sequence[str] = ()) -> Judge:
    """The judge that `config.sampling.scorer` names, for completions of these prompts by the weights at `model`.

    model: None only asks whether there is such a scorer. Raises `ConfigError` before anything is scored for a name that is
    none, and afterwards where it fails on everything.
    """
    name = config.sampling.scorer
    assert name is not None
    kind, _, argument = name.partition(":")
    judge = SCORERS[kind](Task(config, model, prompts, argument)) if kind in SCORERS else each(resolve(name))

    def checked(completions: Sequence[Texts], local: bool) -> Scores:
        scores, failures = judge(completions, local)
        if failures and len(failures) == len(completions):
            raise ConfigError(f"sampling.scorer: {name} failed on every completion ({failures[0][1]})")
        return scores, failures

    return checked


def resolve(name: str) -> Scorer:
    """The function behind a dotted path `package.module:function`. Raises `ConfigError`."""
    if not dotted.is_dotted(name):
        raise ConfigError(
            f"sampling.scorer: {name!r} is none of {', '.join(SCORERS)}, nor a dotted path package.module:function"
        )
    try:
        found = dotted.load(name)
    except ImportError as error:
        raise ConfigError(f"sampling.scorer: {error}") from None
    if not callable(found):
        raise ConfigError(f"sampling.scorer: {name!r} is a {type(found).__name__}; name a function (prompt, response)")
    return found


def each(scorer: Scorer) -> Judge:
    """A judge that calls a function for each completion, in this process."""
    return lambda completions, local: score_all(scorer, [(c.prompt, c.response) for c in completions])


def score_all(scorer: Scorer, pairs: Iterable[tuple[str, str]]) -> Scores:
    """Score n (prompt, response) pairs; nan and an entry among the failures where the scorer fails."""
    scores: list[float] = []
    failures: list[Failure] = []
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
