"""Choosing a token from logits: filters, and random streams that belong to a completion instead of a batch.

A draw is the argmax of log-probability plus Gumbel noise: equal in distribution to drawing from the softmax, but a rounding
error of the logits changes it only where two candidates nearly tie. (Inverting the cumulative distribution takes one random
number instead of V, but there each error shifts all later boundaries, and a vocabulary has many: see
`test_noise_in_the_logits_rarely_changes_a_token`.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLD = 1e-30
"""A temperature up to this one takes the likeliest token: float32 could not hold logits divided by it."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tokens may be drawn. Temperature comes first, then top-k, top-p and min-p."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # leave out what is less likely than this share of the likeliest
    min_new_tokens: int = 0


def next_tokens(
    logits: Tensor, filters: Filters, ends: Tensor, step: int, streams: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Choose one token per row. logits [A, V], ends [E] token ids → (token [A] int64, log-probability [A]).

    The log-probability is the model's own: without temperature and filters.
    """
    scores = barred(logits, ends) if step < filters.min_new_tokens else logits
    if filters.temperature > COLD:
        scores = _filtered(scores / filters.temperature, filters) + gumbel(streams, logits)
    token = scores.argmax(-1)
    return token, logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)


def barred(logits: Tensor, ends: Tensor) -> Tensor:
    """[A, V] with −inf on the tokens `ends` [E]."""
    logits = logits.clone()
    logits[:, ends] = float("-inf")
    return logits


def _filtered(scores: Tensor, filters: Filters) -> Tensor:
    """[A, V] with −inf on what the filters leave out. Ties at a border stay in."""
    if 0 < filters.top_k < scores.shape[-1]:
        least = scores.topk(filters.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if filters.top_p < 1:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < _nucleus_border(probs, filters.top_p), float("-inf"))
    if filters.min_p > 0:
        # A share of the largest probability is a distance from the largest score: no softmax.
        border = scores.amax(-1, keepdim=True) + torch.tensor(filters.min_p, dtype=scores.dtype).log()
        scores = scores.masked_fill(scores < border, float("-inf"))
    return scores


def _nucleus_border(probs: Tensor, mass: float) -> Tensor:
    """Least probability [A, 1] in the smallest set of tokens that holds `mass`.

    Sorting a whole vocabulary costs as much as the layers' step. The set is nearly always among the first few hundred
    tokens, so the search widens only for the rows where it is not.
    """
    vocabulary = probs.shape[-1]
    border = torch.empty_like(probs[:, :1])
    open_rows, count = torch.arange(len(probs), device=probs.device), 256
    while len(open_rows):
        top = probs[open_rows].topk(min(count, vocabulary)).values
        before = top.cumsum(-1) - top
        last = ((before < mass).sum(-1, keepdim=True) - 1).clamp(min=0)  # float32 holds no mass below 1e-45
        border[open_rows] = top.gather(-1, last)
        found = before[:, -1] >= mass
        open_rows = open_rows[~found] if count < vocabulary else open_rows[:0]
        count *= 8
    return border


def stream(seed: int, key: int, copy: int, device: torch.device, purpose: str = "") -> torch.Generator:
    """The random stream of one completion of the prompt that `key` names; each further purpose has one of its own."""
    return torch.Generator(device).manual_seed(stream_seed(seed, key, copy, purpose))


def stream_seed(seed: int, key: int, copy: int, purpose: str = "") -> int:
    """What a stream begins with, 0 … 2⁶³ − 1."""
    name = f"{seed}/{key}/{copy}/{purpose}" if purpose else f"{seed}/{key}/{copy}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def gumbel(streams: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Gumbel noise [A, V], each row from its own stream."""
    noise = torch.empty_like(like)
    for values, generator in zip(noise, streams, strict=True):
        values.uniform_(generator=generator)
    return noise.log_().neg_().log_().neg_()
