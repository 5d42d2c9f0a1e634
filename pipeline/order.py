"""Which rows make up which optimizer step, and who computes them. Order is data, not state.

    step_rows(lengths, seed, epoch, rows_per_step)   knows nothing of workers
    micro_batches(rows, tokens, workers, budget, …)  deals one step out
    Plan(config, lengths)                            the steps of a whole run

All are pure, so a checkpoint only has to store the step's number, a resumed run continues with the very next row, and
another number of workers trains on the same steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipeline.config import RunConfig

BUCKET_STEPS = 8
"""Steps whose rows are sorted by length together: less padding, while the mix of lengths stays random on a larger scale."""
ROWS_AT_ONCE = 1024
"""Rows that are dealt out together; of more (those of an evaluation) the longest come first, then the next."""
SORT_ROWS = 2**20
"""Rows that are sorted in one call: what sorting takes beside the order itself, some 20 MB."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward on one worker, as positions in `lengths`."""

    rows: tuple[int, ...]
    filler: bool = False  # True: computed with weight 0, so that this rank stays in step with the others


class Steps(Sequence[np.ndarray]):
    """The steps of one epoch, each the positions of its rows. Two arrays, whatever the number of steps."""

    def __init__(self, rows: np.ndarray, steps: np.ndarray, rows_per_step: int) -> None:
        self._rows, self._steps, self._size = rows, steps, rows_per_step

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: Any) -> Any:
        start = int(self._steps[number]) * self._size
        return self._rows[start : start + self._size]

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows, step by step, and where each step ends among them. [rows], [steps]"""
        starts = self._steps.astype(np.int64) * self._size
        sizes = np.minimum(self._size, len(self._rows) - starts)
        ends = np.cumsum(sizes)
        return self._rows[np.repeat(starts - (ends - sizes), sizes) + np.arange(len(self._rows))], ends

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self._rows.nbytes + self._steps.nbytes


def position_type(count: int) -> type[np.signedinteger]:
    """The smallest integers that number so many rows: at a billion rows, each array of them is 4 GB instead of 8."""
    return np.int32 if count < 2**31 else np.int64


def step_rows(lengths: np.ndarray, seed: int, epoch: int, rows_per_step: int) -> Steps:
    """Positions 0…n−1, each exactly once, cut into steps of `rows_per_step` (the last may be smaller)."""
    order = _shuffled(len(lengths), [seed, epoch])
    window = BUCKET_STEPS * rows_per_step
    whole = len(order) // window * window
    at_once = max(1, SORT_ROWS // window) * window
    if len(lengths) and lengths.max() < 2**16:
        lengths = lengths.astype(np.uint16)  # numpy sorts these by their digits: four times as fast
    for start in range(0, whole, at_once):
        _sort_by_length(order[start : min(start + at_once, whole)].reshape(-1, window), lengths)
    if whole < len(order):
        _sort_by_length(order[whole:].reshape(1, -1), lengths)
    return Steps(order, _shuffled(steps_per_epoch(len(order), rows_per_step), [seed, epoch, 1]), rows_per_step)


def _shuffled(count: int, seed: list[int]) -> np.ndarray:
    """0 … count − 1 in a random order, which the numbers' type does not change."""
    numbers = np.arange(count, dtype=position_type(count))
    np.random.default_rng(seed).shuffle(numbers)
    return numbers


