"""DPO that leaves a trace: which rows each forward saw, when, in which process. It can also slow steps down, or break one.

A configuration names it by its dotted path, as any objective of a user's own.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field

from pipeline.contracts import Batch, LossOut, PolicyOut
from pipeline.objectives.dpo import Dpo


class Witness(Dpo):
    """DPO whose every training forward appends a line to a file."""

    trace: str = ""
    """Folder; each process appends to a file of its own. Empty: none."""
    pause: Annotated[float, Field(ge=0)] = 0.0
    """Seconds added to each forward: time for something to happen."""
    poison: int | None = None
    """The row id whose loss is NaN."""

    def __call__(self, out: PolicyOut, batch: Batch) -> LossOut:
        if self.trace and torch.is_grad_enabled():
            self._note(batch)
        found = super().__call__(out, batch)
        if self.poison is not None and (batch.row_ids == self.poison).any():
            broken = {name: replace(term, total=term.total * torch.nan) for name, term in found.terms.items()}
            return replace(found, terms=broken)
        return found

    def _note(self, batch: Batch) -> None:
        time.sleep(self.pause)
        rows = [int(row) for row, weight in zip(batch.row_ids, batch.weight, strict=True) if weight > 0]
        line = {"time": time.time(), "rank": dist.get_rank(), "rows": rows}
        with (Path(self.trace) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
