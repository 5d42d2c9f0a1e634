"""Loss and metrics on rows that were not trained on: in the training loop, and with standard errors for `jobs.eval`.

The loop adds up whole batches. `row_facts` does the same arithmetic row by row, as a Ray Data stage, so that each number has
the spread of its rows, and keeps what calibration is measured on: the rewards of the pairs that the data order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Mean, Objective, PolicyOut
from pipeline.evaluation.estimates import influence, metric, ratio, share, spread
from pipeline.evaluation.findings import Findings
from pipeline.evaluation.results import Metric
from pipeline.learner import load_trained
from pipeline.metrics import Sums, batch_metrics, ordered_pairs
from pipeline.order import micro_batches
from pipeline.rows import Rows
from pipeline.stage import Item, Resources, run_stage

if TYPE_CHECKING:
    from pipeline.driver import Prepared
    from pipeline.evaluation.study import Study

PIECE_ROWS = 256
COEFFICIENT = "coefficient/"


@torch.no_grad()
def add_batches(
    sums: Sums, forward: Callable[[Batch], PolicyOut], objective: Objective, batches: Iterable[Batch]
) -> None:
    """Add the loss terms and metrics of `batches` to `sums`."""
    for batch in batches:
        _add(sums, objective, forward(batch), batch)


def _add(sums: Sums, objective: Objective, out: PolicyOut, batch: Batch) -> None:
    result, weights = objective(out, batch), objective.weight(batch)
    sums.add({f"loss/{name}": Mean(term.total, weights[name]) for name, term in result.terms.items()})
    sums.add({COEFFICIENT + name: _constant(term.coefficient, term.total) for name, term in result.terms.items()})
    sums.add(dict(result.metrics) | batch_metrics(objective, out, batch))


def means(sums: Sums) -> dict[str, float]:
    """Divide: `eval/loss` = Σ coefficient · mean of the term, and every metric under eval/."""
    found = sums.reduce()
    coefficients = {
        name.removeprefix(COEFFICIENT): found.pop(name) for name in list(found) if name.startswith(COEFFICIENT)
    }
    found["loss"] = sum(c * found.get(f"loss/{name}", 0.0) for name, c in coefficients.items())
    return {f"eval/{name}": value for name, value in found.items()}


def _constant(value: float, like: Tensor) -> Mean:
    return Mean(like.new_tensor(value), like.new_tensor(1.0))


# --------------------------------------------------------------------------------------------- row by row


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What one held-out row adds to every metric, and its ordered pairs."""

    row_id: int
    weight: float
    sums: Mapping[str, Sequence[float]]  # metric → undivided total and weight
    pairs: np.ndarray  # [n, 4]: implied reward of the better and the worse response, and their mean log π per token


class FactsOfRows:
    """The actor: positions of held-out rows → the facts of each, as plain numbers."""

    def __init__(
        self,
        config: dict[str, Any],
        model: str,
        rows: str,
        reference: str | None,
        frozen: str,
        carried: dict[str, float],
    ) -> None:
        self.config: RunConfig = validate(config)
        self.rows = Rows(Path(rows), Path(reference) if reference else None)
        self.carried = carried
        self.device = torch.device("cuda" if self.config.scaling.gpus_per_worker else "cpu")
        self.forward = load_trained(self.config, model, frozen, self.device)

    @torch.no_grad()
    def __call__(self, item: Item) -> Item:
        positions, budget = item["positions"], self.config.train.tokens_per_micro_batch
        dealt = micro_batches(positions, self.rows.lengths[positions], 1, budget, padded=True)[0]
        found = []
        for micro in dealt:
            batch = replace(collate(self.rows.take(micro)), carried=self.carried).to(self.device)
            out = self.forward(batch)
            found += [self._facts(*one_row(out, batch, b)) for b in range(len(batch.row_ids))]
        # As text: Arrow would give every row the metrics of all others, as nulls.
        return {"facts": json.dumps(found)}

    def _facts(self, out: PolicyOut, batch: Batch) -> dict[str, Any]:
        sums = Sums()
        _add(sums, self.config.objective, out, batch)
        pairs = pairs_of(self.config.objective, out, batch)
        return {
            "row_id": int(batch.row_ids[0]),
            "weight": float(batch.weight[0]),
            "sums": sums.plain(),
            "pairs": pairs.flatten().tolist(),
        }


