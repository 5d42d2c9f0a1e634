"""What the frozen reference says of prepared rows, computed once: per-token log-probabilities, and where an objective asks for the
exact KL and it is cheaper (`reference_cost`), the last hidden states.

Rows are scored piece by piece (`reference_pieces`) in the order in which training reads them, and no piece that a run does not
read: before training, beside it on what else the cluster has, or in one process each piece before its turn. An actor holds
the reference and writes one part per piece. The folder's name hashes the rows, the weights and the precision, so a stale cache
is never found; within it each order of the rows has a folder of its own, and one that holds all rows serves every order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.collate import collate
from pipeline.config import ModelConfig, RunConfig, digest
from pipeline.contracts import REFERENCE_SCHEMA, STATES_SCHEMA
from pipeline.durable import clear_leftovers, write_json, write_text
from pipeline.model import Policy, load_policy
from pipeline.model_files import fingerprint
from pipeline.order import micro_batches
from pipeline.patience import patiently
from pipeline.pretrained import load_config, settled
from pipeline.redaction import redact
from pipeline.reference_pieces import Pieces, order_of
from pipeline.rows import (
    FORM,
    MANIFEST,
    Rows,
    StaleCache,
    finish,
    is_finished,
    manifest,
    part_of,
    whole_parts,
    write_part,
)
from pipeline.stage import Item, Resources, left_beside, run_stage
from pipeline.trunk import pads

logger = logging.getLogger(__name__)

REFUSED, SCORING = "refused.txt", "scoring.txt"
"""In a folder whose rows could not be scored: why. Workers that wait for them end with it. While they are scored, it lies
there under the other name with what is true if it ever takes the first: a file can be renamed where nothing can be written."""


class ScoreRows:
    """The actor: a piece of the rows → one part of reference log-probs, and one of hidden states where there is a folder for them."""

    def __init__(
        self,
        folder: str | None,
        states: str | None,
        rows: str,
        model: str,
        config: dict[str, Any],
        budget: int,
        gpu: bool,
    ) -> None:
        self.folder, self.states = (Path(path) if path else None for path in (folder, states))
        self.rows, self.budget = Rows(Path(rows)), budget
        settings = ModelConfig.model_validate(config).model_copy(
            update={"lora": None, "activation_checkpointing": False}
        )
        self.device = torch.device("cuda" if gpu else "cpu")
        self.policy: Policy = load_policy(settings, model, keep_states=states is not None).to(self.device).eval()

    def __call__(self, item: Item) -> Item:
        folders = [self.folder, *([self.states] if self.states else [])]
        missing = [folder is not None and not part_of(folder, item["number"]).is_file() for folder in folders]
        if any(missing):
            for folder, table, lacks_it in zip(folders, self.tables(item["positions"]), missing, strict=True):
                if lacks_it:
                    write_part(folder, item["number"], table)
        return {"number": item["number"]}

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


def cache_of(config: RunConfig, rows_folder: Path, model: str, kind: str) -> Path:
    """The cache of what `model` says of these rows, in whatever order: its name is part of a run's identity."""
    cache = Path(config.storage) / "cache"
    own = settled(config).model
    # A change of what some precision computes changes its number.
    arithmetic = {"bfloat16": 2}.get(own.dtype, 1)
    key = digest(arithmetic, rows_folder.name, fingerprint(model, cache), own.dtype, own.attention)
    return cache / f"{kind}-{key}"


def folder_of(config: RunConfig, rows_folder: Path, model: str) -> Path:
    """Where the log-probs of this order of the rows are, or would be."""
    return cache_of(config, rows_folder, model, "reference") / order_of(config)


def score(config: RunConfig, rows_folder: Path, model: str, local: bool = False, states: bool = False) -> Path:
    """Reference log-probs of all rows that a run reads, under the weights at `model`; returns their finished folder.

    states: write the hidden states, too, from the same forward.
    """
    scoring = Scoring(config, rows_folder, model, local, states)
    scoring.run(scoring.pieces.of_the_run)
    return scoring.folder


