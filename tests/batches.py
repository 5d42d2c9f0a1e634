"""Hand-made batches for tests of the maths: no tokenizer, no model, ragged on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.contracts import Batch, PolicyOut

VOCABULARY = 17


def make_batch(
    lengths: Sequence[Sequence[int]],
    *,
    weight: Sequence[float] | None = None,
    responses: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
) -> Batch:
    """A batch of B = len(lengths) rows; `lengths[b][k]` is the number of tokens of response k of row b.

    `responses` and `tokens` pad K and R beyond the longest. Prompts have 1, 2, 3, … tokens. Reference log-probs are
    random, float32, 0 where masked.
    """
    rng = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    most = responses or max(map(len, lengths))
    longest = tokens or max(max(row) for row in lengths)
    width = max(1 + b + sum(row) for b, row in enumerate(lengths))
    input_ids = torch.randint(VOCABULARY, (rows, width), generator=rng)
    position_ids, segment = torch.zeros(rows, width, dtype=torch.long), torch.full((rows, width), -1)
    predictor = torch.zeros(rows, most, longest, dtype=torch.long)
    response_ids, mask = torch.zeros_like(predictor), torch.zeros(rows, most, longest, dtype=torch.bool)
    for b, row in enumerate(lengths):
        prompt = at = 1 + b
        segment[b, :prompt], position_ids[b, :prompt] = 0, torch.arange(prompt)
        for k, length in enumerate(row):
            segment[b, at : at + length] = k + 1
            position_ids[b, at : at + length] = prompt + torch.arange(length)
            predictor[b, k, :length] = torch.tensor([prompt - 1, *range(at, at + length - 1)][:length])
            response_ids[b, k, :length] = input_ids[b, at : at + length]
            mask[b, k, :length] = True
            at += length
    valid = torch.tensor([[k < len(row) for k in range(most)] for row in lengths])
    ref = -torch.rand(rows, most, longest, generator=rng) * 3 * mask
    weights = torch.tensor(list(weight) if weight is not None else [1.0] * rows)
    return Batch(
        input_ids, position_ids, segment, predictor, response_ids, mask, valid, weights, torch.arange(rows), ref
    )


def make_logprobs(batch: Batch, seed: int = 1) -> Tensor:
    """Random policy log-probs [B, K, R]: a leaf that wants a gradient, filled with values behind the mask too."""
    rng = torch.Generator().manual_seed(seed)
    return (-torch.rand(batch.response_mask.shape, generator=rng) * 3).requires_grad_()


def as_out(raw: Tensor, batch: Batch) -> PolicyOut:
    """The model's side of the contract: log-probs are 0 where masked, and no gradient passes there."""
    return PolicyOut(raw.masked_fill(~batch.response_mask, 0.0))


def rows_of(batch: Batch, index: Sequence[int]) -> Batch:
    """The given rows, as a batch of their own."""
    at = torch.tensor(list(index))
    assert batch.ref_logprobs is not None
    return Batch(
        batch.input_ids[at],
        batch.position_ids[at],
        batch.segment[at],
        batch.predictor[at],
        batch.response_ids[at],
        batch.response_mask[at],
        batch.valid[at],
        batch.weight[at],
        batch.row_ids[at],
        batch.ref_logprobs[at],
    )


def with_ratios(log_ratios: Sequence[Sequence[float]]) -> tuple[Batch, Tensor]:
    """One-token responses whose log-ratios ℓ are given, [B][K]: (batch, policy log-probs with gradient)."""
    batch = make_batch([[1] * len(row) for row in log_ratios])
    batch = replace(batch, ref_logprobs=torch.full(batch.response_mask.shape, -1.0))
    return batch, (torch.tensor(log_ratios)[..., None] - 1.0).requires_grad_()
