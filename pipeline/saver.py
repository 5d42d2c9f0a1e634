"""When a checkpoint is due: a copy at the step's border, and a thread that writes it while training goes on.

The copy is this rank's share of weights and moments in host memory: 12 bytes a parameter, over all ranks. The thread writes
and flushes its files; rank 0's waits for those of all ranks, then commits: until then the earlier checkpoint stands. At
most one is under way. What goes wrong surfaces at the next step, on all ranks alike; the last one is waited for. However
long that takes, it is no hang for as long as bytes reach the disk.

With `checkpoint.in_background=false` the same happens inside the step, with no copy: file by file.

Left out: the form of a checkpoint (`checkpoint`), who may commit one (`fencing`), how tensors get out of the trainer (`engine`).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipeline import checkpoint
from pipeline.config import CheckpointConfig
from pipeline.distributed import agree
from pipeline.durable import discard
from pipeline.errors import UserError
from pipeline.fencing import Attempt, refuse_superseded
from pipeline.learner import Learner
from pipeline.lease import Superseded
from pipeline.patience import patiently

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the writing thread: its checksums take the processor time that training leaves."""
LONELY_SECONDS = 120.0
"""What one rank has written is seen by all others in this time, or they do not write to the same storage."""
ROUND_SECONDS = 0.5
"""How often ranks that wait for a checkpoint tell each other how far they are."""
MINUS = "-−"
"""Before a metric's name: the highest value is the best."""
GRACE_SECONDS = 10.0
"""The same, after this rank's training has failed: others may be dead."""