def _sort_by_length(windows: np.ndarray, lengths: np.ndarray) -> None:
    """Sort each of these windows of positions, in place. [windows, rows]"""
    windows[:] = np.take_along_axis(windows, np.argsort(lengths[windows], axis=1, kind="stable"), axis=1)


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """Optimizer steps that use each of `rows` once."""
    return -(-rows // rows_per_step)


class Plan:
    """The steps of a whole run, as a function of lengths, seed and epoch alone."""

    def __init__(self, config: RunConfig, lengths: np.ndarray) -> None:
        self.lengths, self._seed, self._train = lengths, config.seed, config.train
        self._epoch: tuple[int, Sequence[np.ndarray]] = (-1, [])
        self.steps_per_epoch = steps_per_epoch(len(lengths), config.train.rows_per_step)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)

    def positions(self, step: int) -> np.ndarray:
        """Rows of a step (counted from 0), as positions in `lengths`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, step_rows(self.lengths, self._seed, epoch, self._train.rows_per_step))
        return self._epoch[1][within]

    def evaluates_after(self, step: int) -> bool:
        """Every `eval_every` steps (default: epochs), and at the end."""
        return (step + 1) % self._evaluates_every == 0 or step + 1 == self.total_steps

    @property
    def first_evaluation(self) -> int:
        """The step after which held-out rows are read for the first time."""
        return min(self._evaluates_every, self.total_steps) - 1

    @property
    def _evaluates_every(self) -> int:
        return self._train.eval_every or self.steps_per_epoch


def micro_batches(
    rows: Sequence[int] | np.ndarray,
    tokens: np.ndarray,
    workers: int,
    budget: int,
    padded: bool,
    costs: np.ndarray | None = None,
    most: int | None = None,
) -> list[list[MicroBatch]]:
    """Deal a step's rows out: [workers][n] micro-batches, the same n for every worker.

    A micro-batch has at most `budget` tokens, or where its rows are `padded`, as many of the longest. What it costs is as even as
    possible, so that ranks wait little for each other: `costs` of its rows; where they are padded, its tokens. A row longer than the
    budget gets a micro-batch of its own.

    rows, tokens, costs: [n] each; costs are integers of any unit (default: tokens).
    most: as many workers as there can be (default: `workers`). The rows that share a micro-batch depend on this number alone, not
    on how many workers are there now: what is computed in low precision rounds the same way before and after a resize.
    """
    most = most or workers
    assert workers <= most and len(rows) == len(tokens)
    size = tokens.tolist()
    price = size if costs is None or padded else costs.tolist()
    longest_first = sorted(range(len(rows)), key=lambda i: (-size[i], rows[i]))
    bins = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        bins += _bins(longest_first[start : start + ROWS_AT_ONCE], size, price, most, budget, padded)
    paid = [_tokens(b, size, True) if padded else sum(price[i] for i in b) for b in bins]
    dearest_first = sorted(range(len(bins)), key=lambda i: -paid[i])
    dealt = [MicroBatch(tuple(int(rows[i]) for i in bins[b])) for b in dearest_first]
    dealt += [MicroBatch((int(rows[longest_first[-1]]),), filler=True)] * (-len(dealt) % workers)
    return [dealt[rank::workers] for rank in range(workers)]


def _bins(
    rows: list[int], size: Sequence[int], price: Sequence[int], most: int, budget: int, padded: bool
) -> list[list[int]]:
    """Rows, longest first, as micro-batches within the budget, in as few rounds of `most` as that takes."""
    rounds = -(-sum(min(size[i], budget) for i in rows) // (most * budget))  # fewer have no room for them
    while True:
        count = most * rounds
        bins = _like_bins(rows, size, count, budget) if padded else _cheapest_first(rows, size, price, count, budget)
        if all(len(b) == 1 or _tokens(b, size, padded) <= budget for b in bins):
            break
        rounds += 1 + rounds // 50
    if rounds == 1 and not padded:  # over several rounds the differences even out
        _level(bins, size, price, budget)
    return bins


def costs_of(tokens: np.ndarray, trained_tokens: np.ndarray, head_share: float) -> np.ndarray:
    """What rows cost, in hundredths of what a token costs below the output head, which trained tokens alone go through. [n] ×2 → [n]

    head_share: of the head, in tokens (`learner.head_share`).
    """
    return np.rint(100 * (tokens + head_share * trained_tokens)).astype(np.int64)


def _tokens(rows: Sequence[int], size: Sequence[int], padded: bool) -> int:
    own = [size[i] for i in rows]
    return max(own) * len(own) if padded else sum(own)


def _cheapest_first(
    rows: list[int], size: Sequence[int], price: Sequence[int], count: int, budget: int
) -> list[list[int]]:
    """At most `count` bins: each row, dearest first, goes to the cheapest that has room, or where none has, to the cheapest."""
    bins: list[list[int]] = [[] for _ in range(min(count, len(rows)))]
    filled = [0] * len(bins)
    heap = [(0, i) for i in range(len(bins))]
    for row in sorted(rows, key=lambda i: -price[i]):
        full = []
        while heap and filled[heap[0][1]] and filled[heap[0][1]] + size[row] > budget:
            full.append(heapq.heappop(heap))
        load, i = heapq.heappop(heap) if heap else full.pop(0)
        bins[i].append(row)
        filled[i] += size[row]
        for other in (*full, (load + price[row], i)):
            heapq.heappush(heap, other)
    return bins


def _level(bins: list[list[int]], size: Sequence[int], price: Sequence[int], budget: int) -> None:
    """Rows change places between the dearest and the cheapest bin for as long as that brings them closer to each other."""
    while True:
        loads = [sum(price[row] for row in b) for b in bins]
        dear, cheap = loads.index(max(loads)), loads.index(min(loads))
        room = [budget - sum(size[row] for row in bins[i]) for i in (dear, cheap)]
        move = _move(bins[dear], bins[cheap], size, price, loads[dear] - loads[cheap], room)
        if move is None:
            return
        given, *taken = move
        bins[dear].remove(given)
        bins[cheap].append(given)
        for row in taken:
            bins[cheap].remove(row)
            bins[dear].append(row)


def _move(
    dear: list[int], cheap: list[int], size: Sequence[int], price: Sequence[int], gap: int, room: Sequence[int]
) -> list[int] | None:
    """The row to give, and perhaps one to take for it, that leave two bins closest to each other; None: they stay as they are.

    gap: between their costs; room: tokens that either has left.
    """
    best, move = gap, None
    for given in dear if gap and len(dear) > 1 else ():
        for taken in ([], *([row] for row in cheap)):
            more = size[given] - sum(size[row] for row in taken)  # tokens for the cheap one
            left = abs(gap - 2 * (price[given] - sum(price[row] for row in taken)))
            if left < best and -room[0] <= more <= room[1]:
                best, move = left, [given, *taken]
    return move


def _like_bins(rows: list[int], size: Sequence[int], count: int, budget: int) -> list[list[int]]:
    """Cut rows (longest first) into at most `count` bins of like lengths, the dearest bin as cheap as possible."""
    longest = size[rows[0]]
    # Cheaper than the longest row, or than allowed, gains nothing.
    low, high = min(longest, budget), longest * len(rows)
    while low < high:  # bisection on the cost of a bin
        middle = (low + high) // 2
        if len(_greedy_bins(rows, size, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _greedy_bins(rows, size, low)


def _greedy_bins(rows: list[int], size: Sequence[int], cost: int) -> list[list[int]]:
    bins, start = [], 0
    while start < len(rows):
        count = max(1, cost // size[rows[start]])
        bins.append(rows[start : start + count])
        start += count
    return bins
