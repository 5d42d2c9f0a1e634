"""Hand-made batches for tests of the maths: no tokenizer, no model, ragged on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.contracts import Batch, Needs, Objective, PolicyOut

VOCABULARY = 17
LOGPROB, KL, VALUE, SCORE = range(4)
"""Channels of `make_raw`. Thoughts and what a prior makes of steps grow from the scores of the first response."""
THOUGHTS, STEPS, WIDTH = 3, 4, 6
"""n, S and D of latent outputs."""

LENGTHS = {
    "demonstration": [[3], [1], [5], [2]],
    "preference": [[3, 2], [1, 4], [5, 5], [2, 1]],
    "ranking": [[3, 2], [1, 4, 2, 2], [5, 5, 1], [2, 1]],
    "unpaired": [[3, 2], [1, 4], [5, 5], [2, 1]],
    "trajectory": [[6, 2], [1, 4, 7, 2], [5], [3, 1]],
}
"""Response lengths of four rows of each kind; of an unpaired one's two responses the last answers another prompt."""


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


def batch_of(kind: str, *, weight: Sequence[float] | None = None) -> Batch:
    """Four ragged rows of a kind of record, `LENGTHS`."""
    batch = make_batch(LENGTHS[kind], weight=weight)
    return {"unpaired": as_unpaired, "trajectory": as_trajectories}.get(kind, lambda same: same)(batch)


def as_unpaired(batch: Batch) -> Batch:
    """Labels ±1 by turns on the first response's last token; the last response answers another prompt."""
    label = torch.tensor([1.0, -1.0]).repeat(len(batch.weight))[: len(batch.weight), None]
    first = torch.arange(batch.valid.shape[1]) == 0
    last = batch.response_mask & (batch.response_mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return replace(batch, valid=batch.valid & first, token_rewards=label[..., None] * (last & first[:, None]))


def as_trajectories(batch: Batch, seed: int = 3) -> Batch:
    """Every third token from the second on is the environment's; rewards on all tokens, behaviour log-probs for all."""
    rng = torch.Generator().manual_seed(seed)
    inside, reference = batch.response_mask, batch.ref_logprobs
    assert reference is not None
    tokens = inside.sum(-1, keepdim=True)  # [B, K, 1]
    ends = torch.tensor([0, 2, 3, 5])  # the policy's tokens, all of them
    ends = torch.where(ends < tokens, ends, -1)
    mask = inside & (torch.arange(inside.shape[-1]) % 3 != 1)
    return replace(
        batch,
        response_mask=mask,
        ref_logprobs=reference * mask,
        token_rewards=torch.randn(inside.shape, generator=rng) * inside,
        step_ends=ends,
        behaviour_logprobs=torch.where(batch.valid, -3 * torch.rand(batch.valid.shape, generator=rng), torch.nan),
    )


def make_logprobs(batch: Batch, seed: int = 1) -> Tensor:
    """Random policy log-probs [B, K, R]: a leaf that wants a gradient, filled with values behind the mask too."""
    rng = torch.Generator().manual_seed(seed)
    return (-torch.rand(batch.response_mask.shape, generator=rng) * 3).requires_grad_()


def make_raw(batch: Batch, seed: int = 1) -> Tensor:
    """Random outputs of all networks in one leaf [B, K, R, 4]: log-probs ≤ 0, KLs ≥ 0, values, scores (at token 0)."""
    rng = torch.Generator().manual_seed(seed)
    raw = 3 * torch.rand((*batch.response_mask.shape, 4), generator=rng)
    return (raw * torch.tensor([-1.0, 1.0, 1.0, 1.0]) - torch.tensor([0.0, 0.0, 1.5, 1.5])).requires_grad_()


def as_out(raw: Tensor, batch: Batch, needs: Needs | None = None) -> PolicyOut:
    """The model's side of the contract: everything is 0 where masked, and no gradient passes there.

    raw: log-probs alone [B, K, R], or with `needs` the leaf of `make_raw`, of which only what is needed is there.
    """
    masked = ~batch.response_mask
    if needs is None:
        return PolicyOut(raw.masked_fill(masked, 0.0))
    if needs.model == "reward":
        scores = raw[:, :, 0, SCORE].masked_fill(~batch.valid, 0.0)
        return PolicyOut(torch.zeros(masked.shape), scores=scores)
    logprobs, kl, values = (raw[..., channel].masked_fill(masked, 0.0) for channel in (LOGPROB, KL, VALUE))
    latent = as_latent(raw[:, 0, 0, SCORE], needs) if needs.latent != "none" else {}
    return PolicyOut(logprobs, kl if needs.kl != "none" else None, values if needs.critic else None, **latent)


def as_latent(size: Tensor, needs: Needs) -> dict[str, Tensor]:
    """Latent outputs that grow with one number per row, [B]; the same directions for every row."""
    rng = torch.Generator().manual_seed(8)
    named = {"thoughts": (THOUGHTS, WIDTH), "question": (WIDTH,)}
    named |= {"steps": (STEPS, WIDTH), "step_texts": (STEPS, WIDTH)} if needs.latent == "steps" else {}
    found = {}
    for name, shape in named.items():
        base, slope = torch.randn(2, *shape, generator=rng)
        found[name] = base + slope * size.view(-1, *[1] * len(shape)) / 3
    return found | ({"step_texts": found["step_texts"].detach()} if "step_texts" in found else {})


def loss_of(objective: Objective, out: PolicyOut, batch: Batch) -> Tensor:
    """What `loop` makes of it: Σ coefficient · total / weight."""
    weights = objective.weight(batch)
    return sum(t.coefficient * t.total / weights[name] for name, t in objective(out, batch).terms.items())


def rows_of(batch: Batch, index: Sequence[int]) -> Batch:
    """The given rows, as a batch of their own."""
    at = torch.tensor(list(index))
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: value[at] if isinstance(value, Tensor) else value for name, value in values.items()})


def padded(batch: Batch, responses: int, tokens: int) -> Batch:
    """The same batch with so many more responses and tokens of padding."""

    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad(x, (0, tokens, 0, responses) if x.dim() == 3 else (0, responses))

    names = (
        "predictor",
        "response_ids",
        "response_mask",
        "valid",
        "ref_logprobs",
        "token_rewards",
        "behaviour_logprobs",
    )
    ends = None if batch.step_ends is None else pad(batch.step_ends, (0, 0, 0, responses), value=-1)
    return replace(batch, step_ends=ends, **{name: wide(getattr(batch, name)) for name in names})


def with_ratios(log_ratios: Sequence[Sequence[float]]) -> tuple[Batch, Tensor]:
    """One-token responses whose log-ratios ℓ are given, [B][K]: (batch, policy log-probs with gradient)."""
    batch = make_batch([[1] * len(row) for row in log_ratios])
    batch = replace(batch, ref_logprobs=torch.full(batch.response_mask.shape, -1.0))
    return batch, (torch.tensor(log_ratios)[..., None] - 1.0).requires_grad_()


def assert_same_update(first: Objective, second: Objective, batch: Batch, raw: Tensor) -> None:
    """Asserts that two objectives have the same loss and the same gradient, and that there is one.

    raw: log-probs alone [B, K, R], or the leaf of `make_raw`.
    """
    outs = [as_out(raw, batch, o.needed() if raw.dim() == 4 else None) for o in (first, second)]
    losses = [loss_of(o, out, batch) for o, out in zip((first, second), outs, strict=True)]
    grads = [torch.autograd.grad(loss, raw)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].abs().sum() > 0
