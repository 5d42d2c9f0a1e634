"""A key-value cache that grows in place and can be forked.

transformers' dynamic cache copies itself for each new token; with hundreds of roll-outs behind one prompt that costs as much
as the model. `GrowingLayer` keeps room for some tokens more. Sliding-window and recurrent layers stay the library's own.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64
"""Tokens that fit before the layer is copied into a larger place."""


class GrowingLayer(DynamicLayer):
    """Keys and values [A, heads, T, D] as views of a buffer with room behind them. No two layers share a buffer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [A, heads, t, D] and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room: tuple[Tensor, Tensor] | None = None
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.room is None or self.room[0].shape[-2] < stop:
            self.room = (_roomy(self.keys, stop + ROOM), _roomy(self.values, stop + ROOM))
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, in any number and order, into a buffer of their own."""
        super().reorder_cache(beam_idx)
        self.room = None


def _roomy(states: Tensor, length: int) -> Tensor:
    """States [A, heads, T, D] at the beginning of a buffer [A, heads, length, D]."""
    buffer = states.new_empty(*states.shape[:2], length, states.shape[-1])
    buffer[:, :, : states.shape[-2]] = states
    return buffer


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for this model."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def forked(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows [A'], any of them several times; the original can go on as if nothing had happened."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    fork.reorder_cache(rows)
    return fork
