"""Files that survive a crash: content and names that are on disk before the next step depends on them.

Left out: what the files mean (`checkpoint`, `rows`).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.redaction import sealed


def digest_file(path: Path) -> str:
    """XXH3 (128 bits) of a file's content, as hex: against damage, at several GB/s; memory does not grow with the file."""
    import xxhash

    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            content.update(block)
    return content.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Written aside, flushed and renamed: readers see the old content or the new. Secrets are `sealed`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    aside.write_text(json.dumps(sealed(value), indent=1, ensure_ascii=False) + "\n")
    flush(aside)
    aside.rename(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Delete a folder, if it is there.

    It is renamed first (to `.step-discarded-…` beside it), so that nothing damaged stays under its name and late writers
    fail instead of filling it again. What cannot be deleted now stays under that name.
    """
    doomed = folder.with_name(f".step-discarded-{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):  # somebody else discards it too
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
