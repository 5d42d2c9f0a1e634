"""Finding and opening the files behind a `config.Source`.

A path may be a file, a glob, a folder, or any URL that fsspec opens; what `datasets` loads (a saved folder, a hub
name) is copied into one parquet file, so that it is read like all else.

Left out: what the files hold (`sources`).
"""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
from fsspec.core import url_to_fs

from pipeline.config import ConfigError, Source, digest
from pipeline.durable import replacing
from pipeline.redaction import redact, without_credentials

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
TABLES = {".csv", ".tsv", ".xls", ".xlsx"}
"""Files in which an empty text, the word "null" and nothing look alike."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SAVED = ("state.json", "dataset_dict.json")
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json"}


@dataclass(frozen=True, slots=True)
class File:
    """One file of records."""

    path: str  # absolute path or URL
    format: str  # jsonl (lines), json (one array) or parquet
    label: str  # name for people: relative to the folder or pattern


def resolve(source: Source, key: str, work: Path) -> list[File]:
    """The files of one source, sorted by path. Raises `ConfigError` naming `key` (e.g. "data.sources.0")."""
    try:
        fs, root = url_to_fs(source.path)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}.path: {source.path} cannot be opened ({one_line(error)}); check the URL") from None
    if fs.isdir(root):
        if source.format == "huggingface" or (source.format == "auto" and _is_saved(fs, root)):
            return [_copied(source, key, work, root if _is_saved(fs, root) else None)]
        base, paths = root, [path for path in sorted(fs.find(root)) if _is_data(path, root, source.format)]
        if not paths:
            wanted = " or ".join(ENDINGS) if source.format == "auto" else source.format
            raise ConfigError(f"{key}.path: {source.path} holds no {wanted} file; name another folder or a file")
    elif fs.exists(root):
        base, paths = os.path.dirname(root), [root]
    elif wildcard := re.search(r"[*?\[]", root):
        base = os.path.dirname(root[: wildcard.start()] + "_")
        paths = [path for path in sorted(fs.glob(root)) if fs.isfile(path)]
        if not paths:
            raise ConfigError(f"{key}.path: no file matches {source.path}; check the pattern")
    elif source.format == "huggingface" or (source.format == "auto" and _may_be_hub_name(source.path)):
        return [_copied(source, key, work, None)]
    else:
        raise ConfigError(f"{key}.path: {source.path} does not exist; check the path")
    if "file" in fs.protocol and paths != [root]:
        _check_inside(paths, base, key)
    return [
        File(_absolute(fs, path), _format(fs, path, source, key), without_credentials(_relative(path, base)))
        for path in paths
    ]


def open_binary(path: str) -> BinaryIO:
    """A binary stream of the (decompressed) file at a path or URL."""
    fs, root = url_to_fs(path)
    stream = fs.open(root, "rb")
    return io.BufferedReader(pa.CompressedInputStream(stream, compression(path))) if compression(path) else stream


def size_of(path: str) -> int:
    """Bytes of the file at a path or URL; 0 where its server does not say."""
    fs, root = url_to_fs(path)
    return int(fs.size(root) or 0)


def compression(path: str) -> str | None:
    """Codec that the file's ending names."""
    return COMPRESSIONS.get(os.path.splitext(path)[1].lower())


def one_line(error: Exception) -> str:
    """An exception's text, fit for a message of one line."""
    return redact(" ".join(str(error).split()))[:200]  # first: of half a secret nobody knows that it is one


def _ending(path: str) -> str:
    """The ending that names the format: .jsonl of both a.jsonl and a.jsonl.gz."""
    stem, ending = os.path.splitext(path)
    return os.path.splitext(stem)[1].lower() if ending.lower() in COMPRESSIONS else ending.lower()


def _is_saved(fs: Any, root: str) -> bool:
    return any(fs.exists(f"{root}/{name}") for name in _SAVED)


def _may_be_hub_name(path: str) -> bool:
    return _HUB_NAME.fullmatch(path) is not None and _ending(path) not in ENDINGS


def _is_data(path: str, root: str, wanted: str) -> bool:
    """Whether a file of a folder holds records: a fitting ending, and neither hidden nor a description."""
    parts = PurePosixPath(_relative(path, root)).parts
    if any(part.startswith((".", "_")) for part in parts) or parts[-1] in _DESCRIPTIONS:
        return False
    known = ENDINGS.get(_ending(path))
    return known is not None and (wanted == "auto" or (wanted == "parquet") == (known == "parquet"))


