"""Steps whose lines in `metrics.jsonl` are damaged or lost: what checkpoints and rank 0's log still know of them.

A checkpoint's state has all metrics of its step; the log has a few numbers every ten seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Set
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.run_log import SHOWN, path_of, read_events

logger = logging.getLogger(__name__)

MOST_SHOWN = 8
_told: set[str] = set()


def mend(path: Path, known: Set[int], damaged: list[int]) -> dict[int, dict[str, Any]]:
    """Metrics of steps that the file does not have, by step; warns, once for each state of the file.

    Args:
        path: the metrics file, in its run's folder.
        known: the steps that it has.
        damaged: numbers of its damaged lines.
    """
    missing = set(range(1, max(known, default=0))) - known
    found = _elsewhere(path.parent, missing)
    parts = [f"damaged lines {spans(damaged)}" if damaged else ""]
    parts.append(f"steps {spans(found)} are taken from checkpoints and logs" if found else "")
    parts.append(f"steps {spans(missing - found.keys())} are missing" if missing - found.keys() else "")
    warn_once(f"{path}{f':{damaged[0]}' if damaged else ''}: {'; '.join(filter(None, parts))}")
    return found


def _elsewhere(run: Path, missing: Set[int]) -> dict[int, dict[str, Any]]:
    from pipeline import checkpoint  # imports torch, which most readers of a metrics file do not need

    found: dict[int, dict[str, Any]] = {}
    if not missing:
        return found
    for event in read_events(path_of(run, 0)):
        if event["event"] == "step" and event["step"] in missing:
            numbers = {name: event[name] for name in SHOWN if isinstance(event.get(name), int | float)}
            found[event["step"]] = {"step": event["step"], **numbers}
    for folder in checkpoint.saved(run):
        if (step := int(folder.name[5:])) in missing:
            try:
                metrics = checkpoint.read_state(folder)["metrics"]
                found[step] = {"step": step, **{str(name): float(value) for name, value in metrics.items()}}
            except (OSError, ValueError, TypeError, LookupError, AttributeError):
                continue  # a damaged checkpoint is told by whoever goes on from it
    return found


def spans(numbers: Iterable[int]) -> str:
    """[4, 5, 6, 9] → "4–6, 9"; the first few where there are many."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    shown = [f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs[:MOST_SHOWN]]
    return ", ".join([*shown, "…"] if len(runs) > MOST_SHOWN else shown)


def warn_once(text: str) -> None:
    """A warning that this process has not given yet: files are read again and again."""
    if text not in _told:
        _told.add(text)
        logger.warning("%s", text)
