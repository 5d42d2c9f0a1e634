"""Scorers: by name, by path, and with failures counted."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.evaluation.scorers import resolve, score_all

PAIRS = [("a", "b"), ("", "long"), ("boom", ""), ("x", "yz")]


def test_vader_scores_prompt_and_response_together():
    """0.4404, -0.5423 and -0.3412 are VADER's own compound scores of the whole texts."""
    pytest.importorskip("vaderSentiment")
    scorer = resolve("vader")
    assert scorer("The film is", " good") == pytest.approx(0.4404)
    assert scorer("The film is bad", "") == scorer("The film", " is bad") == pytest.approx(-0.5423)
    assert scorer("The film is not", " good") == pytest.approx(-0.3412)


def test_vader_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"sampling\.scorer: vader needs vaderSentiment.*qalign\[demo\]"):
        resolve("vader")


def test_a_dotted_path_gives_a_users_function():
    assert resolve("operator:concat") is __import__("operator").concat


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vadr", "'vadr' is none of vader, nor a dotted path"),
        ("no_such_module:f", "cannot load 'no_such_module:f'.*installed on every node"),
        ("math:no_such", "cannot load 'math:no_such'"),
        ("math:pi", "'math:pi' is a float; name a function"),
        ("../evil:f", "nor a dotted path"),
    ],
)
def test_what_is_no_scorer_is_refused_in_one_line(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(name)
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
    scores, failures = score_all(resolve("operator:concat"), [])
    assert scores.shape == (0,)
    assert failures == []
