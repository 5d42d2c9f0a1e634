"""KTO: worked numbers, its baseline from the step before, and what mismatched responses are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Batch, PolicyOut
from pipeline.objectives.kto import Kto, kto_loss
from tests.batches import as_unpaired, batch_of, loss_of, with_ratios


def worked(baseline: float | None = None) -> tuple[Batch, Tensor]:
    """A good response with ℓ = 2 and a bad one with ℓ = −1, beside mismatched ones with 0.7 and 0.1."""
    batch, raw = with_ratios([[2.0, 0.7], [-1.0, 0.1]])
    batch = as_unpaired(batch)
    return (batch if baseline is None else replace(batch, carried={"mismatched_log_ratio": baseline})), raw


def test_loss_worked():
    """βℓ = 1 and −0.5 over 0.2: 1 − σ(0.8) = 0.310026 where good, 1 − σ(0.2 + 0.5) = 0.331812 where bad."""
    reward, desirable = torch.tensor([[1.0, -0.5]]), torch.tensor([[True, False]])
    torch.testing.assert_close(kto_loss(reward, 0.2, desirable), torch.tensor([[0.3100255, 0.3318122]]))


def test_objective_worked():
    """β 0.5, z₀ 0.4: the losses above, weighed 2 and 0.5, over two responses."""
    batch, raw = worked(0.4)
    objective = Kto(beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    loss = loss_of(objective, PolicyOut(raw), batch)
    assert loss.item() == pytest.approx((2 * 0.3100255 + 0.5 * 0.3318122) / 2, abs=1e-6)
    (grad,) = torch.autograd.grad(loss, raw)
    slopes = [-2 * 0.5 * 0.3100255 * (1 - 0.3100255) / 2, 0.5 * 0.5 * 0.3318122 * (1 - 0.3318122) / 2]
    torch.testing.assert_close(grad[:, 0, 0], torch.tensor(slopes))
    assert not grad[:, 1].any(), "mismatched responses are measured, not trained on"


def test_baseline_is_never_negative_and_0_in_the_first_step():
    first, below, above = (loss_of(Kto(), PolicyOut(worked(z)[1]), worked(z)[0]).item() for z in (None, -3.0, 3.0))
    assert first == below
    assert above != first


def test_metrics_worked():
    batch, raw = worked(0.4)
    batch = replace(batch, weight=torch.tensor([1.0, 3.0]))
    metrics = Kto(beta=0.5, desirable_weight=2.0)(PolicyOut(raw), batch).metrics
    means = {name: (mean.total / mean.weight).item() for name, mean in metrics.items()}
    assert means == pytest.approx(
        {
            "mismatched_log_ratio": (0.7 + 3 * 0.1) / 4,
            "reward/desirable": 1.0,
            "reward/undesirable": -0.5,
            "desirable_share": 2 / (2 + 3),
        }
    )


def test_its_baseline_is_the_metric_that_it_asks_for():
    assert Kto.needs.carried == ("mismatched_log_ratio",)
    assert Kto.needs.mismatched
    batch = batch_of("unpaired")
    mean = Kto()(PolicyOut(batch.ref_logprobs + 0.25 * batch.response_mask), batch).metrics["mismatched_log_ratio"]
    assert (mean.total / mean.weight).item() == pytest.approx(0.25 * (2 + 4 + 5 + 1) / 4), (
        "a sum over each one's tokens"
    )
