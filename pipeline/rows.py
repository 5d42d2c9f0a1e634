"""Prepared rows on disk: Arrow IPC parts that are written once, memory-mapped, and addressed by an index.

A folder of parts is finished when its `manifest.json` exists (it is written last) and every part is what the manifest says;
anything else is refused or made again. Parts are written aside and renamed, under names that follow from the plan: a
retried or continued `prepare` repeats no finished part and never shows a half-written one.

Rows and their reference log-probs are separate folders that join by row id; a missing row is an error, never a gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.arrow_files import ExtensionType, read_ipc
from pipeline.config import ConfigError, DataConfig
from pipeline.contracts import REFERENCE_SCHEMA, ROW_SCHEMA, STATES_SCHEMA, Row
from pipeline.durable import Corrupt, digest_file, read_json, replacing, write_json
from pipeline.errors import UserError
from pipeline.order import MicroBatch, position_type

MANIFEST = "manifest.json"
FORM = "form.json"
"""Number format and width of hidden states, in their folder."""
_COLUMNS = tuple(field.name for field in fields(Row) if field.name in ROW_SCHEMA.names)


class StaleCache(UserError, ValueError):
    """A prepared folder is unfinished, damaged, or lacks rows."""


def write_part(folder: Path, number: int, table: pa.Table) -> Path:
    """Write one part under its final name, atomically."""
    return write_tables(folder, number, [table], table.schema)


def write_tables(folder: Path, number: int, tables: Iterable[pa.Table], schema: pa.Schema) -> Path:
    """The same, of tables one after the other."""
    path = part_of(folder, number)
    with replacing(path) as aside, pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in tables:
            writer.write_table(table)
    return path


def part_of(folder: Path, number: int) -> Path:
    """Where part `number` is, or will be."""
    return folder / f"part-{number:06d}.arrow"


def finish(folder: Path, parts: Iterable[int], meta: dict[str, Any]) -> None:
    """Declare the folder complete: these parts with sizes and checksums, and what it was made of."""
    found = {path.name: [path.stat().st_size, digest_file(path)] for path in (part_of(folder, i) for i in parts)}
    write_json(folder / MANIFEST, {"parts": found, **meta})


def is_finished(folder: Path) -> bool:
    """Whether the folder has a manifest and all parts are there, to the last bit."""
    try:
        parts = manifest(folder)["parts"]
    except StaleCache:
        return False
    return all(digest_file(folder / name) == known for name, (_, known) in parts.items())


def whole_parts(folder: Path) -> set[int]:
    """Numbers of the parts that are there and whole: by the manifest's checksum, else as far as Arrow can tell."""
    known = {}
    if (folder / MANIFEST).is_file():
        with suppress(StaleCache):
            known = manifest(folder, missing=True)["parts"]
    return {
        int(path.stem.removeprefix("part-"))
        for path in folder.glob("part-*.arrow")
        if (digest_file(path) == known[path.name][1] if path.name in known else _is_readable(path))
    }


def _is_readable(part: Path) -> bool:
    try:
        read_ipc(part).validate(full=True)
    except (OSError, pa.ArrowInvalid, ExtensionType):
        return False
    return True


