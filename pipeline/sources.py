"""From `config.Source`s to raw records, in chunks that any process can read on its own.

`plan` makes one streaming pass over the files: it hashes the contents and cuts them into chunks that know the number
of their first record. `read` turns a chunk into `RawRecord`s; a record that cannot be read is one with an `error`,
never an exception.

Left out: finding files (`files`), JSON (`json_records`), columns of other layouts (`columns`), what the fields mean
(`layouts`), and where chunks are read (`data`, on Ray).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.arrow_files import ExtensionType, open_parquet
from pipeline.columns import mapped
from pipeline.config import ConfigError, Source, digest
from pipeline.files import File, compression, one_line, open_binary, resolve, size_of
from pipeline.json_records import BYTE_ORDER_MARK, excerpt, parse_array, parse_line
from pipeline.redaction import without_credentials

# A line that holds nothing but white space; the lookahead leaves its end to be the next line's beginning.
_BLANK_LINE = re.compile(rb"\n[ \t\r\x0b\x0c]*(?=\n)")
_BLANK_START = re.compile(rb"[ \t\r\x0b\x0c]*\n")


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
) -> Plan:
    """Find, hash and cut the files of all `sources`, in order.

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
        for file in files:
            content = xxhash.xxh3_128()
            try:
                spans = list(_scan(file, chunk_bytes, content))
            except (OSError, pa.ArrowException, ExtensionType) as error:
                what = f"{file.path} is not a readable {file.format} file ({one_line(error)})"
                raise ConfigError(f"{key}.{i}.path: {what}; replace it") from None
            for start, stop, line, records in spans:
                place = (first_source_index + i, file.path, file.format, start, stop, record, records, line)
                chunks.append(Chunk(*place, label=file.label, mapping=mapping))
                record += records
            contents.append([file.format, content.hexdigest()])
    return Plan(chunks, digest(*contents), record - first_record)


def _mapping(source: Source) -> str:
    """The part of a source that says what its columns mean."""
    given = source.model_dump(mode="json", include={"columns", "trajectories"})
    return json.dumps(given, sort_keys=True) if any(given.values()) else ""


def _scan(file: File, chunk_bytes: int, content: Any) -> Iterable[_Span]:
    """Cut one file, and feed its bytes to the hash `content`."""
    if file.format == "parquet":
        return _scan_parquet(file.path, chunk_bytes, content)
    if file.format == "json":
        return _scan_array(file.path, content)
    spans = list(_scan_lines(file.path, chunk_bytes, content))
    if spans and compression(file.path):  # there is no place to start from but the beginning: one chunk
        return [(0, spans[-1][1], 1, sum(records for *_, records in spans))]
    return spans


def _scan_lines(path: str, chunk_bytes: int, content: Any) -> Iterator[_Span]:
    start, line = 0, 1
    with open_binary(path) as stream:
        while block := stream.read(chunk_bytes):
            block += stream.readline()
            content.update(block)
            length = len(block)
            if not block.endswith(b"\n"):
                block += b"\n"
            lines = block.count(b"\n")
            blank = len(_BLANK_LINE.findall(block)) + (_BLANK_START.match(block) is not None)
            yield start, start + length, line, lines - blank
            start += length
            line += lines


def _scan_array(path: str, content: Any) -> Iterator[_Span]:
    with open_binary(path) as stream:
        data = stream.read()
    content.update(data)
    yield 0, len(data), 1, len(parse_array(data))


def _scan_parquet(path: str, chunk_bytes: int, content: Any) -> Iterator[_Span]:
    with open_binary(path) as stream:
        while block := stream.read(8 << 20):
            content.update(block)
        stream.seek(0)
        metadata = open_parquet(stream).metadata
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
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
    for line, value, error, raw in parts:
        if value is not None and source is not None:
            value, error = _mapped(value, source)
        yield RawRecord(chunk.first_record + found, f"{chunk.label}:{line}", value, error, raw)
        found += 1
    if found != chunk.records:
        planned = f"{found} records where {chunk.records} were planned"
        raise RuntimeError(f"{without_credentials(chunk.path)}: {planned}; the file changed, run again")


_Part = tuple[int, dict[str, Any] | None, str | None, str]
"""Line, value, error, excerpt."""


def _read_lines(chunk: Chunk) -> Iterator[_Part]:
    with open_binary(chunk.path) as stream:
        if not compression(chunk.path):
            stream.seek(chunk.start)
        position, number = chunk.start, chunk.first_line
        while position < chunk.stop and (line := stream.readline()):
            if line.strip():
                yield number, *parse_line(line if position else line.removeprefix(BYTE_ORDER_MARK)), excerpt(line)
            position += len(line)
            number += 1


def _read_array(chunk: Chunk) -> Iterator[_Part]:
    with open_binary(chunk.path) as stream:
        yield from ((number, *element) for number, element in enumerate(parse_array(stream.read()), start=1))


def _read_parquet(chunk: Chunk) -> Iterator[_Part]:
    with open_binary(chunk.path) as stream:
        file = open_parquet(stream)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(chunk.start, first), min(chunk.stop, first + rows)
            if low < high:
                yield from _read_group(file, group, first, low, high)
            first += rows


def _read_group(file: Any, group: int, first: int, low: int, high: int) -> Iterator[_Part]:
    """Rows low…high of a row group that begins at row `first`; what lies before is decoded again, which is cheap beside the rest.

    Where the group is damaged, the rest of its rows have an error: nothing is lost uncounted.
    """
    done = low
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
            start, stop = max(low - first, 0), min(high - first, batch.num_rows)
            if start < stop:
                for number, (value, error) in enumerate(_rows(batch.slice(start, stop - start)), first + start + 1):
                    yield number, value, error, excerpt(value)
                    done = number
            first += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system or the network, not of the decoder
            raise
    yield from ((number, None, "unreadable parquet: the file is damaged", "") for number in range(done + 1, high + 1))


def _rows(batch: pa.RecordBatch) -> list[tuple[dict[str, Any] | None, str | None]]:
    """Parquet promises UTF-8 and checks nothing: one bad row must not take the batch along."""
    try:
        return [(row, None) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [(None, "bad UTF-8")]
        return [row for i in range(batch.num_rows) for row in _rows(batch.slice(i, 1))]


def _mapped(value: dict[str, Any], source: Source) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return mapped(value, source), None
    except ValueError as error:
        return None, str(error)
