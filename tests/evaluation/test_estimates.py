"""Means, ratios, shares and the AUROC against numbers worked out by hand, and their intervals against repetition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.estimates import auroc, influence, mean, mean_se, ratio, share, spread
from pipeline.evaluation.findings import Unmeasurable


def test_mean_and_standard_error_by_hand() -> None:
    """Values 1, 2, 6: mean 3, variance (4 + 1 + 9)/2 = 7, standard error √(7/3)."""
    assert mean_se([1, 2, 6]) == (pytest.approx(3), pytest.approx(math.sqrt(7 / 3)))
    value, error = mean_se([5.0])
    assert value == 5
    assert math.isnan(error)
    assert all(math.isnan(x) for x in mean_se([]))


def test_one_value_has_no_error_and_no_interval() -> None:
    found = mean([5.0])
    assert (found.value, found.standard_error, found.low, found.high, found.n) == (5.0, None, None, None, 1)


def test_what_is_no_number_cannot_be_measured() -> None:
    with pytest.raises(Unmeasurable, match="nan"):
        mean([math.nan])


def test_intervals_are_cut_to_what_is_possible() -> None:
    found = mean([0.0, 0.0, 0.9], lowest=0.0)
    assert found.low == 0.0
    assert found.high == pytest.approx(0.3 + 1.959964 * 0.3)


def test_a_ratio_of_equal_weights_is_a_mean() -> None:
    values = [1.0, 2.0, 6.0]
    assert ratio([2 * v for v in values], [2.0] * 3).model_dump() == pytest.approx(mean(values).model_dump())


def test_a_ratio_by_hand() -> None:
    """(2 + 3) / (1 + 3) = 5/4; residuals 2 − 5/4 = 3/4 and 3 − 15/4 = −3/4; pulls ±3/16, √(2 · 2 · 9/256) = 3/8."""
    found = ratio([2, 3], [1, 3])
    assert found.value == pytest.approx(5 / 4)
    assert found.standard_error == pytest.approx(3 / 8)


def test_units_without_weight_do_not_count() -> None:
    found = ratio([2, 3, 0], [1, 3, 0])
    assert (found, found.n) == (ratio([2, 3], [1, 3]), 2)
    assert influence([1, 4, 0], [1, 2, 0])[1].sum() == pytest.approx(0)
    assert math.isnan(spread(np.zeros(1)))


def test_a_ratios_error_is_its_spread_over_repetitions() -> None:
    """2,000 repetitions with 80 responses of unlike length."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 20, size=(2000, 80))
    totals = weights * rng.normal(1.0, 0.5, size=(2000, 80)) + 0.3 * weights
    values = totals.sum(1) / weights.sum(1)
    errors = [ratio(t, w).standard_error for t, w in zip(totals[:200], weights[:200], strict=True)]
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.1)


def test_wilsons_interval_by_hand() -> None:
    """8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half 0.22643 (also in any table: 0.490 … 0.943)."""
    found = share(0.8, 10)
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert found.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 10))


def test_wilsons_interval_does_not_shrink_to_nothing_at_the_ends() -> None:
    assert share(1.0, 10).low == pytest.approx(0.7225, abs=1e-4)
    assert share(0.0, 10).high == pytest.approx(1 - 0.7225, abs=1e-4)
    assert share(1.0, 10).high == pytest.approx(1.0)
    assert share(1.0, 40, effective=10).low == share(1.0, 10).low


def test_wilsons_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = np.random.default_rng(0).binomial(30, 0.9, size=400)
    covered = [s.low <= 0.9 <= s.high for s in (share(h / 30, 30) for h in hits)]
    assert 0.92 <= np.mean(covered) <= 0.99


def test_auroc_by_hand() -> None:
    """Of 2 × 3 comparisons of (4, 2) with (1, 2, 3): four won, one tied."""
    assert auroc([4, 2, 1, 2, 3], [True, True, False, False, False]) == pytest.approx(4.5 / 6)
