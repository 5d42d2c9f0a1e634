"""Pure maths on tensors that several modules share. No configuration, no model, no state.

Shapes use the symbols of `contracts`: B prompts, K responses, R response tokens, N tokens of a flat list,
D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGIT_CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's float32 logits. Small enough to stay in memory next to any model, large enough for full GEMM speed."""


def selected_logprobs(hidden: Tensor, ids: Tensor, project: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """log softmax(project(hidden))[ids] without ever holding all logits.

    hidden [N, D], ids [N] → [N] float32, nats. Logits exist for one chunk at a time and are recomputed in the
    backward pass; they are float32 inside the chunk whatever `hidden`'s type, because a bfloat16 logsumexp over a
    large vocabulary is off by several percent.
    """
    assert hidden.dim() == 2 and ids.shape == hidden.shape[:1]

    def chunk_logprobs(h: Tensor, i: Tensor) -> Tensor:
        logits = project(h).float()
        return logits.gather(-1, i[:, None]).squeeze(-1) - logits.logsumexp(-1)

    rows = max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary))
    recompute = torch.is_grad_enabled() and hidden.requires_grad
    # An empty batch still goes through once: every rank has to reach the head for collectives to match.
    chunks = []
    for h, i in zip(hidden.split(rows), ids.split(rows), strict=True):
        chunks.append(checkpoint(chunk_logprobs, h, i, use_reentrant=False) if recompute else chunk_logprobs(h, i))
    return torch.cat(chunks)


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