def _format(fs: Any, path: str, source: Source, key: str) -> str:
    known = ENDINGS.get(_ending(path)) if source.format == "auto" else source.format
    if known is None and _ending(path) in TABLES:
        raise ConfigError(
            f"{key}.path: {path} is a table, whose text has lost its types; write jsonl or parquet with the program that made it"
        )
    if known is None:
        raise ConfigError(f"{key}.format: the ending of {path} says nothing; set format to jsonl or parquet")
    if known == "huggingface":
        raise ConfigError(f"{key}.format: {path} is a file, not what datasets saves; set format to jsonl or parquet")
    if known != "parquet" and _ending(path) == ".json":
        with open_binary(_absolute(fs, path)) as stream:
            beginning = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        return "json" if beginning.startswith(b"[") else "jsonl"
    return known


def _absolute(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else fs.unstrip_protocol(path)


def _relative(path: str, base: str) -> str:
    return path[len(base) :].lstrip("/") if path.startswith(base) else path


def _check_inside(paths: list[str], base: str, key: str) -> None:
    """Raises ConfigError where a link leads out of the folder: what was unpacked there must not choose what else is read."""
    root = Path(base).resolve()
    for path in map(Path, paths):
        target = path.resolve()
        if not target.is_relative_to(root) and not _is_blob(path, target):
            raise ConfigError(f"{key}.path: {path} is a link to {target}, outside of {base}; name the target itself")


def _is_blob(path: Path, target: Path) -> bool:
    """Whether this is how the hub's cache is laid out: …/snapshots/COMMIT/FILE is a link to …/blobs/HASH."""
    if "snapshots" not in path.parts:
        return False
    return target.parent == Path(*path.parts[: path.parts.index("snapshots")]).resolve() / "blobs"


# ------------------------------------------------------------------------------------------------ datasets


def _copied(source: Source, key: str, work: Path, saved: str | None) -> File:
    """What `datasets` loads, as one parquet file in `work`, written once. `saved`: folder of `save_to_disk`."""
    data = _load_saved(source, key, saved) if saved else _load_named(source, key)
    # A saved folder keeps its fingerprint when its files are changed by hand: their size and time join the key.
    stat = (
        sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in Path(saved).rglob("*.arrow")) if saved else []
    )
    name = digest(data._fingerprint, len(data), stat)
    path = Path(work).resolve() / f"datasets-{name}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            data.to_parquet(str(aside))
    return File(str(path), "parquet", f"{source.path.rstrip('/').rpartition('/')[2]}[{source.split}]")


def _load_saved(source: Source, key: str, folder: str) -> Any:
    import datasets

    _check_saved(Path(folder), key)
    try:
        loaded = datasets.load_from_disk(folder)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{key}.path: {folder} cannot be loaded ({one_line(error)}); save it again") from None
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise ConfigError(f"{key}.split: no split {source.split} in {folder}; choose one of {', '.join(loaded)}")
        return loaded[source.split]
    if source.split not in ("train", str(loaded.split)):
        raise ConfigError(f"{key}.split: {folder} holds one data set, no split {source.split}; remove the key")
    return loaded


def _check_saved(folder: Path, key: str) -> None:
    """Raises ConfigError where a saved folder's descriptions name files or folders that lie elsewhere."""
    for description in folder.rglob("*.json"):
        if description.name not in _SAVED:
            continue
        try:
            found = json.loads(description.read_text(encoding="utf-8"))
            names = [*found.get("splits", []), *(file["filename"] for file in found.get("_data_files") or ())]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{key}.path: {description} cannot be read; save the data set again") from None
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name:
                raise ConfigError(f"{key}.path: {description} names {name!r}, outside of its folder; save it again")


def _load_named(source: Source, key: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        text = one_line(error)
        for word, part in (("split", "split"), ("BuilderConfig", "subset"), ("Config name", "subset")):
            if word in text:
                raise ConfigError(f"{key}.{part}: {source.path}: {text}; choose another {part}") from None
        raise ConfigError(
            f"{key}.path: {source.path} is neither a path here nor a data set that can be loaded ({text}); check the name"
        ) from None
