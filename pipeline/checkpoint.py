"""Checkpoints on a shared file system: layout, checksums, atomic commit, fencing of stale writers, retention.

    <run>/checkpoints/step-00000020/   weights-00001-of-00002.safetensors …   float32 parameters by name
                                       moments-00001-of-00002.safetensors …   exp_avg/<name>, exp_avg_sq/<name>
                                       critic-weights-… and critic-moments-…  the same of the critic, where there is one
                                       state.json                             what the caller wants back: step, best, …
                                       manifest.json                          name → size and checksum of the rest
    <run>/attempt, attempt.lock, lease                                        who may commit

A checkpoint is written aside (`.step-00000020.<attempt>`), its manifest last, flushed, and renamed into place: a folder
named `step-…` is whole or damaged, never half written. Only the newest attempt at a run may commit, and only while its
driver lives: workers were seen to go on after their driver was killed.

Left out: how tensors get out of and into a trainer (`engine`), and any communication between ranks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.durable import digest_file, discard, flush, write_json
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

FOLDER, STATE, MANIFEST, SEAL = "checkpoints", "state.json", "manifest.json", ".seal"
LEASE_SECONDS = 15.0
_NAME = re.compile(r"step-\d{8,}")
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


class Superseded(UserError, RuntimeError):
    """This attempt may not commit: a newer one has begun, or its driver is gone."""


class Corrupt(UserError, ValueError):
    """A file of a run that is not what it was: names it and says what is wrong with it."""


# ------------------------------------------------------------------------------------------------ writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and flush one safetensors file, and beside it its seal (size and checksum, for the manifest).

    Each writer seals its own files, so that checksums are computed in parallel and what `finish` sees is compared with
    what was written. Tensors have to be on the CPU and contiguous. Raises OSError; then there is no file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)  # aside and renamed, with the interpreter's lock released
    except SafetensorError as error:
        if (number := _SYSTEM_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    flush(path)
    path.with_name(path.name + SEAL).write_text(json.dumps(_entry(path)))


def deal(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names in `parts` lists of about equal total size: each goes, largest first, to the lightest list so far."""
    dealt: list[list[str]] = [[] for _ in range(parts)]
    load = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = load.index(min(load))
        dealt[lightest].append(name)
        load[lightest] += sizes[name]
    return dealt


