"""Scorers: by name, by path, and with failures counted."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from pipeline.config import ConfigError, EvaluationConfig, RunConfig
from pipeline.config_file import validate
from pipeline.evaluation.judging import Texts
from pipeline.evaluation.scorers import answer_scorer, judge_for, resolve, score_all

PAIRS = [("a", "b"), ("", "long"), ("boom", ""), ("x", "yz")]


def configure(scorer: str, **data) -> RunConfig:
    return validate(
        {
            "data": {"kind": "demonstration", "sources": [{"path": "x"}]},
            "model": {"path": "x"},
            "objective": {"name": "sft"},
            "sampling": {"scorer": scorer, **data},
        }
    )


def score(scorer: str, *pairs: tuple[str, str]) -> list[float]:
    return judge_for(configure(scorer), "x")([Texts(*pair, [], []) for pair in pairs], True)[0].tolist()


def test_vader_scores_prompt_and_response_together():
    """0.4404, -0.5423 and -0.3412 are VADER's own compound scores of the whole texts."""
    pytest.importorskip("vaderSentiment")
    found = score(
        "vader",
        ("The film is", " good"),
        ("The film is bad", ""),
        ("The film", " is bad"),
        ("The film is not", " good"),
    )
    assert found == pytest.approx([0.4404, -0.5423, -0.5423, -0.3412])


def test_vader_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"sampling\.scorer: vader needs vaderSentiment.*qalign\[demo\]"):
        judge_for(configure("vader"), None)


def test_a_dotted_path_gives_a_users_function():
    assert resolve("xxhash:xxh3_64_hexdigest") is __import__("xxhash").xxh3_64_hexdigest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vadr", "'vadr' is none of vader, verifiable, classifier, nor a dotted path"),
        ("no_such_module:f", "cannot load 'no_such_module:f'.*installed on every node"),
        ("xxhash:no_such", "cannot load 'xxhash:no_such'"),
        ("xxhash:VERSION", "'xxhash:VERSION' is a str; name a function"),
        ("../evil:f", "nor a dotted path"),
    ],
)
def test_what_is_no_scorer_is_refused_in_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        judge_for(configure(name), None)
    assert "\n" not in str(caught.value)


def test_failures_are_counted_and_the_rest_is_scored():
    def scorer(prompt: str, response: str):
        if prompt == "boom":
            raise KeyError("no such word")
        return {"b": 1.5, "long": math.inf, "yz": "2"}[response]

    scores, failures = score_all(scorer, PAIRS)
    np.testing.assert_array_equal(scores, [1.5, math.nan, math.nan, 2.0])
    assert failures == [(1, "the score is inf"), (2, "KeyError: 'no such word'")]


def test_a_scorer_that_returns_no_number_is_a_failure():
    scores, failures = score_all(lambda _prompt, _response: None, PAIRS[:1])
    assert np.isnan(scores).tolist() == [True]
    assert failures[0][0] == 0
    assert failures[0][1].startswith("TypeError")


def test_no_pairs_give_no_scores():
    scores, failures = score_all(resolve("xxhash:xxh64"), [])
    assert scores.shape == (0,)
    assert failures == []


def test_a_scorer_that_fails_on_everything_is_an_error():
    with pytest.raises(ConfigError, match=r"xxhash:xxh64 failed on every completion \(TypeError"):
        score("xxhash:xxh64", ("a", "b"))


PATTERN = EvaluationConfig().answer_pattern


@pytest.mark.parametrize(
    ("right", "response", "expected"),
    [
        ("72", "7 * 10 is 70, and 2.\n#### 72", 1.0),
        ("she has 72\n#### 72", "The answer is 72.", 1.0),
        ("72", "72", 1.0),
        ("72", "72 is what I got, #### 71", 0.0),
        ("72", "perhaps 72 or so", 0.0),  # no marked answer, and not an answer alone
        ("1,200", "#### $1200", 1.0),
        ("Paris", "Answer: Paris", 1.0),
        ("Paris", "Answer: Rome", 0.0),
    ],
)
def test_a_verifiable_answer_is_matched(right, response, expected):
    assert answer_scorer({"q": right}, PATTERN)("q", response) == expected


def test_a_prompt_without_an_answer_is_a_failure():
    scores, failures = score_all(answer_scorer({"q": "1"}, PATTERN), [("q", "1"), ("other", "1")])
    np.testing.assert_array_equal(scores, [1.0, math.nan])
    assert failures == [(1, "LookupError: no answer for this prompt")]
