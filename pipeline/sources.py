"""From `config.Source`s to raw records, in chunks that any process can read on its own.

`plan` makes one streaming pass over the files: it hashes the contents and cuts them into chunks that know the number
of their first record. `read` turns a chunk into `RawRecord`s; a record that cannot be read is one with an `error`,
never an exception.

Left out: finding files (`files`), JSON (`json_lines`, `json_records`), columns of other layouts (`columns`), what the fields mean
(`layouts`), and where chunks are read (`data`, on Ray).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.arrow_files import ExtensionType, holds_structs_of_structs, open_parquet, without_nulls
from pipeline.columns import mapped
from pipeline.config import ConfigError, DataConfig, Source, digest
from pipeline.files import File, compression, one_line, open_binary, resolve, size_of
from pipeline.json_lines import Part, Refused, cut_lines, read_lines
from pipeline.json_records import EXCERPT, BrokenArray, array_elements, excerpt, too_large
from pipeline.redaction import without_credentials


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one file. Plain numbers and strings only, so that `Chunk(**asdict(chunk))` survives Ray Data."""

    source_index: int  # which source
    path: str  # absolute path or URL
    format: str  # jsonl (bytes start…stop, at line starts), json (one array, whole), parquet (rows start…stop)
    start: int
    stop: int
    first_record: int  # row_id of its first record
    records: int
    first_line: int  # 1-based line, array element or row at which it begins
    label: str  # file name for people
    mapping: str  # JSON of the source's columns and trajectories; empty: the columns are ours
    max_record_bytes: int  # a larger record is refused unread
    cut: bool = False  # the source's limit lies within: what follows the last record is not read


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as it stands in its file; either `value` or `error` is None."""

    row_id: int  # running number over all sources, whatever the chunk size
    source: str  # "reviews.jsonl:17"
    value: dict[str, Any] | None
    error: str | None  # short and without text of the record, so that reasons can be counted
    raw: str  # excerpt for the quarantine file

    def content(self) -> dict[str, Any]:
        """The record's fields. Raises ValueError with `error` where there are none."""
        if self.value is None:
            raise ValueError(self.error)
        return self.value


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to read."""

    chunks: list[Chunk]
    fingerprint: str  # of contents, order and column mappings; not of places, names or chunk sizes
    records: int


MOST_CHUNKS = 2**13
"""Chunks of large sources, about: each becomes a task of Ray's and a file that every worker maps, and Linux allows a process 65,530 maps.
(Parquet, whose content is larger than its file, makes some times as many.)"""

MAX_RECORD_BYTES: int = DataConfig.model_fields["max_record_bytes"].default
BATCH_BYTES = 256 * 2**20
"""Of a suspicious parquet file's rows that are decoded together, at most: a row cannot be larger than its group."""
SUSPICIOUS = 50
"""How many times a row group is larger than what it is compressed to: text is less."""

_Span = tuple[int, int, int, int]
"""start, stop, first_line and records of a chunk to be."""


# --------------------------------------------------------------------------------------------------- plan


