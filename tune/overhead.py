"""Where a trial's time went: what it cost beside its steps, from the events that its rank 0 left (`pipeline.run_log`).

    waiting ── start ──▶ loading ── first step ──▶ training ── end ──▶ ending

Waiting: for Tune, for room, and for workers to be there (the first trial of a group waits for their imports). Loading: the model, the
engine and the first step. Ending: until the sweep knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from pipeline.run_log import path_of, read_events

PARTS = ("waiting", "loading", "ending")
"""What is not training."""


def spent(run: Path, began: float, ended: float) -> dict[str, float]:
    """Seconds of each part of a trial between two times (Unix); empty where its workers did not get as far as a step."""
    times: dict[str, list[float]] = {}
    for event in read_events(path_of(run, 0)):
        at = datetime.fromisoformat(event["time"]).timestamp()
        if began <= at <= ended:
            times.setdefault(event["event"], []).append(at)
    if not {"start", "step", "end"} <= times.keys():
        return {}
    marks = [began, times["start"][0], times["step"][0], times["end"][-1], ended]
    names = ("waiting", "loading", "training", "ending")
    return {name: round(after - before, 2) for name, before, after in zip(names, marks, marks[1:], strict=False)}


def describe(trials: Sequence[dict[str, float]]) -> str:
    """One line of medians over the trials' `spent`; empty where none of them has any."""
    known = [parts for parts in trials if parts]
    if not known:
        return ""
    middle = {name: median(parts[name] for parts in known) for name in PARTS}
    total = median(sum(parts[name] for name in PARTS) for parts in known)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in middle.items())
    return f"{total:.1f} s a trial beside its training ({parts}; medians of {len(known)})"
