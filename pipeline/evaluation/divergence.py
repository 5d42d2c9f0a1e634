"""KL(π ‖ π_ref) of whole responses, on the policy's own samples: what a reward was bought with.

Two estimates per response y ~ π(· | x): the sum over its positions of the exact KL between the two next-token
distributions, and the plain log-ratio log π(y|x) − log π_ref(y|x). Both have the sequence KL as their expectation; the
first has the smaller variance and is never negative. On responses that π did not sample, neither is a KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.decoding.sampling import last_logits_only
from pipeline.ops import LOGIT_CHUNK_BYTES


class SequenceKL(NamedTuple):
    """Estimates of KL(π ‖ π_ref) in nats, one per response."""

    exact: Tensor  # [n] float64: Σ_t Σ_v π(v|s_t) · (log π(v|s_t) − log π_ref(v|s_t))
    sampled: Tensor  # [n] float64: Σ_t ρ_t


class _Batch(NamedTuple):
    """B responses behind their prompts: columns [P of prompts, padded left | R of responses, padded right]."""

    input_ids: Tensor  # [B, P + R] int64
    mask: Tensor  # [B, P + R] int64
    prompt_width: int  # P


@torch.inference_mode()
def sequence_kl(
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_tokens: int,
) -> SequenceKL:
    """Both estimates for n responses that `policy` sampled at temperature 1, unfiltered.

    prompts, completions: token ids, one prompt per completion. batch_tokens: padded tokens of one forward. Both are
    Hugging Face causal models on one device; their own logits are used, so that what an architecture does after its
    output head counts. Raises ValueError when their vocabularies differ.
    """
    assert len(prompts) == len(completions)
    assert not policy.training
    assert not reference.training
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"policy and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens; use one tokenizer"
        )
    result = SequenceKL(*torch.zeros(2, len(prompts), dtype=torch.float64))
    device = next(policy.parameters()).device
    for places in _batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], batch_tokens):
        batch = _padded([prompts[i] for i in places], [completions[i] for i in places], device)
        exact, sampled = _batch_kl(policy, reference, batch, sizes[0])
        result.exact[places], result.sampled[places] = exact.cpu(), sampled.cpu()
    return result


def _batch_kl(
    policy: torch.nn.Module, reference: torch.nn.Module, batch: _Batch, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The two estimates for a batch, [B] float64 each."""
    rows = len(batch.input_ids)
    exact, sampled = torch.zeros(2, rows, dtype=torch.float64, device=batch.mask.device)
    width = max(1, LOGIT_CHUNK_BYTES // (4 * vocabulary * rows))
    column = batch.prompt_width
    for ours, theirs in zip(_logits(policy, batch, width), _logits(reference, batch, width), strict=True):
        log_pi, log_ref = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        span = slice(column, column + ours.shape[1])
        ids, valid = batch.input_ids[:, span], batch.mask[:, span].bool()
        ratio = log_pi - log_ref
        # where(): a token that π excludes adds nothing, but 0 · inf would be nan.
        terms = torch.where(log_pi > -math.inf, log_pi.exp() * ratio, 0.0).sum(-1)
        chosen = ratio.gather(-1, ids[..., None]).squeeze(-1)
        exact += torch.where(valid, terms, 0.0).double().sum(-1)
        sampled += torch.where(valid, chosen, 0.0).double().sum(-1)
        column = span.stop
    return exact, sampled


def _logits(model: torch.nn.Module, batch: _Batch, width: int) -> Iterator[Tensor]:
    """Logits that predict the responses' columns, in order: [B, 1, V] for the first, then [B, ≤ width, V].

    The responses go through the model in pieces behind the prompts' key-value cache: nothing is computed twice, and
    the logits of all positions never exist together.
    """
    position = (batch.mask.cumsum(-1) - 1).clamp(min=0)
    total, cache = batch.input_ids.shape[1], None
    # The last column predicts nothing. The prompts are one piece, of which the last column alone is wanted.
    edges = [0, *range(batch.prompt_width, total - 1, width), total - 1]
    for start, stop in pairwise(edges):
        out = model(
            input_ids=batch.input_ids[:, start:stop],
            attention_mask=batch.mask[:, :stop],
            position_ids=position[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **(last_logits_only(model) if start == 0 else {}),
        )
        cache = out.past_key_values
        yield out.logits[:, -1:] if start == 0 else out.logits


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of the sequences, longest first, in batches of at most `batch_tokens` padded tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, batch_tokens // max(1, lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]


def _padded(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> _Batch:
    assert all(prompts), "a response's first token needs a prompt token that predicts it"
    left, right = max(map(len, prompts)), max(1, *map(len, completions))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, stop = left - len(prompt), left + len(completion)
        ids[row, start:stop] = torch.tensor([*prompt, *completion])
        mask[row, start:stop] = 1
    return _Batch(ids.to(device), mask.to(device), left)


def mean_se(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean of n independent values and its standard error (nan for n < 2, both nan for n = 0).

    Completions of one prompt are not independent: average them first, and pass one value per prompt.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan
    return float(x.mean()), float(x.std()) / math.sqrt(len(x))
