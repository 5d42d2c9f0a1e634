"""Whether an exact KL reads the reference's hidden states from a cache or runs the reference beside the policy: by measurement.

Both need the reference's output head at every step. Beyond it, running costs a forward of the trunk per step; the cache
costs one write (its forward is that of the log-probs, which are computed anyway) and a read per step, and place on the disk.

Left out: writing the cache (`reference`) and reading it (`rows`).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pipeline.collate import collate
from pipeline.config import RunConfig
from pipeline.durable import recall_json, write_json
from pipeline.order import micro_batches
from pipeline.reference import ScoreRows, actor_arguments, actor_resources, cache_of
from pipeline.rows import Rows, write_part
from pipeline.stage import Item, run_stage
from pipeline.trunk import pads, token_states

SAMPLE_TOKENS = 4096
"""Tokens of the rows that are measured: a second or so of work."""
DISK_SHARE = 0.5
"""Of the free disk at most so much goes to a cache that nobody asked for by name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cost:
    """Per token of packed rows: seconds, and bytes on disk."""

    live: float
    write: float
    read: float
    bytes: float

    def cached_is_cheaper(self, epochs: float) -> bool:
        """Over so many passes over the data."""
        return self.write + epochs * self.read < epochs * self.live


class MeasureCost(ScoreRows):
    """The actor: rows → the `Cost` of their hidden states, on this hardware and this storage."""

    def __call__(self, item: Item) -> Item:
        assert self.states is not None
        tokens = int(self.rows.lengths[item["positions"]].sum())
        live = min(self._run(item["positions"]) for _ in range(2))  # the first run warms up
        table = self.tables(item["positions"])[1]
        started = time.monotonic()
        part = write_part(self.states, 0, table)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # read it back from the storage, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = time.monotonic()
        part.read_bytes()
        read = time.monotonic() - written
        cost = Cost(live / tokens, (written - started) / tokens, read / tokens, part.stat().st_size / tokens)
        return asdict(cost)

    @torch.inference_mode()
    def _run(self, positions: list[int]) -> float:
        """Seconds of the trunk's forward over these rows."""
        padded = pads(self.policy.layout)
        dealt = micro_batches(positions, self.rows.lengths[positions], 1, self.budget, padded)[0]
        batches = [collate(self.rows.take(micro)).to(self.device) for micro in dealt]
        started = time.monotonic()
        for batch in batches:
            token_states(self.policy.lm, batch, self.policy.layout)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started


def keeps_states(config: RunConfig, rows_folder: Path, model: str, local: bool = False) -> bool:
    """Whether hidden states are kept; else the reference runs beside the policy.

    Under `model.reference_states=auto` both are measured, once for these rows, weights and storage.
    """
    folder, choice = cache_of(config, rows_folder, model, "states"), config.model.reference_states
    if choice == "auto":
        choice = _choose(config, rows_folder, model, folder, local)
    return choice == "cached"


def _choose(config: RunConfig, rows_folder: Path, model: str, folder: Path, local: bool) -> str:
    note = folder.with_suffix(".json")
    rows = Rows(rows_folder)
    cost = recall_json(note, _checked_cost)
    if cost is None:
        cost = Cost(**_measure(config, rows, rows_folder, model, local))
        write_json(note, asdict(cost))
    tokens, free = int(rows.lengths.sum()), shutil.disk_usage(folder.parent).free
    size, epochs = cost.bytes * tokens, _epochs(config, len(rows))
    fits = folder.is_dir() or size < DISK_SHARE * free  # a cache that was begun has its place
    choice = "cached" if fits and cost.cached_is_cheaper(epochs) else "live"
    logger.info(
        "reference states: %s (per 1000 tokens running takes %.3g s, reading %.3g s; %.3g GiB of %.3g GiB free)",
        choice,
        1000 * cost.live,
        1000 * cost.read,
        size / 2**30,
        free / 2**30,
    )
    return choice


def _checked_cost(known: Any) -> Cost:
    return Cost(**{field.name: float(known[field.name]) for field in fields(Cost)})


def _epochs(config: RunConfig, rows: int) -> float:
    """Passes over the data."""
    steps = config.train.max_steps
    whole = float(config.train.epochs)
    return whole if steps is None else min(whole, steps * config.train.rows_per_step / max(1, rows))


def _measure(config: RunConfig, rows: Rows, rows_folder: Path, model: str, local: bool) -> dict[str, Any]:
    taken = max(1, int((rows.lengths.cumsum() <= SAMPLE_TOKENS).sum()))
    aside = Path(tempfile.mkdtemp(prefix=".states-", dir=Path(config.storage) / "cache"))
    try:
        arguments = actor_arguments(config, rows_folder, model, aside, aside)
        items = [{"positions": list(range(min(taken, len(rows))))}]
        (found,) = run_stage(
            MeasureCost, arguments, items, label="reference cost", resources=actor_resources(config), local=local
        )
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return found
