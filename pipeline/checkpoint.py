"""Checkpoints on a shared file system: layout, checksums, retention.

    <run>/checkpoints/step-00000020/   weights-00001-of-00002.safetensors …   float32 parameters by name
                                       moments-00001-of-00002.safetensors …   exp_avg/<name>, exp_avg_sq/<name>
                                       critic-weights-… and critic-moments-…  the same of the critic, where there is one
                                       state.json                             what the caller wants back: step, best, …
                                       manifest.json                          name → size and checksum of the rest

A checkpoint is written aside, its manifest last, flushed, and renamed into place: a folder named `step-…` is whole or
damaged, never half written.

Left out: how tensors get out of and into a trainer (`engine`), and who may rename it into place (`fencing`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.durable import Corrupt, digest_file, discard, read_json, replacing, write_json

logger = logging.getLogger(__name__)

FOLDER, STATE, MANIFEST, SEAL = "checkpoints", "state.json", "manifest.json", ".seal"
_NAME = re.compile(r"step-\d{8,}")
BLOCK_BYTES = 2**26
"""Of a tensor that are written and flushed at a time."""


# ------------------------------------------------------------------------------------------------ writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], beat: Callable[[], None] = lambda: None) -> None:
    """Write and flush one safetensors file, and beside it its seal (size and checksum, for the manifest).

    Each writer seals its own files, so that checksums are computed in parallel, of what was to be written. Tensors have to
    be float32, on the CPU and contiguous. Raises OSError; then there is no file.

    beat: called whenever so many bytes (`BLOCK_BYTES`) have reached the disk: slow storage is no storage that hangs.
    """
    import xxhash

    content = xxhash.xxh3_128()
    with replacing(path) as aside, aside.open("wb", buffering=0) as file:
        for block in _blocks(tensors):
            content.update(block)
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
            beat()
        size = file.tell()
    write_json(path.with_name(path.name + SEAL), {"size": size, "xxh3": content.hexdigest()})


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file of these tensors, piece by piece: eight bytes with the header's length, the header, all numbers."""
    header, end = {}, 0
    for name in sorted(tensors):
        tensor = tensors[name]
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    yield struct.pack("<Q", len(described)) + described
    for name in sorted(tensors):
        numbers = memoryview(tensors[name].detach().flatten().numpy()).cast("B") if tensors[name].numel() else b""
        for start in range(0, len(numbers), BLOCK_BYTES):
            yield numbers[start : start + BLOCK_BYTES]


def deal(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names in `parts` lists of about equal total size: each goes, largest first, to the lightest list so far."""
    dealt: list[list[str]] = [[] for _ in range(parts)]
    load = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = load.index(min(load))
        dealt[lightest].append(name)
        load[lightest] += sizes[name]
    return dealt


def finish(folder: Path, state: Mapping[str, Any]) -> None:
    """Complete the checkpoint `folder`, all of whose tensors are written: its state, then its manifest.

    Raises Corrupt when a file is not what its writer sealed.
    """
    write_json(folder / STATE, state)
    entries = {}
    for path in sorted(folder.iterdir()):
        # A manifest, or a file half written, is of an earlier attempt to finish that the storage cut off.
        if path.name.endswith(SEAL) or path.name == MANIFEST or path.name.startswith("."):
            continue
        seal = path.with_name(path.name + SEAL)
        entries[path.name] = _described(seal) if seal.exists() else _entry(path)
        if path.stat().st_size != entries[path.name]["size"]:
            raise Corrupt(f"{path}: its writer sealed another size; is the storage shared by all workers?")
        seal.unlink(missing_ok=True)
    write_json(folder / MANIFEST, {"files": entries})


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3": digest_file(path)}


def _described(seal: Path) -> dict[str, Any]:
    check = lambda entry: {"size": int(entry["size"]), "xxh3": str(entry["xxh3"])}  # noqa: E731
    return read_json(seal, check, "the same command goes on from the checkpoint before")


# ------------------------------------------------------------------------------------------------ reading


def path_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / FOLDER / f"step-{step:08d}"


def saved(run: Path) -> list[Path]:
    """All committed checkpoints, oldest first; unverified."""
    found = (run / FOLDER).glob("step-*") if (run / FOLDER).is_dir() else []
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def latest(run: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Damaged ones are skipped with a warning that says why."""
    for folder in reversed(saved(run)):
        try:
            verify(folder)
        except Corrupt as error:
            logger.warning("%s; falling back to the checkpoint before", error)
        else:
            return folder
    return None


def best(run: Path) -> Path | None:
    """The checkpoint with the best value of `checkpoint.best`, as the newest one remembers it; None: there is none."""
    newest = latest(run)
    known = read_state(newest)["best"] if newest is not None else None
    folder = path_of(run, known["step"]) if known else None
    return folder if folder is not None and folder.is_dir() else None


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises Corrupt."""
    try:
        entries = read_json(folder / MANIFEST, _checked_entries)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Corrupt(f"{folder / MANIFEST}: missing") from None
    if unknown := {path.name for path in folder.glob("*.safetensors")} - entries.keys():
        raise Corrupt(f"{folder / min(unknown)}: not in the manifest")
    for name, (size, digest) in entries.items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise Corrupt(f"{path}: missing")
        if path.stat().st_size != size:
            raise Corrupt(f"{path}: {path.stat().st_size} bytes instead of {size}")
        if digest_file(path) != digest:
            raise Corrupt(f"{path}: its checksum differs from the manifest's")


def read_state(folder: Path) -> dict[str, Any]:
    """What `finish` was given. Raises Corrupt when it is no such thing."""
    return read_json(folder / STATE, _checked_state, "delete the checkpoint, or name another one")


def _checked_entries(found: Any) -> dict[str, tuple[int, str]]:
    """Size and checksum of each file of a checkpoint."""
    entries = {str(name): (int(entry["size"]), str(entry["xxh3"])) for name, entry in found["files"].items()}
    _ = entries[STATE]
    return entries


def _checked_state(state: Any) -> dict[str, Any]:
    if type(state["step"]) is not int:
        raise TypeError("a step is a number")
    return dict(state)


def read_tensors(folder: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor on the CPU), one at a time, from however many files of this kind there are.

    kind: what the names of its files begin with: `weights`, `moments`, or either behind `critic-`.
    Raises Corrupt when a file is none of safetensors.
    """
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise Corrupt(f"{path}: {' '.join(str(error).split())}") from None


def read_weights(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The trained parameters: (name, float32 tensor), one at a time. prefix: "" for the policy, "critic-" for the critic."""
    return read_tensors(folder, f"{prefix}weights")


@torch.no_grad()
def load_into(parameters: Mapping[str, Tensor], folder: Path, prefix: str = "") -> None:
    """Copy the weights in place. Raises ValueError unless the checkpoint holds exactly these parameters."""
    found = set()
    for name, tensor in read_weights(folder, prefix):
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise Corrupt(f"{folder}: has {name} {list(tensor.shape)}, this model does not; it is of another model")
        parameters[name].copy_(tensor)
        found.add(name)
    if missing := parameters.keys() - found:
        raise Corrupt(f"{folder}: lacks {min(missing)}; it is of another model")


def prune(run: Path, keep: int, best: Path | None = None) -> None:
    """Delete all checkpoints but the newest `keep` and the best."""
    assert keep >= 1
    for folder in saved(run)[:-keep]:
        if folder != best:
            discard(folder)