class Saver:
    """Commits checkpoints of one attempt at a run; only the newest attempt may. Every method is collective.

    Args:
        run: the run's folder.
        attempt: rank 0's right to commit.
        resume: the checkpoint that training goes on from.
        beat: called whenever a piece of a checkpoint is on disk, and at each try to reach storage, which are bounded: what
            a watchdog listens to. A write that hangs does not call it.
    """

    def __init__(
        self,
        run: Path,
        settings: CheckpointConfig,
        attempt: Attempt | None,
        resume: Path | None,
        beat: Callable[[], None] = lambda: None,
        number: int = 0,
    ) -> None:
        self._run, self._settings, self._attempt, self._beat = run, settings, attempt, beat
        self.number = number
        """Of the attempt."""
        self.resume = resume
        state = checkpoint.read_state(resume) if resume else {"step": 0, "best": None, "metrics": {}}
        self.step: int = state["step"]
        """Of the checkpoint that training goes on from."""
        self.metrics: dict[str, float] = state["metrics"]  # of that step
        self._best = Best.parse(settings.best, state["best"])
        self._write: Write | None = None

    @classmethod
    def begin(
        cls, run: Path, settings: CheckpointConfig, beat: Callable[[], None] = lambda: None, owner: str | None = None
    ) -> Saver:
        """Take over the run (rank 0) for the driver that has the lease, and agree on the checkpoint to go on from."""
        attempt = Attempt.begin(run, owner=owner) if dist.get_rank() == 0 else None
        resume, number = agree((checkpoint.latest(run), attempt.number) if attempt else None)
        return cls(run, settings, attempt, resume, beat, number)

    def current(self) -> AbstractContextManager[None]:
        """On rank 0: nobody takes over the run inside. Raises Superseded where somebody has."""
        assert self._attempt is not None
        return self._attempt.current()

    def save(self, learner: Learner, step: int, metrics: dict[str, float], wait: bool = False) -> float:
        """Begin to write the checkpoint of `step`, after waiting for the one before → seconds.

        wait: until this one is committed, too, as without `in_background`. Raises what `poll` raises.
        """
        began = time.monotonic()
        self._settle()
        folder, attempt = agree((self._make_folder(step), self._attempt.number) if self._attempt else None)
        self._best.note(step, metrics)
        state = {"step": step, "updates": learner.updates(), "best": self._best.plain(), "metrics": metrics}
        background = self._settings.in_background
        parts = learner.parts(copied=background)
        commit = partial(self._commit, folder, state, learner.files()) if self._attempt else None
        own = Place(folder, self._run, attempt, self._settings.patience)
        self._write = Write(list(parts) if background else parts, own, commit, self._beat)
        if not background:
            self._write.write_parts()
        self._write.start()
        if wait or not background:
            self._settle()
        return time.monotonic() - began

    def best_so_far(self, metrics: Mapping[str, float]) -> bool:
        """Whether a step's evaluation is better than all before, so that its checkpoint is one to keep. Collective."""
        return evaluated(metrics) and agree(self._best.beaten_by(metrics))

    @property
    def busy(self) -> bool:
        """Whether this rank is writing a checkpoint now."""
        return self._write is not None and not self._write.done

    def poll(self) -> None:
        """Between steps: raises what went wrong, on any rank, with the checkpoint under way.

        Superseded: a newer attempt has taken over. StorageFailed: the disk is full or away. RuntimeError: all else.
        """
        if self._write is None:
            return
        done, written, outcomes = self._write.done, self._write.written, [None] * dist.get_world_size()
        mine = self._write.error  # asked second: what is done without an error when asked first may have failed since
        told = (type(mine) if isinstance(mine, UserError) else RuntimeError, _one_line(mine)) if mine else None
        dist.all_gather_object(outcomes, (done, written, told))
        for *_, error in outcomes:
            if error is not None:
                self._give_up()
                raise error[0](error[1])
        if all(written for _, written, _ in outcomes):
            self._write.all_written.set()
        if all(done for done, *_ in outcomes):
            self._write = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the checkpoint under way. After an error other ranks may be gone, and that error is the one to see."""
        if kind is None:
            self._settle()
        elif (write := self._write) is not None:
            self._give_up(unless_done=True)
            if write.error is not None:
                logger.warning("the checkpoint under way was not saved: %s", _one_line(write.error))

    def _settle(self) -> None:
        """No checkpoint is under way, or raise why it failed: as soon as it has failed on any rank."""
        while self._write is not None:
            self._write.wait(ROUND_SECONDS)
            self.poll()

    def _give_up(self, unless_done: bool = False) -> None:
        """Leave the checkpoint under way; what there is of it takes space that somebody may be short of."""
        assert self._write is not None
        self._write.hurry.set()
        self._write.wait()
        if self._attempt is not None and not (unless_done and self._write.error is None):
            with suppress(OSError):  # the storage may be what failed; the next attempt deletes it
                discard(self._write.place.folder)
        self._write = None

    def _make_folder(self, step: int) -> Path:
        attempt = self._attempt
        assert attempt is not None
        return patiently(partial(attempt.temporary, step), self._run, self._settings.patience, beat=self._beat)

    def _commit(self, folder: Path, state: dict[str, Any], files: list[str]) -> None:
        """Rank 0: complete the checkpoint when all files are there, and delete what is not kept."""
        assert self._attempt is not None and self._write is not None
        write, seconds = self._write, self._settings.patience
        patient = partial(patiently, root=self._run, seconds=seconds, hurry=write.hurry, beat=self._beat)
        patient(partial(_await_files, folder, files, write.all_written, write.hurry, self._beat))
        patient(partial(checkpoint.finish, folder, state))
        patient(partial(self._attempt.commit, folder, state["step"]))
        best = checkpoint.path_of(self._run, state["best"]["step"]) if state["best"] else None
        patient(partial(checkpoint.prune, self._run, self._settings.keep, best))


class Best:
    """Which checkpoint is the best by one metric: `checkpoint.best`.

    Args:
        metric: its name, behind a minus where the highest value is the best; None: none is.
        step, value: of the best so far; the value is the one to be lowest.
    """

    def __init__(self, metric: str | None, step: int | None = None, value: float = math.inf) -> None:
        self._metric, self._step, self._value = metric, step, value
        self._warned = False

    @classmethod
    def parse(cls, metric: str | None, plain: dict[str, Any] | None) -> Best:
        """What `plain` gave, unless that was of another metric."""
        if plain is None or plain.get("metric", metric) != metric or not math.isfinite(plain["value"]):
            return cls(metric)
        return cls(metric, plain["step"], plain["value"])

    def plain(self) -> dict[str, Any] | None:
        """As a checkpoint's state has it; None: there is none yet."""
        return None if self._step is None else {"metric": self._metric, "step": self._step, "value": self._value}

    def beaten_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether these are better than all before; what is not finite is not."""
        return self._of(metrics) < self._value

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """A checkpoint with these metrics is about to be written."""
        if self.beaten_by(metrics):
            self._step, self._value = step, self._of(metrics)

    def _of(self, metrics: Mapping[str, float]) -> float:
        """The value to be lowest; infinite where there is none."""
        if self._metric is None:
            return math.inf
        name = self._metric.lstrip(MINUS)
        value = metrics.get(name)
        if value is None and not self._warned and evaluated(metrics) and dist.get_rank() == 0:
            self._warned = True
            logger.warning("checkpoint.best: there is no metric %s; known here: %s", name, ", ".join(sorted(metrics)))
        if value is None or not math.isfinite(value):
            return math.inf
        return -value if self._metric[0] in MINUS else value


def evaluated(metrics: Mapping[str, float]) -> bool:
    """Whether a step's metrics hold those of an evaluation."""
    return any(name.startswith("eval/") for name in metrics)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint is written, by which attempt, and for how long a disk may be full or away."""

    folder: Path
    run: Path
    attempt: int
    patience: float


class Write:
    """One rank's part in writing a checkpoint: its files, then on rank 0 the commit."""

    def __init__(
        self,
        parts: Iterable[tuple[str, dict[str, Tensor]]],
        place: Place,
        commit: Callable[[], None] | None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.written = self.done = False
        """Whether this rank's files are written, and whether all is done; either way, there may be an error."""
        self.error: Exception | None = None
        self.hurry = threading.Event()
        """Set when training has failed: nothing is tried again, nobody is waited for in vain."""
        self.all_written = threading.Event()
        """Set when the files of all ranks are written, as far as their writers know."""
        self.place = place
        self._parts, self._commit, self._beat = iter(parts), commit, beat
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write what `write_parts` has not written yet, and commit, in a thread that yields to all others.

        An error is kept in `error`, for the main thread to raise on all ranks alike.
        """
        self._thread = threading.Thread(target=self._run_aside, name="checkpoint", daemon=True)
        self._thread.start()

    def write_parts(self) -> None:
        """Write this rank's files."""
        place = self.place
        for name, tensors in self._parts:
            write = partial(checkpoint.write_tensors, place.folder / name, tensors, self._beat)
            self._do(partial(patiently, write, place.run, place.patience, self.hurry, beat=self._beat))
            # After an error all is skipped but the asking: where it gathers over ranks, the others need this one.
        self._parts = iter(())  # the copy is gone before the others are waited for
        self.written = True

    def _do(self, act: Callable[[], Any]) -> None:
        if self.error is not None:
            return
        try:
            act()
        except FileNotFoundError as error:  # a newer attempt deletes what older ones are writing
            self.error = self._superseded() or error
        except Exception as error:
            self.error = error

    def _superseded(self) -> Superseded | None:
        try:
            refuse_superseded(self.place.run, self.place.attempt)
        except Superseded as superseded:
            return superseded
        return None

    def wait(self, seconds: float | None = None) -> None:
        """Until the thread has ended, or for so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run_aside(self) -> None:
        if sys.platform == "linux":  # elsewhere the call is about the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self.write_parts()
        if self._commit is not None:
            self._do(self._commit)
        self.done = True


def _await_files(
    folder: Path,
    names: Iterable[str],
    all_written: threading.Event,
    hurry: threading.Event,
    beat: Callable[[], None],
) -> None:
    """Return when all files of a checkpoint are sealed. Raises Corrupt when all are written, and some cannot be seen."""
    missing = {name + checkpoint.SEAL for name in names}
    last = time.monotonic()
    while missing:
        came = {name for name in missing if (folder / name).exists()}
        missing -= came
        waits_for_writers = not all_written.is_set() and not hurry.is_set()
        if came or waits_for_writers:
            last = time.monotonic()
        elif time.monotonic() - last > (GRACE_SECONDS if hurry.is_set() else LONELY_SECONDS):
            raise checkpoint.Corrupt(
                f"{folder}: {min(missing).removesuffix(checkpoint.SEAL)} did not come; is the storage shared by all workers?"
            )
        if not waits_for_writers:
            beat()  # this is bounded; writers tell of their progress themselves
        time.sleep(0.02)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (
        text if isinstance(error, UserError) else f"a checkpoint could not be written: {type(error).__name__}: {text}"
    )
