"""Who may commit checkpoints of a run: the newest attempt at it, and only while its driver lives.

    <run>/attempt, attempt.lock      the number of the newest attempt, which is changed under the lock
    <run>/lease                      touched by the driver every second
    <run>/checkpoints/.step-00000020.<attempt>   a checkpoint that this attempt is writing

Workers were seen to go on after their driver was killed, and beside those that the next driver had started.

Left out: what a checkpoint holds (`checkpoint`), and any communication between ranks.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import FOLDER, Corrupt, path_of
from pipeline.durable import discard, flush, write_json
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0


class Superseded(UserError, RuntimeError):
    """This attempt may not commit: a newer one has begun, or its driver is gone."""


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

    def commit(self, temporary: Path, step: int) -> Path:
        """Rename a complete temporary checkpoint into place, which is returned. Raises Superseded, one line."""
        final = path_of(self.run, step)
        if self.leased:
            _await_driver(self.run, self.lease_seconds)
        with _lock(self.run):
            refuse_superseded(self.run, self.number)
            if temporary.is_dir() or not final.is_dir():  # else an earlier call failed behind the renaming
                flush(temporary)
                discard(final)  # if there is one: it did not verify, and its step was trained again
                temporary.rename(final)
            flush(final.parent)
        return final


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
