"""Sampling from a causal language model with a key-value cache.

What sets it apart from a library's generate: each completion draws from a random stream of its own, so that it does
not depend on which others share its batch or on how many machines work (up to the rounding of the forward pass); a
prompt runs through the model once for all of its completions; completions that ended leave the batch; and each token
comes with its log-probability. Left out: reading prompts, text, and where the model runs (see `stage`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import ConfigError, SamplingConfig


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled response."""

    token_ids: list[int]  # [R], with the EOS that ended it, if one did
    logprobs: list[float]  # [R] nats, under the model itself: no temperature, no filter


@dataclass(frozen=True, slots=True)
class Draw:
    """One completion to make: the prompt's place in the caller's list, and which of its completions."""

    prompt: int
    copy: int


def sample(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingConfig,
    eos_ids: Sequence[int],
    pad_id: int,
    keys: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """`settings.per_prompt` completions of each prompt: those of the first prompt, then of the second, …

    prompts: token ids, n × [P]. keys [n]: names each prompt's random streams; completion i of a prompt is a function of
    (model, prompt, settings, its key, i) alone. `progress` is told the number of completions after each batch.
    Raises ValueError for an empty prompt, one beyond the model's context, and for a model that yields no numbers.
    """
    assert len(keys) == len(prompts)
    assert not model.training, "dropout would change the distribution: call model.eval() first"
    _check_lengths(model, prompts, settings.max_new_tokens)
    # Longest first: batches hold little padding, and a batch too large for the memory shows at once.
    order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p]))
    draws = [Draw(p, i) for p in order for i in range(settings.per_prompt)]
    done: dict[Draw, Completion] = {}
    for start in range(0, len(draws), settings.batch_size):
        batch = draws[start : start + settings.batch_size]
        with torch.inference_mode():
            decoded = _decode(model, prompts, batch, settings, eos_ids, pad_id, keys)
        done.update(zip(batch, decoded, strict=True))
        if progress is not None:
            progress(len(batch))
    return [done[Draw(p, i)] for p in range(len(prompts)) for i in range(settings.per_prompt)]


