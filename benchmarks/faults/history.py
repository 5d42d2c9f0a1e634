"""From traces to what became of each step: begun when, by whom, how often, and whether any row was lost or used twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults.errors import DrillError
from benchmarks.faults.runs import Seen


@dataclass(frozen=True, slots=True)
class History:
    """What happened to a training, step by step; steps count from 0.

    Args:
        starts: the first step of each group of workers that took a step.
        repeated: finished steps that each of the later groups did again.
        recovered: seconds from each group's last sign of life to the next group's first step.
    """

    starts: tuple[int, ...]
    repeated: tuple[int, ...]
    recovered: tuple[float, ...]
    steps: int


def order_of(quiet: Sequence[Sequence[Seen]], ranks: int) -> dict[tuple[int, tuple[int, ...]], int]:
    """(rank, rows) → step, from an undisturbed run. Raises DrillError where a row is lost or used twice in an epoch."""
    lines = {process[0].rank: process for process in quiet}
    if len(quiet) != ranks or sorted(lines) != list(range(ranks)) or len({len(line) for line in quiet}) != 1:
        raise DrillError(f"the undisturbed run has {len(quiet)} processes of {[len(line) for line in quiet]} steps")
    steps = [sorted(row for rank in range(ranks) for row in lines[rank][step].rows) for step in range(len(lines[0]))]
    check_epochs(steps)
    found = {(rank, seen.rows): step for rank, line in lines.items() for step, seen in enumerate(line)}
    if len(found) != ranks * len(steps):
        raise DrillError("two steps have the same rows: a trace would not tell them apart")
    return found


def check_epochs(steps: Sequence[Sequence[int]]) -> None:
    """Each row is used once in each full epoch, and never twice in the last one. Raises DrillError."""
    rows = len({row for step in steps for row in step})
    seen: Counter[int] = Counter()
    for step in steps:
        if sum(seen.values()) == rows:
            seen.clear()
        seen.update(step)
        twice = [row for row, count in seen.items() if count > 1]
        if twice:
            raise DrillError(f"rows {twice[:5]} were used twice in an epoch")


def history(processes: Sequence[Sequence[Seen]], order: dict[tuple[int, tuple[int, ...]], int]) -> History:
    """Read the traces of a disturbed run against the order of the undisturbed one.

    Raises DrillError when a process left the order, a group went back behind where it may, or a step is missing.
    """
    groups: list[dict[int, list[tuple[float, int]]]] = []  # rank → (time, step) of each group
    for process in processes:
        steps = [_step(seen, order) for seen in process]
        if steps != list(range(steps[0], steps[0] + len(steps))):
            raise DrillError(f"rank {process[0].rank} went through the steps {steps}")
        line = list(zip((seen.time for seen in process), steps, strict=True))
        home = next((g for g in groups if process[0].rank not in g and _together(g, line)), None)
        if home is None:
            groups.append({process[0].rank: line})
        else:
            home[process[0].rank] = line
    total = 1 + max(order.values())
    begun = [max(step for line in group.values() for _, step in line) for group in groups]
    starts = [min(line[0][1] for line in group.values()) for group in groups]
    last = [max(time for line in group.values() for time, _ in line) for group in groups]
    first = [min(line[0][0] for line in group.values()) for group in groups]
    if starts[0] != 0 or begun[-1] != total - 1:
        raise DrillError(f"the steps {starts[0]} to {begun[-1]} of {total} were seen")
    for before, start in zip(begun, starts[1:], strict=False):
        if start > before + 1:
            raise DrillError(f"the steps between {before} and {start} are missing")
    repeated = tuple(max(0, before - start) for before, start in zip(begun, starts[1:], strict=False))
    recovered = tuple(later - end for end, later in zip(last, first[1:], strict=False))
    return History(tuple(starts), repeated, recovered, total)


def _step(seen: Seen, order: dict[tuple[int, tuple[int, ...]], int]) -> int:
    try:
        return order[seen.rank, seen.rows]
    except KeyError:
        raise DrillError(
            f"rank {seen.rank} used the rows {seen.rows} together, the undisturbed run never did"
        ) from None


def _together(group: dict[int, list[tuple[float, int]]], line: list[tuple[float, int]]) -> bool:
    """Whether this rank belongs to the group: it began with the same step, at about the same time."""
    other = next(iter(group.values()))
    return other[0][1] == line[0][1] and abs(other[0][0] - line[0][0]) < 5.0
