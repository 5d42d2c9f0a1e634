"""Is a policy as often right about preferences as it is sure of them? ECE in two meanings, Brier score, reliability bins.

(a) The objective's own preference probability: σ(r_better − r_worse), for objectives that hold the Bradley–Terry or the
Plackett–Luce model. Rankings are measured by their pairs.
(b) The confidence of the f-DPO authors' code: exp(mean log π per token) of the better response. It says how likely the
response is, and is no probability of a preference; the two are kept apart by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluation.estimates import metric, ratio
from pipeline.evaluation.findings import Findings, Unmeasurable
from pipeline.evaluation.held_out import RowFacts
from pipeline.evaluation.results import Bin, Metric, Skipped

if TYPE_CHECKING:
    from pipeline.evaluation.study import Study

RESAMPLES = 500


def measure(study: Study) -> Findings:
    """ECE and Brier score on the held-out rows' ordered pairs; says which of the two meanings cannot be measured."""
    facts, objective, bins = study.facts, study.config.objective, study.config.evaluation.bins
    pairs, weights, rows = stack(facts)
    if not len(pairs):
        raise Unmeasurable(
            f"the held-out rows order no two responses to one prompt (data.kind={study.config.data.kind})"
        )
    found = Findings()
    if objective.bradley_terry:
        confidence, right = preference_confidence(pairs)
        edges = np.linspace(0.5, 1.0, bins + 1)
        found.reliability.extend(reliability(confidence, right, weights, edges))
        found.metrics["ece"] = ece(confidence, right, weights, rows, edges)
        found.metrics["brier"] = brier(pairs, weights, rows)
    else:
        reason = f"{study.config.objective_name} has no preference probability"
        found.skipped.append(Skipped(what="ece, brier", reason=reason))
    if objective.needed().model == "reward":
        reason = "a reward model has no log-probabilities"
        found.skipped.append(Skipped(what="ece_likelihood", reason=reason))
    else:
        confidence, right = likelihood_confidence(pairs)
        edges = np.linspace(0.0, 1.0, bins + 1)
        found.likelihood_reliability.extend(reliability(confidence, right, weights, edges))
        found.metrics["ece_likelihood"] = ece(confidence, right, weights, rows, edges)
    return found


def stack(facts: Sequence[RowFacts]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ordered pairs [n, 4], their weights [n] (a row's pairs share its weight), and the row each is of [n]."""
    used = [row for row in facts if len(row.pairs) and row.weight > 0]
    pairs = np.concatenate([np.zeros((0, 4)), *(row.pairs for row in used)])
    weights = np.concatenate([np.zeros(0), *(np.full(len(row.pairs), row.weight / len(row.pairs)) for row in used)])
    rows = np.repeat(np.arange(len(used)), [len(row.pairs) for row in used])
    return pairs, weights, rows


def preference_confidence(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(max(p, 1 − p), whether the better response is the likelier one: ties one half), p = σ(r_better − r_worse). Each [n]"""
    margin = pairs[:, 0] - pairs[:, 1]
    return sigmoid(np.abs(margin)), _right(margin)


def likelihood_confidence(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(exp(mean log π) of the better response, whether that of the worse one is lower), as the f-DPO authors' code has it."""
    return np.exp(np.minimum(pairs[:, 2], 0.0)), _right(pairs[:, 2] - pairs[:, 3])


def brier(pairs: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> Metric:
    """Mean of (1 − p)²; pairs stand in the data's order, so the outcome is always 1."""
    squared = sigmoid(pairs[:, 1] - pairs[:, 0]) ** 2
    return ratio(np.bincount(rows, squared * weights), np.bincount(rows, weights), 0.0, 1.0)


def reliability(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> list[Bin]:
    """Confidence and accuracy of each bin that holds a pair."""
    place, bins = _places(confidence, edges), []
    for b in np.unique(place):
        own = place == b
        low, high = edges[b], edges[b + 1]
        sure, hit = (float(np.average(x[own], weights=weights[own])) for x in (confidence, right))
        bins.append(Bin(low=float(low), high=float(high), confidence=sure, accuracy=hit, n=int(own.sum())))
    return bins


def ece(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray, rows: np.ndarray, edges: np.ndarray) -> Metric:
    """Σ_bins weight · |accuracy − confidence|, with the spread and the 95 % range of a bootstrap over rows.

    The estimate is biased upwards: in each bin, noise counts as miscalibration. The fewer pairs, the more.
    """
    count = rows.max() + 1
    sums = np.zeros((count, len(edges) - 1))  # of weight · (right − confidence), by row and bin
    np.add.at(sums, (rows, _places(confidence, edges)), weights * (right - confidence))
    total = np.bincount(rows, weights, minlength=count)
    value = float(np.abs(sums.sum(0)).sum() / total.sum())
    if count < 2:
        return metric(value, float("nan"), int(count))
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    spread = np.abs(drawn @ sums).sum(-1) / (drawn @ total)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Metric(value=value, standard_error=float(spread.std(ddof=1)), low=float(low), high=float(high), n=int(count))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^{−x}) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def _right(margin: np.ndarray) -> np.ndarray:
    return np.where(margin == 0, 0.5, (margin > 0).astype(np.float64))


def _places(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Each confidence's bin; the last bin is closed on both sides."""
    return np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, len(edges) - 2)