def plan(
    sources: Sequence[Source],
    work: Path,
    first_source_index: int = 0,
    chunk_bytes: int = 8 << 20,
    *,
    first_record: int = 0,
    key: str = "data.sources",
    max_record_bytes: int = MAX_RECORD_BYTES,
    limit: int | None = None,
) -> Plan:
    """Find, hash and cut the files of all `sources`, in order; of each at most `limit` records, unless it has a limit of its own.

    `work` takes the parquet copies of `datasets` data. `first_source_index` and `first_record` let the numbers of a
    second plan (held-out records) go on where a first one ended; `key` names the sources in messages.
    Raises `ConfigError` for what cannot be found or opened. Broken records are left to `read`.
    """
    import xxhash  # at several GB/s, hashing costs next to nothing beside reading

    chunks: list[Chunk] = []
    contents: list[Any] = []
    record = first_record
    found = [resolve(source, f"{key}.{i}", work) for i, source in enumerate(sources)]
    chunk_bytes = max(chunk_bytes, sum(size_of(file.path) for files in found for file in files) // MOST_CHUNKS)
    for i, (source, files) in enumerate(zip(sources, found, strict=True)):
        mapping = _mapping(source)
        contents.append(mapping)
        left = source.limit or limit or math.inf
        for file in files:
            if left <= 0:
                break
            content, refused = xxhash.xxh3_128(), Refused(max_record_bytes)
            try:
                spans, cut = _first(_scan(file, chunk_bytes, content, refused), left)
            except (OSError, pa.ArrowException, ExtensionType) as error:
                what = f"{file.path} is not a readable {file.format} file ({one_line(error)})"
                raise ConfigError(f"{key}.{i}.path: {what}; replace it") from None
            for start, stop, line, records in spans:
                place = (first_source_index + i, file.path, file.format, start, stop, record, records, line)
                chunks.append(Chunk(*place, label=file.label, mapping=mapping, max_record_bytes=max_record_bytes))
                record += records
                left -= records
            if cut:
                chunks[-1] = replace(chunks[-1], cut=True)
            contents.append(
                [
                    file.format,
                    content.hexdigest(),
                    *refused.name(),
                    *([{"first": sum(span[3] for span in spans)}] if cut else []),
                ]
            )
    return Plan(chunks, digest(*contents), record - first_record)


def _first(spans: Iterable[_Span], most: float) -> tuple[list[_Span], bool]:
    """The spans that hold the first `most` records, and whether the last one is cut. What follows is not even looked at."""
    found: list[_Span] = []
    for start, stop, line, records in spans:
        found.append((start, stop, line, int(min(most, records))))
        if records > most:
            return found, True
        most -= records
        if most <= 0:
            break
    return found, False


def _mapping(source: Source) -> str:
    """The part of a source that says what its columns mean."""
    given = source.model_dump(mode="json", include={"columns", "trajectories"})
    return json.dumps(given, sort_keys=True) if any(given.values()) else ""


def _scan(file: File, chunk_bytes: int, content: Any, refused: Refused) -> Iterable[_Span]:
    """Cut one file, and feed its bytes to the hash `content`."""
    if file.format == "parquet":
        return _scan_parquet(file.path, chunk_bytes, content, refused)
    if file.format == "json":
        return _scan_array(file.path, content, refused)
    spans = cut_lines(file.path, chunk_bytes, content, refused)
    return _as_one(spans) if compression(file.path) else spans


def _as_one(spans: Iterable[_Span]) -> list[_Span]:
    """Of a compressed file, which can be read from its beginning only."""
    pieces = list(spans)
    return [(0, pieces[-1][1], 1, sum(records for *_, records in pieces))] if pieces else []


def _scan_array(path: str, content: Any, refused: Refused) -> Iterator[_Span]:
    size, records = 0, 0
    with open_binary(path) as stream:
        while block := stream.read(8 << 20):
            content.update(block)
            size += len(block)
    with open_binary(path) as stream:
        try:
            for _, error, _ in array_elements(stream, refused.most):
                if error == too_large(refused.most):
                    refused.note(records)
                records += 1
        except BrokenArray:  # it is one JSON value: broken anywhere, it counts as one broken record
            size, records = 0, 1
    yield 0, size, 1, records


def _scan_parquet(path: str, chunk_bytes: int, content: Any, refused: Refused) -> Iterator[_Span]:
    with open_binary(path) as stream:
        while block := stream.read(8 << 20):
            content.update(block)
        stream.seek(0)
        metadata = open_parquet(stream).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    if refused.most != MAX_RECORD_BYTES and max(sizes, default=0) > refused.most:
        refused.note(refused.most)  # which rows are too large is known when they are decoded
    size = sum(sizes)
    rows = max(1, chunk_bytes * metadata.num_rows // max(1, size))
    for start in range(0, metadata.num_rows, rows):
        stop = min(start + rows, metadata.num_rows)
        yield start, stop, start + 1, stop - start


# --------------------------------------------------------------------------------------------------- read


def read(chunk: Chunk) -> Iterator[RawRecord]:
    """The records of one chunk, in order.

    Raises RuntimeError when the file no longer holds what was planned, OSError when it cannot be read at all.
    """
    parts = {"jsonl": _read_lines, "json": _read_array, "parquet": _read_parquet}[chunk.format](chunk)
    source = Source(path=chunk.path, **json.loads(chunk.mapping)) if chunk.mapping else None
    found = 0
    for line, value, error, raw in islice(parts, chunk.records if chunk.cut else None):
        if value is not None and source is not None:
            value, error = _mapped(value, source)
        yield RawRecord(chunk.first_record + found, f"{chunk.label}:{line}", value, error, raw)
        found += 1
    if found != chunk.records:
        planned = f"{found} records where {chunk.records} were planned"
        raise RuntimeError(f"{without_credentials(chunk.path)}: {planned}; the file changed, run again")


def _read_lines(chunk: Chunk) -> Iterator[Part]:
    return read_lines(chunk.path, chunk.start, chunk.stop, chunk.first_line, chunk.max_record_bytes)


def _read_array(chunk: Chunk) -> Iterator[Part]:
    with open_binary(chunk.path) as stream:
        elements = array_elements(stream, chunk.max_record_bytes)
        if chunk.stop:
            yield from ((number, *element) for number, element in enumerate(elements, start=1))
            return
        try:
            for _ in elements:
                pass
        except BrokenArray as error:
            with open_binary(chunk.path) as again:
                yield 1, None, str(error), excerpt(again.read(4 * EXCERPT))


def _read_parquet(chunk: Chunk) -> Iterator[Part]:
    with open_binary(chunk.path) as stream:
        file = open_parquet(stream)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(chunk.start, first), min(chunk.stop, first + rows)
            if low < high:
                yield from _read_group(file, group, first, low, high, chunk.max_record_bytes)
            first += rows


def _read_group(file: Any, group: int, first: int, low: int, high: int, most: int) -> Iterator[Part]:
    """Rows low…high of a row group that begins at row `first`; what lies before is decoded again, which is cheap beside the rest.

    Where the group is damaged, the rest of its rows have an error: nothing is lost uncounted.
    """
    done = low
    try:
        for batch in file.iter_batches(_batch_size(file.metadata.row_group(group)), row_groups=[group]):
            start, stop = max(low - first, 0), min(high - first, batch.num_rows)
            if start < stop:
                rows = _rows(batch.slice(start, stop - start), most)
                for number, (value, error) in enumerate(rows, first + start + 1):
                    yield number, value, error, excerpt(value)
                    done = number
            first += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system or the network, not of the decoder
            raise
    yield from ((number, None, "unreadable parquet: the file is damaged", "") for number in range(done + 1, high + 1))


def _batch_size(group: Any) -> int:
    """Rows to decode together. A value that many rows share is stored once, and unpacked for each of them."""
    size, compressed = (
        group.total_byte_size,
        sum(group.column(i).total_compressed_size for i in range(group.num_columns)),
    )
    if size <= 4 << 20:
        return 1024
    return 64 if size < SUSPICIOUS * compressed else max(1, min(64, BATCH_BYTES // size))


def _rows(batch: pa.RecordBatch, most: int) -> list[tuple[dict[str, Any] | None, str | None]]:
    """Parquet promises UTF-8 and checks nothing: one bad row must not take the batch along, nor one that is too large."""
    if batch.nbytes > most and batch.num_rows == 1:
        return [(None, too_large(most))]
    try:
        if batch.nbytes <= most:
            nested = [field.name for field in batch.schema if holds_structs_of_structs(field.type)]
            return [(row | {name: without_nulls(row[name]) for name in nested}, None) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [(None, "bad UTF-8")]
    return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1), most)]


def _mapped(value: dict[str, Any], source: Source) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return mapped(value, source), None
    except ValueError as error:
        return None, str(error)