def finish(folder: Path, state: Mapping[str, Any], attempt: Attempt) -> Path:
    """Complete the temporary checkpoint `folder`, all of whose tensors are written, and commit it as step `state["step"]`.

    Returns its final path. Raises Superseded, and Corrupt when a file is not what its writer sealed.
    """
    write_json(folder / STATE, state)
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(SEAL):
            continue
        seal = path.with_name(path.name + SEAL)
        entries[path.name] = json.loads(seal.read_text()) if seal.exists() else _entry(path)
        if path.stat().st_size != entries[path.name]["size"]:
            raise Corrupt(f"{path}: its writer sealed another size; is the storage shared by all workers?")
        seal.unlink(missing_ok=True)
    write_json(folder / MANIFEST, {"files": entries})
    final = path_of(attempt.run, int(state["step"]))
    attempt.commit(folder, final)
    return final


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3": digest_file(path)}


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
    """The checkpoint with the best value of `checkpoint.best`, as the newest one remembers it."""
    newest = latest(run)
    known = read_state(newest)["best"] if newest is not None else None
    return path_of(run, known["step"]) if known else None


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises Corrupt."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        entries = {str(name): (int(entry["size"]), str(entry["xxh3"])) for name, entry in files.items()}
        _ = entries[STATE]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Corrupt(f"{folder / MANIFEST}: missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Corrupt(f"{folder / MANIFEST}: unreadable") from None
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
    try:
        state = json.loads((folder / STATE).read_bytes())
        if not isinstance(state, dict) or type(state["step"]) is not int:
            raise ValueError("no step")
    except (ValueError, KeyError, RecursionError):
        raise Corrupt(f"{folder / STATE}: unreadable") from None
    return state


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


# ------------------------------------------------------------------------------------------------ fencing


def next_attempt(run: Path) -> int:
    """The number that the next attempt will get if nobody else begins one first. Raises Corrupt."""
    path = run / "attempt"
    if not path.exists():
        return 1
    try:
        return int(path.read_bytes()) + 1
    except ValueError:
        raise Corrupt(f"{path}: no number; write the number of the last attempt into it, or a large one") from None


def refuse_superseded(run: Path, number: int) -> None:
    """Raises Superseded, one line, unless attempt `number` is the newest."""
    if (newest := next_attempt(run) - 1) != number:
        raise Superseded(f"{run}: attempt {number} may not commit, attempt {newest} has taken over")


@dataclass(frozen=True, slots=True)
class Attempt:
    """The right to commit checkpoints of a run, until a newer attempt begins or the driver is gone."""

    run: Path
    number: int
    leased: bool  # a driver had a lease on the run when this began: from then on it has to keep it fresh
    lease_seconds: float = LEASE_SECONDS

    @classmethod
    def begin(cls, run: Path, lease_seconds: float = LEASE_SECONDS) -> Attempt:
        """Take the next number; from now on older attempts cannot commit, and what they left half written is removed.

        Raises Superseded when a driver had a lease on this run and let it expire: whoever starts this outlived it.
        """
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        leased = (run / "lease").exists()
        if leased:
            _await_driver(run, lease_seconds)
        with _lock(run):
            number = next_attempt(run)
            write_json(run / "attempt", number)
            for leftover in (run / FOLDER).glob(".step-*"):
                discard(leftover)
        return cls(run, number, leased, lease_seconds)

    def temporary(self, step: int) -> Path:
        """A new empty folder, on the run's own file system, to write the checkpoint of `step` into."""
        folder = path_of(self.run, step).with_name(f".step-{step:08d}.{self.number}")
        discard(folder)
        folder.mkdir()
        return folder

    def commit(self, temporary: Path, final: Path) -> None:
        """Rename a complete temporary checkpoint into place. Raises Superseded, one line."""
        if self.leased:
            _await_driver(self.run, self.lease_seconds)
        with _lock(self.run):
            refuse_superseded(self.run, self.number)
            if temporary.is_dir() or not final.is_dir():  # else an earlier call failed behind the renaming
                flush(temporary)
                discard(final)  # if there is one: it did not verify, and its step was trained again
                temporary.rename(final)
            flush(final.parent)


class Lease:
    """A driver's sign of life: a context that touches `<run>/lease` every `interval` seconds from a thread.

    On leaving, the lease expires at once but stays: workers that are still alive then may not go on committing. Entering
    raises Superseded when another driver is renewing the lease: two drivers would only take the run from each other.
    """

    def __init__(self, run: Path, interval: float = 1.0) -> None:
        self._path, self._interval = run / "lease", interval
        self._stop, self._away = threading.Event(), False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if _lease_age(self._path.parent) < LEASE_SECONDS:
            self._refuse_company()
        self._path.touch()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.utime(self._path, (0, 0))

    def _refuse_company(self) -> None:
        """The lease was renewed a moment ago: by a driver that lives (it will be again), or by one that was killed."""
        seen = self._path.stat().st_mtime_ns
        until = time.monotonic() + 5 * self._interval
        while time.monotonic() < until:
            if self._path.stat().st_mtime_ns != seen:
                raise Superseded(
                    f"{self._path.parent}: another driver is training this run; wait for it or stop it first"
                )
            time.sleep(self._interval / 5)

    def _renew(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._path.touch()
            except OSError as error:  # storage out of reach for a moment: workers wait, so keep trying
                if not self._away:
                    logger.warning("storage: %s; still trying", error)
                self._away = True
            else:
                if self._away:
                    logger.warning("storage: works again")
                self._away = False


def _await_driver(run: Path, lease_seconds: float) -> None:
    """Return once the lease is fresh. Raises Superseded when nobody renews it within `lease_seconds`.

    Waiting is for a machine that was suspended: its worker may wake up before its driver's thread does.
    """
    until = time.monotonic() + lease_seconds
    while _lease_age(run) > lease_seconds:
        if time.monotonic() > until:
            raise Superseded(f"{run}: its driver is gone; start the same command again to go on")
        time.sleep(min(0.2, lease_seconds / 10))


def _lease_age(run: Path) -> float:
    """Seconds since the last renewal, both ends by the file server's clock."""
    clock, lease = run / "attempt.lock", run / "lease"
    clock.touch()
    return clock.stat().st_mtime - lease.stat().st_mtime if lease.exists() else math.inf


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    with (run / "attempt.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
