"""Sequences in a model: what was decoded so far is in the cache, what may come next in the logits.

Every decoder is written on three moves: run the prompts once, fork rows (beams, candidates, roll-outs, or leaving out what
has ended), and append one token to each.

A row's logits are those of the model on that sequence alone, whatever is beside it. Two kinds of models get there without
the cache of all steps so far:

- where rotary frequencies depend on the length (`rope`), it is filled again when a row crosses a border;
- where a row's logits would change with padding or with its cache, as a probe shows when a model is first used, sequences are run
  as a whole for each token, those of one length together. The log says so.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from pipeline import rope
from pipeline.decoding.cache import exchange, forked, new_cache
from pipeline.packing import ALONE, FAILURES, check_causal, one_line
from pipeline.thinker import Thinker, with_places

logger = logging.getLogger(__name__)

PROBE = [[5, 11, 7, 13, 4, 9, 3], [8, 12], [6, 10, 14]]
"""Ragged beginnings by which a model's cache is tried."""

_REASONS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
"""What `uncached` found."""


class Prefixes:
    """A sequences side by side, padded on the left.

    logits [A, V]: of the token that comes next, float32 (or float64 where the model computes in it).
    """

    def __init__(
        self,
        model: nn.Module,
        cache: DynamicCache | None,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor,
        root: Tensor,
        shared: int,
    ) -> None:
        self.model, self.logits, self._cache = model, logits, cache  # without a cache sequences are run as a whole
        self._ids, self._mask = ids, mask  # [A, T]
        self._position = mask.sum(-1)  # [A] of the next token
        self._root, self._shared = root, shared  # rows of equal root [A] have their first `shared` places in common

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
        return cls._begin(model, prompts, pad_id, streams, cached=uncached(model) is None)

    @classmethod
    def _begin(
        cls,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        pad_id: int,
        streams: Sequence[torch.Generator] | None,
        cached: bool,
    ) -> Prefixes:
        device = next(model.parameters()).device
        prompts = [with_places(model, prompt) for prompt in prompts]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        filled, logits = _filled(model, ids, mask, streams) if cached else (None, _whole(model, ids, mask))
        return cls(model, filled, logits, ids, mask, torch.arange(len(mask), device=device), width)

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
        root = self._root[rows]
        cache = None if self._cache is None else forked(self._cache, rows)
        return Prefixes(self.model, cache, self.logits[rows], self._ids[rows], self._mask[rows], root, self._shared)

    def keep(self, rows: Tensor) -> None:
        """These rows [A'] take the place of all; costs nothing where they are the same, and little where each is replaced
        by one of the same prompt."""
        rows = rows.to(self.device)
        if torch.equal(rows, torch.arange(len(self), device=self.device)):
            return
        root = self._root[rows]
        if self._cache is not None and torch.equal(root, self._root):
            exchange(self._cache, rows, self._shared)
        elif self._cache is not None:
            self._cache.reorder_cache(rows)
        self.logits, self._ids, self._mask = self.logits[rows], self._ids[rows], self._mask[rows]
        self._position, self._root = self._position[rows], root

    def append(self, tokens: Tensor) -> None:
        """One token behind each sequence, tokens [A]."""
        tokens = tokens.to(self.device)[:, None]
        self._ids = torch.cat([self._ids, tokens], dim=-1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self), 1)], dim=-1)
        self._position = self._position + 1
        if self._cache is None:
            self.logits = _whole(self.model, self._ids, self._mask)
        elif self._crosses():
            self._cache, self.logits = _filled(self.model, self._ids, self._mask)
        else:
            name, read = cache_name(self.model), {"input_ids": tokens, "position_ids": self._position[:, None] - 1}
            if name == "past_key_values":  # the others are recurrent: a token has no padding before it any more
                read["attention_mask"] = self._mask
            self.logits = _wide(self.model(**read, **{name: self._cache}, use_cache=True).logits)

    def _crosses(self) -> bool:
        """Whether the last token changed the rotary frequencies of a row's whole past."""
        if rope.border(self.model) is None:
            return False
        return not torch.equal(*(rope.kinds(self.model, lengths) for lengths in (self._position, self._position - 1)))


