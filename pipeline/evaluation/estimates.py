"""Numbers with their errors: means over independent units, shares, ratios of sums, and the AUROC.

A unit is what was drawn independently: a prompt, a row. Completions of one prompt are not independent, so they are averaged
first. Intervals are for 95 %. What cannot be estimated (an error from one unit) is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pipeline.evaluation.findings import Unmeasurable
from pipeline.evaluation.results import Metric

Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""


def mean_se(values: ArrayLike) -> tuple[float, float]:
    """Mean of n independent values and its standard error (nan for n < 2, both nan for n = 0)."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))


def mean(values: ArrayLike, lowest: float = -math.inf, highest: float = math.inf) -> Metric:
    """Mean of n ≥ 1 independent values, which lie between `lowest` and `highest`."""
    value, error = mean_se(values)
    return metric(value, error, np.size(values), lowest, highest)


def ratio(totals: ArrayLike, weights: ArrayLike, lowest: float = -math.inf, highest: float = math.inf) -> Metric:
    """Σ totals / Σ weights over n units, e.g. a mean per token where units are responses of unlike length.

    totals, weights: [n], Σ weights > 0. The standard error is the linearised one (delta method); with equal weights it is
    that of the mean.
    """
    value, pulls = influence(totals, weights)
    return metric(value, spread(pulls), len(pulls), lowest, highest)


def influence(totals: ArrayLike, weights: ArrayLike) -> tuple[float, np.ndarray]:
    """Σ totals / Σ weights, and each unit's pull on it, [m] of the m units that have weight; the pulls sum to 0."""
    x, w = np.asarray(totals, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    assert w.sum() > 0
    value = x.sum() / w.sum()
    return float(value), ((x - value * w) / w.sum())[w > 0]


def spread(pulls: np.ndarray) -> float:
    """Standard error of an estimate from its units' pulls; nan for fewer than two."""
    n = len(pulls)
    return math.sqrt(n / (n - 1) * float(pulls @ pulls)) if n > 1 else math.nan


def share(value: float, n: int, effective: float | None = None) -> Metric:
    """A share of n units, 0 … 1, with Wilson's interval, which holds at 0 and 1, too.

    Units may count in part (a tie one half, several completions of a prompt): their variance is then smaller than a yes-or-no
    unit's, and the interval on the safe side. effective: the number of equally weighted units that the weighted ones are worth.
    """
    m = effective or float(n)
    centre = (value + Z * Z / (2 * m)) / (1 + Z * Z / m)
    half = Z / (1 + Z * Z / m) * math.sqrt(value * (1 - value) / m + Z * Z / (4 * m * m))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Metric(value=value, standard_error=math.sqrt(value * (1 - value) / m), low=low, high=high, n=n)


def metric(value: float, error: float, n: int, lowest: float = -math.inf, highest: float = math.inf) -> Metric:
    """A number with its standard error (nan: unknown) and the normal interval, cut to what is possible.

    Raises Unmeasurable where it is no number.
    """
    if not math.isfinite(value):
        raise Unmeasurable(f"a result is {value}")
    if not math.isfinite(error):
        return Metric(value=value, n=n)
    low, high = max(lowest, value - Z * error), min(highest, value + Z * error)
    return Metric(value=value, standard_error=error, low=low, high=high, n=n)


def auroc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """The chance that a labelled item's score is above an unlabelled one's, ties one half. There have to be both."""
    from sklearn.metrics import roc_auc_score  # half a second

    return float(roc_auc_score(np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)))
