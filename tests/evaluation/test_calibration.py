"""ECE and Brier score: by hand, on data of known calibration, and for objectives that have no probability."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config_file import validate
from pipeline.evaluation import calibration
from pipeline.evaluation.calibration import (
    brier,
    ece,
    likelihood_confidence,
    preference_confidence,
    reliability,
    sigmoid,
    stack,
)
from pipeline.evaluation.findings import Unmeasurable
from pipeline.evaluation.held_out import RowFacts

HALF = np.linspace(0.5, 1.0, 6)
UNIT = np.linspace(0.0, 1.0, 11)


def row(*pairs: tuple[float, float, float, float], weight: float = 1.0) -> RowFacts:
    return RowFacts(0, weight, {}, np.reshape(np.array(pairs, dtype=np.float64), (-1, 4)))


def pairs_with(probabilities: np.ndarray) -> np.ndarray:
    """Pairs whose preference probability is given."""
    margin = np.log(probabilities / (1 - probabilities))
    return np.stack([margin, *np.zeros((3, len(margin)))], axis=1)


def test_ece_and_brier_by_hand() -> None:
    """p = .8, .8, .8, .3: three of confidence .8 (all right), one of .7 (wrong): ECE (3 · .2 + .7) / 4, Brier (3 · .04 + .49) / 4."""
    pairs = pairs_with(np.array([0.8, 0.8, 0.8, 0.3]))
    confidence, right = preference_confidence(pairs)
    np.testing.assert_allclose(confidence, [0.8, 0.8, 0.8, 0.7])
    assert right.tolist() == [1, 1, 1, 0]
    weights, rows = np.ones(4), np.arange(4)
    assert ece(confidence, right, weights, rows, np.linspace(0.5, 1, 11)).value == pytest.approx((3 * 0.2 + 0.7) / 4)
    assert brier(pairs, weights, rows).value == pytest.approx((3 * 0.04 + 0.49) / 4)


def test_the_sure_and_right_have_no_error_the_sure_and_wrong_the_largest() -> None:
    sure = np.array([[50.0, -50.0, 0, 0]])
    one, zero = np.ones(1), np.zeros(1, dtype=int)
    confidence, right = preference_confidence(sure)
    assert ece(confidence, right, one, zero, HALF).value == pytest.approx(0)
    confidence, right = preference_confidence(-sure)
    assert ece(confidence, right, one, zero, HALF).value == pytest.approx(1)
    assert brier(-sure, one, zero).value == pytest.approx(1)


def test_equal_rewards_are_a_coin_and_half_right() -> None:
    tie = np.zeros((1, 4))
    confidence, right = preference_confidence(tie)
    assert (confidence[0], right[0]) == (0.5, 0.5)
    assert ece(confidence, right, np.ones(1), np.zeros(1, dtype=int), HALF).value == 0


def test_a_calibrated_model_is_found_calibrated_and_an_overconfident_one_is_not() -> None:
    """5,000 pairs whose order is drawn with the stated probability; then the same with margins doubled."""
    rng = np.random.default_rng(1)
    margin = rng.normal(0, 1.5, size=5_000)
    margin *= np.where(rng.random(5_000) < sigmoid(margin), 1.0, -1.0)  # the better response stands first
    weights, rows = np.ones(5_000), np.arange(5_000)

    def error(scale: float) -> float:
        pairs = np.stack([scale * margin, *np.zeros((3, 5_000))], axis=1)
        confidence, right = preference_confidence(pairs)
        expected = np.abs(confidence - sigmoid(np.abs(margin))).mean()
        found = ece(confidence, right, weights, rows, np.linspace(0.5, 1, 11))
        assert found.value == pytest.approx(expected, abs=0.025)
        assert found.low <= found.value * 1.5 and found.n == 5_000
        return found.value

    assert error(1.0) < 0.025
    assert error(2.0) > 0.08


def test_the_f_dpo_authors_meaning_by_hand() -> None:
    """Mean log-probs (−.5, −1), (−2, −1): confidences e^−.5 (right) and e^−2 (wrong), in different bins."""
    pairs = np.array([[0, 0, -0.5, -1.0], [0, 0, -2.0, -1.0]])
    confidence, right = likelihood_confidence(pairs)
    np.testing.assert_allclose(confidence, [math.exp(-0.5), math.exp(-2)])
    expected = ((1 - math.exp(-0.5)) + math.exp(-2)) / 2
    assert ece(confidence, right, np.ones(2), np.arange(2), UNIT).value == pytest.approx(expected)


def test_bins_hold_their_pairs_and_the_last_one_its_end() -> None:
    confidence, right = np.array([0.55, 0.6, 1.0, 0.95]), np.array([1.0, 0.0, 1.0, 1.0])
    bins = reliability(confidence, right, np.ones(4), HALF)
    assert [(round(b.low, 2), round(b.high, 2), b.n, b.accuracy) for b in bins] == [
        (0.5, 0.6, 1, 1.0),
        (0.6, 0.7, 1, 0.0),
        (0.9, 1.0, 2, 1.0),
    ]
    assert bins[2].confidence == pytest.approx(0.975)


def test_a_row_counts_once_however_many_pairs_it_has() -> None:
    """A ranking of three right pairs beside one wrong pair: half right."""
    right, wrong = (3.0, 0.0, 0, 0), (0.0, 3.0, 0, 0)
    pairs, weights, rows = stack([row(right, right, right), row(wrong), row(), row(right, weight=0.0)])
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert rows.tolist() == [0, 0, 0, 1]
    confidence, hits = preference_confidence(pairs)
    assert np.average(hits, weights=weights) == pytest.approx(0.5)
    assert ece(confidence, hits, weights, rows, HALF).value == pytest.approx(abs(0.5 - sigmoid(np.array(3.0))))
    assert brier(pairs, weights, rows).n == 2


def study(objective: dict, kind: str, facts: list[RowFacts]) -> SimpleNamespace:
    config = validate(
        {"data": {"kind": kind, "sources": [{"path": "x"}]}, "model": {"path": "x"}, "objective": objective}
    )
    return SimpleNamespace(config=config, facts=facts)


PAIR = row((1.0, 0.0, -0.5, -1.0))


@pytest.mark.parametrize(
    ("objective", "kind", "measured"),
    [
        ({"name": "dpo"}, "preference", {"ece", "brier", "ece_likelihood"}),
        ({"name": "plackett_luce"}, "ranking", {"ece", "brier", "ece_likelihood"}),
        ({"name": "reward_model"}, "preference", {"ece", "brier"}),
        ({"name": "ipo"}, "preference", {"ece_likelihood"}),
        ({"name": "simpo"}, "preference", {"ece_likelihood"}),
        ({"name": "dqo"}, "trajectory", {"ece_likelihood"}),
    ],
)
def test_what_an_objective_has_no_probability_for_is_left_out_with_a_reason(objective, kind, measured) -> None:
    found = calibration.measure(study(objective, kind, [PAIR, PAIR]))
    assert found.metrics.keys() == measured
    skipped = {name for s in found.skipped for name in s.what.split(", ")}
    assert skipped == {"ece", "brier", "ece_likelihood"} - measured
    assert all(s.reason for s in found.skipped)
    assert bool(found.reliability) == ("ece" in measured)


def test_rows_without_an_order_cannot_be_measured() -> None:
    with pytest.raises(Unmeasurable, match="order no two responses"):
        calibration.measure(study({"name": "sft"}, "demonstration", [row()]))
