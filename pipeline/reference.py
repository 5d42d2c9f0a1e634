"""Per-token reference log-probabilities of prepared rows, computed once on the whole cluster.

Rows are sorted by length and cut into pieces of equal cost; an actor holds the frozen reference and writes one part per
piece. The folder's name hashes the rows, the weights and the precision, so a stale cache is never found; an unfinished
one is refused by `rows.Rows` and continued here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.collate import collate
from pipeline.config import ModelConfig, RunConfig, digest
from pipeline.contracts import REFERENCE_SCHEMA
from pipeline.model import Policy, load_policy
from pipeline.order import micro_batches
from pipeline.pretrained import fingerprint, precision
from pipeline.rows import MANIFEST, Rows, finish, is_finished, part_of, write_part
from pipeline.stage import Item, Resources, run_stage

PIECE_TOKENS = 32768
"""Tokens of one piece: seconds of work for an actor, so that none waits long for the last one."""


class ScoreRows:
    """The actor: row positions → one part of reference log-probs."""

    def __init__(self, folder: str, rows: str, model: str, config: dict[str, Any], budget: int, gpu: bool) -> None:
        self.folder, self.rows, self.budget = Path(folder), Rows(Path(rows)), budget
        settings = ModelConfig.model_validate(config).model_copy(
            update={"lora": None, "activation_checkpointing": False}
        )
        self.device = torch.device("cuda" if gpu else "cpu")
        self.policy: Policy = load_policy(settings, model).to(self.device).eval()

    def __call__(self, item: Item) -> Item:
        if not is_whole(part_of(self.folder, item["number"])):
            write_part(self.folder, item["number"], self._score(item["positions"]))
        return {"rows": len(item["positions"])}

    @torch.inference_mode()
    def _score(self, positions: list[int]) -> pa.Table:
        ids: list[int] = []
        logprobs: list[list[list[float]]] = []
        for micro in micro_batches(positions, self.rows.lengths, 1, self.budget, self.policy.layout != "flat")[0]:
            rows = self.rows.take(micro)
            out = self.policy(collate(rows).to(self.device)).logprobs.cpu()
            for row, found in zip(rows, out, strict=True):
                ids.append(row.row_id)
                logprobs.append([found[k, : len(r)].tolist() for k, r in enumerate(row.response_ids)])
        return pa.Table.from_pydict({"row_id": ids, "ref_logprobs": logprobs}, schema=REFERENCE_SCHEMA)


def is_whole(part: Path) -> bool:
    """Whether an earlier, interrupted call wrote this part in full."""
    try:
        with pa.ipc.open_file(pa.memory_map(str(part))) as reader:
            reader.read_all().validate(full=True)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def score(config: RunConfig, rows_folder: Path, model: str, local: bool = False) -> Path:
    """Reference log-probs of all rows under the weights at `model`; returns their finished folder."""
    cache = Path(config.storage) / "cache"
    dtype = str(precision(config.model.dtype))
    key = digest(1, rows_folder.name, fingerprint(model, cache), dtype, config.model.attention)
    folder = cache / f"reference-{key}"
    if is_finished(folder):
        return folder
    if (folder / MANIFEST).is_file():  # it was finished and is damaged: no part of it can be trusted
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    gpu = config.scaling.gpus_per_worker > 0
    pieces = _pieces(Rows(rows_folder).lengths)
    arguments = {
        "folder": str(folder),
        "rows": str(rows_folder),
        "model": model,
        "config": config.model.model_dump(mode="json"),
        "budget": config.train.tokens_per_micro_batch,
        "gpu": gpu,
    }
    resources = Resources(
        cpus=config.scaling.cpus_per_worker, gpus=config.scaling.gpus_per_worker, actors=config.scaling.data_actors
    )
    items = [{"number": i, "positions": piece.tolist()} for i, piece in enumerate(pieces)]
    done = run_stage(ScoreRows, arguments, items, label="reference", resources=resources, local=local, unit="piece")
    total = sum(item["rows"] for item in done)
    finish(folder, len(pieces), {"rows": total, "model": model, "dtype": dtype})
    Rows(rows_folder, folder)  # refuses missing rows
    return folder


def _pieces(lengths: np.ndarray) -> list[np.ndarray]:
    """Positions, longest first (a row too long for memory fails at once), in pieces of about `PIECE_TOKENS`."""
    order = np.argsort(-lengths, kind="stable")
    piece = (np.cumsum(lengths[order]) - 1) // min(PIECE_TOKENS, max(1, int(lengths.sum()) // 8))
    return np.split(order, np.flatnonzero(np.diff(piece)) + 1) if len(order) else []