def _check_lengths(model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {place} has no tokens to continue; begin it with the tokenizer's BOS")
        if context is not None and len(prompt) + new_tokens > context:
            raise ConfigError(
                f"prompt {place}: {len(prompt)} tokens + {new_tokens} new ones exceed the model's context of {context};"
                " shorten the prompt or lower sampling.max_new_tokens"
            )


# ----------------------------------------------------------------------------------------------- one batch


def _decode(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    batch: list[Draw],
    settings: SamplingConfig,
    eos_ids: Sequence[int],
    pad_id: int,
    keys: Sequence[int],
) -> list[Completion]:
    """Decode one batch of B completions to its end. A ≤ B of them are in the model's batch at a time."""
    new = settings.max_new_tokens
    logits, mask, cache = _prefill(model, prompts, batch, new, pad_id)
    device, prompt_width = mask.device, mask.shape[1] - new
    streams = [_stream(settings.seed, keys[draw.prompt], draw.copy, device) for draw in batch]
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    ids = torch.full((len(batch), new), pad_id, device=device)
    logprobs = torch.zeros(ids.shape, device=device)
    lengths = torch.full((len(batch),), new, device=device)
    row = torch.arange(len(batch), device=device)  # [A] place in the batch
    position = mask[:, :prompt_width].sum(-1)  # [A] of the token that is chosen next
    running = torch.ones_like(row, dtype=torch.bool)  # [A] false: ended, not yet taken out
    for step in range(new):
        token, logprob = next_tokens(logits.float(), settings, ends, step, streams)
        # What is written after a row's end is cut off by its length.
        ids[row, step], logprobs[row, step] = token, logprob
        ended = running & torch.isin(token, ends)
        lengths[row[ended]] = step + 1
        running &= ~ended
        left = int(running.sum())
        if left == 0 or step + 1 == new:
            break
        if left <= 0.75 * len(row):  # taking rows out copies the cache: worth it when a quarter of the work goes
            keep = running.nonzero().squeeze(-1)
            cache.reorder_cache(keep)
            streams = [streams[a] for a in keep.tolist()]
            row, token, position, mask, running = (x[keep] for x in (row, token, position, mask, running))
        out = model(
            input_ids=token[:, None],
            attention_mask=mask[:, : prompt_width + step + 1],
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits, position = out.logits[:, -1], position + 1
    cut = zip(ids.tolist(), logprobs.tolist(), lengths.tolist(), strict=True)
    return [Completion(token_ids[:length], values[:length]) for token_ids, values, length in cut]


def _prefill(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], batch: list[Draw], new: int, pad_id: int
) -> tuple[Tensor, Tensor, object]:
    """Run each prompt once, then copy its cache to each of its completions.

    Returns the logits of the first new token [B, V], the attention mask [B, P + new] (prompts padded on the left, all
    new tokens visible) and the cache.
    """
    device = next(model.parameters()).device
    places = list(dict.fromkeys(draw.prompt for draw in batch))
    width = max(len(prompts[p]) for p in places)
    padded = [[pad_id] * (width - len(prompts[p])) + list(prompts[p]) for p in places]
    seen = [[0] * (width - len(prompts[p])) + [1] * (len(prompts[p]) + new) for p in places]
    mask = torch.tensor(seen, device=device)
    out = model(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=mask[:, :width],
        position_ids=(mask[:, :width].cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        **last_logits_only(model),
    )
    copies = torch.tensor([places.index(draw.prompt) for draw in batch], device=device)
    out.past_key_values.reorder_cache(copies)
    return out.logits[:, -1][copies], mask[copies], out.past_key_values


def last_logits_only(model: torch.nn.Module) -> dict[str, int]:
    """Arguments that hold a forward's vocabulary projection to the last position, where the model knows them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters hide the signature
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


# ------------------------------------------------------------------------------------------------ one token


def next_tokens(
    logits: Tensor, settings: SamplingConfig, ends: Tensor, step: int, streams: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Choose one token per row. logits [A, V] float32 (overwritten) → (token [A] int64, log-probability [A]).

    The log-probability is the model's own. The choice is the argmax of log-probability plus Gumbel noise: equal in
    distribution to drawing from the softmax, but a rounding error of the logits changes it only where two candidates
    nearly tie. (Inverting the cumulative distribution takes one random number instead of V, but there each error
    shifts all later boundaries, and a vocabulary has many: see `test_noise_in_the_logits_rarely_changes_a_token`.)
    """
    total = logits.logsumexp(-1)
    if not bool(total.isfinite().all()):
        raise ValueError("the model yields nan or infinite logits; check its weights, or load it in float32")
    if step < settings.min_new_tokens:
        logits[:, ends] = float("-inf")
    scores = logits
    if settings.temperature > 0:
        scores = _filtered(logits / settings.temperature, settings) + _gumbel(streams, logits)
    token = scores.argmax(-1)
    return token, logits.gather(-1, token[:, None]).squeeze(-1) - total


def _filtered(scores: Tensor, settings: SamplingConfig) -> Tensor:
    """[A, V] with −inf on what top-k, then top-p leave out. Ties at the border stay in."""
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if settings.top_p < 1:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < _nucleus_border(probs, settings.top_p), float("-inf"))
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
        last = (before < mass).sum(-1, keepdim=True) - 1
        border[open_rows] = top.gather(-1, last)
        found = before[:, -1] >= mass
        open_rows = open_rows[~found] if count < vocabulary else open_rows[:0]
        count *= 8
    return border


def _stream(seed: int, key: int, copy: int, device: torch.device) -> torch.Generator:
    """The random stream of one completion."""
    digest = hashlib.blake2b(f"{seed}/{key}/{copy}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _gumbel(streams: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Gumbel noise [A, V], each row from its own stream."""
    noise = torch.empty_like(like)
    for values, stream in zip(noise, streams, strict=True):
        values.uniform_(generator=stream)
    return noise.log_().neg_().log_().neg_()
