"""Drills: a disk that is full, storage that goes away, checkpoints that are damaged. All of them without Ray: one process."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from benchmarks.faults.bench import Bench, Outcome
from benchmarks.faults.errors import DrillError
from benchmarks.faults.runs import Training
from pipeline import checkpoint

SMALL_BYTES = 60_000
"""Metrics and logs stay below it, a checkpoint does not."""


def full_disk_for_a_while(bench: Bench) -> Outcome:
    """No file of the process can grow (the kernel refuses, as a full disk does), until somebody makes room."""
    with bench.training("full-for-a-while", "checkpoint.patience=120", local=True) as training:
        training.start()
        training.await_step(bench.every + 1)
        _limit(training, SMALL_BYTES)
        training.wait_until(lambda: "trying again" in training.log(), "a full disk")
        time.sleep(3)
        _limit(training, resource.RLIM_INFINITY)
        training.finish()
        return _undisturbed(bench, training, "disk full during a checkpoint, room is made later", "works again")


def full_disk(bench: Bench) -> Outcome:
    """The same, for longer than the run has patience."""
    with bench.training("full", "checkpoint.patience=2", local=True) as training:
        training.start()
        training.await_step(bench.every + 1)
        before = checkpoint.latest(training.run)
        _limit(training, SMALL_BYTES)
        training.finish(status=2)
        last = training.log().strip().splitlines()[-1]
        stands = before is not None and checkpoint.latest(training.run) == before
        training.start()
        training.finish()
        found, same = bench.compare(training, local=True)
        ok = stands and same and "free some space" in last
        happened = f"stopped: “{_short(last)}”; the earlier checkpoint stands, the same command went on"
        return Outcome("disk full for longer than checkpoint.patience", happened, ok, None, max(found.repeated), same)


def unreachable(bench: Bench) -> Outcome:
    """The storage's folder is gone, then it is back."""
    seconds = 6 if bench.quick else 30
    with bench.training("unreachable", local=True) as training:
        training.start()
        training.await_step(bench.every - 1)
        away = training.storage.with_name("storage-away")
        training.storage.rename(away)
        time.sleep(seconds)
        away.rename(training.storage)
        training.finish()
        return _undisturbed(bench, training, f"storage out of reach for {seconds} s", "works again")


def truncated(bench: Bench) -> Outcome:
    """The newest checkpoint's weights lose their last byte."""
    return _damaged(bench, "truncated", lambda path: os.truncate(path, path.stat().st_size - 1))


def flipped(bench: Bench) -> Outcome:
    """One bit of the newest checkpoint's weights changes."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)

    return _damaged(bench, "bit-flipped", flip)


DRILLS = [full_disk_for_a_while, full_disk, unreachable, truncated, flipped]


def _limit(training: Training, size: int) -> None:
    """The largest file that the driver may write, from now on."""
    assert training.driver is not None
    resource.prlimit(training.driver.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _undisturbed(bench: Bench, training: Training, did: str, said: str) -> Outcome:
    """The outcome of a training that had to go on all the while, and say so."""
    found, same = bench.compare(training, local=True)
    ok = same and not found.repeated and said in training.log()
    happened = "it said so, trained on, and wrote the checkpoint later" if ok else "it did not go on as it has to"
    return Outcome(did, happened, ok, None, sum(found.repeated), same)


def _damaged(bench: Bench, name: str, damage) -> Outcome:
    """Kill a training that has two checkpoints, damage the newer one, start again."""
    with bench.training(name, local=True) as training:
        training.start()
        training.wait_until(lambda: len(_saved(training)) == 2, "two checkpoints")
        training.kill_driver()
        newest = _saved(training)[-1]
        damage(next(newest.glob("weights-*")))
        training.start()
        training.finish()
        found, same = bench.compare(training, local=True)
        said = f"{newest}" in training.log() and "falling back to the checkpoint before" in training.log()
        ok = same and said and found.starts[-1] == int(newest.name[5:]) - bench.every
        happened = "its checksum gave it away; said so and went on from the one before" if ok else "not noticed"
        did = f"newest checkpoint {name} after a kill"
        return Outcome(did, happened, ok, max(found.recovered), max(found.repeated), same)


def _saved(training: Training) -> list[Path]:
    try:
        return checkpoint.saved(training.run)
    except DrillError:
        return []  # there is no run yet


def _short(text: str) -> str:
    return text if len(text) < 160 else f"{text[:60]} … {text[-90:]}"