class Scoring:
    """The reference's part in one run: the pieces of its rows, which of them are missing, and three ways to make them.

    `folder` is where log-probs are, or will be, and `states` where hidden states are.
    """

    def __init__(
        self, config: RunConfig, rows_folder: Path, model: str, local: bool = False, states: bool = False
    ) -> None:
        self.config, self.model, self.local, self._rows = config, model, local, rows_folder
        self.pieces = Pieces.of(config, Rows(rows_folder))
        self.folder = self._place("reference")
        self.states = self._place("states") if states else None
        self._missing: set[int] | None = None  # None: nobody has looked yet

    def _place(self, kind: str) -> Path:
        """This order's own folder where it was begun, else one that holds all rows, else its own."""
        cache = cache_of(self.config, self._rows, self.model, kind)
        own = cache / order_of(self.config)
        if not own.is_dir():
            for other in sorted(cache.glob(f"*/{MANIFEST}")):
                if _rows_in(other.parent) == len(self.pieces.numbers) and is_finished(other.parent):
                    return other.parent
        return own

    @property
    def _folders(self) -> list[Path]:
        return [folder for folder in (self.folder, self.states) if folder is not None]

    @property
    def _own(self) -> list[Path]:
        """Folders that this order adds to; another's holds all rows already."""
        return [folder for folder in self._folders if folder.name == order_of(self.config)]

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of these pieces that are not there; parts that are damaged are removed, and count as such."""
        if self._missing is None:
            self._missing = set()
            for folder in self._own:
                whole = whole_parts(folder)
                for number in set(range(len(self.pieces))) - whole:
                    part_of(folder, number).unlink(missing_ok=True)
                    self._missing.add(number)
        return [number for number in numbers if number in self._missing]

    def run(
        self, numbers: Sequence[int], resources: Resources | None = None, ended: Callable[[], bool] = lambda: False
    ) -> None:
        """Make what is missing of these pieces, in their order, and declare complete what is there."""
        if missing := self.missing(numbers):
            self._make(missing, resources or actor_resources(self.config), ended)
        self._finish()

    def for_reading(self, positions: np.ndarray) -> None:
        """Make the pieces of these rows, and behind them as much again as there is already.

        The reference is loaded for that and released again: its memory is needed between two steps only, and as each time twice as
        much is scored, it is loaded a few times.
        """
        asked = set(self.pieces.numbers[positions].tolist())
        missing = self.missing(self.pieces.of_the_run)
        room = int(self.pieces.tokens.sum() - self.pieces.tokens[missing].sum())
        chosen = []
        for number in missing:
            if number in asked or room > 0:
                chosen.append(number)
                room -= int(self.pieces.tokens[number])
            asked.discard(number)
            if not asked and room <= 0:
                break
        self._make(chosen, actor_resources(self.config))

    @contextmanager
    def while_training(self) -> Iterator[Callable[[np.ndarray], None] | None]:
        """What makes the rows' pieces before their turn, for a worker in this process; None: they come by themselves.

        On a cluster they are made beside training by what its workers leave free, and before it where that is nothing.
        """
        wanted = self.pieces.of_the_run
        for folder in self._folders:
            (folder / REFUSED).unlink(missing_ok=True)
        missing = self.missing(wanted)  # removes damaged pieces before a worker opens them
        if self.local:
            yield self.for_reading
        elif not missing:
            yield None
        elif (free := beside_training(self.config)) is None:
            self.run(wanted)
            yield None
        else:
            with self._beside(wanted, free):
                yield None
        self._finish()

    @contextmanager
    def _beside(self, numbers: Sequence[int], resources: Resources) -> Iterator[None]:
        ended = threading.Event()
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SCORING, "scoring ended early; the driver's output says why\n")

        def work() -> None:
            try:
                self.run(numbers, resources, ended.is_set)
            except BaseException as error:  # told by the workers, who wait for it, or else by nobody
                logger.warning("reference: %s", error)
                refuse = partial(self._refuse, redact(str(error)))
                patiently(refuse, Path(self.config.storage), self.config.checkpoint.patience, hurry=ended)

        thread = threading.Thread(target=work, name="reference", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for folder in self._folders:
                with suppress(OSError):
                    (folder / SCORING).unlink()

    def _refuse(self, why: str) -> None:
        """Have the workers end, who wait for pieces that will not come: also on a full disk."""
        for folder in self._folders:
            try:
                write_text(folder / REFUSED, why + "\n")
            except OSError:
                if not (folder / REFUSED).is_file():
                    (folder / SCORING).replace(folder / REFUSED)

    def _make(self, numbers: Sequence[int], resources: Resources, ended: Callable[[], bool] = lambda: False) -> None:
        for folder in self._own:
            folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder)
        if self.states in self._own:
            write_json(self.states / FORM, self._form())
        items = [{"number": number, "positions": self.pieces.rows_of(number).tolist()} for number in numbers]
        folder, states = (place if place in self._own else None for place in (self.folder, self.states))
        arguments = actor_arguments(self.config, self._rows, self.model, folder, states)
        sizes = [int(self.pieces.tokens[number]) for number in numbers]
        stage = run_stage(
            ScoreRows,
            arguments,
            items,
            label="reference",
            resources=resources,
            local=self.local,
            unit="token",
            sizes=sizes,
        )
        with closing(stage):
            for item in stage:
                self._missing.discard(item["number"])
                if ended():
                    return

    def _form(self) -> dict[str, Any]:
        text = load_config(self.model, self.config.model.trust_remote_code).get_text_config()
        return {"dtype": settled(self.config).model.dtype, "width": text.hidden_size}

    def _finish(self) -> None:
        """Declare complete what is there, unless it was already."""
        missing = set(self.missing(range(len(self.pieces))))
        there = [number for number in range(len(self.pieces)) if number not in missing]
        scored = sum(len(self.pieces.rows_of(number)) for number in there)
        for folder in self._own:
            if there and _rows_in(folder) != scored:
                finish(folder, there, {"rows": scored, "model": self.model})


def _rows_in(folder: Path) -> int | None:
    """How many rows a finished folder holds; None of another one."""
    try:
        return manifest(folder).get("rows")
    except StaleCache:
        return None


def actor_arguments(
    config: RunConfig, rows_folder: Path, model: str, folder: Path | None, states: Path | None
) -> dict[str, Any]:
    """What `ScoreRows` is made with: the folders that it writes to."""
    return {
        "folder": str(folder) if folder else None,
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


def beside_training(config: RunConfig) -> Resources | None:
    """The actors that a cluster has room for beside the training workers; None: for none."""
    own = actor_resources(config)
    room = left_beside(own, config.scaling.most_workers)
    return replace(own, actors=min(room, own.actors or room)) if room else None
