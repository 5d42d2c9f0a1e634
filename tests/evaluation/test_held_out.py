"""Held-out metrics row by row: the same means as whole batches give, with the spread of the rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.evaluation.held_out import RowFacts, _add, add_batches, estimates, means, one_row, pairs_of
from pipeline.metrics import Sums
from pipeline.objectives import OBJECTIVES
from tests.batches import as_out, batch_of, make_batch, make_raw

KINDS = ["demonstration", "preference", "ranking", "unpaired", "trajectory"]


def fitting(name: str):
    objective = OBJECTIVES[name]()
    return objective, next(kind for kind in KINDS if kind in objective.needed().records)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_add_up_to_the_batch(name) -> None:
    objective, kind = fitting(name)
    batch = batch_of(kind, weight=[1.0, 0.5, 2.0, 0.0])
    out = as_out(make_raw(batch), batch, objective.needed())
    whole = Sums()
    add_batches(whole, lambda _: out, objective, [batch])
    facts = []
    for b in range(4):
        sums = Sums()
        own = one_row(out, batch, b)
        _add(sums, objective, *own)
        facts.append(RowFacts(b, float(batch.weight[b]), sums.plain(), np.zeros((0, 4))))
    expected = {name.removeprefix("eval/"): value for name, value in means(whole).items()}
    found = estimates(facts)
    assert found.keys() == expected.keys()
    for metric, value in expected.items():
        assert found[metric].value == pytest.approx(value, rel=1e-5, abs=1e-6), metric


def test_standard_errors_by_hand() -> None:
    """Losses 1, 2, 6 of weight 1 with coefficient 2: mean 6, error 2 √(7/3)."""
    facts = [
        RowFacts(i, 1.0, {"loss/a": [x, 1.0], "coefficient/a": [2.0, 1.0], "accuracy": [right, 1.0]}, np.zeros((0, 4)))
        for i, (x, right) in enumerate([(1, 1), (2, 1), (6, 0)])
    ]
    found = estimates(facts)
    assert (found["loss"].value, found["loss"].n) == (pytest.approx(6.0), 3)
    assert found["loss"].standard_error == pytest.approx(2 * (7 / 3) ** 0.5)
    assert found["accuracy"].value == pytest.approx(2 / 3)
    assert found["accuracy"].low == pytest.approx(0.2077, abs=1e-3) and found["accuracy"].high <= 1.0  # Wilson


def test_a_loss_of_two_terms_knows_that_rows_weigh_on_both() -> None:
    """Terms that cancel row by row have a loss without spread."""
    facts = [
        RowFacts(
            i,
            1.0,
            {"loss/a": [x, 1.0], "loss/b": [x, 1.0], "coefficient/a": [1.0, 1.0], "coefficient/b": [-1.0, 1.0]},
            np.zeros((0, 4)),
        )
        for i, x in enumerate([1.0, 5.0])
    ]
    assert estimates(facts)["loss"].standard_error == pytest.approx(0.0)


def test_pairs_are_the_datas_order_with_rewards_and_mean_log_probs() -> None:
    objective, batch = OBJECTIVES["plackett_luce"](beta=1.0), make_batch([[1, 2, 1]])
    logprobs = torch.tensor([[[-1.0, 0.0], [-2.0, -4.0], [-3.0, 0.0]]])
    out = as_out(logprobs, replace(batch, ref_logprobs=torch.zeros_like(logprobs)))
    pairs = pairs_of(objective, out, replace(batch, ref_logprobs=torch.zeros_like(logprobs)))
    assert pairs.tolist() == [[-1, -6, -1, -3], [-1, -3, -1, -3], [-6, -3, -3, -3]]


def test_equal_returns_make_no_pair() -> None:
    batch = replace(make_batch([[1, 1, 1]]), token_rewards=torch.tensor([[[1.0], [1.0], [0.0]]]))
    out = as_out(torch.zeros(1, 3, 1), batch)
    assert len(pairs_of(OBJECTIVES["sft"](), out, batch)) == 2