def _filled(
    model: nn.Module, ids: Tensor, mask: Tensor, streams: Sequence[torch.Generator] | None = None
) -> tuple[DynamicCache, Tensor]:
    """A cache of sequences [A, T] that are padded on the left, and the logits [A, V] behind them."""
    cache = new_cache(model)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        **{cache_name(model): cache},
        **last_logits_only(model),
        **({} if streams is None else {"streams": streams}),
    )
    return cache, _wide(out.logits)


def _whole(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits [A, V] behind sequences [A, T], those of one length run together and without padding."""
    lengths, found = mask.sum(-1), {}
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        read = {"input_ids": ids[rows, -length:], "use_cache": False}
        if isinstance(model, Thinker):
            read["attention_mask"] = mask[rows, -length:]
        logits = _wide(model(**read, **last_logits_only(model)).logits)
        found |= dict(zip(rows.tolist(), logits, strict=True))
    return torch.stack([found[row] for row in range(len(ids))])


def cache_name(model: nn.Module) -> str:
    """The argument by which a model takes its cache."""
    return "cache_params" if "cache_params" in _arguments(model) else "past_key_values"


@torch.inference_mode()
def uncached(model: nn.Module) -> str | None:
    """Why this model's sequences have to be run as a whole for each token, or None; found once, and told in the log.

    Raises ConfigError for a model that looks ahead.
    """
    lm = model.lm if isinstance(model, Thinker) else model
    if not isinstance(lm, PreTrainedModel):  # whoever writes a model of another kind keeps to the cache's contract
        return None
    if model not in _REASONS:
        rope.attach(lm)
        check_causal(lm)
        _REASONS[model] = _try_cache(lm)
        if _REASONS[model] is not None:
            logger.warning(
                "%s: each token is decoded without a cache, which is slow (%s)", type(lm).__name__, _REASONS[model]
            )
    return _REASONS[model]


def _try_cache(lm: nn.Module) -> str | None:
    if lm.config.model_type in ALONE:
        return f"the cache of {lm.config.model_type} is not what it computes without"
    size = lm.config.get_text_config().vocab_size
    sequences = [[token % size for token in prompt] for prompt in PROBE]
    try:
        found = Prefixes._begin(lm, sequences, 0, None, cached=True)
        for take, tokens in (([0, 1, 2], [4, 7, 9]), ([2, 1, 1, 0], [3, 5, 12, 8])):
            found.keep(torch.tensor(take))
            found.append(torch.tensor(tokens) % size)
            sequences = [[*sequences[row], token % size] for row, token in zip(take, tokens, strict=True)]
    except FAILURES as error:
        return one_line(error)
    mask = torch.ones_like
    exact = torch.cat([_whole(lm, ids := torch.tensor([row], device=found.device), mask(ids)) for row in sequences])
    gap = float((found.logits - exact).abs().max() / exact.abs().max().clamp(min=1e-6))
    close = gap <= (1e-3 if lm.dtype == torch.float32 else 0.2)  # far above rounding, far below another context
    return None if close else f"its logits change by {gap:.2g} of their size beside other rows or behind a cache"


def _wide(logits: Tensor) -> Tensor:
    """[A, T, V] → the last position's [A, V], in float32 or wider, a copy of its own."""
    last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if not bool(last.amax(-1).isfinite().all()):  # nan wins every comparison, so that one anywhere shows here
        raise ValueError("the model yields nan or infinite logits; check its weights, or load it in float32")
    return last


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Arguments that hold a forward's vocabulary projection to the last position, where the model knows them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}


def _arguments(model: nn.Module) -> frozenset[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters hide the signature
    return _parameters(vars(base).get("forward", type(base).forward))


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
