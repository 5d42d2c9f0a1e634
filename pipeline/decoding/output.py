"""What `jobs.decode` writes: pieces as they are done, then one file, or one folder as `datasets` saves them.

A piece is two files, rows and refused rows, and a third with counts that is written last: without it the piece does not exist.
Assembling streams the pieces, in order, into the file that was asked for and deletes them; a description beside it says what
it was made of, so that the same job does nothing a second time.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.durable import building, digest_file, discard, read_json, recall_json, replacing, write_json, write_text
from pipeline.redaction import redacted

logger = logging.getLogger(__name__)

FOLDER = "folder"
"""Among the pieces: the output as a folder, until it is whole."""
ENDINGS = (".jsonl", ".parquet", "")
"""Of the output's name; without one it is a folder."""
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("index", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("policy_logprobs", pa.list_(pa.float32())),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("score", pa.float64()),
        ("method", pa.string()),
        ("seconds", pa.float64()),
        ("details", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))),  # no map: datasets has none
    ]
)
"""A row of the output: one completion. logprobs: under what the decoder drew from; seconds: the batch's, shared out evenly."""

FACTS = ("rows", "tokens", "refused", "unscored", "seconds", "scored", "score", "score_squared")


def check_output(path: Path) -> None:
    """Raises ConfigError for a name that says nothing about the format."""
    if path.suffix not in ENDINGS:
        raise ConfigError(
            f"sampling.output: {path} has to end in .jsonl or .parquet, or in nothing for a folder that datasets reads"
        )
    saved = (path / "dataset_info.json").is_file()
    if not path.suffix and path.exists() and not saved:
        raise ConfigError(f"sampling.output: {path} is there and no folder saved by datasets; name another")


class Pieces:
    """The folder of finished pieces of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self, number: int, rows: list[dict[str, Any]], refused: list[dict[str, str]], seconds: float, unscored: int = 0
    ) -> None:
        """Write piece `number`; it exists when this returns, or not at all. unscored: of those refused, by a scorer that failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, lines in ((self._rows(number), rows), (self._refused(number), refused)):
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in redacted(lines)))
        scores = [row["score"] for row in rows if row["score"] is not None]
        facts = {
            "rows": len(rows),
            "tokens": sum(len(row["token_ids"]) for row in rows),
            "refused": len(refused),
            "unscored": unscored,
            "seconds": seconds,
            "scored": len(scores),
            "score": sum(scores),
            "score_squared": sum(score * score for score in scores),
            "files": [digest_file(path) for path in (self._rows(number), self._refused(number))],
        }
        write_json(self._facts(number), facts)

    def is_done(self, number: int) -> bool:
        """Whether piece `number` was written to its end, is what was written, and no scorer failed in it: that may be mended by now."""
        known = recall_json(self._facts(number), _checked_facts)
        if known is None or known[0]["unscored"]:
            return False
        paths = (self._rows(number), self._refused(number))
        if all(path.is_file() and digest_file(path) == digest for path, digest in zip(paths, known[1], strict=True)):
            return True
        logger.warning("%s: damaged; it is decoded again", paths[0])
        return False

    def facts(self, count: int) -> dict[str, float]:
        """Totals of pieces 0 … count − 1."""
        found = dict.fromkeys(FACTS, 0.0)
        for number in range(count):
            facts, _ = read_json(
                self._facts(number), _checked_facts, "delete it, then the same command decodes it again"
            )
            for name, value in facts.items():
                found[name] += value
        return found

    def assemble(self, count: int, output: Path, quarantine: Path) -> None:
        """Join pieces 0 … count − 1 into `output` and, where rows were refused, `quarantine`."""
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = (self._rows(number) for number in range(count))
        if output.suffix:
            with replacing(output) as aside:
                _join(rows, aside) if output.suffix == ".jsonl" else _write_parquet(rows, aside)
        else:
            with building(self.folder / FOLDER) as aside:
                _write_folder(rows, aside)
            discard(output)
            (self.folder / FOLDER).rename(output)
        refused = [self._refused(number) for number in range(count)]
        if any(path.stat().st_size for path in refused):
            with replacing(quarantine) as aside:
                _join(refused, aside)
        else:
            quarantine.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the pieces."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _rows(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.rows.jsonl"

    def _refused(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.refused.jsonl"

    def _facts(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.json"


def _checked_facts(found: Any) -> tuple[dict[str, float], list[str]]:
    """Counts of a piece, and its files' digests."""
    rows, refused = found["files"]
    return {name: float(found[name]) for name in FACTS}, [str(rows), str(refused)]


def _join(parts: Iterable[Path], target: Path) -> None:
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out)


def _write_folder(parts: Iterator[Path], target: Path) -> None:
    """A folder as `datasets` saves it, by way of a parquet file in it; memory stays that of a batch."""
    from datasets import Dataset

    work = target / ".work"
    work.mkdir()
    _write_parquet(parts, work / "rows.parquet")
    Dataset.from_parquet(str(work / "rows.parquet"), cache_dir=str(work)).save_to_disk(str(target))
    shutil.rmtree(work)


def _write_parquet(parts: Iterator[Path], target: Path) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(target, SCHEMA) as writer:
        for part in parts:
            rows = [json.loads(line) for line in part.read_text(encoding="utf-8").split("\n") if line]
            for row in rows:
                row["details"] = [{"name": name, "value": value} for name, value in row["details"].items()]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
