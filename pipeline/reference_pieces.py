"""Which rows the reference scores together, and in what order: that in which training reads them.

A piece is a set of rows that follows from the rows, their split and the order of the first epoch alone. So neither a kill nor
`train.max_steps` changes what is computed together, and with it no bit of a log-probability.

Left out: scoring itself (`reference`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.config import RunConfig, digest
from pipeline.order import Plan, position_type, step_rows
from pipeline.rows import Rows

PIECE_TOKENS = 32768
"""Tokens of one piece: seconds of work for an actor, so that none waits long for the last one."""
MOST_PIECES = 2**14
"""Pieces at most: each is a task of Ray's and a file that every worker maps (Linux allows 65,530 maps a process)."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Rows cut into pieces: those of the training steps, first step first, then those held out."""

    positions: np.ndarray  # [n] of rows, piece by piece
    bounds: np.ndarray  # [pieces + 1]: where each begins in `positions`
    tokens: np.ndarray  # [pieces]
    numbers: np.ndarray  # [rows]: the piece of each row; −1: a row that nobody reads
    in_training: int  # the first so many are of training steps
    until_evaluation: int  # pieces that training reads before its first evaluation
    until_end: int  # and before its end

    @classmethod
    def of(cls, config: RunConfig, rows: Rows) -> Pieces:
        split = rows.split(config.data, config.seed)
        plan = Plan(config, rows.lengths[split.train])
        trained, steps = step_rows(plan.lengths, config.seed, 0, config.train.rows_per_step).flat()
        held = split.eval[np.argsort(-rows.lengths[split.eval], kind="stable")]
        positions = np.concatenate([split.train[trained], held]).astype(position_type(len(rows)))
        lengths = rows.lengths[positions].astype(np.int64)
        size = max(PIECE_TOKENS, int(lengths.sum()) // MOST_PIECES)
        training = growing_ends(lengths[: len(trained)], steps, size)
        bounds = np.concatenate([[0], training, len(trained) + even_ends(lengths[len(trained) :], size)]).astype(
            np.int64
        )
        numbers = np.full(len(rows), -1, dtype=np.int32)
        numbers[positions] = np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds))
        tokens = np.diff(np.concatenate([[0], np.cumsum(lengths)])[bounds])

        def pieces_before(step: int) -> int:
            """Training pieces that the first `step` steps read."""
            return int(np.searchsorted(training, steps[min(step, len(steps)) - 1])) + 1 if step and len(steps) else 0

        evaluation, end = pieces_before(plan.first_evaluation + 1), pieces_before(plan.total_steps)
        return cls(positions, bounds, tokens, numbers, len(training), min(evaluation, end), end)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows_of(self, number: int) -> np.ndarray:
        """Positions of a piece's rows."""
        return self.positions[self.bounds[number] : self.bounds[number + 1]]

    @property
    def held_out(self) -> list[int]:
        """The pieces that an evaluation reads."""
        return list(range(self.in_training, len(self)))

    @property
    def of_the_run(self) -> list[int]:
        """The pieces that a run reads, in its order: held-out rows at the first evaluation."""
        before, after = range(self.until_evaluation), range(self.until_evaluation, self.until_end)
        return [*before, *self.held_out, *after]


def order_of(config: RunConfig) -> str:
    """Names the split of the rows and their order in the first epoch."""
    shares = [source.share for source in config.data.sources]
    return digest(config.seed, config.train.rows_per_step, config.data.eval_fraction, shares)


def growing_ends(lengths: np.ndarray, steps: np.ndarray, size: int) -> np.ndarray:
    """Ends of pieces of whole steps: one step at first, then twice as many each time, up to `size` tokens."""
    before = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], steps])]  # [steps + 1]
    ends, step, wanted = [], 0, 1
    while step < len(steps):
        full = int(np.searchsorted(before, before[step] + size, side="right")) - 1
        step = max(step + 1, min(step + wanted, full, len(steps)))
        ends.append(int(steps[step - 1]))
        wanted *= 2
    return np.array(ends, dtype=np.int64)


def even_ends(lengths: np.ndarray, size: int) -> np.ndarray:
    """Ends of pieces of about `size` tokens each."""
    piece = (np.cumsum(lengths) - 1) // size
    return np.concatenate([np.flatnonzero(np.diff(piece)) + 1, [len(lengths)]]) if len(lengths) else np.zeros(0, int)
