"""Rotary positions and root-mean-square norms of transformers' models in fewer passes over memory, on a CPU in float32.

Written with one tensor operation behind the other, most of their time goes into reading and writing intermediate results.
Each is one autograd function here. A model gets them where they compute what its own code computes
(asked once, with random numbers); for other devices and types its own code runs as before.

Left out: GPUs, and whatever is fast already (`attention`, matrix products).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROTATE = "apply_rotary_pos_emb"
"""What the function is called in transformers' files of models."""

TYPES = (torch.float32, torch.float64)
"""A bfloat16 model rounds after each operation: to fuse some would change its numbers."""


def attach(lm: nn.Module) -> None:
    """Make a model use what this file offers, where it computes the same; calling it again changes nothing."""
    for name in {type(module).__module__ for module in lm.modules()}:
        own = getattr(file := sys.modules.get(name), ROTATE, None)
        if own is not None and not hasattr(own, "replaced") and _same_rotation(own):
            setattr(file, ROTATE, _rotation(own))
    for module in lm.modules():
        if "RMSNorm" in type(module).__name__ and "forward" not in vars(module):
            _attach_norm(module)


# -------------------------------------------------------------------------------------------------- rotary


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + (−x₂, x₁) · sin, where x = (x₁, x₂) by halves of its last dimension. [..., D] and what broadcasts to it → [..., D]"""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
        return out, None, None


def _rotation(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        tokens = cos.shape[-2:]
        if not all(map(_fits, (q, k, cos, sin))) or {q.shape[-2:], k.shape[-2:]} != {tokens} or unsqueeze_dim != 1:
            return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    apply_rotary_pos_emb.replaced = own  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _same_rotation(own: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    if _parameters(own) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 5, 3, 8, generator=generator)
    cos, sin = torch.randn(2, 2, 3, 8, generator=generator)
    try:
        found = own(q, k, cos, sin)
    except Exception:  # whatever it is, it is another function
        return False
    mine = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
    return len(found) == 2 and all(map(_alike, found, mine))


# --------------------------------------------------------------------------------------------------- norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² over the last dimension + eps) · weight. [..., D], [D] → [..., D]"""
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    """With s = 1/√(mean x² + eps): ∇x = s·(w·g) − x · s³/D · Σ w·g·x and ∇w = Σ s·g·x over all but the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        product = (grad * x).reshape(-1, size)
        by_weight = torch.mv(product.t(), scale.reshape(-1)) if ctx.needs_input_grad[1] else None
        pull = torch.mv(product, weight).view(scale.shape).mul_(scale.pow(3)).div_(-size)
        by_x = torch.mul(grad, weight, out=product.view(x.shape)).mul_(scale).addcmul_(x, pull)
        return by_x, by_weight, None


class _FusedNorm:
    """In place of the `forward` of a module that computes `rms_norm` with weights `offset` + module.weight."""

    def __init__(self, module: nn.Module, offset: float, eps: float) -> None:
        self._module, self._offset, self._eps = module, offset, eps

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        weight, x = self._module.weight, args[0] if len(args) == 1 and not named else None
        if x is None or not _fits(x) or x.dtype != weight.dtype:
            return type(self._module).forward(self._module, *args, **named)
        return rms_norm(x, weight + self._offset if self._offset else weight, self._eps)


def _attach_norm(module: nn.Module) -> None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(_parameters(module.forward)) == 1  # others have a gate
    if (
        not alone
        or not isinstance(weight, Tensor)
        or weight.dim() != 1
        or not isinstance(eps, float)
        or not _fits(weight)
    ):
        return
    generator = torch.Generator().manual_seed(0)
    other, x = torch.randn(2, len(weight), generator=generator, dtype=weight.dtype)
    rows = torch.stack([x, x * eps**0.5, x.flip(0)])  # the second one shows where eps is added
    try:
        with torch.no_grad():
            found = torch.func.functional_call(module, {"weight": other}, (rows,))
    except Exception:  # whatever it is, it is another norm
        return
    for offset in (0.0, 1.0):  # Gemma's weights are the distance from 1
        if _alike(found, rms_norm(rows, other + offset, eps)):
            module.forward = _FusedNorm(module, offset, eps)
            return


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _fits(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in TYPES


def _alike(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)
