"""SFT and rejection SFT: likelihood of the good responses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.objectives.rejection_sft import RejectionSft, best_of
from pipeline.objectives.sft import Sft
from tests.batches import LENGTHS, as_out, assert_same_update, batch_of, loss_of, make_batch, make_logprobs


def test_sft_worked():
    """Token-level mean: (1 + 2 + 3 + 6) nats over 4 tokens = 3, not the mean of the rows' means (2 + 6) / 2 = 4."""
    batch = make_batch([[3], [1]])
    raw = torch.tensor([[[-1.0, -2.0, -3.0]], [[-6.0, 99.0, 99.0]]])
    assert loss_of(Sft(), as_out(raw, batch), batch).item() == pytest.approx(3.0)
    halved = replace(batch, weight=torch.tensor([0.5, 1.0]))
    assert loss_of(Sft(), as_out(raw, halved), halved).item() == pytest.approx((0.5 * 6 + 6) / (0.5 * 3 + 1))


def test_sft_trains_on_the_best_response_alone():
    batch = make_batch([[2, 3, 1]])
    raw = make_logprobs(batch)
    (grad,) = torch.autograd.grad(loss_of(Sft(), as_out(raw, batch), batch), raw)
    torch.testing.assert_close(grad[0, 0], torch.tensor([-0.5, -0.5, 0.0]))
    assert torch.equal(grad[0, 1:], torch.zeros(2, 3))


def test_rejection_keeps_the_better_part_and_always_one():
    valid = torch.arange(5) < torch.tensor([1, 2, 3, 4, 5])[:, None]
    assert best_of(valid, 0.5).sum(-1).tolist() == [1, 1, 1, 2, 2]
    assert best_of(valid, 0.25).sum(-1).tolist() == [1, 1, 1, 1, 1]
    assert torch.equal(best_of(valid, 1.0), valid)
    assert not best_of(torch.zeros(1, 3, dtype=torch.bool), 0.5).any(), "a filler has nothing to keep"
    assert best_of(torch.ones(1, 10, dtype=torch.bool), 0.7).tolist() == [[True] * 7 + [False] * 3]


def test_rejection_sft_worked():
    """Best two of four: (1 + 3) + 4 nats over 2 + 1 tokens; the worse half has no say."""
    batch = make_batch([[2, 1, 1, 2]])
    raw = torch.tensor([[[-1.0, -3.0], [-4.0, 9.0], [-7.0, 9.0], [-7.0, -7.0]]], requires_grad=True)
    out = as_out(raw, batch)
    loss = loss_of(RejectionSft(), out, batch)
    assert loss.item() == pytest.approx(8 / 3)
    (grad,) = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(grad[0], torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]) / 3)
    kept = RejectionSft()(out, batch).metrics["kept"]
    assert (kept.total.item(), kept.weight.item()) == (2.0, 1.0)
    assert RejectionSft().token_reward(out, batch)[0, 3].tolist() == [-7.0, -7.0]


def test_rejection_sft_of_pairs_is_sft():
    batch = make_batch(LENGTHS["preference"], weight=[1, 2, 0.5, 0])
    assert_same_update(RejectionSft(), Sft(), batch, make_logprobs(batch))


def test_of_trajectories_sft_takes_the_best_ones_policy_tokens():
    batch = batch_of("trajectory")
    raw = make_logprobs(batch)
    (grad,) = torch.autograd.grad(Sft()(as_out(raw, batch), batch).terms["nll"].total, raw)
    assert torch.equal(grad[:, 0], -batch.response_mask[:, 0].float())
    assert not grad[:, 1:].any()
    assert Sft().weight(batch)["nll"] == batch.response_mask[:, 0].sum() < sum(row[0] for row in LENGTHS["trajectory"])


def test_rejection_skips_what_has_no_token_to_train_on():
    """The best response has none: of the two that are left the better one is kept, and of one the only one."""
    assert best_of(torch.tensor([[False, True, True]]), 0.5).tolist() == [[False, True, False]]
    assert best_of(torch.tensor([[False, False, True]]), 0.5).tolist() == [[False, False, True]]


def test_rejection_by_reward_worked():
    """Returns 1.5, 1 and 0.5 of row 0, 0 of row 1: with a bound of 1 the two better ones of row 0 are kept, none of row 1."""
    batch = make_batch([[2, 1, 1], [3]])
    rewards = torch.zeros(batch.response_mask.shape)
    rewards[0, 0, :2], rewards[0, 1, 0], rewards[0, 2, 0] = torch.tensor([0.5, 1.0]), 1.0, 0.5
    batch = replace(batch, token_rewards=rewards)
    raw = torch.tensor([-1.0, -3.0, -9.0]).expand(2, 3, 3).clone().requires_grad_()
    objective, out = RejectionSft(min_reward=1.0), as_out(raw, batch)
    loss = loss_of(objective, out, batch)
    assert loss.item() == pytest.approx((1 + 3 + 1) / 3)
    (grad,) = torch.autograd.grad(loss, raw)
    torch.testing.assert_close(grad[0, :, 0], torch.tensor([-1.0, -1.0, 0.0]) / 3)
    assert not grad[1].any()
    kept = objective(out, batch).metrics["kept"]
    assert (kept.total.item(), kept.weight.item()) == (2.0, 2.0)


def test_rejection_by_reward_of_unpaired_takes_the_good_ones_and_no_mismatched_one():
    """A mismatched response has the return 0, which the bound 0 does not exclude."""
    batch = batch_of("unpaired")
    raw = make_logprobs(batch)
    (grad,) = torch.autograd.grad(loss_of(RejectionSft(min_reward=0.0), as_out(raw, batch), batch), raw)
    assert (grad != 0).any(-1).tolist() == [[True, False], [False, False], [True, False], [False, False]]


def test_rejection_asks_for_data_that_it_can_sort():
    """By rewards only where there are some; unpaired responses only by reward, or bad ones would be trained on."""
    assert RejectionSft().needed().records == {"ranking", "preference", "trajectory"}
    assert RejectionSft(min_reward=0.0).needed().records == {"trajectory", "unpaired"}
