"""Chunked log-probs against the plain formula; the linear continuation of e^{−x}; tail sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline import ops

WIDTH, VOCABULARY = 8, 19


def _head(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(WIDTH, VOCABULARY)


def _plain(hidden: Tensor, ids: Tensor, head: torch.nn.Module) -> Tensor:
    return head(hidden).float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 64])
def test_selected_logprobs_equal_log_softmax_and_gather(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(ops, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * rows_per_chunk)
    head, hidden, ids = _head(), torch.randn(7, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (7,))
    coefficient = torch.randn(7)
    got = ops.selected_logprobs(hidden, ids, head, VOCABULARY)
    got_grads = torch.autograd.grad((got * coefficient).sum(), [hidden, head.weight, head.bias])
    want = _plain(hidden, ids, head)
    want_grads = torch.autograd.grad((want * coefficient).sum(), [hidden, head.weight, head.bias])
    torch.testing.assert_close(got, want)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_no_chunk_exceeds_its_share_of_memory(monkeypatch):
    monkeypatch.setattr(ops, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * 3)
    head, seen = _head(), []

    def project(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return head(hidden)

    hidden = torch.randn(7, WIDTH, requires_grad=True)
    result = ops.selected_logprobs(hidden, torch.zeros(7, dtype=torch.long), project, VOCABULARY)
    assert seen == [3, 3, 1]
    result.sum().backward()
    assert sorted(seen) == [1, 1, 3, 3, 3, 3], "logits are recomputed in the backward pass, not kept"


def test_bfloat16_hidden_states_get_float32_logits():
    """The sum over the vocabulary in bfloat16 would be off by percents: 4096 equal logits have log-prob −log 4096."""
    size = 4096
    head = torch.nn.Linear(WIDTH, size, bias=False).bfloat16()
    torch.nn.init.zeros_(head.weight)
    hidden = torch.randn(2, WIDTH, dtype=torch.bfloat16)
    got = ops.selected_logprobs(hidden, torch.tensor([0, size - 1]), head, size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((2,), -math.log(size)), rtol=1e-6, atol=0)


def test_bfloat16_gradient_is_that_of_the_plain_formula():
    head, ids = _head().bfloat16(), torch.randint(VOCABULARY, (5,))
    hidden = torch.randn(5, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    got = torch.autograd.grad(ops.selected_logprobs(hidden, ids, head, VOCABULARY).sum(), hidden)[0]
    want = torch.autograd.grad(_plain(hidden, ids, head).sum(), hidden)[0]
    torch.testing.assert_close(got, want)


def test_no_tokens_at_all_still_reach_the_head():
    head, calls = _head(), []

    def project(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return head(hidden)

    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    got = ops.selected_logprobs(hidden, torch.zeros(0, dtype=torch.long), project, VOCABULARY)
    got.sum().backward()
    assert got.shape == (0,)
    assert calls, "every rank has to reach the head, or collectives hang"
    assert head.weight.grad is not None
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_exp_neg_is_the_exponential_inside_its_limits():
    x = torch.linspace(-40, 40, 81, dtype=torch.float64, requires_grad=True)
    value = ops.exp_neg(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value, torch.exp(-x))
    torch.testing.assert_close(slope, -torch.exp(-x))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_exp_neg_continues_value_and_slope(sign):
    """At 41 the tangent from 40 gives e^{−40}(1 − 1) = 0, at −41 e^{40}(1 + 1)."""
    edge, step = sign * 40.0, 1e-9
    x = torch.tensor([edge - step, edge, edge + step, sign * 41, sign * 1e6], dtype=torch.float64, requires_grad=True)
    value = ops.exp_neg(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value[:3], torch.full((3,), math.exp(-edge), dtype=torch.float64), rtol=3e-9, atol=0)
    torch.testing.assert_close(slope, torch.full((5,), -math.exp(-edge), dtype=torch.float64), rtol=3e-9, atol=0)
    assert value[3].item() == pytest.approx(0.0 if sign > 0 else 2 * math.exp(40), rel=1e-12, abs=1e-30)
    assert value.isfinite().all()


def test_exp_neg_is_finite_in_float32_far_outside():
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    value = ops.exp_neg(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert (slope < 0).all()
    assert (slope.square() > 0).all(), "a gradient norm squares it"
    assert slope.square().isfinite().all()


def test_tail_logsumexp_worked():
    """log Σ of the tails of (log 1, log 2, log 4) = log 7, log 6, log 4; −inf entries add nothing."""
    scores = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 0.0]]).log()
    want = torch.tensor([[7.0, 6.0, 4.0], [3.0, 2.0, 0.0]]).log()
    torch.testing.assert_close(ops.tail_logsumexp(scores), want)