def manifest(folder: Path, missing: bool = False) -> dict[str, Any]:
    """The folder's manifest, after checking its parts against it (`missing`: they may be missing). Raises `StaleCache`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StaleCache(f"{folder}: not finished; run `qalign prepare` again")
    try:
        found = read_json(path, _checked, f"delete {folder} and run `qalign prepare` again")
    except Corrupt as error:
        raise StaleCache(str(error)) from None
    for name, (size, _) in found["parts"].items():
        part = folder / name
        if missing and part.parent == folder:
            continue
        if part.parent != folder or not part.is_file() or part.stat().st_size != size:
            raise StaleCache(f"{part}: missing or damaged; delete {folder} and run `qalign prepare` again")
    return found


def _checked(found: Any) -> dict[str, Any]:
    return {**found, "parts": {str(name): (int(size), str(known)) for name, (size, known) in found["parts"].items()}}


def _open_parts(folder: Path, schema: pa.Schema) -> pa.Table:
    """All parts as one memory-mapped table."""
    tables = [_open_part(folder / name, schema) for name in manifest(folder)["parts"]]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _open_part(part: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = read_ipc(part)
    except (ExtensionType, pa.ArrowException) as error:
        raise StaleCache(f"{part}: {error}; delete {part.parent} and run `qalign prepare` again") from None
    if not table.schema.equals(schema):
        raise StaleCache(f"{part}: other columns; delete {part.parent} and run `qalign prepare` again")
    return table


class _Scores:
    """What a reference says of rows: a table that joins them by row id, of parts to which others may come."""

    def __init__(self, folder: Path, schema: pa.Schema, row_ids: np.ndarray, growing: bool) -> None:
        self.folder, self._schema, self._row_ids, self._growing = folder, schema, row_ids, growing
        self._opened: set[str] = set()
        self._table = schema.empty_table()
        self._places = np.full(len(row_ids), -1, dtype=position_type(len(row_ids)))
        self.refresh()

    def refresh(self) -> None:
        """Open the parts that have come since the last call."""
        names = (
            sorted(p.name for p in self.folder.glob("part-*.arrow"))
            if self._growing
            else manifest(self.folder)["parts"]
        )
        new = [name for name in names if name not in self._opened]
        if not new:
            return
        tables = [_open_part(self.folder / name, self._schema) for name in new]
        start, added = len(self._table), pa.concat_tables(tables)
        self._table = pa.concat_tables([self._table, added])
        self._opened.update(new)
        ids = added.column("row_id").to_numpy()
        places = np.searchsorted(self._row_ids, ids)
        known = (places < len(self._row_ids)) & (self._row_ids[np.minimum(places, len(self._row_ids) - 1)] == ids)
        self._places[places[known]] = start + np.flatnonzero(known)

    def lacks(self, positions: np.ndarray) -> np.ndarray:
        """Which of these rows it says nothing of. [n] → [≤ n]"""
        return positions[self._places[positions] < 0]

    def cell(self, name: str, position: int) -> pa.Scalar:
        """Raises `StaleCache` for a row that is not in it: an error, never a gap."""
        place = int(self._places[position])
        if place < 0:
            raise StaleCache(
                f"{self.folder}: row {int(self._row_ids[position])} is not in it; delete the folder and run `qalign prepare` again"
            )
        return self._table.column(name)[place]


def _checked_form(found: Any) -> tuple[torch.dtype, int]:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[found["dtype"]], int(found["width"])


@dataclass(frozen=True, slots=True)
class Split:
    """Positions in `Rows` to train on and to hold out, both ascending."""

    train: np.ndarray
    eval: np.ndarray
    left_out: int  # training rows that the mix of shares has no place for


class Rows:
    """Random access to prepared rows, in the order of their row ids.

    Args:
        folder: what `data.prepare` wrote.
        reference: what `reference.score` wrote for these rows, or None.
        states: the hidden states that it wrote beside, or None.
        growing: rows are still being scored; ask `unscored` before they are read.
    """

    def __init__(
        self, folder: Path, reference: Path | None = None, states: Path | None = None, growing: bool = False
    ) -> None:
        table = _open_parts(folder, ROW_SCHEMA)
        ids = table.column("row_id").to_numpy()
        # Parts are numbered as their records are, so that rows lie in order: no index is needed, which at a billion counts.
        self._table, self._order = table, None if bool(np.all(ids[1:] > ids[:-1])) else np.argsort(ids, kind="stable")
        self.row_ids: np.ndarray = self._ordered(ids)
        self.source_index: np.ndarray = self._ordered(table.column("source_index").to_numpy())
        self.prompt_hash: np.ndarray = self._ordered(table.column("prompt_hash").to_numpy())
        self.lengths: np.ndarray = self._ordered(_lengths(table))
        self._reference = _Scores(reference, REFERENCE_SCHEMA, self.row_ids, growing) if reference else None
        self._states = _Scores(states, STATES_SCHEMA, self.row_ids, growing) if states else None
        self._form: tuple[torch.dtype, int] | None = None  # of the states; known once there are some

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, position: int) -> Row:
        place = self._place(position)
        found = {name: _cell(self._table, name, place) for name in _COLUMNS}
        if self._reference is not None:
            found["ref_logprobs"] = self._reference.cell("ref_logprobs", position).as_py()
        if self._states is not None:
            found["ref_states"] = self._states_of(position)
        return Row(**found)

    def _ordered(self, column: np.ndarray) -> np.ndarray:
        return column if self._order is None else column[self._order]

    def _place(self, position: int) -> int:
        """Where the table has the row."""
        return int(position if self._order is None else self._order[position])

    def _states_of(self, position: int) -> torch.Tensor:
        """[n, D]; a copy, as the file is mapped read-only."""
        assert self._states is not None
        cell = self._states.cell("ref_states", position)
        if self._form is None:
            remedy = f"delete {self._states.folder} and run `qalign prepare` again"
            self._form = read_json(self._states.folder / FORM, _checked_form, remedy)
        dtype, width = self._form
        return torch.from_numpy(np.frombuffer(cell.as_buffer(), dtype=np.uint8).copy()).view(dtype).view(-1, width)

    def unscored(self, positions: np.ndarray) -> np.ndarray:
        """Which of these rows the reference has not scored yet. [n] → [≤ n]"""
        scores = [scores for scores in (self._reference, self._states) if scores is not None]
        for one in scores:
            if len(one.lacks(positions)):
                one.refresh()
        return np.unique(np.concatenate([np.zeros(0, positions.dtype), *(one.lacks(positions) for one in scores)]))

    def source(self, position: int) -> str:
        """Where the row came from, `file:line`."""
        return _cell(self._table, "source", self._place(position))

    def weightless(self, data: DataConfig, split: Split) -> list[str]:
        """Warnings about sources all of whose rows have weight 0."""
        positions = np.concatenate([split.train, split.eval])
        weights = self._ordered(self._table.column("weight").to_numpy())
        return weightless(data, weights[positions], self.source_index[positions])

    def trained_tokens(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Of all responses of each of these rows together: those that are the policy's. [n]"""
        responses, trained = self._table.column("response_ids"), self._table.column("trained")

        def count(place: int) -> int:
            mask = trained[place]
            return mask.values.flatten().true_count if mask.is_valid else len(responses[place].values.flatten())

        return np.array([count(self._place(int(i))) for i in positions], dtype=np.int64)

    def take(self, micro: MicroBatch) -> list[Row]:
        """The rows of a micro-batch; those of a filler have weight 0."""
        rows = [self[position] for position in micro.rows]
        return [replace(row, weight=0.0) for row in rows] if micro.filler else rows

    def split(self, data: DataConfig, seed: int) -> Split:
        """Training and held-out positions: by eval source, or by prompt; then the mix of shares."""
        training = self.source_index < len(data.sources)
        held_out = ~training
        if data.eval_fraction:
            prompts = np.unique(self.prompt_hash[training])  # ascending hashes: a random but fixed order
            chosen = prompts[: int(np.ceil(data.eval_fraction * len(prompts)))]
            held_out = np.isin(self.prompt_hash, chosen)
            training = training & ~held_out
        train = _positions(training)
        mixed = _mix(train, self.source_index[train], [source.share for source in data.sources], seed)
        return Split(mixed, _positions(held_out), len(train) - len(mixed))

    def also_trained(self, split: Split) -> int:
        """Held-out rows whose prompt is trained on, too: possible with `data.eval_sources`, which choose their own prompts."""
        return int(np.isin(self.prompt_hash[split.eval], self.prompt_hash[split.train]).sum())


