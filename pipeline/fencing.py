"""Which workers may write to a run: those of the newest attempt, and only while the driver that has the lease lives.

    <run>/attempt                    the number of the newest attempt, which changes under the run's lock
    <run>/checkpoints/.step-00000020.<attempt>   a checkpoint that this attempt is writing

Workers may outlive their driver, and run beside those that the next driver starts.

See also: `checkpoint` for what is committed, `lease` for the driver's side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint import FOLDER, path_of
from pipeline.durable import Corrupt, discard, flush, write_json
from pipeline.lease import LEASE_SECONDS, Superseded, await_driver, locked, refuse_other_owner


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


def confirm(run: Path, number: int, owner: str | None = None, lease_seconds: float = LEASE_SECONDS) -> None:
    """Raises Superseded, one line, unless attempt `number` is the newest and its driver, if the run has one, lives."""
    if (run / "lease").exists():
        await_driver(run, lease_seconds)
    refuse_other_owner(run, owner)
    refuse_superseded(run, number)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The right to commit checkpoints of a run, until a newer attempt begins or the driver is gone."""

    run: Path
    number: int
    leased: bool  # a driver had a lease on the run when this began: from then on it has to keep it fresh
    lease_seconds: float = LEASE_SECONDS
    owner: str | None = None  # the lease's token; None: any driver's

    @classmethod
    def begin(cls, run: Path, lease_seconds: float = LEASE_SECONDS, owner: str | None = None) -> Attempt:
        """Take the next number; from now on older attempts cannot commit, and what they left half written is removed.

        Raises Superseded when a driver had a lease on this run and let it expire (whoever starts this outlived it), or when
        the lease is not `owner`'s.
        """
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        leased = (run / "lease").exists()
        if leased:
            await_driver(run, lease_seconds)
        with locked(run):
            refuse_other_owner(run, owner)
            number = next_attempt(run)
            write_json(run / "attempt", number)
            for leftover in (run / FOLDER).glob(".step-*"):
                discard(leftover)
        return cls(run, number, leased, lease_seconds, owner)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Nobody takes over the run inside. Raises Superseded, one line, where somebody has."""
        with locked(self.run):
            refuse_other_owner(self.run, self.owner)
            refuse_superseded(self.run, self.number)
            yield

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
            await_driver(self.run, self.lease_seconds)
        with self.current():
            if temporary.is_dir() or not final.is_dir():  # else an earlier call failed behind the renaming
                flush(temporary)
                discard(final)  # if there is one: it did not verify, and its step was trained again
                temporary.rename(final)
            flush(final.parent)
        return final
