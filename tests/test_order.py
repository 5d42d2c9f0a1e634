"""Order is a pure function: every row once, whatever the number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import MicroBatch, costs_of, micro_batches, step_rows, steps_per_epoch

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60).map(np.array)


@given(lengths, st.integers(0, 5), st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_uses_every_row_once(lengths: np.ndarray, seed: int, epoch: int, per_step: int) -> None:
    steps = step_rows(lengths, seed, epoch, per_step)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert len(steps) == steps_per_epoch(len(lengths), per_step)
    assert sorted(len(step) for step in steps)[1:] == [per_step] * (len(steps) - 1)  # only one may be smaller


def test_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = np.arange(1, 101)
    flat = lambda *key: np.concatenate(step_rows(lengths, *key, 4)).tolist()  # noqa: E731
    assert flat(0, 0) == flat(0, 0)
    assert flat(0, 0) != flat(0, 1)
    assert flat(0, 0) != flat(1, 0)


def test_rows_of_a_step_have_similar_lengths_but_steps_are_mixed() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    steps = step_rows(lengths, 0, 0, 16)
    within = np.mean([np.ptp(lengths[step]) for step in steps])
    shuffled = np.mean([np.ptp(part) for part in np.split(np.random.default_rng(1).permutation(lengths), 250)])
    assert within < 0.3 * shuffled
    means = np.array([lengths[step].mean() for step in steps])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


@given(lengths, st.integers(1, 5), st.integers(16, 400), st.booleans())
def test_a_step_is_dealt_out_without_loss_and_within_the_budget(
    lengths: np.ndarray, workers: int, budget: int, padded: bool
) -> None:
    dealt = micro_batches(range(len(lengths)), lengths, workers, budget, padded)
    assert len(dealt) == workers
    assert len({len(mine) for mine in dealt}) == 1  # collectives match: every rank does the same number
    real = [m for mine in dealt for m in mine if not m.filler]
    assert sorted(row for m in real for row in m.rows) == list(range(len(lengths)))
    for m in real:
        own = lengths[list(m.rows)]
        assert len(m.rows) == 1 or (max(own) * len(own) if padded else sum(own)) <= budget


@given(lengths, st.integers(1, 6), st.integers(16, 400), st.booleans())
def test_what_is_computed_together_does_not_depend_on_how_many_workers_are_there(
    lengths: np.ndarray, most: int, budget: int, padded: bool
) -> None:
    def together(workers: int) -> set[tuple[int, ...]]:
        dealt = micro_batches(range(len(lengths)), lengths, workers, budget, padded, most=most)
        assert len({len(mine) for mine in dealt}) == 1
        return {m.rows for mine in dealt for m in mine if not m.filler}

    assert all(together(workers) == together(most) for workers in range(1, most))


def test_ranks_get_equal_cost() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 256).astype(int) + 1
    dealt = micro_batches(range(256), lengths, 4, 8192, padded=True)
    cost = [sum(max(lengths[list(m.rows)]) * len(m.rows) for m in mine) for mine in dealt]
    assert max(cost) < 1.1 * min(cost)
    assert sum(cost) < 1.25 * lengths.sum()  # padding


def test_ranks_get_equal_cost_where_nothing_is_padded() -> None:
    """As good as the best of all ways to deal 10 rows to 2 workers, but for 2 %; tokens alone would leave one waiting."""
    apart = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tokens = rng.lognormal(5, 0.6, 10).astype(int) + 2
        costs = costs_of(tokens, np.rint(tokens * rng.uniform(0.1, 0.9, 10)), head_share=4.0)

        def dearer(dealt: list[list[MicroBatch]], costs: np.ndarray = costs) -> int:
            return max(sum(int(costs[list(m.rows)].sum()) for m in mine) for mine in dealt)

        halves = ([i >> row & 1 for row in range(10)] for i in range(2**10))
        best = min(max(costs @ np.array(half), costs @ (1 - np.array(half))) for half in halves)
        assert dearer(micro_batches(range(10), tokens, 2, 10**6, False, costs)) < 1.02 * best
        apart += dearer(micro_batches(range(10), tokens, 2, 10**6, False)) > 1.02 * best
    assert apart > 10


def test_a_row_costs_its_tokens_and_its_responses_pass_through_the_head() -> None:
    assert costs_of(np.array([10, 7]), np.array([4, 0]), head_share=1.25).tolist() == [1500, 700]


def test_many_rows_are_dealt_out_in_no_time() -> None:
    """Those of an evaluation come at once. What long rows leave in a micro-batch, short ones fill."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.6, 50_000).astype(int) + 1
    costs = costs_of(lengths, lengths * rng.uniform(0.1, 0.9, 50_000), head_share=0.4)
    dealt = micro_batches(range(50_000), lengths, 1, 4096, False, costs)[0]
    assert sum(len(m.rows) for m in dealt) == 50_000
    assert len(dealt) < 1.05 * lengths.sum() / 4096 + 1


@pytest.mark.parametrize("head_share", [0.0, 0.4, 4.0])
def test_dear_rows_do_not_drive_cheap_ones_out_of_the_budget(head_share: float) -> None:
    for long, short in (((5000, 1, 1), (1000, 900, 64)), ((3900, 50, 4), (500, 450, 120))):
        tokens, responses = (np.array([long[k]] * long[2] + [short[k]] * short[2]) for k in (0, 1))
        dealt = micro_batches(range(len(tokens)), tokens, 1, 4096, False, costs_of(tokens, responses, head_share))[0]
        assert len(dealt) < 1.1 * tokens.sum() / 4096


@given(lengths, st.integers(0, 5), st.integers(0, 5), st.integers(1, 9))
def test_the_order_is_the_one_that_runs_began_with(lengths: np.ndarray, seed: int, epoch: int, per_step: int) -> None:
    """Window by window, with 64-bit positions: a killed run must go on in its old order."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    for start in range(0, len(order), 8 * per_step):
        part = order[start : start + 8 * per_step]
        order[start : start + 8 * per_step] = part[np.argsort(lengths[part], kind="stable")]
    steps = [order[start : start + per_step] for start in range(0, len(order), per_step)]
    expected = [steps[i].tolist() for i in np.random.default_rng([seed, epoch, 1]).permutation(len(steps))]
    few = lengths % 7 + 1  # ties: which of equal rows comes first is part of the order
    assert [step.tolist() for step in step_rows(lengths, seed, epoch, per_step)] == expected
    assert [s.tolist() for s in step_rows(few, seed, epoch, per_step)] == [
        s.tolist() for s in step_rows(few.astype(np.int64) + 2**16, seed, epoch, per_step)
    ]
