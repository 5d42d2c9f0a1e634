"""The trials on the terminal: a table that is redrawn in place; in a log file, a line where a trial's state changes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid

from tune.table import Trial

STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "diverged": "red", "failed": "red"}
SHOWN = 30
"""Rows on the screen at most, fewer where it is low; of more trials, those that run, the best and the newest."""
AROUND = 8
"""Lines of the table that are no rows, with those of a reason that is folded, and the line below."""
LINE_SECONDS = 30.0
EVALUATED = ("samples/reward", "samples/kl")
"""Columns of the last table where trials were evaluated."""


class Screen:
    """Use as a context.

    Args:
        metric: the one that ranks trials.
        maximise: whether more of it is better.
        title: above the table.
    """

    def __init__(self, metric: str, maximise: bool, title: str) -> None:
        self._metric, self._maximise, self._title = metric, maximise, title
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
            room = max(3, min(SHOWN, self._console.size.height - AROUND))
            rows = chosen(self._trials.values(), room, self._metric, self._maximise)
            table = grid(rows, self._metric, self._title)
            table.caption, table.caption_justify = counts(self._trials.values(), len(rows)), "left"
            self._live.update(table)
            return
        state, when = self._told.get(trial.number, ("", 0.0))
        if trial.state != state or time.monotonic() - when > LINE_SECONDS:
            self._told[trial.number] = trial.state, time.monotonic()
            print(line(trial, self._metric), file=sys.stderr, flush=True)


def chosen(trials: Iterable[Trial], room: int, metric: str, maximise: bool) -> list[Trial]:
    """At most `room` trials, by number: half of the room for those that run, then a quarter for the best, then the newest."""
    trials = sorted(trials, key=lambda t: -t.number)
    running = [t for t in trials if t.state == "running"]
    valued = [t for t in trials if t.state != "running" and t.value(metric) is not None]
    best = sorted(valued, key=lambda t: t.value(metric) or 0.0, reverse=maximise)
    wanted = [*running[: room // 2], *best[: max(1, room // 4)], *trials]
    first = list({t.number: t for t in wanted}.values())[:room]
    return sorted(first, key=lambda t: t.number)


def counts(trials: Iterable[Trial], shown: int) -> str:
    """How many trials are in which state, and how many of them are on the screen."""
    states = Counter(trial.state for trial in trials)
    told = ", ".join(f"{states[state]} {state}" for state in STYLES if states[state])
    return told + (f"; {shown} of {states.total()} shown" if shown < states.total() else "")


def line(trial: Trial, metric: str) -> str:
    """One trial as one line."""
    value = trial.metrics.get(metric)
    told = f" {metric}={value:.4g}" if value is not None else ""
    reason = f": {trial.reason}" if trial.reason else ""
    return f"trial {trial.name} [{trial.label}] step {trial.step}{told} {trial.state}{reason}"


def grid(trials: Iterable[Trial], metric: str, title: str) -> Grid:
    """The trials as a table of rich."""
    trials = list(trials)
    after = [name for name in EVALUATED if any(name in trial.evaluation for trial in trials)]
    found = Grid(title=escape(title), title_justify="left", expand=False)
    for column in ("trial", "settings", "step", metric, *after, "s", "state"):
        justify = "left" if column in ("trial", "settings", "state") else "right"
        found.add_column(escape(column), justify=justify, overflow="fold")
    for trial in trials:
        value = trial.metrics.get(metric)
        state = f"[{STYLES[trial.state]}]{trial.state}[/]" + (f" {escape(trial.reason[:80])}" if trial.reason else "")
        shown = f"{value:.4f}" if value is not None else "–"
        seconds = f"{trial.seconds:.0f}" if trial.seconds else ""
        measured = [f"{trial.evaluation[name]:.4f}" if name in trial.evaluation else "–" for name in after]
        found.add_row(trial.name, escape(trial.label), str(trial.step), shown, *measured, seconds, state)
    return found


def print_final(trials: Iterable[Trial], metric: str, title: str) -> None:
    """The table at the end, on stdout, as wide as it needs to be in a file."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(grid(trials, metric, title))
