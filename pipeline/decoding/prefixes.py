"""Sequences in a model: what was decoded so far is in the cache, what may come next in the logits.

Every decoder is written on three moves: run the prompts once, fork rows (beams, candidates, roll-outs, or leaving out what
has ended), and append one token to each.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from pipeline.decoding.cache import forked, new_cache
from pipeline.thinker import with_places


class Prefixes:
    """A sequences side by side, padded on the left.

    logits [A, V]: of the token that comes next, float32 (or float64 where the model computes in it).
    """

    def __init__(self, model: nn.Module, cache: DynamicCache, logits: Tensor, mask: Tensor) -> None:
        self.model, self.logits, self._cache, self._mask = model, logits, cache, mask
        self._position = mask.sum(-1)  # [A] of the next token

    @classmethod
    def of(
        cls,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        streams: Sequence[torch.Generator] | None = None,
    ) -> Prefixes:
        """Run the prompts [P] through the model. Raises ValueError for a model that yields no numbers.

        streams: one per prompt, for thoughts that are sampled.
        """
        device = next(model.parameters()).device
        prompts = [with_places(model, prompt) for prompt in prompts]
        width = max(map(len, prompts))
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        cache = new_cache(model)
        out = model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            **last_logits_only(model),
            **({} if streams is None else {"streams": streams}),
        )
        return cls(model, cache, _wide(out.logits), mask)

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def device(self) -> torch.device:
        return self._mask.device

    @property
    def logprobs(self) -> Tensor:
        """log π(next token | sequence). [A, V]"""
        return self.logits.log_softmax(-1)

    def select(self, rows: Tensor) -> Prefixes:
        """A fork of these rows [A'], any of them several times; appending to one leaves the other as it is."""
        rows = rows.to(self.device)
        return Prefixes(self.model, forked(self._cache, rows), self.logits[rows], self._mask[rows])

    def keep(self, rows: Tensor) -> None:
        """These rows [A'] take the place of all; costs nothing where they are the same."""
        rows = rows.to(self.device)
        if len(rows) == len(self) and bool((rows == torch.arange(len(self), device=self.device)).all()):
            return
        self._cache.reorder_cache(rows)
        self.logits, self._mask, self._position = self.logits[rows], self._mask[rows], self._position[rows]

    def append(self, tokens: Tensor) -> None:
        """One token behind each sequence, tokens [A]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self), 1)], dim=-1)
        out = self.model(
            input_ids=tokens.to(self.device)[:, None],
            attention_mask=self._mask,
            position_ids=self._position[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits, self._position = _wide(out.logits), self._position + 1


def _wide(logits: Tensor) -> Tensor:
    """[A, T, V] → the last position's [A, V], in float32 or wider, a copy of its own."""
    last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if not bool(last.amax(-1).isfinite().all()):  # nan wins every comparison, so that one anywhere shows here
        raise ValueError("the model yields nan or infinite logits; check its weights, or load it in float32")
    return last


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Arguments that hold a forward's vocabulary projection to the last position, where the model knows them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters hide the signature
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
