"""Diversity: distinct-n by hand with its jackknife, self-BLEU at its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.diversity import distinct, of_samples, self_bleu
from pipeline.evaluation.samples import Samples


def samples(texts: list[list[str]]) -> Samples:
    groups = [[{"text": t, "token_ids": list(range(len(t)))} for t in group] for group in texts]
    return Samples([[1]] * len(texts), ["p"] * len(texts), groups, None, [])


def test_distinct_by_hand() -> None:
    """ "a b a" and "b c": words a b a b c, three of five; pairs ab ba bc, all different."""
    texts = [["a b a"], ["b c"]]
    one, two = distinct(texts, 1), distinct(texts, 2)
    assert one is not None and two is not None
    assert (one.value, two.value, one.n) == (3 / 5, 1.0, 2)
    # Without the first prompt 2/2, without the second 2/3: √(½ · 2 · (1/6)²).
    assert one.standard_error == pytest.approx(1 / 6)
    assert one.high is not None and one.high <= 1.0


def test_no_n_gram_is_no_zero() -> None:
    assert distinct([["a"], [""]], 2) is None
    alone = distinct([["a b"], [""]], 2)
    assert alone is not None and alone.value == 1.0 and alone.standard_error is None


def test_copies_make_it_fall() -> None:
    fresh = distinct([[f"w{i} v{i}"] for i in range(20)], 1)
    stale = distinct([["w v"] for _ in range(20)], 1)
    assert fresh is not None and stale is not None
    assert fresh.value == 1.0
    assert stale.value == 2 / 40


def test_the_jackknife_is_the_spread_over_repetitions() -> None:
    """Prompts of 30 words out of 1,000."""
    rng = np.random.default_rng(0)
    runs = [[[" ".join(map(str, rng.zipf(1.6, 30) % 1000))] for _ in range(30)] for _ in range(80)]
    found = [distinct(texts, 1) for texts in runs]
    errors, values = [f.standard_error for f in found], [f.value for f in found]
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_self_bleu_at_its_ends() -> None:
    pytest.importorskip("sacrebleu")
    assert self_bleu(["the film was good"] * 3) == pytest.approx(100)
    assert self_bleu(["the film was good", "ein ganz anderer satz"]) == pytest.approx(0, abs=1e-9)
    assert self_bleu(["the film was good", " "]) is None, "a text without words is no likeness"


def test_self_bleu_lies_between_for_shared_beginnings() -> None:
    pytest.importorskip("sacrebleu")
    value = self_bleu(["the film was very good", "the film was very bad"])
    assert value is not None
    # Four, three, two, one of the n-grams of orders 1 … 4 out of five, four, three, two are shared; equal lengths.
    assert value == pytest.approx(100 * math.prod([4 / 5, 3 / 4, 2 / 3, 1 / 2]) ** 0.25)


def test_self_bleu_is_within_a_prompt_where_there_are_several_completions() -> None:
    pytest.importorskip("sacrebleu")
    found = of_samples(samples([["a b c d e"] * 2, ["v w x y z"] * 2]))
    assert found["self_bleu"].value == pytest.approx(100)
    assert found["self_bleu_across"].value == pytest.approx(0, abs=1e-9)
    assert "self_bleu" not in of_samples(samples([["a b"], ["c d"]]))


def test_empty_completions_and_lengths_are_counted_by_prompt() -> None:
    found = of_samples(samples([["", "abcd"], ["ab", "ab"]]))
    assert (found["empty"].value, found["empty"].n) == (0.25, 2)
    assert found["length"].value == 2.0
