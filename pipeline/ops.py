"""Pure maths on tensors that several modules share. No configuration, no model, no state.

Shapes use the symbols of `contracts`: B prompts, K responses, R response tokens, N tokens of a flat list,
D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

LOGIT_CHUNK_BYTES = 128 * 2**20
"""Size of one chunk's float32 logits. Small enough to stay in memory next to any model, large enough for full GEMM speed."""

KEPT_BYTES = 256 * 2**20
"""Of the first chunks so many bytes stay for the backward pass; later ones are projected a second time there."""


RARE = 1e-30
"""Below it a float32 probability has lost digits, or is 0."""

Projection = Callable[[Tensor], Tensor]
"""A language model's output head: hidden states [N, D] → logits [N, V]."""


def selected_logprobs(hidden: Tensor, ids: Tensor, project: Projection, vocabulary: int) -> Tensor:
    """log softmax(project(hidden))[ids]: `token_statistics` without a reference. [N, D], [N] → [N] float32, nats."""
    return token_statistics(hidden, ids, project, vocabulary)[0]


def token_statistics(
    hidden: Tensor,
    ids: Tensor,
    project: Projection,
    vocabulary: int,
    reference: tuple[Tensor, Projection] | None = None,
    kl: Literal["none", "forward", "reverse"] = "none",
    longest: int | None = None,
    recompute: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token, and the KL of the whole next-token distributions, without ever holding all logits.

    hidden [N, D], ids [N], reference = (hidden states [N, D′], its output head) → (log-probs [N], KL [N] or None), float32,
    nats. forward = KL(π_ref ‖ π), reverse = KL(π ‖ π_ref). Logits exist for one chunk at a time; beyond `KEPT_BYTES` they are
    recomputed in the backward pass. No gradient reaches the reference. Logits are float32 inside the chunk whatever `hidden`'s type, because
    a bfloat16 logsumexp over a large vocabulary is off by several percent.

    longest: the most tokens that any rank has, where `project` is collective: all then call it equally often; default N.
    recompute: False keeps all chunks for the backward pass.
    """
    assert hidden.dim() == 2 and ids.shape == hidden.shape[:1]
    assert (reference is None) == (kl == "none"), "a KL needs a reference, and nothing else does"
    if reference is None:
        return _in_chunks(partial(_logprobs, project), (hidden, ids), vocabulary, longest, recompute)[0], None
    states, ref_project = reference
    assert states.shape[:1] == ids.shape
    chunk = partial(_logprobs_and_kl, project, ref_project, kl)
    logprobs, divergence = _in_chunks(chunk, (hidden, ids, states), 2 * vocabulary, longest, recompute)
    return logprobs, divergence


def _in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    width: int,
    longest: int | None,
    recompute: bool,
) -> list[Tensor]:
    """function over the first dimension of `inputs`, as many rows at a time as `width` floats each leave room for.

    The number of calls, and which are repeated in the backward pass, follow from `longest` alone: a rank with fewer rows
    makes the last calls with none.
    """
    most = max(1, len(inputs[0]) if longest is None else longest)
    rows = -(-most // -(-most * 4 * width // LOGIT_CHUNK_BYTES))
    again = recompute and torch.is_grad_enabled() and inputs[0].requires_grad
    parts = []
    for start in range(0, most, rows):
        chunk = [x[start : start + rows] for x in inputs]
        if again and min(start + rows, most) * 4 * width > KEPT_BYTES:
            parts.append(checkpoint(function, *chunk, use_reentrant=False))
        else:
            parts.append(function(*chunk))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _logprobs(project: Projection, hidden: Tensor, ids: Tensor) -> tuple[Tensor]:
    return (_Selected.apply(project(hidden).float(), ids),)


class _Selected(torch.autograd.Function):
    """log softmax(logits)[ids], [n, V], [n] → [n].

    Keeps the probabilities π: the gradient, g · (one-hot − π), is then one pass over the chunk, in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        ctx.save_for_backward(probs, ids)
        return _at(logits, ids) - _logsumexp(logits, probs, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probs, ids = ctx.saved_tensors
        column = grad[:, None]
        return probs.mul_(-column).scatter_add_(-1, ids[:, None], column), None


def _logprobs_and_kl(
    project: Projection, ref_project: Projection, kl: str, hidden: Tensor, ids: Tensor, ref_hidden: Tensor
) -> tuple[Tensor, Tensor]:
    logits = project(hidden).float()
    with torch.no_grad():
        ref_logits = ref_project(ref_hidden).float()
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"model.reference: its vocabulary has {ref_logits.shape[-1]} entries, the policy's {logits.shape[-1]}; "
            "a KL needs two models of one vocabulary"
        )
    return _SelectedAndKL.apply(logits, ids, ref_logits, kl)


class _SelectedAndKL(torch.autograd.Function):
    """log π[ids] and KL(π_ref ‖ π) ("forward") or KL(π ‖ π_ref) ("reverse") of logits [n, V] → [n], [n].

    With the gap d of the two models' logits, KL(p ‖ q) = Σ p·d − (log Z_p − log Z_q): no log-probability is formed. By the
    policy's logits, ∇ log π[i] = one-hot − π, ∇ KL(π_ref ‖ π) = π − π_ref and ∇ KL(π ‖ π_ref) = π · (d − Σ π·d).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, ref_logits: Tensor, kl: str) -> tuple[Tensor, Tensor]:
        probs, ref_probs = logits.softmax(-1), ref_logits.softmax(-1)
        total, ref_total = _logsumexp(logits, probs, ids), _logsumexp(ref_logits, ref_probs, ids)
        if kl == "forward":
            chance, between = ref_probs, ref_total - total
            gap = ref_logits - logits
        else:
            chance, between = probs, total - ref_total
            gap = logits - ref_logits
        mean = _dot(chance, gap)
        if not mean.isfinite().all():  # tokens that cannot occur add nothing, however impossible they are to the other
            mean = _dot(chance, gap.masked_fill_(chance == 0, 0.0))
        ctx.save_for_backward(probs, ids, ref_probs if kl == "forward" else gap, mean)
        ctx.kl = kl
        return _at(logits, ids) - total, mean - between

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor, by_kl: Tensor) -> tuple[Tensor, None, None, None]:
        probs, ids, other, mean = ctx.saved_tensors
        column, weight = by_logprob[:, None], by_kl[:, None]
        if ctx.kl == "forward":
            grad = probs.mul_(weight - column).addcmul_(other, weight, value=-1)
        else:
            grad = probs.mul_(other.sub_(mean[:, None]).mul_(weight).sub_(column))
        return grad.scatter_add_(-1, ids[:, None], column), None, None, None


def _at(rows: Tensor, ids: Tensor) -> Tensor:
    """One entry of each row: [n, V], [n] → [n]."""
    return rows.gather(-1, ids[:, None]).squeeze(-1)


def _logsumexp(logits: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
    """Of logits whose softmax is known, without a pass over them: π_i = e^{logit_i − logsumexp} for any i. [n, V] ×2, [n] → [n]"""
    one = _at(probs, ids)
    total = _at(logits, ids) - one.log()
    if (rare := one < RARE).any():
        total[rare] = logits[rare].logsumexp(-1)
    return total


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row: [n, V], [n, V] → [n], without the product in memory."""
    if x.device.type != "cpu":
        return torch.bmm(x[:, None, :], y[:, :, None])[:, 0, 0]
    # The product stays in the processor's cache: a third of the time that its bmm takes.
    rows = max(1, 2**20 // x.shape[-1])
    return torch.cat([(a * b).sum(-1) for a, b in zip(x.split(rows), y.split(rows), strict=True)])


def exp_neg(x: Tensor, limit: float = 40.0) -> Tensor:
    """e^{−x}, continued linearly (value and slope match) where |x| > `limit`.

    Beyond ±40 the square of the slope, which a gradient norm takes, leaves float32's comfortable range, and further
    out e^{−x} itself becomes inf or 0. A clamp would make the slope 0 exactly where a pair is most wrong; the tangent
    keeps it finite, non-zero and of the right sign.
    """
    at = x.clamp(-limit, limit)
    value = torch.exp(-at)
    return value - value.detach() * (x - at)


def tail_logsumexp(scores: Tensor) -> Tensor:
    """[..., K] → [..., K]: log Σ_{j ≥ k} e^{score_j} for each k."""
    return scores.flip(-1).logcumsumexp(-1).flip(-1)


# ------------------------------------------------------------------------------------------------- returns


def discounted_sums(addend: Tensor, factor: Tensor) -> Tensor:
    """X_h = addend_h + factor_h · X_{h+1} over the last dimension, X = 0 behind its end. Both [..., R] → [..., R].

    ⌈log₂ R⌉ rounds of doubling instead of R steps: after each, X_h holds the first 1, 2, 4, … addends from h on, and
    `carry` the product of the factors over them. Nothing is divided by, so any factor from 0 to 1 is safe in float32.
    """
    assert addend.shape == factor.shape
    total, carry, span = addend, factor, 1
    while span < addend.shape[-1]:
        total = total + carry * _ahead(total, span)
        carry = carry * _ahead(carry, span)
        span *= 2
    return total


def following(x: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    """What comes behind each token: `x` at the next policy token, plus the environment's rewards on the way there.

    x, reward, mask [..., R] → [..., R]; mask marks policy tokens. Behind the last one only those rewards are left, and 0
    behind the end.
    """
    here = discounted_sums(torch.where(mask, x, reward), (~mask).to(reward.dtype))
    return _ahead(here, 1)


def lambda_returns(reward: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """G_h = r_h + (1−λ)·V(next) + λ·G(next) at policy tokens, 0 elsewhere; nothing is left behind the end.

    reward, values, mask [B, K, R] → [B, K, R]; `reward` may hold −βρ, too (DQO, arXiv 2410.09302, Eq. 14–16: the sum over
    n-step returns comes to this recursion). λ = 1 is the Monte-Carlo return, λ = 0 the one-step target. The
    environment's tokens are no actions and have no value: a reward on them counts for the policy token before them.
    """
    policy = mask.to(reward.dtype)
    stays = torch.where(mask, (1 - lam) * values + lam * reward, reward)
    behind = _ahead(discounted_sums(stays, 1 - (1 - lam) * policy), 1)
    return (reward + behind) * policy


def importance_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """min(e^Σ, cap) of whole trajectories' log-ratios Σ = log π − log μ, any shape, elementwise; passes no gradient.

    Capped before the exponential, which would overflow. The one-sided cap is that of OREO's published code (e).
    """
    return log_ratio.detach().clamp(max=math.log(cap)).exp()


def _ahead(x: Tensor, n: int) -> Tensor:
    """x_{h+n} at h, 0 where that is behind the end."""
    return pad(x[..., n:], (0, min(n, x.shape[-1])))
