"""Rotary frequencies that depend on a sequence's length (longrope, dynamic NTK): each row gets those of its own length.

Such models turn keys and queries by one set of frequencies up to a border and by another one beyond it. transformers asks
the longest row of a batch, so a row's log-probs would depend on what is beside it. Here each row of position ids is asked
by itself: a sequence means what transformers computes for it alone. What that rules out:

- a packed row whose responses lie on both sides of the border, because they share one prompt (`trunk` splits it);
- a key-value cache that crosses the border, because its keys were turned the other way (`decoding.prefixes` fills it again).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_BORDERS: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()
"""What `border` found: it is asked for each batch."""


def attach(lm: nn.Module) -> None:
    """Make a model ask each row for its own frequencies; calling it again changes nothing."""
    for module in _by_length(lm):
        if "forward" not in vars(module):
            module.forward = _ByRow(module)


def border(lm: nn.Module) -> int | None:
    """Tokens of the longest sequence whose frequencies are those of every shorter one; None: all lengths share one set."""
    if lm not in _BORDERS:
        _BORDERS[lm] = min((limit for module in _by_length(lm) for limit in _limits(module)), default=None)
    return _BORDERS[lm]


def kinds(lm: nn.Module, lengths: Tensor) -> Tensor:
    """Lengths with equal entries share their frequencies. int64 [N] → [N], for a model that has a `border`"""
    return torch.stack([_kind(module, lengths) for module in _by_length(lm)]).amax(0)


def _by_length(lm: nn.Module) -> Iterator[nn.Module]:
    return (
        module for module in lm.modules() if any(kind == "longrope" or "dynamic" in kind for kind in _types(module))
    )


def _types(module: nn.Module) -> list[str]:
    found = getattr(module, "rope_type", None)
    return [found] if isinstance(found, str) else list(found.values()) if isinstance(found, dict) else []


def _limits(module: nn.Module) -> list[int]:
    """The border of each of a module's kinds of layers."""
    known = getattr(module.config, "rope_parameters", None) or {}
    settings = [known, *(value for value in known.values() if isinstance(value, dict))]
    found = [s["original_max_position_embeddings"] for s in settings if s.get("original_max_position_embeddings")]
    return found or [module.config.max_position_embeddings]


def _kind(module: nn.Module, lengths: Tensor) -> Tensor:
    """Dynamic frequencies follow the length itself beyond the border; the others know two sides."""
    limits = _limits(module)
    if any("dynamic" in kind for kind in _types(module)):
        return lengths.clamp(min=min(limits))
    return sum((lengths > limit).long() for limit in limits)


class _ByRow:
    """In place of the `forward` of a rotary embedding: (x, position_ids [B, T], …) → what it returns, row by row."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **named: Any) -> Any:
        kinds = _kind(self._module, position_ids.amax(-1) + 1)
        groups = [kinds == kind for kind in kinds.unique()]
        if len(groups) == 1:
            return self._own(x, position_ids, *args, **named)
        parts = [self._own(x, position_ids[rows], *args, **named) for rows in groups]
        if isinstance(parts[0], Tensor):
            return _joined(parts, groups)
        return tuple(_joined(tensors, groups) for tensors in zip(*parts, strict=True))

    def _own(self, x: Tensor, position_ids: Tensor, *args: Any, **named: Any) -> Any:
        forward = type(self._module).forward
        if any("dynamic" in kind for kind in _types(self._module)):
            # It keeps the frequencies of the longest call so far, until a short one resets them.
            forward(self._module, x, torch.zeros_like(position_ids[:1, :1]), *args, **named)
        return forward(self._module, x, position_ids, *args, **named)


def _joined(parts: Any, groups: list[Tensor]) -> Tensor:
    out = parts[0].new_empty(len(groups[0]), *parts[0].shape[1:])
    for rows, part in zip(groups, parts, strict=True):
        out[rows] = part
    return out
