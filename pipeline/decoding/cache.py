"""A key-value cache that grows in place and can be forked.

transformers' dynamic cache copies itself for each new token; with hundreds of roll-outs behind one prompt that costs as much
as the model. `GrowingLayer` keeps room for some tokens more, and beams of one prompt change places without touching what
they share. Sliding-window and recurrent layers stay the library's own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
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
            self.room = tuple(
                states.new_empty(*states.shape[:2], 0, states.shape[-1]) for states in (key_states, value_states)
            )
            self.keys, self.values = self.room
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.room[0].shape[-2] < stop:
            self.room = tuple(_roomy(states, stop) for states in (self.keys, self.values))
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, in any number and order, into a buffer of their own."""
        if self.is_initialized:
            length, rows = self.keys.shape[-2], beam_idx.to(self.device)
            self.room = tuple(_roomy(states, length, rows) for states in (self.keys, self.values))
            self.keys, self.values = (room[:, :, :length] for room in self.room)

    def exchange(self, rows: Tensor, since: int) -> None:
        """Let rows [A] take the places of all, within the buffer; tokens before `since` are the same in a row and its successor."""
        length = self.keys.shape[-2]
        for room in self.room if since < length else ():
            tail = room[:, :, since:length]
            # As a matrix: index_select of a strided tensor is several times slower than two copies of a flat one.
            room[:, :, since:length] = tail.reshape(len(tail), -1).index_select(0, rows).view_as(tail)


def _roomy(states: Tensor, length: int, rows: Tensor | None = None) -> Tensor:
    """States [A, heads, T, D], or these rows of them, at the beginning of a buffer with room behind `length` tokens."""
    count = len(states) if rows is None else len(rows)
    buffer = states.new_empty(count, states.shape[1], length + ROOM, states.shape[-1])
    begun = buffer[:, :, : states.shape[-2]]
    if rows is None:
        begun.copy_(states)
    else:
        torch.index_select(states, 0, rows, out=begun)
    return buffer


def new_cache(model: nn.Module) -> DynamicCache:
    """An empty cache for this model."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def forked(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows [A'], any of them several times; the original can go on as if nothing had happened."""
    fork = copy.copy(cache)
    fork.layers = [_copied(layer) for layer in cache.layers]
    fork.reorder_cache(rows)
    return fork


def _copied(layer: Any) -> Any:
    """With dictionaries of its own, in which recurrent layers keep their states."""
    found = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(found, name, dict(value))
    return found


def exchange(cache: DynamicCache, rows: Tensor, since: int) -> None:
    """Let rows [A] take the places of all; tokens before `since` are the same in a row and its successor."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.exchange(rows, since)
        else:
            layer.reorder_cache(rows)
