"""Checksums of an export's files, in a file of its own that is written last; `xxh128sum -c` reads it, too.

A folder without that file, such as any model from elsewhere, is taken as it is. Weights that differ from their checksum are
damaged, as is anything that is missing or cannot be read. A text that differs may be a person's edit: that is a warning.
"""

from __future__ import annotations

import json
import logging
from functools import cache as once
from pathlib import Path
from typing import Any

from pipeline.durable import WRITER, digest_file, recall_json, write_json, write_text

logger = logging.getLogger(__name__)

FILE = "checksums.xxh128"
MEMO = "checksums.json"
TEXTS = frozenset({".json", ".jinja", ".txt", ".md", ".py"})


def seal(folder: Path) -> None:
    """Write the checksums of all files in a folder that is complete otherwise."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (FILE, WRITER))
    lines = [f"{digest_file(path)}  {path.relative_to(folder)}\n" for path in files]
    write_text(folder / FILE, "".join(lines))


def damage(folder: Path, cache: Path) -> str | None:
    """The first damaged file of a sealed folder and what is wrong with it; None where all is well, or nothing is known.

    Digests are remembered in `cache`, by path, size and times of change.
    """
    try:
        entries = _read(folder / FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return f"{FILE} is unreadable"
    files = {name: folder / name for name in entries}
    for name, path in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{FILE} names {name}, which is no file in it"
        if not path.is_file():
            return f"{name} is missing"
    found = _digests(files, cache)
    for name in (name for name in entries if found[name] != entries[name]):
        if not _is_text(files[name]):
            return f"the checksum of {name} differs"
        _warn(f"{files[name]} is not as it was exported; if that is meant, delete {FILE} beside it")
    return None


def _read(path: Path) -> dict[str, str]:
    """Name → digest. Raises ValueError for what `seal` did not write."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("  ", 1) for line in lines]
    if not pairs or any(len(pair) != 2 or len(pair[0]) != 32 for pair in pairs):
        raise ValueError(path)
    return {name: digest for digest, name in pairs}


def _digests(files: dict[str, Path], cache: Path) -> dict[str, str]:
    stats = {name: path.stat() for name, path in files.items()}
    keys = {name: f"{files[name].resolve()}|{s.st_size}|{s.st_mtime_ns}|{s.st_ctime_ns}" for name, s in stats.items()}
    memo = cache / MEMO
    known = recall_json(memo, checked_digests) or {}
    fresh = {key: digest_file(files[name]) for name, key in keys.items() if key not in known}
    if fresh:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(memo, known | fresh)
    known |= fresh
    return {name: known[key] for name, key in keys.items()}


def checked_digests(memo: Any) -> dict[str, str]:
    """Remembered digests of files; raises what `durable.read_json` takes for damage."""
    if not all(isinstance(digest, str) for digest in memo.values()):
        raise TypeError("digests are text")
    return dict(memo)


def _is_text(path: Path) -> bool:
    """Whether this is something that a person writes, and that is whole."""
    if path.suffix not in TEXTS:
        return False
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
    except ValueError:
        return False
    return True


@once
def _warn(message: str) -> None:
    """Once a process: a model is looked up in many places."""
    logger.warning("%s", message)
