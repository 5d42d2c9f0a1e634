"""TDPO: worked numbers, where its gradients go, and DPO as its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.contracts import Batch, PolicyOut
from pipeline.objectives.dpo import Dpo
from pipeline.objectives.tdpo import Tdpo
from tests.batches import KL, LENGTHS, LOGPROB, as_out, assert_same_update, loss_of, make_batch, make_raw, with_ratios


def worked() -> tuple[Batch, PolicyOut, Tensor]:
    """ℓ = (2, −3), D = (1, 4)."""
    batch, raw = with_ratios([[2.0, -3.0]])
    kl = torch.tensor([[[1.0], [4.0]]], requires_grad=True)
    return batch, PolicyOut(raw, kl=kl), kl


@pytest.mark.parametrize("variant", [1, 2])
def test_worked(variant):
    """β 0.1: u = 0.5, δ = 0.1 (4 − 1) = 0.3; with α = 1 −log σ(0.2) = 0.598139, with α = 0.5 −log σ(0.35) = 0.533382."""
    batch, out, _ = worked()
    whole, half = Tdpo(variant=variant, alpha=1.0), Tdpo(variant=variant, alpha=0.5)
    assert loss_of(whole, out, batch).item() == pytest.approx(0.598139, abs=1e-6)
    assert loss_of(half, out, batch).item() == pytest.approx(math.log1p(math.exp(-0.35)), abs=1e-6)
    torch.testing.assert_close(half.implied_reward(out, batch), torch.tensor([[0.25, -0.1]]))


@pytest.mark.parametrize(("variant", "loss"), [(1, 0.598139), (2, 0.533382)])
def test_each_variant_alone_is_the_papers(variant, loss):
    """TDPO₁ is −log σ(u − δ), TDPO₂ −log σ(u − δ/2): in a dump and under a changed β as well, and what is set stays."""
    batch, out, _ = worked()
    assert loss_of(Tdpo(variant=variant), out, batch).item() == pytest.approx(loss, abs=1e-6)
    assert Tdpo(**Tdpo(variant=variant).model_dump()) == Tdpo(variant=variant)
    assert Tdpo(variant=variant, alpha=0.25).alpha == 0.25


@pytest.mark.parametrize(("variant", "chosen"), [(1, -1.0), (2, 0.0)])
def test_the_chosen_kl_has_a_gradient_in_the_first_variant_alone(variant, chosen):
    """∂L/∂D(y_l) = αβ σ(−(u − αδ)); D(y_w) the opposite, so that variant 1 raises it, or nothing."""
    batch, out, kl = worked()
    (grad,) = torch.autograd.grad(loss_of(Tdpo(variant=variant, alpha=0.5), out, batch), kl)
    slope = 0.5 * 0.1 / (1 + math.exp(0.35))
    torch.testing.assert_close(grad.flatten(), torch.tensor([chosen * slope, slope]))


@pytest.mark.parametrize("variant", [1, 2])
def test_without_kl_it_is_dpo(variant):
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    assert_same_update(Tdpo(beta=0.3, variant=variant, alpha=0.0), Dpo(beta=0.3), batch, make_raw(batch))


def test_both_variants_have_one_value_and_one_gradient_on_the_log_probs():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    raw = make_raw(batch)
    losses = [loss_of(Tdpo(variant=v, alpha=0.5), as_out(raw, batch, Tdpo.needs), batch) for v in (1, 2)]
    grads = [torch.autograd.grad(loss, raw)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0][..., LOGPROB], grads[1][..., LOGPROB])
    torch.testing.assert_close(grads[0][:, 1, :, KL], grads[1][:, 1, :, KL])
    assert grads[0][:, 0, :, KL].any()
    assert not grads[1][:, 0, :, KL].any()


def test_metrics_are_sums_over_tokens_and_means_over_pairs():
    """KL 1 on each of 3 and 2 tokens, 2 on 1 and 4 tokens: chosen (3 + 2·2) / 3, rejected (2 + 2·8) / 3."""
    batch = make_batch([[3, 2], [1, 4]], weight=[1, 2])
    kl = torch.tensor([1.0, 2.0])[:, None, None] * batch.response_mask
    metrics = Tdpo()(PolicyOut(batch.ref_logprobs, kl=kl), batch).metrics
    assert (metrics["kl/chosen"].total.item(), metrics["kl/chosen"].weight.item()) == (7.0, 3.0)
    assert (metrics["kl/rejected"].total.item(), metrics["kl/rejected"].weight.item()) == (18.0, 3.0)
