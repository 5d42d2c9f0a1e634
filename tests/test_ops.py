"""Chunked log-probs and KLs against the plain formula; continued e^{−x}; tail sums; λ-returns and importance weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    monkeypatch.setattr(ops, "KEPT_BYTES", 4 * VOCABULARY * 4)
    head, seen = _head(), []

    def project(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return head(hidden)

    hidden = torch.randn(7, WIDTH, requires_grad=True)
    result = ops.selected_logprobs(hidden, torch.zeros(7, dtype=torch.long), project, VOCABULARY)
    assert seen == [3, 3, 1]
    result.sum().backward()
    assert seen[3:] in ([3, 1], [1, 3]), "beyond what may be kept, logits are recomputed in the backward pass"


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


# ------------------------------------------------------------------------------------------------------ KL


def _two_models(rows: int = 7) -> tuple[torch.nn.Module, torch.nn.Module, Tensor, Tensor, Tensor]:
    """A policy's head and a wider reference's head over one vocabulary, their hidden states, and token ids."""
    head, ref_head = _head(), torch.nn.Linear(WIDTH + 3, VOCABULARY)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    return head, ref_head, hidden, torch.randn(rows, WIDTH + 3, requires_grad=True), torch.arange(rows) % VOCABULARY


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 64])
def test_token_statistics_equal_the_plain_formulas(kl, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(ops, "LOGIT_CHUNK_BYTES", 2 * 4 * VOCABULARY * rows_per_chunk)
    head, ref_head, hidden, ref_hidden, ids = _two_models()
    leaves, coefficient = [hidden, head.weight, head.bias], torch.randn(2, 7)
    got = ops.token_statistics(hidden, ids, head, VOCABULARY, (ref_hidden, ref_head), kl)
    got_grads = torch.autograd.grad(sum((c * x).sum() for c, x in zip(coefficient, got, strict=True)), leaves)
    logp, ref_logp = head(hidden).log_softmax(-1), ref_head(ref_hidden).log_softmax(-1).detach()
    exact = {
        "forward": (ref_logp.exp() * (ref_logp - logp)).sum(-1),
        "reverse": (logp.exp() * (logp - ref_logp)).sum(-1),
    }[kl]
    want = _plain(hidden, ids, head), exact
    want_grads = torch.autograd.grad(sum((c * x).sum() for c, x in zip(coefficient, want, strict=True)), leaves)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [0, 2, 7, 11])
def test_all_ranks_call_the_head_equally_often(rows, monkeypatch):
    """Whose rows end earlier goes on with none: 4 chunks of 3 for the longest of 11; those behind the kept 6 run twice."""
    monkeypatch.setattr(ops, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * 3)
    monkeypatch.setattr(ops, "KEPT_BYTES", 4 * VOCABULARY * 6)
    head, _, hidden, _, ids = _two_models(rows)
    calls = []

    def project(states: Tensor) -> Tensor:
        calls.append(len(states))
        return head(states)

    got = ops.token_statistics(hidden, ids, project, VOCABULARY, longest=11)[0]
    assert len(calls) == 4 and sum(calls) == rows
    torch.testing.assert_close(got, _plain(hidden, ids, head))
    got.sum().backward()
    assert len(calls) == 6


def test_forward_and_reverse_kl_worked():
    """π = (¼, ¾), π_ref = (½, ½): forward ½ log 2 + ½ log ⅔, reverse ¼ log ½ + ¾ log 3/2."""
    states, same = torch.tensor([[0.25, 0.75]]).log(), torch.nn.Identity()
    reference = torch.zeros(1, 2), same
    want = {
        "forward": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "reverse": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
    }
    for kl, value in want.items():
        logprob, got = ops.token_statistics(states, torch.tensor([1]), same, 2, reference, kl)
        assert (logprob.item(), got.item()) == pytest.approx((math.log(0.75), value))


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_impossible_tokens_add_nothing_to_a_kl(kl):
    """Both forbid the third token: 0 · (−inf + inf) is 0 here, in value and in gradient."""
    logits = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    reference = torch.tensor([[2.0, 1.0, -torch.inf]]), torch.nn.Identity()
    _, got = ops.token_statistics(logits, torch.tensor([0]), torch.nn.Identity(), 3, reference, kl)
    two = torch.tensor([[1.0, 2.0]]).log_softmax(-1)
    want = (two.exp() * (two - two.flip(-1))).sum().item()  # symmetric
    (grad,) = torch.autograd.grad(got.sum(), logits)
    assert got.item() == pytest.approx(want)
    assert grad.isfinite().all()
    assert grad[0, 2] == 0


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_no_gradient_reaches_the_reference(kl):
    head, ref_head, hidden, ref_hidden, ids = _two_models()
    sum(x.sum() for x in ops.token_statistics(hidden, ids, head, VOCABULARY, (ref_hidden, ref_head), kl)).backward()
    assert ref_hidden.grad is None
    assert ref_head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_kl_chunks_make_room_for_both_models_and_are_recomputed(monkeypatch):
    monkeypatch.setattr(ops, "LOGIT_CHUNK_BYTES", 2 * 4 * VOCABULARY * 3)
    monkeypatch.setattr(ops, "KEPT_BYTES", 0)
    head, ref_head, hidden, ref_hidden, ids = _two_models()
    seen: list[tuple[str, int]] = []

    def watch(name: str, module: torch.nn.Module):
        def project(x: Tensor) -> Tensor:
            seen.append((name, len(x)))
            return module(x)

        return project

    reference = ref_hidden, watch("reference", ref_head)
    _, kl = ops.token_statistics(hidden, ids, watch("policy", head), VOCABULARY, reference, "forward")
    forward = list(seen)
    assert forward == [(who, n) for n in (3, 3, 1) for who in ("policy", "reference")]
    kl.sum().backward()
    assert sorted(seen) == sorted(2 * forward), "logits are recomputed in the backward pass, not kept"


def test_no_tokens_at_all_still_reach_both_heads():
    head, ref_head, hidden, ref_hidden, ids = _two_models(0)
    logprobs, kl = ops.token_statistics(hidden, ids, head, VOCABULARY, (ref_hidden, ref_head), "reverse")
    (logprobs.sum() + kl.sum()).backward()
    assert logprobs.shape == kl.shape == (0,)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_bfloat16_kl_is_computed_in_float32():
    """Half of 4096 logits raised by 1/16: the KL is about 5e-4, less than a bfloat16 step of any of its log-probs."""
    size, one = 4096, torch.ones(1, 1, dtype=torch.bfloat16)
    flat, bent = torch.zeros(2, 1, size, dtype=torch.bfloat16)
    bent[0, ::2] = 0.0625
    reference = one, lambda x: x @ flat
    _, kl = ops.token_statistics(one, torch.tensor([0]), lambda x: x @ bent, size, reference, "reverse")
    logp, ref_logp = (x.double().log_softmax(-1) for x in (bent, flat))
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx((logp.exp() * (logp - ref_logp)).sum().item(), rel=1e-2)


@pytest.mark.parametrize("kl", ["none", "forward", "reverse"])
def test_hand_written_gradients_are_those_of_finite_differences(kl):
    """In float64, where differences are exact enough to tell."""
    rng = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, generator=rng, dtype=torch.double).unbind()
    ids, weights = torch.tensor([0, 4, 2]), torch.randn(2, 3, generator=rng, dtype=torch.double)

    def total(x: Tensor) -> Tensor:
        if kl == "none":
            return (ops._Selected.apply(x, ids) * weights[0]).sum()
        found = ops._SelectedAndKL.apply(x, ids, reference.log_softmax(-1), kl)
        return sum((values * weight).sum() for values, weight in zip(found, weights, strict=True))

    (gradient,) = torch.autograd.grad(total(leaf := logits.clone().requires_grad_()), leaf)
    for one in torch.eye(15, dtype=torch.double).view(15, 3, 5):
        difference = (total(logits + 1e-6 * one) - total(logits - 1e-6 * one)) / 2e-6
        torch.testing.assert_close((gradient * one).sum(), difference, rtol=1e-6, atol=1e-8)


def test_log_probs_survive_logits_of_any_size():
    """The probability of the token underflows; its log-prob does not, nor does its gradient."""
    logits = torch.tensor([[0.0, 500.0, -1e4], [1e30, 0.0, 0.0], [-torch.inf, 0.0, 1.0]], requires_grad=True)
    ids = torch.tensor([2, 0, 1])
    got = ops._Selected.apply(logits, ids)
    torch.testing.assert_close(got, logits.detach().double().log_softmax(-1)[range(3), ids].float())
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    torch.testing.assert_close(gradient[0], torch.tensor([0.0, -1.0, 1.0]))


def test_two_vocabularies_are_refused_in_one_line():
    head, _, hidden, _, ids = _two_models()
    other = torch.randn(7, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY + 1)
    with pytest.raises(ValueError, match=r"^model.reference: its vocabulary has 20 entries, the policy's 19; [^\n]*$"):
        ops.token_statistics(hidden.detach(), ids, head, VOCABULARY, other, "forward")


# ------------------------------------------------------------------------------------------------- returns


def test_discounted_sums_worked():
    """X₃ = 4, X₂ = 3 + 0 · 4, X₁ = 2 + 1 · 3, X₀ = 1 + ½ · 5; the last factor has nothing behind it."""
    got = ops.discounted_sums(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 0.0, 9.0]))
    assert got.tolist() == [3.5, 5.0, 3.0, 4.0]


@pytest.mark.parametrize("width", [0, 1, 2, 3, 4, 5, 7, 8, 9, 33])
def test_discounted_sums_equal_the_recursion(width):
    addend, factor = torch.randn(2, 3, width, dtype=torch.float64), torch.rand(2, 3, width, dtype=torch.float64)
    behind, want = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, width, dtype=torch.float64)
    for h in reversed(range(width)):
        behind = want[..., h] = addend[..., h] + factor[..., h] * behind
    torch.testing.assert_close(ops.discounted_sums(addend, factor), want)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 0.5, 0.999, 1.0])
def test_discounted_sums_of_long_float32_rows_keep_their_digits(factor):
    """4096 tokens: the closed form Σ factor^i, which a scan that divides by factor^h would lose to 0 or inf."""
    factors = torch.full((4096,), factor)
    factor = factors[0].item()  # as float32 has it
    got = ops.discounted_sums(torch.ones(4096), factors)[0].item()
    assert got == pytest.approx(4096 if factor == 1 else (1 - factor**4096) / (1 - factor), rel=1e-5)


def test_following_worked():
    """Policy, environment, environment, policy, environment: x is 7 at the second policy token, rewards lie between."""
    mask = torch.tensor([True, False, False, True, False])
    x, reward = torch.tensor([3.0, 9.0, 9.0, 7.0, 9.0]), torch.tensor([100.0, 1.0, 2.0, 100.0, 4.0])
    assert ops.following(x, reward, mask)[mask].tolist() == [1 + 2 + 7, 4]


def _direct_returns(reward: list[float], values: list[float], mask: list[bool], lam: float) -> list[float]:
    """G^λ at each policy token as the paper's weighted sum of n-step returns, in plain numbers.

    A step is a policy token with the environment's tokens behind it, whose rewards it earns.
    """
    starts = [t for t, policy in enumerate(mask) if policy]
    ends = [*starts, len(mask)][1:]
    earned = [sum(reward[a:b]) for a, b in zip(starts, ends, strict=True)]
    found = []
    for h in range(len(starts)):
        left = len(starts) - h
        n_step = [sum(earned[h : h + n]) + (values[starts[h + n]] if n < left else 0.0) for n in range(1, left + 1)]
        bootstrapped = sum(lam ** (n - 1) * n_step[n - 1] for n in range(1, left))
        found.append((1 - lam) * bootstrapped + lam ** (left - 1) * n_step[-1])
    return found


_number = st.floats(-4, 4, width=32)
_token = st.tuples(_number, _number, st.booleans())


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(_token, min_size=1, max_size=12), lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_lambda_returns_are_the_sum_of_n_step_returns(tokens, lam):
    reward, values, mask = (list(column) for column in zip(*tokens, strict=True))
    padding = [0.0, 0.0, 0.0]
    got = ops.lambda_returns(
        torch.tensor([*reward, *padding], dtype=torch.float64),
        torch.tensor([*values, *padding], dtype=torch.float64),
        torch.tensor([*mask, False, False, False]),
        lam,
    )
    found = got[: len(mask)][torch.tensor(mask)].tolist()
    assert found == pytest.approx(_direct_returns(reward, values, mask, lam), abs=1e-9)
    assert not got[: len(mask)][~torch.tensor(mask)].any()


def test_lambda_returns_of_each_response_are_its_own():
    reward, values = torch.randn(2, 2, 3, 6)
    mask = torch.rand(2, 3, 6) > 0.3
    whole = ops.lambda_returns(reward, values, mask, 0.7)
    for b in range(2):
        for k in range(3):
            torch.testing.assert_close(whole[b, k], ops.lambda_returns(reward[b, k], values[b, k], mask[b, k], 0.7))


def test_importance_weights_worked():
    """Capped at e from above only, finite where e^Σ is not, and without gradient."""
    log_ratio = torch.tensor([-200.0, -1.0, 0.0, 0.5, 1.5, 200.0], requires_grad=True)
    got = ops.importance_weights(log_ratio, math.e)
    assert got.tolist() == pytest.approx([0.0, math.exp(-1), 1.0, math.exp(0.5), math.e, math.e])
    assert not got.requires_grad
