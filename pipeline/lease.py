"""Which driver owns a run: the one whose token is in the lease, for as long as it renews it.

    <run>/lease          the token of the driver that owns the run, which touches the file every second
    <run>/attempt.lock   locked while the lease or the attempt changes hands, and while a checkpoint or a step is written

Of any number of drivers that start at once, on one machine or many, exactly one gets the lease: it is compared and set under
the lock. The lock is `flock`, which NFS (version 4, or 3 with its lock service) and Lustre (mounted with `flock`) hold
across machines.

See also: `fencing` for the workers' side.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.durable import clear_leftovers, write_text
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0


class Superseded(UserError, RuntimeError):
    """This attempt may not commit: a newer one has begun, or its driver is gone."""


class Lease:
    """A driver's right to a run, and its sign of life: a context that touches `<run>/lease` every `interval` seconds.

    On leaving, the lease expires at once but stays: workers that are still alive then may not go on committing. Entering
    raises Superseded when another driver is renewing the lease, or takes it at the same time.

    Attributes:
        run: the folder.
        owner: the token in the lease; one of its own unless given.
        lost: whether another driver has taken the run, as it may from one that was suspended. Known within `interval`.
    """

    def __init__(self, run: Path, interval: float = 1.0, owner: str | None = None) -> None:
        self.owner, self.lost = owner or uuid.uuid4().hex, False
        self.run, self._path, self._interval = run, run / "lease", interval
        self._stop, self._away = threading.Event(), False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self.run.mkdir(parents=True, exist_ok=True)
        seen = _look(self.run)
        if _lease_age(self.run) < LEASE_SECONDS:
            self._refuse_company(seen)
        with locked(self.run):
            if _look(self.run) != seen:
                raise self._company()
            write_text(self._path, self.owner)
        clear_leftovers(self.run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # where it cannot be reached it expires by itself
            if owner_of(self.run) == self.owner:
                os.utime(self._path, (0, 0))

    def confirm(self) -> None:
        """Raises Superseded, one line, where another driver has taken the run."""
        refuse_other_owner(self.run, self.owner)

    def _refuse_company(self, seen: Look) -> None:
        """The lease was renewed a moment ago: by a driver that lives (it will be again), or by one that was killed."""
        until = time.monotonic() + 5 * self._interval
        while time.monotonic() < until:
            if _look(self.run) != seen:
                raise self._company()
            time.sleep(self._interval / 5)

    def _company(self) -> Superseded:
        return Superseded(f"{self.run}: another driver is training this run; wait for it or stop it first")

    def _renew(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.lost = self.lost or is_taken_over(self.run, self.owner)
                if not self.lost:
                    os.utime(self._path)
            except OSError as error:  # storage out of reach for a moment: workers wait, so keep trying
                if not self._away:
                    logger.warning("storage: %s; still trying", error)
                self._away = True
            else:
                if self._away:
                    logger.warning("storage: works again")
                self._away = False


Look = tuple[bytes, int] | None
"""A lease's content and time of its last renewal; None: there is none."""


def _look(run: Path) -> Look:
    try:
        with (run / "lease").open("rb") as file:  # opened anew: NFS asks the server then, and not its cache
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def owner_of(run: Path) -> str | None:
    """The token of the driver that took the run last; of a damaged lease, what is no driver's. None: there was none."""
    seen = _look(run)
    return None if seen is None else seen[0].decode(errors="replace")


def is_taken_over(run: Path, owner: str | None) -> bool:
    """Whether the run is another driver's by now than `owner`'s (None: any driver's); not where storage is away."""
    try:
        return owner is not None and owner_of(run) not in (None, owner)
    except OSError:
        return False


def refuse_other_owner(run: Path, owner: str | None) -> None:
    """Raises Superseded, one line, where the run is another driver's than `owner` (None: any driver's)."""
    if is_taken_over(run, owner):
        raise Superseded(f"{run}: another driver has taken over this run; this one ends")


def await_driver(run: Path, lease_seconds: float) -> None:
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
def locked(run: Path, name: str = "attempt.lock") -> Iterator[None]:
    """Nobody else is inside for this run and name, on any machine. Raises UserError where the file system has no locks."""
    with (run / name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(error.errno, error.strerror, file.name) from None
            raise UserError(
                f"storage: {file.name} cannot be locked ({error.strerror}); mount the file system with locks (NFS without "
                "nolock, Lustre with flock), or name another folder"
            ) from None
        yield
