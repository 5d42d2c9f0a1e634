"""What each rank did, for machines: JSON lines in `<run>/logs/rank-00000.jsonl`, one event per line.

    {"time": "2026-01-31T12:00:00.000+00:00", "event": "start", "run": "run-0123456789abcdef", "attempt": 2, "rank": 0,
     "workers": 1, "step": 20, "total_steps": 100, "host": "…", "pid": 123}

Events: start, step (every ten seconds), checkpoint, log (warnings and errors of any library), end, left, failed. All attempts at a run
share the files. `step` is the number of steps that are done. For people: `log.txt` and the progress bar (`progress`).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.durable import append_line
from pipeline.errors import Leaving
from pipeline.lease import is_taken_over
from pipeline.redaction import redact, redacted

logger = logging.getLogger(__name__)

FOLDER = "logs"
STEP_SECONDS = 10.0
STARTED = {"attempt": int, "step": int, "total_steps": int}
"""What the event `start` always has."""
SHOWN = ("loss", "tokens_per_second", "grad_norm", "lr")
_told: set[tuple[Path, int]] = set()


class RunLog(logging.Handler):
    """One rank's events, as a context around its training. Every line is written at once.

    Storage that is full or away stops no training: what could not be written is counted in the next line's `lost`.
    Once another driver has taken the run, nothing is written: the log is that driver's.

    Args:
        owner: the token of the driver in the run's lease; None: whoever has it.
    """

    def __init__(self, run: Path, rank: int, workers: int, owner: str | None = None) -> None:
        super().__init__(logging.WARNING)
        self._run, self._owner = run, owner
        self._place: dict[str, Any] = {"run": run.name, "attempt": None, "rank": rank, "workers": workers, "step": None}
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        self._path, self._lost = path_of(run, rank), 0
        self._told_at = 0.0

    def __enter__(self) -> RunLog:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: Any) -> None:
        logging.getLogger().removeHandler(self)
        if error is None:
            self.event("end")
        elif isinstance(error, Leaving):
            self.event("left", reason=str(error))
        else:
            trace = "".join(traceback.format_exception(kind, error, where))
            self.event("failed", error=f"{type(error).__name__}: {error}", traceback=trace)
        self.close()

    def start(self, attempt: int, step: int, total_steps: int) -> None:
        """The rank begins, or goes on, behind `step`."""
        self._place |= {"attempt": attempt, "step": step}
        self.event("start", total_steps=total_steps, host=socket.gethostname(), pid=os.getpid())

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; a line is written for the first and then every ten seconds."""
        self._place["step"] = step
        if time.monotonic() >= self._told_at + STEP_SECONDS:
            self._told_at = time.monotonic()
            self.event("step", **{name: metrics[name] for name in SHOWN if name in metrics})

    def event(self, event: str, **values: Any) -> None:
        """Write a line."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        lost = {"lost": self._lost} if self._lost else {}
        line = {"time": moment, "event": event, **self._place, **values, **lost}
        if is_taken_over(self._run, self._owner):
            return
        try:
            text = json.dumps(redacted(line), ensure_ascii=False, default=lambda other: redact(str(other)))
            append_line(self._path, text.encode())
        except OSError:
            self._lost += 1
        else:
            self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """A warning or an error that any library logged."""
        self.event("log", level=record.levelname, logger=record.name, message=record.getMessage())


def path_of(run: Path, rank: int) -> Path:
    """Where a rank's events are."""
    return run / FOLDER / f"rank-{rank:05d}.jsonl"


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines, oldest first. Damaged ones are skipped, and counted in a warning."""
    if not path.is_file():
        return
    damaged = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if (event := _parsed(line)) is not None:
                yield event
            elif line.endswith(b"\n"):  # else it is still being written
                damaged.append(number)
    if damaged and (path, len(damaged)) not in _told:
        _told.add((path, len(damaged)))
        logger.warning("%s:%d: %d damaged lines are skipped", path, damaged[0], len(damaged))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An event whose place and time are what `RunLog` writes, or None."""
    try:
        event = json.loads(line)
        datetime.fromisoformat(event["time"]).timestamp()
        needed = {"rank": int, "workers": int, "event": str} | (STARTED if event["event"] == "start" else {})
        optional = {name: event[name] for name in ("attempt", "step") if event[name] is not None}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        return None
    whole = all(type(event.get(name)) is kind for name, kind in needed.items())
    return event if whole and all(type(value) is int for value in optional.values()) else None


def last_start(run: Path) -> dict[str, Any] | None:
    """How the newest attempt at a run began."""
    return max(
        (e for e in read_events(path_of(run, 0)) if e["event"] == "start"), key=lambda e: e["attempt"], default=None
    )