def weightless(data: DataConfig, weights: np.ndarray, source_index: np.ndarray) -> list[str]:
    """Warnings about sources all of whose rows have weight 0. weights, source_index [n]"""
    sources = [(f"data.sources.{i}", source) for i, source in enumerate(data.sources)]
    sources += [(f"data.eval_sources.{i}", source) for i, source in enumerate(data.eval_sources)]
    found = np.setdiff1d(source_index, source_index[weights > 0])
    return [
        f"{key}: all rows of {source.path} have weight 0, so that no loss counts them; remove the source or the weights"
        for key, source in (sources[i] for i in found)
    ]


def _positions(chosen: np.ndarray) -> np.ndarray:
    return np.flatnonzero(chosen).astype(position_type(len(chosen)))


def _mix(train: np.ndarray, source: np.ndarray, shares: Sequence[float | None], seed: int) -> np.ndarray:
    """The largest subset of rows in which source i has its share; without shares, all rows."""
    if shares[0] is None:
        return train
    total = sum(share or 0.0 for share in shares)
    wanted = [(share or 0.0) / total for share in shares]
    counts = [int((source == i).sum()) for i in range(len(shares))]
    size = min(count / share for count, share in zip(counts, wanted, strict=True))
    kept = []
    for i, share in enumerate(wanted):
        own = train[source == i]
        if int(size * share + 1e-9) == 0:
            raise ConfigError(
                f"data.sources.{i}.share: so small that no row of it is used; raise it or remove the source"
            )
        kept.append(np.random.default_rng([seed, i]).permutation(own)[: int(size * share + 1e-9)])
    return np.sort(np.concatenate(kept))


def _lengths(table: pa.Table) -> np.ndarray:
    """Tokens of each packed row, from list offsets alone: no token is read. [n] int32"""
    lengths = [np.zeros(0, dtype=np.int32)]
    for prompts, responses in zip(table.column("prompt_ids").chunks, table.column("response_ids").chunks, strict=True):
        # Offsets compose: the outer ones index responses, the inner ones index tokens.
        inner, outer = responses.values.offsets.to_numpy(), responses.offsets.to_numpy()
        lengths.append(np.diff(prompts.offsets.to_numpy()) + np.diff(inner[outer]))
    return np.concatenate(lengths)


def _cell(table: pa.Table, name: str, place: int) -> Any:
    return table.column(name)[place].as_py()
