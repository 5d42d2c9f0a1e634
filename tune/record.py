"""What happens to trials, told to everybody: the table on disk, MLflow, the lease on the run, the terminal.

A thread follows the metrics of running trials, so that neither a slow tracking server nor a slow terminal holds up Tune.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.config import ConfigError
from pipeline.lease import Lease, Superseded
from pipeline.progress import LOG_FILE, METRICS_FILE, Follower, parse_line, read_metrics
from pipeline.tracking import Status, Tracker
from tune.group import STOP_FILE
from tune.overhead import spent
from tune.plan import Sweep
from tune.table import State, Trial

STATUS: dict[State, Status] = {"finished": "FINISHED", "stopped": "FINISHED", "diverged": "FAILED", "failed": "FAILED"}
logger = logging.getLogger(__name__)


@dataclass
class _Open:
    """A trial that runs."""

    trial: Trial
    lease: Lease
    metrics: Follower
    log: Follower
    tracker: Tracker | None = None  # from its start on
    last_step: int = 0  # newest step that MLflow knows
    started: float | None = None


class Recorder:
    """Use as a context: on leaving, everything is sent. Thread-safe.

    Args:
        sweep: the sweep.
        parent: the tracker of the sweep itself.
        show: called with a trial whenever there is news of it.
    """

    def __init__(self, sweep: Sweep, parent: Tracker, show: Callable[[Trial], None]) -> None:
        self._sweep, self._parent, self._show = sweep, parent, show
        self._open: dict[int, _Open] = {}
        self._ended: list[tuple[_Open, Status]] = []
        self._lock = threading.RLock()
        self._leases = ExitStack()
        self._stop = threading.Event()
        self._broken: BaseException | None = None
        self.problem: ConfigError | None = None  # why no further trial makes sense; raised on leaving
        self._thread = threading.Thread(target=self._follow, name="recorder", daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Trials that still run stay `running` in the table: the same command takes them up again."""
        with self._lock:
            for one in self._open.values():
                self._leases.push(one.lease)
                if one.started is not None:
                    self._ended.append((one, "KILLED"))
            self._open.clear()
        self._stop.set()
        self._thread.join()
        self._leases.close()
        if (problem := self._broken or self.problem) is not None:
            raise problem

    def expect(self, trial: Trial) -> None:
        """Its workers may begin at any time. Where another driver trains the same run, it is recorded as failed instead.

        Raises lease.Superseded then.
        """
        run = Path(trial.run)
        lease = Lease(run, owner=self._sweep.owner)
        try:
            lease.__enter__()
        except Superseded as error:
            self._sweep.tell(self._sweep.table.put(replace(trial, state="failed", reason=str(error))))
            raise
        (run / STOP_FILE).unlink(missing_ok=True)
        with self._lock:
            self._open[trial.number] = self._following(trial, lease)

    def started(self, number: int) -> None:
        """Its workers begin, for the first time or again."""
        with self._lock:
            one = self._open[number]
            if one.started is None:
                one.started = time.monotonic()
            self._sweep.table.put(one.trial)
        self._show(one.trial)

    def ended(self, number: int, state: State, reason: str = "") -> None:
        """`stopped` by the scheduler: its workers are told to return from their loop."""
        with self._lock:
            if self.problem is not None and state == "stopped":
                return  # not by the scheduler
            one = self._open.pop(number)
            if state == "stopped":
                (Path(one.trial.run) / STOP_FILE).touch()
                self._leases.push(one.lease)  # a checkpoint that is being written may still be committed
            else:
                one.lease.__exit__()
            now = time.monotonic()
            seconds = now - (now if one.started is None else one.started)  # it may fail before it starts
            parts = spent(Path(one.trial.run), time.time() - seconds, time.time())
            found = replace(_now(one.trial), state=state, reason=reason, seconds=round(seconds, 2), spent=parts)
            self._sweep.tell(self._sweep.table.put(found))
            one.trial = found
            self._ended.append((one, STATUS[state]))
        self._show(found)
        if not self._sweep.space.sweeps_objectives:  # objectives differ in their metrics; else the first one tells
            try:
                self._sweep.check_reported([found])
            except ConfigError as error:
                self.problem = error

    # ------------------------------------------------------------------------------------------------- parts

    def _following(self, trial: Trial, lease: Lease) -> _Open:
        run = Path(trial.run)
        return _Open(trial, lease, Follower(run / METRICS_FILE), Follower(run / LOG_FILE, from_end=True))

    def _tracker(self, trial: Trial) -> Tracker:
        config = self._sweep.config_of(trial)
        folder = self._sweep.trial_folder(trial)
        nested = self._parent if config.tracking.enabled else None
        return tracking.start(config, folder, Path(trial.run).name, f"{trial.name} {trial.label}"[:100], nested)

    def _follow(self) -> None:
        try:
            self._tell_owed()
            while not self._stop.wait(0.5):
                self._drain()
            self._drain()
        except BaseException as error:  # raised where the sweep ends
            self._broken = error

    def _drain(self) -> None:
        with self._lock:
            running, ended = [one for one in self._open.values() if one.started is not None], self._ended
            self._ended = []
        for one in [*running, *(one for one, _ in ended)]:
            self._read(one)
        for one, status in ended:
            self._finish(one, status)

    def _finish(self, one: _Open, status: Status) -> None:
        assert one.tracker is not None
        facts = {name: value for name, value in one.trial.metrics.items() if name.startswith("eval/")}
        one.tracker.log_summary({f"final/{name}": value for name, value in facts.items()})
        reason = {"trial.reason": one.trial.reason} if one.trial.reason else {}
        one.tracker.log_summary({"trial.state": one.trial.state, **reason})
        one.tracker.finish(status)

    def _tell_owed(self) -> None:
        """Trials whose end MLflow does not know: the driver was killed when it was in the table alone, or MLflow was away."""
        for trial in self._sweep.table.done():
            status, tracker = STATUS[trial.state], self._tracker(trial)
            if not tracker.owes(status):
                continue
            one = self._following(trial, Lease(Path(trial.run)))  # a lease that nobody enters: its workers are gone
            self._introduce(one, tracker)
            self._read(one)
            self._finish(one, status)
            if tracker.owes(status):
                return  # it is still away: the next call tries again

    def _introduce(self, one: _Open, tracker: Tracker) -> None:
        tracker.log_config(self._sweep.config_of(one.trial).dump())
        one.tracker, one.last_step = tracker, tracker.last_step()

    def _read(self, one: _Open) -> None:
        """New lines of a trial's metrics and log. Only this thread reads them."""
        for text in one.log.new_lines():
            logger.warning("trial %s: %s", one.trial.name, text)
        if one.tracker is None:
            self._introduce(one, self._tracker(one.trial))
        newest: dict[str, Any] = {}
        for text in one.metrics.new_lines():
            if (line := parse_line(text)) is None:
                logger.warning("%s: a damaged line is left out", one.metrics.path)
                continue
            newest |= line
            step = line.pop("step")
            if step > one.last_step:
                one.tracker.log_metrics(step, line)
                one.last_step = step
        with self._lock:
            if newest and self._open.get(one.trial.number) is one:  # else its last word is known already
                step = int(newest.pop("step"))
                one.trial = replace(one.trial, step=step, metrics=one.trial.metrics | newest)
                self._show(one.trial)


def _now(trial: Trial) -> Trial:
    """The trial with what its metrics file says."""
    newest: dict[str, Any] = {}
    for line in read_metrics(Path(trial.run) / METRICS_FILE):
        newest |= line
    step = int(newest.pop("step", 0))
    return replace(trial, step=step, metrics=newest)
