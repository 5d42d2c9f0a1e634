"""The trials on the terminal: a table that is redrawn in place; in a log file, a line where a trial's state changes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid

from tune.table import Trial

STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "diverged": "red", "failed": "red"}
SHOWN = 30
"""Rows on the screen; of more trials, the newest and the best."""
LINE_SECONDS = 30.0


class Screen:
    """Use as a context.

    Args:
        metric: the one that ranks trials.
        title: above the table.
    """

    def __init__(self, metric: str, title: str) -> None:
        self._metric, self._title = metric, title
        self._trials: dict[int, Trial] = {}
        self._told: dict[int, tuple[str, float]] = {}  # in a log file: state and when it was told
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=2, transient=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, trial: Trial) -> None:
        """There is news of this trial. Called from more than one thread."""
        self._trials[trial.number] = trial
        if self._live is not None:
            newest = sorted(self._trials.values(), key=lambda t: (t.state != "running", -t.number))[:SHOWN]
            self._live.update(grid(sorted(newest, key=lambda t: t.number), self._metric, self._title))
            return
        state, when = self._told.get(trial.number, ("", 0.0))
        if trial.state != state or time.monotonic() - when > LINE_SECONDS:
            self._told[trial.number] = trial.state, time.monotonic()
            print(line(trial, self._metric), file=sys.stderr, flush=True)


def line(trial: Trial, metric: str) -> str:
    """One trial as one line."""
    value = trial.metrics.get(metric)
    told = f" {metric}={value:.4g}" if value is not None else ""
    reason = f": {trial.reason}" if trial.reason else ""
    return f"trial {trial.name} [{trial.label}] step {trial.step}{told} {trial.state}{reason}"


def grid(trials: Iterable[Trial], metric: str, title: str) -> Grid:
    """The trials as a table of rich."""
    found = Grid(title=escape(title), title_justify="left", expand=False)
    for column in ("trial", "settings", "step", metric, "s", "state"):
        found.add_column(
            escape(column), justify="right" if column in ("step", metric, "s") else "left", overflow="fold"
        )
    for trial in trials:
        value = trial.metrics.get(metric)
        state = f"[{STYLES[trial.state]}]{trial.state}[/]" + (f" {escape(trial.reason[:80])}" if trial.reason else "")
        shown = f"{value:.4f}" if value is not None else "–"
        seconds = f"{trial.seconds:.0f}" if trial.seconds else ""
        found.add_row(trial.name, escape(trial.label), str(trial.step), shown, seconds, state)
    return found


def print_final(trials: Iterable[Trial], metric: str, title: str) -> None:
    """The table at the end, on stdout, as wide as it needs to be in a file."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(grid(trials, metric, title))
