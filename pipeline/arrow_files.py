"""Opens Arrow and Parquet files from elsewhere, and refuses column types that are not plain.

An Arrow file can name *extension types*, whose values are made by Python code that any imported library may have registered. Ray's
`ray.data.arrow_pickled_object`, which every Ray Data worker knows, unpickles its bytes: a parquet file could run a program of its
author's. Text, numbers, lists and structs need no extension, so that files of records, rows and log-probs are refused where they have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


class ExtensionType(ValueError):
    """A file whose columns are of a type that runs code of some library: names the column and the type."""


def open_parquet(stream: BinaryIO) -> ParquetFile:
    """The file, of which nothing but the description has been read. Raises ExtensionType, pa.ArrowException."""
    from pyarrow import parquet

    file = parquet.ParquetFile(stream)
    check_plain(file.schema_arrow)
    return file


def read_ipc(path: Path) -> pa.Table:
    """A memory-mapped Arrow IPC file as a table. Raises ExtensionType, pa.ArrowException, OSError."""
    with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
        check_plain(reader.schema)
        return reader.read_all()


def holds_structs_of_structs(outer: pa.DataType) -> bool:
    """Whether a column holds lists of structs with structs inside, as calls of tools and their arguments are."""
    lists = (found for found in _types(outer) if isinstance(found, pa.ListType | pa.LargeListType))
    return any(sum(isinstance(inner, pa.StructType) for inner in _types(found)) > 1 for found in lists)


def without_nulls(value: Any) -> Any:
    """A value whose objects lack their null fields: Arrow gives each struct all fields of all others."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def check_plain(schema: pa.Schema) -> None:
    """Raises ExtensionType where a column, or what lies within it, is of a type that Python code makes the values of."""
    for field in schema:
        for found in _types(field.type):
            # Types that Arrow itself defines (JSON, UUID) are `BaseExtensionType` only: no Python runs for them.
            if isinstance(found, pa.ExtensionType | pa.UnknownExtensionType):
                raise ExtensionType(f"column {field.name!r} is of the extension type {found.extension_name!r}")


def _types(outer: pa.DataType) -> Iterator[pa.DataType]:
    """A type and all types within it."""
    yield outer
    if isinstance(outer, pa.BaseExtensionType):
        yield from _types(outer.storage_type)
    elif isinstance(outer, pa.DictionaryType | pa.RunEndEncodedType):
        yield from _types(outer.value_type)
    else:
        for i in range(outer.num_fields):
            yield from _types(outer.field(i).type)