def one_row(out: PolicyOut, batch: Batch, b: int) -> tuple[PolicyOut, Batch]:
    """Row b alone, with all paddings as they are."""
    rows = slice(b, b + 1)

    def cut(whole: Any) -> dict[str, Tensor]:
        values = {f.name: getattr(whole, f.name) for f in fields(whole)}
        return {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}

    # The states of a value head belong to all rows' tokens at once, and have done their work.
    return replace(out, **(cut(out) | {"states": None})), replace(batch, **cut(batch))


def pairs_of(objective: Objective, out: PolicyOut, batch: Batch) -> Tensor:
    """The ordered pairs of a batch of one row, [n, 4] as in `RowFacts.pairs`."""
    if batch.valid.shape[1] < 2:
        return torch.zeros(0, 4)
    reward = objective.implied_reward(out, batch)[0]  # [K]
    tokens = batch.response_mask[0].sum(-1).clamp(min=1)
    likelihood = out.logprobs[0].sum(-1) / tokens  # [K]
    better, worse = ordered_pairs(batch)[0].nonzero(as_tuple=True)
    return torch.stack([reward[better], reward[worse], likelihood[better], likelihood[worse]], dim=-1).float()


def row_facts(
    config: RunConfig,
    prepared: Prepared,
    model: str,
    positions: np.ndarray,
    local: bool,
    carried: Mapping[str, float],
) -> list[RowFacts]:
    """Facts of the prepared rows at `positions` under the exported weights at `model`; `carried` as in `Batch`."""
    pieces = np.array_split(np.sort(positions), max(1, len(positions) // PIECE_ROWS))
    arguments = {
        "config": config.dump(),
        "model": model,
        "rows": str(prepared.rows),
        "reference": str(prepared.reference) if prepared.reference else None,
        "frozen": prepared.frozen,
        "carried": dict(carried),
    }
    items = [{"positions": piece.tolist()} for piece in pieces]
    done = run_stage(
        FactsOfRows, arguments, items, label="held-out", resources=resources(config), local=local, unit="piece"
    )
    return [
        RowFacts(f["row_id"], f["weight"], f["sums"], np.reshape(np.asarray(f["pairs"], dtype=np.float64), (-1, 4)))
        for part in done
        for f in json.loads(part["facts"])
    ]


def resources(config: RunConfig) -> Resources:
    """What one actor of an evaluation gets: as much as a training worker."""
    scaling = config.scaling
    return Resources(cpus=scaling.cpus_per_worker, gpus=scaling.gpus_per_worker, actors=scaling.data_actors)


# ---------------------------------------------------------------------------------------------- evaluator


def measure(study: Study) -> Findings:
    """`eval/<metric>`: the loss and all metrics of training, with standard errors over rows."""
    return Findings(metrics={f"eval/{name}": value for name, value in estimates(study.facts).items()})


def estimates(facts: Sequence[RowFacts]) -> dict[str, Metric]:
    """Each metric from its rows' totals and weights; metrics without weight are left out.

    `loss` = Σ coefficient · mean of the term; its error takes account of rows weighing on several terms.
    """
    totals: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in {name for row in facts for name in row.sums}:
        columns = np.array([row.sums.get(name, (0.0, 0.0)) for row in facts], dtype=np.float64)
        totals[name] = columns[:, 0], columns[:, 1]
    found = {
        name: ratio(*pair)
        for name, pair in sorted(totals.items())
        if pair[1].sum() > 0 and not name.startswith(COEFFICIENT)
    }
    if "accuracy" in found:
        found["accuracy"] = _accuracy(found["accuracy"], totals["accuracy"][1])
    loss, pulls = 0.0, np.zeros(len(facts))
    for name in (name.removeprefix(COEFFICIENT) for name in totals if name.startswith(COEFFICIENT)):
        total, weight = totals[f"loss/{name}"]
        if weight.sum() > 0:
            coefficient = ratio(*totals[COEFFICIENT + name]).value
            value, pull = influence(total, weight)
            loss += coefficient * value
            pulls[weight > 0] += coefficient * pull
    return found | {"loss": metric(loss, spread(pulls), len(facts))}


def _accuracy(plain: Metric, weights: np.ndarray) -> Metric:
    """The share with Wilson's interval; unequal weights are worth fewer rows."""
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    return share(plain.value, plain.n, effective).model_copy(update={"standard_error": plain.standard_error})
