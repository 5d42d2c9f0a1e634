"""Files that survive a crash: content and names that are on disk before the next step depends on them.

    with replacing(path) as aside: …    a file: written aside, flushed, renamed; gone when writing fails
    with building(folder) as aside: …   the same for a folder
    write_json / read_json              every small file of ours
    append_line                         every file that grows by lines
    clear_leftovers                     what killed writers left; what living ones write is locked, and stays

What files mean is told where they are used (`checkpoint`, `rows`); who may write to a run, in `lease` and `fencing`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import UserError
from pipeline.redaction import sealed

logger = logging.getLogger(__name__)

T = TypeVar("T")

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a disk, a quota or a file that has no room."""
WRITER = ".writer"
"""In a folder that is being built: locked for as long as its writer lives."""
YOUNG_SECONDS = 2.0
"""A temporary name this young may not be locked yet."""
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.tmp")
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)


class Corrupt(UserError, ValueError):
    """A file of ours that is not what it was: names it and says what is wrong with it, and what to do."""


# ------------------------------------------------------------------------------------------------ writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file's path to write to, which becomes `path` on leaving: readers see the old content or the new.

    It lies in the same folder under a name that nobody else has, on whatever machine. After an error it is gone, and an
    OSError names `path`.
    """
    aside = _beside(path)
    with naming(path, aside), aside.open("xb") as mine:
        _lock(mine)
        try:
            yield aside
            flush(aside)
            aside.replace(path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise
        flush(path.parent)


@contextmanager
def building(folder: Path, keep: bool = False) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` on leaving. After an error it is gone, and an OSError names `folder`.

    Where `folder` exists and is not empty: with `keep` it is as good as ours, which is deleted; else FileExistsError.
    """
    aside = _beside(folder)
    with naming(folder, aside):
        aside.mkdir()
        try:
            with (aside / WRITER).open("xb") as mine:
                _lock(mine)
                yield aside
                (aside / WRITER).unlink()
                for path in [*aside.rglob("*"), aside]:
                    flush(path)
                _take_place(aside, folder, keep)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        flush(folder.parent)


def _take_place(aside: Path, folder: Path, keep: bool) -> None:
    try:
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if not keep:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from None
        shutil.rmtree(aside)


def write_json(path: Path, value: Any) -> None:
    """A value as a JSON file: readers see the old content or the new. Secrets are `sealed`."""
    write_text(path, json.dumps(sealed(value), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8 with the line ends of `text`: readers see the old content or the new."""
    with replacing(path) as aside:
        aside.write_bytes(text.encode())


def append_line(path: Path, line: bytes, sync: bool = False) -> None:
    """Add a line, which begins a new one even where the line before was cut off. sync: it is on disk on return."""
    with naming(path), path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        rest = memoryview(line + b"\n")
        while rest:
            rest = rest[file.write(rest) :]
        if sync:
            os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Delete a folder, if it is there.

    It is renamed first, so that nothing damaged stays under its name and late writers fail instead of filling it again.
    What cannot be deleted now is a leftover.
    """
    doomed = _beside(folder)
    with suppress(FileNotFoundError):  # somebody else discards it too
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed writers left in `folder` (not in folders below). What a living process is writing stays."""
    with suppress(OSError):  # no such folder, or storage that is away: nothing depends on it
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > YOUNG_SECONDS:
                _clear(path)


def _clear(path: Path) -> None:
    lock = path / WRITER if path.is_dir() else path
    with suppress(OSError):
        if lock.exists():
            with lock.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where the writer lives
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody has: pods share process ids, and machines share folders."""
    return path.with_name(f".{path.name.lstrip('.')[:100]}.{uuid.uuid4().hex[:12]}.tmp")


def _lock(file: BinaryIO) -> None:
    with suppress(OSError):  # storage without locks: `clear_leftovers` finds it unlocked, and only then old enough
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def naming(path: Path, aside: Path | None = None) -> Iterator[None]:
    """What goes wrong with storage becomes an OSError with the path that a person knows."""
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, UserError) else system_error(error, path)
        if found is None:
            raise
        known = getattr(error, "filename", None)
        if isinstance(error, OSError) and known is not None and not _is_within(str(known), aside or path):
            raise
        raise found from None


def _is_within(name: str, path: Path) -> bool:
    return name == str(path) or name.startswith(f"{path}/")


def system_error(error: BaseException, path: Path) -> OSError | None:
    """The system's error behind one of Python's, safetensors' or Arrow's, about `path`; None where there is none."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := _SYSTEM_ERROR.search(str(error))):
        number = int(told[1] or told[2])
    return None if number is None else OSError(number, os.strerror(number), str(path))


# ------------------------------------------------------------------------------------------------ reading


def read_json(path: Path, check: Callable[[Any], T], remedy: str = "") -> T:
    """What `check` makes of the content of a JSON file; it may raise ValueError, TypeError, LookupError or AttributeError.

    remedy: what to do about a damaged file, e.g. "delete it". Raises Corrupt, one line, where it is damaged, and OSError.
    """
    try:
        return check(json.loads(path.read_bytes()))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise Corrupt(f"{path}: damaged{'; ' if remedy else ''}{remedy}") from None


def recall_json(path: Path, check: Callable[[Any], T], instead: str = "it is made again") -> T | None:
    """The same of a file that one can do without: None where there is none, or after a warning where it is damaged."""
    try:
        return read_json(path, check, instead)
    except FileNotFoundError:
        return None
    except Corrupt as error:
        logger.warning("%s", error)
        return None


def digest_file(path: Path) -> str:
    """XXH3 (128 bits) of a file's content, as hex: against damage, at several GB/s; memory does not grow with the file."""
    import xxhash

    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()
