"""Loss and metrics on rows that were not trained on: in the training loop, and as a Ray Data stage for `jobs.eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.config_file import validate
from pipeline.contracts import Batch, Mean, Objective, PolicyOut
from pipeline.learner import load_trained
from pipeline.metrics import Sums, batch_metrics
from pipeline.order import micro_batches
from pipeline.rows import Rows
from pipeline.stage import Item, Resources, run_stage

if TYPE_CHECKING:
    from pipeline.driver import Prepared

PIECE_ROWS = 256


@torch.no_grad()
def add_batches(
    sums: Sums, forward: Callable[[Batch], PolicyOut], objective: Objective, batches: Iterable[Batch]
) -> None:
    """Add the loss terms and metrics of `batches` to `sums`."""
    for batch in batches:
        out = forward(batch)
        result, weights = objective(out, batch), objective.weight(batch)
        sums.add({f"loss/{name}": Mean(term.total, weights[name]) for name, term in result.terms.items()})
        sums.add(
            {f"coefficient/{name}": _constant(term.coefficient, term.total) for name, term in result.terms.items()}
        )
        sums.add(dict(result.metrics) | batch_metrics(objective, out, batch))


def means(sums: Sums) -> dict[str, float]:
    """Divide: `eval/loss` = Σ coefficient · mean of the term, and every metric under eval/."""
    found = sums.reduce()
    coefficients = {
        name.removeprefix("coefficient/"): found.pop(name) for name in list(found) if name.startswith("coefficient/")
    }
    found["loss"] = sum(c * found.get(f"loss/{name}", 0.0) for name, c in coefficients.items())
    return {f"eval/{name}": value for name, value in found.items()}


def _constant(value: float, like: torch.Tensor) -> Mean:
    return Mean(like.new_tensor(value), like.new_tensor(1.0))


class ScorePiece:
    """The actor: positions of held-out rows → undivided sums."""

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

    def __call__(self, item: Item) -> Item:
        sums = Sums()
        dealt = micro_batches(item["positions"], self.rows.lengths, 1, self.config.train.tokens_per_micro_batch)[0]
        batches = (replace(collate(self.rows.take(m)), carried=self.carried).to(self.device) for m in dealt)
        add_batches(sums, self.forward, self.config.objective, batches)
        return {"sums": sums.plain()}


def held_out(
    config: RunConfig,
    prepared: Prepared,
    model: str,
    positions: np.ndarray,
    local: bool,
    carried: Mapping[str, float],
) -> Mapping[str, float]:
    """Metrics of the exported weights at `model` on the prepared rows at `positions`; `carried` as in `Batch`."""
    pieces = np.array_split(np.sort(positions), max(1, len(positions) // PIECE_ROWS))
    arguments = {
        "config": config.dump(),
        "model": model,
        "rows": str(prepared.rows),
        "reference": str(prepared.reference) if prepared.reference else None,
        "frozen": prepared.frozen,
        "carried": dict(carried),
    }
    scaling = config.scaling
    resources = Resources(cpus=scaling.cpus_per_worker, gpus=scaling.gpus_per_worker, actors=scaling.data_actors)
    items = [{"positions": piece.tolist()} for piece in pieces]
    total = Sums()
    for part in run_stage(
        ScorePiece, arguments, items, label="held-out", resources=resources, local=local, unit="piece"
    ):
        total.add_plain(part["sums"])
    return means(total)
