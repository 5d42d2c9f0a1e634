"""How a run tells what it is doing: `metrics.jsonl`, written by rank 0 and followed by the driver.

The file is the one source of step metrics. The driver's `Monitor` draws the progress bar from it and mirrors it to MLflow,
so that a slow terminal or a tracking server that is down cannot slow training, and a resumed run logs no step twice.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.durable import append_line, naming, recall_json, write_text
from pipeline.errors import UserError
from pipeline.metrics_gaps import mend
from pipeline.patience import StorageFailed, may_pass, patiently
from pipeline.redaction import redact
from pipeline.terminal import RedactingFormatter

logger = logging.getLogger(__name__)

METRICS_FILE, LOG_FILE = "metrics.jsonl", "log.txt"
ERROR_FILE, RAY_FILE = "error.json", "ray.json"
"""Why a run ended that starting again cannot help; the address of the Ray that its workers were started on."""

Fence = Callable[[], AbstractContextManager[None]]


class MetricsFile:
    """Rank 0's side: one JSON line per optimizer step, `{"step": …, "loss": …}`.

    Lines wait in memory while storage is out of reach or full: training does not.

    Args:
        after: the step that training goes on from.
        patience: seconds that lines may wait.
        beat: as in `patiently`.
        fence: a context in which nobody takes over the run; raises lease.Superseded where somebody has.
    """

    def __init__(
        self,
        path: Path,
        after: int,
        patience: float = 0.0,
        beat: Callable[[], None] = lambda: None,
        fence: Fence = nullcontext,
    ) -> None:
        self.path, self._patience, self._beat, self._fence = path, patience, beat, fence
        self._waiting, self._since = b"", None
        patiently(partial(self._begin, after), path.parent, patience)

    def _begin(self, after: int) -> None:
        """Keep the lines up to a step: those beyond it are about to be written again."""
        with self._fence():
            kept = [line for line in read_metrics(self.path) if line["step"] <= after]
            # Another file: whoever follows this one sees that it begins anew.
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Write a finished step. Raises StorageFailed, lease.Superseded, or OSError where waiting cannot help."""
        self._waiting += (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            self._write()
        except UserError:
            self._waiting = b""
            raise
        except OSError as error:
            if not may_pass(error, self.path.parent):
                raise
            if self._since is None:
                self._since = time.monotonic()
                logger.warning("%s; its lines wait in memory", error)
            if time.monotonic() - self._since > self._patience:
                raise StorageFailed(f"{error}; mend it, then the same command goes on") from None

    def close(self) -> None:
        """Write what waits. The file cannot be used afterwards."""
        if self._waiting:
            patiently(self._write, self.path.parent, self._patience, beat=self._beat)

    def _write(self) -> None:
        """Opened anew each time: a file server that was away may not know an old handle."""
        with self._fence(), naming(self.path), self.path.open("ab", buffering=0) as file:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
        self._since = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Each step's metrics, in order; a last line that is still being written does not count.

    The numbers of damaged lines come from elsewhere in the run's folder where they are there; what is damaged, and which
    steps are missing then, is a warning.
    """
    if not path.is_file():
        return []
    *complete, _ = path.read_bytes().split(b"\n")
    found: dict[int, dict[str, Any]] = {}
    damaged = []
    for number, line in enumerate(complete, 1):
        if (metrics := parse_line(line)) is not None:
            found[metrics["step"]] = metrics
        elif line.strip():
            damaged.append(number)
    if damaged or len(found) < max(found, default=0):
        found |= mend(path, found.keys(), damaged)
    return [found[step] for step in sorted(found)]


def parse_line(line: bytes | str) -> dict[str, Any] | None:
    """A line of a metrics file, {"step": …, name: number}, or None where it is damaged."""
    try:
        metrics = json.loads(line)
        values = metrics.values()
        whole = type(metrics["step"]) is int and metrics["step"] > 0
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return metrics if whole and all(isinstance(value, int | float) for value in values) else None


def read_error(run: Path) -> str | None:
    """Why a run ended that starting again cannot help; None where there is no such note."""

    def text(found: Any) -> str:
        if not isinstance(found, str):
            raise TypeError("a reason is text")
        return found

    return recall_json(run / ERROR_FILE, text, "left out")


@contextmanager
def log_to(path: Path, superseded: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Copy our own warnings to a file: workers are elsewhere, and the driver's `Monitor` shows it to the person.

    superseded: asked before each; whether the file is another driver's by now.
    """
    handler = _LogFile(path)
    handler.addFilter(lambda _: not superseded())
    handler.setLevel(logging.WARNING)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("pipeline")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A full disk costs the copy of a warning and nothing else: the terminal has it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def tell(run: Path, text: str) -> None:
    """A line for the person at the driver's terminal, from any worker."""
    append_line(run / LOG_FILE, redact(text).encode())


PATIENCE = 15.0
"""Seconds after which the tracker is told of a run that has no step yet."""


class Monitor:
    """The driver's side: a thread that follows the run's metrics and log while workers train.

    Args:
        run: the run's folder.
        total_steps: length of the bar.
        on_step: called once per new step with (step, metrics); the tracker's `log_metrics`.
        tick: called twice a second, in the monitor's thread.
        introduce: called once, in the monitor's thread, before the first step is told; returns the last step that an earlier driver told.
    """

    def __init__(
        self,
        run: Path,
        total_steps: int,
        on_step: Callable[[int, dict[str, float]], None],
        introduce: Callable[[], int] = int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._metrics, self._log = Follower(run / METRICS_FILE), Follower(run / LOG_FILE, from_end=True)
        self._on_step, self._introduce, self._tick, self._last = on_step, introduce, tick, 0
        self._bar = _Bar(total_steps)
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._drain()
        self._bar.close()

    def _follow(self) -> None:
        # What it imports would compete with the workers' own start.
        while not self._stop.wait(0.5) and not self._metrics.grew and time.monotonic() < self._started + PATIENCE:
            pass
        self._last = self._introduce()
        while not self._stop.wait(0.5):
            with suppress(OSError):  # storage out of reach: nothing is lost, it is read once it is back
                self._drain()
            self._tick()

    def _drain(self) -> None:
        """Tell what has been written since the last call."""
        for text in self._log.new_lines():
            tqdm.write(text, file=sys.stderr)
        newest = None
        for text in self._metrics.new_lines():
            if (metrics := parse_line(text)) is None:
                logger.warning("%s: a damaged line; the next start looks for its numbers elsewhere", self._metrics.path)
                continue
            step = metrics.pop("step")
            if step > self._last:
                self._on_step(step, metrics)
                self._last = step
            newest = step, metrics
        if newest is not None:
            self._bar.show(*newest, began=self._metrics.began)


class Follower:
    """New complete lines of a file that others append to. One that a resumed worker replaced is read from its start."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        self.path, self._inode, self._offset = path, 0, 0
        self.began = True
        """Whether the last `new_lines` were read from the file's start: they may have been there for long."""
        if path.is_file():
            found = path.stat()
            self._inode, self._offset = found.st_ino, found.st_size if from_end else 0

    @property
    def grew(self) -> bool:
        """Whether there is anything that `new_lines` has not given yet."""
        if not self.path.is_file():
            return False
        found = self.path.stat()
        return (found.st_ino, found.st_size) != (self._inode, self._offset)

    def new_lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset = found.st_ino, 0
            self.began = self._offset == 0
            file.seek(self._offset)
            complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return complete.decode(errors="replace").splitlines()


class _Bar:
    """A tqdm bar on a terminal; in a log file, a line every ten seconds instead."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar = tqdm(total=total, desc="train", unit="step", disable=not sys.stderr.isatty())
        self._shown = time.monotonic()
        self._since: tuple[float, int] | None = None  # when the clock was started, at which step

    def show(self, step: int, metrics: dict[str, float], began: bool) -> None:
        """`step` is done. began: those up to it are not this start's, or not for sure: how fast steps are is measured from here."""
        now = time.monotonic()
        if began or self._since is None:
            self._since = now, step
        if not self._bar.disable:
            if began:
                self._bar.reset()
                self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.set_postfix_str(summarise(metrics), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._shown >= 10 or step == self._total:
            self._shown = now
            line = f"train {step}/{self._total} {summarise(metrics)}{self._left(now, step)}"
            print(line, file=sys.stderr, flush=True)

    def _left(self, now: float, step: int) -> str:
        """The time that is left, in words; nothing before a step was timed."""
        assert self._since is not None
        started, first = self._since
        return f" ETA {(self._total - step) * (now - started) / (step - first):.0f}s" if step > first else ""

    def close(self) -> None:
        self._bar.close()


def summarise(metrics: dict[str, float]) -> str:
    """The few numbers that a person watches."""
    shown = {
        "loss": "loss",
        "margin": "reward/margin",
        "acc": "accuracy",
        "eval": "eval/loss",
        "tok/s": "tokens_per_second",
    }
    return " ".join(f"{short}={metrics[name]:.4g}" for short, name in shown.items() if name in metrics)
