"""What the frozen reference says of prepared rows, computed once on the whole cluster: per-token log-probabilities, and where
an objective asks for the exact KL and it is cheaper (`reference_cost`), the last hidden states.

Rows are sorted by length and cut into pieces of equal cost; an actor holds the reference and writes one part per
piece. The folder's name hashes the rows, the weights and the precision, so a stale cache is never found; an unfinished
one is refused by `rows.Rows` and continued here.
"""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.arrow_files import ExtensionType, read_ipc
from pipeline.collate import collate
from pipeline.config import ModelConfig, RunConfig, digest
from pipeline.contracts import REFERENCE_SCHEMA, STATES_SCHEMA
from pipeline.model import Policy, load_policy
from pipeline.model_files import fingerprint
from pipeline.order import micro_batches, position_type
from pipeline.pretrained import load_config, settled
from pipeline.rows import MANIFEST, Rows, finish, is_finished, part_of, write_part
from pipeline.stage import Item, Resources, run_stage
from pipeline.trunk import pads

PIECE_TOKENS = 32768
"""Tokens of one piece: seconds of work for an actor, so that none waits long for the last one."""
MOST_PIECES = 2**14
"""Pieces at most: each is a task of Ray's and a file that every worker maps (Linux allows 65,530 maps a process)."""


class ScoreRows:
    """The actor: a range of the rows, longest first → one part of reference log-probs, and one of hidden states where there is a folder for them."""

    def __init__(
        self, folder: str, states: str | None, rows: str, model: str, config: dict[str, Any], budget: int, gpu: bool
    ) -> None:
        self.folder, self.states = Path(folder), Path(states) if states else None
        self.rows, self.budget = Rows(Path(rows)), budget
        settings = ModelConfig.model_validate(config).model_copy(
            update={"lora": None, "activation_checkpointing": False}
        )
        self.longest_first = _longest_first(self.rows.lengths)
        self.device = torch.device("cuda" if gpu else "cpu")
        self.policy: Policy = load_policy(settings, model, keep_states=states is not None).to(self.device).eval()

    def __call__(self, item: Item) -> Item:
        folders = [folder for folder in (self.folder, self.states) if folder is not None]
        missing = [folder for folder in folders if not is_whole(part_of(folder, item["number"]))]
        if missing:
            positions = self.longest_first[item["first"] : item["stop"]].tolist()
            for folder, table in zip(folders, self.tables(positions), strict=True):
                if folder in missing:
                    write_part(folder, item["number"], table)
        return {"rows": item["stop"] - item["first"]}

    @torch.inference_mode()
    def tables(self, positions: list[int]) -> list[pa.Table]:
        """Log-probs of these rows, and behind them the states where they are kept."""
        ids: list[int] = []
        logprobs: list[list[list[float]]] = []
        states: list[bytes] = []
        padded = pads(self.policy.layout)
        for micro in micro_batches(positions, self.rows.lengths[positions], 1, self.budget, padded)[0]:
            rows = self.rows.take(micro)
            batch = collate(rows)
            out = self.policy(batch.to(self.device))
            for row, found in zip(rows, out.logprobs.cpu(), strict=True):
                ids.append(row.row_id)
                logprobs.append([found[k, : len(r)].tolist() for k, r in enumerate(row.response_ids)])
            if out.states is not None:
                own = batch.response_mask.flatten(1).sum(-1).tolist()  # trained tokens of each row
                states += map(_bytes, out.states.cpu().split(own))
        tables = [pa.Table.from_pydict({"row_id": ids, "ref_logprobs": logprobs}, schema=REFERENCE_SCHEMA)]
        if self.states is not None:
            tables.append(pa.Table.from_pydict({"row_id": ids, "ref_states": states}, schema=STATES_SCHEMA))
        return tables


def _bytes(states: torch.Tensor) -> bytes:
    return states.contiguous().view(torch.uint8).numpy().tobytes()


def is_whole(part: Path) -> bool:
    """Whether an earlier, interrupted call wrote this part in full."""
    try:
        read_ipc(part).validate(full=True)
    except (OSError, pa.ArrowInvalid, ExtensionType):
        return False
    return True


def folder_of(config: RunConfig, rows_folder: Path, model: str, kind: str) -> Path:
    """Where what `model` says of these rows is, or will be."""
    cache = Path(config.storage) / "cache"
    own = settled(config).model
    # A change of what some precision computes changes its number.
    arithmetic = {"bfloat16": 2}.get(own.dtype, 1)
    key = digest(arithmetic, rows_folder.name, fingerprint(model, cache), own.dtype, own.attention)
    return cache / f"{kind}-{key}"


def score(config: RunConfig, rows_folder: Path, model: str, local: bool = False, states: Path | None = None) -> Path:
    """Reference log-probs of all rows under the weights at `model`; returns their finished folder.

    states: write the hidden states, too, from the same forward, into this folder.
    """
    folder = folder_of(config, rows_folder, model, "reference")
    folders = [folder, *([states] if states else [])]
    if all(map(is_finished, folders)):
        return folder
    for one in folders:
        if (one / MANIFEST).is_file() and not is_finished(one):  # it is damaged: no part of it can be trusted
            shutil.rmtree(one)
        one.mkdir(parents=True, exist_ok=True)
    pieces = _pieces(Rows(rows_folder).lengths)
    items = [{"number": i, "first": first, "stop": stop} for i, (first, stop) in enumerate(pieces)]
    arguments = actor_arguments(config, rows_folder, model, folder, states)
    label, resources = "reference", actor_resources(config)
    done = run_stage(ScoreRows, arguments, items, label=label, resources=resources, local=local, unit="piece")
    meta = {
        "rows": sum(item["rows"] for item in done),
        "model": model,
        "dtype": settled(config).model.dtype,
    }
    width = load_config(model, config.model.trust_remote_code).get_text_config().hidden_size
    for one in folders:
        if not is_finished(one):
            finish(one, len(pieces), meta | ({"width": width} if one == states else {}))
    Rows(rows_folder, folder, states)  # refuses missing rows
    return folder


def actor_arguments(
    config: RunConfig, rows_folder: Path, model: str, folder: Path, states: Path | None
) -> dict[str, Any]:
    """What `ScoreRows` is made with."""
    return {
        "folder": str(folder),
        "states": str(states) if states else None,
        "rows": str(rows_folder),
        "model": model,
        "config": config.model.model_dump(mode="json"),
        "budget": config.train.tokens_per_micro_batch,
        "gpu": config.scaling.gpus_per_worker > 0,
    }


def actor_resources(config: RunConfig) -> Resources:
    """An actor gets what a training worker gets."""
    scaling = config.scaling
    return Resources(cpus=scaling.cpus_per_worker, gpus=scaling.gpus_per_worker, actors=scaling.data_actors)


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """Positions in the order of scoring: a row too long for memory fails at once."""
    return np.argsort(-lengths, kind="stable").astype(position_type(len(lengths)))


def _pieces(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Ranges (first, stop) of `_longest_first`, of about `PIECE_TOKENS` each, or as many as make `MOST_PIECES`."""
    total = int(lengths.sum())
    size = max(min(PIECE_TOKENS, max(1, total // 8)), total // MOST_PIECES)
    piece = (np.cumsum(np.sort(lengths)[::-1], dtype=np.int64) - 1) // size
    bounds = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(lengths)]
    return list(pairwise(bounds)) if len(lengths) else []
